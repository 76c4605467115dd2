"""Smaller images at the start of a run, which need less arithmetic: which size the images of a step have.

Howard et al. 2018, https://www.fast.ai/posts/2018-04-30-dawnbench-fastai.html (progressive resizing).
"""

import re
from itertools import pairwise

import numpy as np

from fastres.data.splits import IMAGE_SIZE
from fastres.errors import UserError

SMALLEST = 8  # pixels a side: a ResNet halves them three times


def image_sizes(schedule: str, full: int = IMAGE_SIZE) -> list[tuple[int, float]]:
    """The sizes in pixels a side, in turn, each with the fraction of the steps that ends it; the last is ``full``, 1.0.

    ``schedule`` is ``none``, or joins ``SIZE:UNTIL`` by commas. Raises UserError unless both parts increase.
    """
    parts = [] if schedule == "none" else schedule.split(",")
    found = [re.fullmatch(r"(\d{1,4}):(0?\.\d{1,4})", part.strip()) for part in parts]
    sizes = [(int(match[1]), float(match[2])) for match in found if match]
    sizes = [(SMALLEST - 1, 0.0), *sizes, (full, 1.0)]
    if len(sizes) < len(parts) + 2 or not all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(sizes)):
        raise UserError(
            f"--image-size-schedule {schedule[:50]!r}: must be none, or increasing sizes from {SMALLEST} to "
            f"{full - 1} and the fractions of the run that end them, for instance 24:0.65, or 16:0.3,24:0.65"
        )
    return sizes[1:]


def canonical_schedule(schedule: str, full: int = IMAGE_SIZE) -> str:
    """One spelling of equal schedules."""
    return ",".join(f"{size}:{until:g}" for size, until in image_sizes(schedule, full)[:-1]) or "none"


def _ends(schedule: str, total: int, full: int) -> list[tuple[int, int]]:
    """Each size in turn, and the first step of a run of ``total`` that no longer has it."""
    return [(size, round(until * total)) for size, until in image_sizes(schedule, full)]


def steps_of_sizes(schedule: str, total: int, done: int, full: int = IMAGE_SIZE) -> dict[int, int]:
    """How many of the first ``done`` of a run's ``total`` steps have each size."""
    ends = [(size, min(end, done)) for size, end in _ends(schedule, total, full)]
    return {size: end - start for (_, start), (size, end) in pairwise([(0, 0), *ends])}


def mean_area(schedule: str, full: int = IMAGE_SIZE) -> float:
    """The pixels of a run's images relative to those of ``full``: about the share of the arithmetic."""
    ends = [(0, 0.0), *image_sizes(schedule, full)]
    return sum((until - start) * (size / full) ** 2 for (_, start), (size, until) in pairwise(ends))


def size_of_steps(schedule: str, steps: np.ndarray, total: int, full: int = IMAGE_SIZE) -> np.ndarray:
    """The size of each of ``steps``, counted from 0, of a run of ``total``; int32."""
    sizes, ends = zip(*_ends(schedule, total, full), strict=True)
    return np.array(sizes, np.int32)[np.searchsorted(ends[:-1], steps, side="right")]
