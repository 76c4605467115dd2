"""`pytest` runs tests/, and `pytest --benchmark-only` runs benchmarks/; neither imports anything of the other folder.

testpaths names this file alone: pytest imports the conftest.py of every folder in it before it reads the options.
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "benchmarks: write the table of throughputs with its provenance to FILE, as benchmarks/render.py reads it"
    parser.addoption("--benchmark-csv", metavar="FILE", help=help)


def pytest_configure(config: pytest.Config) -> None:
    if config.args_source == config.ArgsSource.TESTPATHS:
        config.args = ["benchmarks" if config.getoption("benchmark_only", False) else "tests"]
