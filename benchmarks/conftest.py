"""The table of throughputs at the end of the benchmarks, and `--benchmark-csv FILE`, which keeps it."""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pandas as pd
import pytest
import torch
from timing import Row, provenance, rows_of

from fastres.machine import device_name
from fastres.training.hardware import tune_libraries

ROWS = pytest.StashKey[list[Row]]()


@pytest.fixture(scope="session", autouse=True)
def libraries_as_in_training() -> None:
    """The settings for every device that is there: some benchmarks measure both."""
    tune_libraries("cpu")
    if torch.cuda.is_available():
        tune_libraries("cuda")


@pytest.fixture
def report(benchmark, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Takes what a benchmark measured, as `rows_of` does."""
    benchmark._mode = "interleaved"  # or pytest-benchmark warns that it has measured nothing itself

    def take(name: str, case: str, images: int, device: str, seconds: Mapping[str, np.ndarray]) -> None:
        rows = rows_of(name, case, images, device_name(torch.device(device)), seconds)
        request.config.stash.setdefault(ROWS, []).extend(rows)

    return take


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows, path = config.stash.get(ROWS, []), config.getoption("benchmark_csv")
    for line in tables(rows) if rows else ():
        terminalreporter.write_line(line)
    if rows and path:
        where = provenance(shlex.join(["python", "-m", "pytest", *config.invocation_params.args]), "cpu")
        table = pd.DataFrame(rows).to_csv(index=False, float_format="%.6g")
        path.write_text(f"# {json.dumps(where)}\n{table}", encoding="utf-8")


def tables(rows: list[Row]) -> Iterator[str]:
    """The lines of a table for each benchmark: a row for each case, images/s of each candidate and x eager.

    Beside the median of the rounds stands half the distance of their 20th and 80th percentile.
    """
    frame = pd.DataFrame(rows)
    spread = (50 * (frame.p80 - frame.p20) / frame.seconds).map(" ±{:.0f}%".format)
    frame["cell"] = (frame.images / frame.seconds).map("{:,.1f}".format) + spread
    for (benchmark, device), part in frame.groupby(["benchmark", "device"], sort=False):
        table = part.pivot_table("cell", "case", "candidate", aggfunc="last", sort=False)
        if "eager" in table:
            table["x eager"] = part[part.candidate == "eager"].set_index("case").times_as_long.map("{:.2f}".format)
        lines = table.fillna("").rename_axis(index=None, columns=None).to_string().splitlines()
        yield from ("", f"{benchmark}, images/s, {device}", *lines)
