"""The source itself: every file is read and written as UTF-8, whatever the locale, and ruff finds nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lacks_encoding(call):
    """Whether ``call`` reads or writes text in the encoding of the locale."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    keywords = {keyword.arg for keyword in call.keywords}
    literals = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    opens_text = name == "open" and (not call.args or any(re.fullmatch("[rwaxt+]+", str(mode)) for mode in literals))
    opens_text |= isinstance(call.func, ast.Name) and name == "open" and len(call.args) == 1
    text = opens_text or name in ("read_text", "write_text") or keywords & {"text", "universal_newlines"}
    return bool(text) and "encoding" not in keywords


@pytest.mark.parametrize(
    ("code", "lacks"),
    [
        ("path.read_text()", True),
        ("path.write_text(text)", True),
        ("open(path)", True),
        ("path.open('w')", True),
        ("subprocess.run(command, text=True)", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("open(path, 'rb')", False),
        ("Image.open(file)", False),
    ],
)
def test_a_missing_encoding_is_seen(code, lacks):
    assert lacks_encoding(ast.parse(code).body[0].value) == lacks


def test_text_is_utf_8_whatever_the_locale():
    paths = [ROOT / "setup.py", *(ROOT / "fastres").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and lacks_encoding(node)
    ]
    assert len(paths) > 40
    assert calls == []


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout
