"""Where the benchmarks ran: into every result file goes what is needed to judge its figures or measure them again."""

from typing import Any

import pytest
import torch

from fastres.training.hardware import tune_libraries
from fastres.training.run import commit, device_name, versions


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fastres"] = {
        "cpu": device_name(torch.device("cpu")),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
        "commit": commit(),
    }


@pytest.fixture(scope="session", autouse=True)
def libraries_as_in_training() -> None:
    """Those of every device that is there: some benchmarks measure both."""
    tune_libraries("cpu")
    if torch.cuda.is_available():
        tune_libraries("cuda")
