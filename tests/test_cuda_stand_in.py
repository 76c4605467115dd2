"""What only a GPU reaches, with tests/cuda_stand_in.py in its place."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from fastres import profile
from fastres.data import create_loader
from fastres.data.dali import MAX_BATCHES_IN_FLIGHT
from fastres.data.plan import training_plan
from fastres.models import create_model
from fastres.profiling.measure import interleave
from fastres.training import run
from tests import cuda_stand_in
from tests.training.test_trainer import make_trainer, random_batches, train_epoch

SMALL = {"batch_size": 8, "lr": 0.01, "schedule": "cosine", "epochs": 2}


@pytest.fixture
def log(monkeypatch):
    with cuda_stand_in.in_place(monkeypatch) as log:
        yield log


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_replayed_step_is_the_step(log, amp):
    batches = random_batches([8, 8, 8, 5])
    states, losses = [], []
    for device, graphs in (("cuda", True), ("cpu", False)):
        torch.manual_seed(0)
        trainer = make_trainer(
            batches, create_model("resnet18", 4), device, amp=amp, cuda_graphs=graphs, channels_last=True, **SMALL
        )
        trainer.warm_up()
        log.clear()
        losses.append([train_epoch(trainer, batches, number).loss for number in range(2)])
        states.append(trainer.model.state_dict())
        assert log.count("replay") == (6 if graphs else 0)  # the last batch of an epoch has 5 images
    assert losses[0] == losses[1]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=0)
