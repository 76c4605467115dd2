"""`pytest` runs tests/, and `pytest --benchmark-only` runs benchmarks/; neither imports anything of the other folder.

pyproject.toml names this file as the only test path: pytest imports the conftest.py of a test path before it reads the
options.
"""

import gc
from pathlib import Path

import pytest

gc.disable()  # what is imported and collected lives as long as the process, and looking through it again takes seconds


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or Triton's bindings report leaks when Python ends


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "with --benchmark-only: write the table of throughputs with its provenance to FILE, for benchmarks/render.py"
    parser.addoption("--benchmark-csv", metavar="FILE", type=Path, help=help)


def pytest_configure(config: pytest.Config) -> None:
    only, path = config.getoption("benchmark_only", False), config.getoption("benchmark_csv")
    if path and not (only and path.parent.is_dir()):
        why = "there is no such folder" if only else "needs --benchmark-only"
        raise pytest.UsageError(f"--benchmark-csv {path}: {why}")
    if config.args_source == config.ArgsSource.TESTPATHS:
        config.args = ["benchmarks" if only else "tests"]
