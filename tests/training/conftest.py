"""Shared by the tests of runs: a run of the tiny model, and when two runs are the same."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fastres.config import TrainConfig
from fastres.training.checkpoint import read_checkpoint
from fastres.training.hardware import resolve
from fastres.training.run import Run

SETTINGS = {"model": "vgg11", "dataset": "folder", "epochs": 3, "batch_size": 20, "lr": 0.02, "device": "cpu"}


def start(dataset, folder, checkpoint=None, **settings):
    config, _ = resolve(TrainConfig(**{**SETTINGS, "output_dir": folder, **settings}), dataset)
    return Run(config, dataset, checkpoint)


@pytest.fixture
def finished(arrays, tmp_path):
    run = start(arrays, tmp_path / "run")
    return run, run.fit()


def assert_same_run(one, other):
    """Bit-identical weights, states and history, times aside."""
    first, second = read_checkpoint(one), read_checkpoint(other)
    for state in (first, second):
        for settings in (state["run"]["asked"], state["run"]["chosen"]):
            settings.pop("output_dir", None)
        state.pop("seconds")
        for row in state["history"]:
            for name in ("epoch_seconds", "images_per_second", "data_wait_seconds"):
                row.pop(name)
    for name in ("run", "history", "format", "steps_per_epoch"):
        assert first.pop(name) == second.pop(name)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for name in ("best.safetensors", "last.safetensors"):
        torch.testing.assert_close(*(load_file(folder / name) for folder in (one, other)), rtol=0, atol=0)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    for name in ("best_accuracy", "best_epoch", "test_loss", "last_accuracy", "accuracy", "confusion_matrix"):
        assert summaries[0][name] == summaries[1][name]
