"""The learning rate as a closed form of the step, so that a resumed or longer run needs no state of it."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Schedule(NamedTuple):
    """How the learning rate changes, as a factor of its peak.

    decay: the factor after the warm-up, of the fraction of the rest of the run that is over (0 to 1) and of the number
        of milestones that have passed.
    start: the factor from which the warm-up rises linearly to 1.
    default_warmup: epochs of warm-up, of the run's epochs; used unless they are given.
    """

    decay: Callable[[float, int], float]
    start: float = 0.0
    default_warmup: Callable[[int], float] = lambda epochs: min(1.0, epochs / 2)


SCHEDULES = {
    "constant": Schedule(lambda progress, passed: 1.0, start=1.0, default_warmup=lambda epochs: 0.0),
    "multistep": Schedule(lambda progress, passed: 0.1**passed),
    # Loshchilov & Hutter 2016, arXiv:1608.03983, without restarts
    "cosine": Schedule(lambda progress, passed: 0.5 * (1 + math.cos(math.pi * progress))),
    "linear": Schedule(lambda progress, passed: 1 - progress),
    # Smith & Topin 2017, arXiv:1708.07120; it starts at 1/25 like torch's OneCycleLR
    "onecycle": Schedule(
        lambda progress, passed: 1 - progress, start=1 / 25, default_warmup=lambda epochs: 0.3 * epochs
    ),
}


def lr_factor(
    schedule: str,
    *,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: float = 0.0,
    milestones: Sequence[int] = (),
) -> Callable[[int], float]:
    """The factor of the peak learning rate at a step, which is counted from 0 at the start of the run.

    ``schedule`` is a key of SCHEDULES; ``milestones`` are epochs.
    """
    decay, start, _ = SCHEDULES[schedule]
    total = epochs * steps_per_epoch
    warmup = warmup_epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return start + (1 - start) * (step + 1) / (warmup + 1)
        progress = min((step - warmup) / max(total - warmup, 1), 1.0)
        return decay(progress, sum(step >= milestone * steps_per_epoch for milestone in milestones))

    return factor
