"""Inputs and CUDA graphs for timing kernels, and the rows of a benchmark's results."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from fastres import machine
from fastres.training.cuda_graph import capture

Row = dict[str, Any]  # a line of a result file
GPU_BYTES = 2**30  # many times a GPU's cache, and enough that launching a graph takes a small part of the time


def provenance(command: str, device: str) -> dict[str, Any]:
    """Where and when a benchmark ran: the first line of its result file."""
    return machine.provenance() | {"command": command, "machine": machine.device_name(torch.device(device))}


def sets_beyond_cache(tensor_bytes: int) -> int:
    """The number of tensors of that size to take in turn, so that a GPU's cache holds none of them; 1 on a CPU."""
    return max(1, GPU_BYTES // tensor_bytes) if torch.cuda.is_available() else 1


def as_cuda_graph(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph, which takes the time of its kernels, without Python's; on a CPU `run` itself."""
    if not torch.cuda.is_available():
        return run
    graph, _ = capture(run)
    return graph.replay


def rows_of(benchmark: str, case: str, images: int, device: str, seconds: Mapping[str, np.ndarray]) -> list[Row]:
    """A row for each candidate of `seconds`, `[rounds]`, of a pass over `images`.

    `seconds`, `p20` and `p80` are the median and percentiles of the rounds; `times_as_long` is the median over that of
    the first candidate, and `times_p20` and `times_p80` are the percentiles of their ratios in the same round.
    """
    ours = next(iter(seconds.values()))
    rows = []
    for candidate, values in seconds.items():
        p20, median, p80 = np.percentile(values, (20, 50, 80))
        times_p20, times_p80 = np.percentile(values / ours, (20, 80))
        row = {"benchmark": benchmark, "case": case, "images": images, "device": device, "candidate": candidate}
        times = {"times_as_long": median / np.median(ours), "times_p20": times_p20, "times_p80": times_p80}
        rows.append(row | {"seconds": median, "p20": p20, "p80": p80} | times)
    return rows
