from itertools import pairwise

import pytest
import torch
from torch.optim import lr_scheduler

from fastres.training.schedule import lr_factor

EPOCHS, STEPS = 10, 7


def factors(schedule, **options):
    factor = lr_factor(schedule, epochs=EPOCHS, steps_per_epoch=STEPS, **options)
    return [factor(step) for step in range(EPOCHS * STEPS)]


def torch_factors(make):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    out = []
    for _ in range(EPOCHS * STEPS):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


def test_constant():
    assert set(factors("constant")) == {1.0}


def test_multistep_is_torchs():
    expected = torch_factors(lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [4 * STEPS, 6 * STEPS]))
    assert factors("multistep", milestones=(4, 6)) == pytest.approx(expected)


def test_cosine_is_torchs():
    expected = torch_factors(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * STEPS))
    assert factors("cosine") == pytest.approx(expected)


def test_linear_is_torchs():
    expected = torch_factors(lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, EPOCHS * STEPS))
    assert factors("linear") == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["multistep", "cosine", "linear", "onecycle"])
def test_warm_up_rises_linearly_to_the_peak(schedule):
    rise = factors(schedule, warmup_epochs=2, milestones=(9,))[: 2 * STEPS + 1]
    first = 1 / (2 * STEPS + 1)  # of the way from where it starts
    assert rise[0] == pytest.approx(1 / 25 + 24 / 25 * first if schedule == "onecycle" else first)
    assert rise[-1] == 1
    steps = [after - before for before, after in pairwise(rise)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_onecycle_peaks_after_its_rise_and_ends_near_zero():
    values = factors("onecycle", warmup_epochs=3.0)
    rise = 3 * STEPS
    assert values.index(max(values)) == rise
    assert values[0] == pytest.approx(1 / 25 + 24 / 25 / (rise + 1))
    assert 0 < values[-1] < 0.05
