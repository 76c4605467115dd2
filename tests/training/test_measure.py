"""What a profile measures with: windows that stand for an epoch, and two loops that do the same."""

import pytest
import torch

from fastres.config import TrainConfig
from fastres.models import create_model
from fastres.training.baseline import StudyLoop
from fastres.training.measure import Resident, Variant, Window, train
from fastres.training.trainer import Trainer


class FixedEngine:
    """Takes 3 s for four batches, 1.2 s of them waiting."""

    device = torch.device("cpu")

    def train_epoch(self, window, epoch):
        epoch.seconds, epoch.data_wait_seconds, epoch.steps = 3.0, 1.2, 4


class FixedWindow:
    first_wait = 1.0


@pytest.mark.parametrize("steps", [4, 100])
def test_the_first_wait_is_paid_once_an_epoch(steps):
    variant = Variant("eager", TrainConfig(), FixedEngine(), FixedWindow())
    variant.measure(0, steps)
    wait = 1.0 + (steps - 1) * 0.3
    assert variant.wait_seconds == pytest.approx([wait])
    assert variant.epoch_seconds == pytest.approx([wait + steps * 0.45])


def test_a_window_goes_on_where_it_was_over_the_end_of_an_epoch():
    class Loader:
        def epoch(self, number):
            return iter([(number, 0), (number, 1), (number, 2)])

    window = Window(Loader(), 2)
    assert [list(window.epoch(0)) for _ in range(3)] == [[(0, 1), (0, 2)], [(1, 0), (1, 1)], [(1, 2), (2, 0)]]


def test_the_studies_loop_trains_as_the_trainer_does():
    config = TrainConfig(device="cpu", amp="off", compile=False, schedule="constant", warmup_epochs=0.0, lr=0.05)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(8, 3, 32, 32, generator=generator), torch.randint(0, 4, (8,), generator=generator)
    results, weights = [], []
    for build in (
        lambda model: StudyLoop(model, config, torch.device("cpu")),
        lambda model: Trainer(model, config, torch.device("cpu"), 4, 2),
    ):
        torch.manual_seed(0)
        engine = build(create_model("vgg11", 4, fused=False))
        results.append(train(engine, Resident(batch, 2)))
        weights.append(engine.model.state_dict())
    assert results[0].loss == pytest.approx(results[1].loss)
    assert results[0].accuracy == results[1].accuracy
    assert results[0].images == results[1].images == 16
    torch.testing.assert_close(*weights)
