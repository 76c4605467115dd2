"""Measuring for a profile: a few steps stand for an epoch, and the plain loop trains as the trainer does."""

import time

import pytest
import torch

from fastres.config import TrainConfig
from fastres.data.datasets import synthetic
from fastres.models import create_model
from fastres.profiling.measure import (
    Candidate,
    ContinuingLoader,
    PlainTrainer,
    RepeatedBatch,
    create_trainer,
    first_batch,
    loader_rates,
    planned_loader,
    train,
)
from fastres.training.trainer import Trainer


class FixedTrainer:
    """Takes 3 s for four batches, 1.2 s of them waiting."""

    device = torch.device("cpu")

    def train_epoch(self, loader, epoch):
        epoch.seconds, epoch.data_wait_seconds, epoch.steps = 3.0, 1.2, 4


class FixedLoader:
    first_wait = 1.0


@pytest.mark.parametrize(("steps", "wait"), [(4, 1.2), (100, 1.0 + 99 * 0.3)])
def test_the_first_wait_is_paid_once_an_epoch(steps, wait):
    candidate = Candidate("eager", TrainConfig(), FixedTrainer())
    candidate.measure(FixedLoader(), 0, steps)
    assert candidate.wait_seconds == pytest.approx([wait])
    assert candidate.epoch_seconds == pytest.approx([wait + steps * 0.45])


@pytest.mark.parametrize(("name", "starts_anew"), [("eager", True), ("dali", False)])
def test_only_a_loader_that_starts_anew_is_waited_for_in_every_epoch(name, starts_anew):
    loader = planned_loader(TrainConfig(batch_size=4, loader=name, device="cpu"), synthetic(8), 2)
    assert (ContinuingLoader(loader, 1).first_wait > 0) == starts_anew


def test_a_loader_continues_over_the_end_of_an_epoch():
    class Loader:
        starts_anew = False

        def epoch(self, number):
            return iter([(number, 0), (number, 1), (number, 2)])

    loader = ContinuingLoader(Loader(), 2)
    assert [list(loader.epoch(0)) for _ in range(3)] == [[(0, 1), (0, 2)], [(1, 0), (1, 1)], [(1, 2), (2, 0)]]


def test_a_loader_without_a_model_is_measured_in_images_a_second(monkeypatch):
    class Loader:
        def epoch(self, number):
            for _ in range(2):
                time.sleep(0.02)
                yield None, torch.zeros(4)

    monkeypatch.setattr("fastres.profiling.measure.planned_loader", lambda *_: Loader())
    rates = loader_rates(TrainConfig(batch_size=4, device="cpu"), ["dali"], synthetic(8))
    assert 1 < rates["dali"] <= 8 / 0.04


def test_the_plain_loop_trains_as_the_trainer_does():
    config = TrainConfig(device="cpu", amp="off", compile=False, schedule="constant", warmup_epochs=0.0, lr=0.05)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(8, 3, 32, 32, generator=generator), torch.randint(0, 4, (8,), generator=generator)
    results, weights = [], []
    for build in (
        lambda model: PlainTrainer(model, config, torch.device("cpu")),
        lambda model: Trainer(model, config, torch.device("cpu"), 4, 2),
    ):
        torch.manual_seed(0)
        trainer = build(create_model("vgg11", 4, fused=False))
        results.append(train(trainer, RepeatedBatch(batch, 2)))
        weights.append(trainer.model.state_dict())
    assert results[0].loss == pytest.approx(results[1].loss)
    assert results[0].accuracy == results[1].accuracy
    assert results[0].images == results[1].images == 16
    torch.testing.assert_close(*weights)


def test_a_batch_outlives_its_loader(monkeypatch):
    class Loader:
        def epoch(self, number):
            images, labels = torch.ones(4, 3, 32, 32), torch.ones(4, dtype=torch.int64)
            try:
                yield images, labels
            finally:  # freed memory is used again
                images.zero_(), labels.zero_()

    monkeypatch.setattr("fastres.profiling.measure.planned_loader", lambda *_: Loader())
    images, labels = first_batch(TrainConfig(device="cpu"), synthetic(4))
    assert (images.min(), labels.min()) == (1, 1)


def test_a_step_is_captured_and_evaluation_is_not_compiled(monkeypatch, tiny_vgg11):
    phases = []
    monkeypatch.setattr(Trainer, "_warm_up", lambda self, batch, size, training: phases.append((batch, training)))
    dataset = synthetic(8)
    config = TrainConfig(
        model="vgg11", batch_size=4, device="cpu", amp="off", loader="eager", compile=False, cuda_graphs=True,
        warmup_epochs=0.0,
    )  # fmt: skip
    Candidate("fastres, compiled", config, create_trainer(config, dataset)).warm_up(dataset)
    assert phases == [(4, True)]
