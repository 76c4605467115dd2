"""Pictures are drawn whatever the user's matplotlib is set to, and leave that as it is."""

import os
import subprocess
import sys

IMPORT = """
import os
import fastres.report, matplotlib

settings = dict(dict.items(matplotlib.rcParams))  # rcParams["backend"] would load it
print(os.environ["MPLBACKEND"], settings["backend"])
"""
DRAW = """
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

for module in walk_packages(fastres.__path__, "fastres."):
    if module.name != "fastres._C":  # which needs torch first
        import_module(module.name)
fastres.report.plots.plot_curves(Path(sys.argv[1]), "a run")
assert dict(dict.items(matplotlib.rcParams)) == settings
assert "matplotlib.pyplot" not in sys.modules
"""
NOTEBOOK = "module://matplotlib_inline.backend_inline"  # which is not installed


def output_of(code, backend, *arguments):
    environment = os.environ | {"MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_users_backend_stays():
    assert output_of(IMPORT, "module://nowhere") == ["module://nowhere", "module://nowhere"]
    assert output_of("import matplotlib\n" + IMPORT, "svg") == ["svg", "svg"]


def test_pictures_are_drawn_under_a_notebooks_backend(tmp_path):
    row = "1,0.1,2.0,50.0,2.0,50.0,1.0,1.0,0.0"
    names = "epoch,lr,train_loss,train_accuracy,test_loss,test_accuracy,epoch_seconds,images_per_second"
    (tmp_path / "history.csv").write_text(f"{names},data_wait_seconds\n{row}\n")
    backend, *_ = output_of(IMPORT + DRAW, NOTEBOOK, tmp_path)
    assert backend == NOTEBOOK
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
