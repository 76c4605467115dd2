"""A run that was interrupted ends as if it had not been."""

import itertools
import multiprocessing
import os
import random
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from fastres.errors import Interrupted
from fastres.models import MODELS
from fastres.training.checkpoint import read_checkpoint
from tests.conftest import tiny_model
from tests.training.conftest import assert_same_run, start

pytestmark = pytest.mark.usefixtures("tiny_vgg11")


RESUMED_SETTINGS = [
    {"amp": "off", "loader": "dali", "augmentation": "crop-flip"},
    {"amp": "bf16", "loader": "eager", "augmentation": "crop-flip-cutout-mixup"},
    {"amp": "off", "optimizer": "adamw", "schedule": "linear"},
    {"amp": "bf16", "optimizer": "muon", "schedule": "onecycle"},
    {
        "amp": "off",
        "model": "resnet18",
        "image_size_schedule": "12:0.3,24:0.5",
        "augmentation": "reflectcrop-altflip-cutout-cutmix",
    },
    pytest.param({"device": "cuda", "amp": "fp16"}, marks=pytest.mark.gpu),
    pytest.param({"device": "cuda", "cuda_graphs": False}, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("settings", RESUMED_SETTINGS)
def test_a_run_stopped_by_signals_ends_bit_identically(settings, arrays, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "resnet18", tiny_model)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    start(arrays, tmp_path / "whole", **settings).fit()

    stops = iter([0, 15, 0, 0, 2, 0, 0, 0, 0, 0])  # within the first epoch, and at the last step of the second
    part = start(arrays, tmp_path / "part", **settings)
    for exit_code in (143, 130):
        with pytest.raises(Interrupted, match=r"stopped by SIG(TERM|INT); --resume .*part goes on") as stop:
            part.fit(signalled=lambda: next(stops))
        assert stop.value.exit_code == exit_code
        part = start(arrays, tmp_path / "part", read_checkpoint(tmp_path / "part"), **settings)
    part.fit(signalled=lambda: next(stops))
    assert_same_run(tmp_path / "whole", tmp_path / "part")


def run_until_killed(dataset, folder):
    """In a process of its own: a new run, or the one that is there. The thread counts must not differ between them."""
    torch.set_num_threads(1)
    MODELS["vgg11"] = tiny_model
    checkpoint = read_checkpoint(folder) if (folder / "last.pt").exists() else None
    start(dataset, folder, checkpoint, checkpoint_minutes=1e-9, epochs=20).fit()


def test_a_run_killed_at_random_moments_ends_bit_identically(arrays, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_resume"])

    def begin(folder):
        process = context.Process(target=run_until_killed, args=(arrays, folder))
        process.start()
        return process

    begin(tmp_path / "warm-up").join()  # starts the server
    begun = time.monotonic()
    whole = begin(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    duration = time.monotonic() - begun

    delays = random.Random(0)
    kills = 0
    for _ in range(20):
        process = begin(tmp_path / "part")
        process.join(delays.uniform(0, 0.15) * duration)
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills >= 10
    last = begin(tmp_path / "part")
    last.join()
    assert last.exitcode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "part")


def run_that_dies(dataset, folder, last_step, settings):
    """In a process of its own: a run that is killed after ``last_step`` steps."""
    MODELS["vgg11"] = tiny_model
    steps = itertools.count(1)

    def on_step(step, loss):
        if next(steps) == last_step + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    start(dataset, folder, **settings).fit(on_step)


@pytest.mark.parametrize(("last_step", "saved_step"), [(3, 0), (4, 4), (7, 4), (8, 8), (13, 12)])
def test_a_killed_run_loses_fewer_steps_than_asked(last_step, saved_step, arrays, tmp_path):
    # epochs of 3 steps, so that every 4th step moves through the epoch, which --checkpoint-every does not save
    settings = {"epochs": 6, "checkpoint_every": 5, "checkpoint_steps": 4}
    process = multiprocessing.get_context("forkserver").Process(
        target=run_that_dies, args=(arrays, tmp_path / "run", last_step, settings)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    state = read_checkpoint(tmp_path / "run")
    done_in_epoch = state["epoch"]["steps"] if state["epoch"] else 0
    assert len(state["history"]) * state["steps_per_epoch"] + done_in_epoch == saved_step


def test_minutes_between_checkpoints(arrays, tmp_path, monkeypatch):
    minutes = itertools.count()  # one more at every look at the clock
    clock = SimpleNamespace(monotonic=lambda: 60 * next(minutes), perf_counter=time.perf_counter)
    monkeypatch.setattr("fastres.training.run.time", clock)
    run = start(arrays, tmp_path / "run", epochs=4, checkpoint_every=4, checkpoint_minutes=4)
    saved, save = [], run._save
    run._save = lambda epoch=None: saved.append(epoch and (epoch.number, epoch.steps)) or save(epoch)
    run.fit()
    assert saved == [None, (1, 1), (2, 2), (3, 3), None]  # every fourth step, of three an epoch


def test_the_last_epoch_is_saved(arrays, tmp_path):
    run = start(arrays, tmp_path / "run", epochs=4, checkpoint_every=3)
    run.fit()
    assert len(read_checkpoint(run.folder)["history"]) == 4
