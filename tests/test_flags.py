"""Names are printed as they are, whatever is in them, also where the terminal cannot show it."""

import os
import subprocess
import sys

import pytest

CODE = r"""
from rich.table import Table
from fastres.flags import open_console

name = "run[lr=0.1][/x] :car: 'a' 12 é \udce9"
table = Table(name, title=name)
table.add_row(name)
console = open_console()
console.print(name)
console.print(table)
"""


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", r"run[lr=0.1][/x] :car: 'a' 12 é \udce9"),
        ("ascii", r"run[lr=0.1][/x] :car: 'a' 12 \xe9 \udce9"),
    ],
)
def test_names_are_printed_as_they_are(encoding, shown):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "FORCE_COLOR": "1"}  # as on a terminal
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, encoding=encoding)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(shown) == 4
