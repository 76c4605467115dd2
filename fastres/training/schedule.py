"""The learning rate as a function of the step, in closed form, so that a resumed or longer run needs no state of it."""

import math
from collections.abc import Callable, Sequence

ONECYCLE_START = 1 / 25  # of the peak; as torch's OneCycleLR
ONECYCLE_RISE = 0.3  # part of the run that rises, unless the warm-up is given


def lr_factor(
    schedule: str,
    *,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: float = 0.0,
    milestones: Sequence[int] = (),
) -> Callable[[int], float]:
    """What the peak learning rate is multiplied with at a step, counted from 0.

    All but ``constant`` first rise linearly over ``warmup_epochs``. Then ``multistep`` divides by 10 at each of the
    ``milestones`` (epochs), ``cosine`` falls as half a cosine to 0 at the end of the run (Loshchilov & Hutter 2016,
    arXiv:1608.03983, without restarts), and ``onecycle``, which rises from 1/25, falls linearly to 0 (Smith & Topin
    2017, arXiv:1708.07120).
    """
    total = epochs * steps_per_epoch
    warmup = warmup_epochs * steps_per_epoch
    start = ONECYCLE_START if schedule == "onecycle" else 0.0

    def factor(step: int) -> float:
        if schedule == "constant":
            return 1.0
        if step < warmup:
            return start + (1 - start) * (step + 1) / (warmup + 1)
        if schedule == "multistep":
            return 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in milestones)
        progress = min((step - warmup) / max(total - warmup, 1), 1.0)
        return 1 - progress if schedule == "onecycle" else 0.5 * (1 + math.cos(math.pi * progress))

    return factor
