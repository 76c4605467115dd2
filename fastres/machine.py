"""Provenance of a measurement: the device, the versions of the libraries, and the commit of this package."""

import os
import platform
import resource
import shlex
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastres

PACKAGES = ("torch", "torchvision", "triton", "nvidia-dali-cuda130", "numpy")
REPOSITORY = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, Any]:
    """The command, date, versions and commit of this process's results."""
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "versions": versions(),
        "commit": commit(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    threads = torch.get_num_threads()
    return f"{next(names, platform.machine())}, {threads} thread{'s' * (threads > 1)}"


def peak_memory_mb(device: torch.device) -> float:
    """MiB that torch reserved on CUDA, CUDA graphs included; on a CPU, the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def free_memory() -> int:
    """Bytes of the host's memory that programs can still get, the cache of files included."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(2**10 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def versions() -> dict[str, str]:
    """Versions of Python, fastres and the libraries that decide what is computed and how fast."""
    found = {"python": platform.python_version(), "fastres": fastres.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """FASTRES_COMMIT if it is set; else the commit of fastres' own checkout, with ``-dirty`` if files have changed.

    None for an installed package, also if its folder lies in the git repository of another project.
    """
    if given := os.environ.get("FASTRES_COMMIT"):
        return given
    root = _git("rev-parse", "--show-toplevel")
    if root is None or Path(root).resolve() != REPOSITORY:
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(*arguments: str) -> str | None:
    # without GIT_DIR and the like, which a hook or a user may have set for another repository
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, env=environment, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return os.fsdecode(done.stdout).strip()
