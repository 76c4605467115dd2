"""Timing candidates against each other on a machine that is not quiet."""

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from fastres.training.trainer import capture

GPU_BYTES = 2**30  # many times what a GPU's cache holds, and so much that its start takes a small part of the time


def sets_beyond_cache(tensor_bytes: int) -> int:
    """How many tensors of that size to take in turn, so that none is found in a GPU's cache; 1 where there is none."""
    return max(1, GPU_BYTES // tensor_bytes) if torch.cuda.is_available() else 1


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each candidate in each round, `[rounds]`; a round runs every candidate once, in random order.

    Whatever else the machine does then slows all of them alike, and so does what the one before left in the
    caches. Each runs once beforehand, to warm up. A GPU is waited for on both sides of a measurement.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for name in rng.permutation(list(candidates)):
            wait()
            start = time.perf_counter()
            candidates[name]()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def kernels_alone(run: Callable[[], object], pool: object = None) -> Callable[[], object]:
    """`run` as a CUDA graph, which takes as long as its kernels and not as Python; where there is no GPU, itself.

    Graphs of one `pool` share memory.
    """
    if not torch.cuda.is_available():
        return run
    graph, _ = capture(run, pool)
    return graph.replay


def percentiles(values: np.ndarray) -> dict[str, float]:
    """The 20th, 50th and 80th percentile."""
    return {f"p{p}": float(np.percentile(values, p)) for p in (20, 50, 80)}


def ratios(seconds: Mapping[str, np.ndarray], of: str) -> dict[str, dict[str, float]]:
    """How many times as long as `of` every other candidate took: p20, p50 and p80 of the rounds.

    `fastest` compares each one's fastest round: on a busy machine, the least disturbed.
    """
    return {
        name: {**percentiles(values / seconds[of]), "fastest": float(values.min() / seconds[of].min())}
        for name, values in seconds.items()
        if name != of
    }
