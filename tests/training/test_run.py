"""A run's folder, and that a run which was interrupted ends as if it had not been."""

import json
import pickle

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastres.config import TrainConfig
from fastres.errors import UserError
from fastres.training.checkpoint import read_checkpoint, write_atomically
from fastres.training.run import Run, best_row, resolve

SETTINGS = {"model": "vgg11", "dataset": "folder", "epochs": 3, "batch_size": 20, "lr": 0.02, "device": "cpu"}


def start(dataset, folder, checkpoint=None, **settings):
    config, _ = resolve(TrainConfig(**{**SETTINGS, "output_dir": folder, **settings}), dataset)
    return Run(config, dataset, checkpoint)


@pytest.fixture
def finished(arrays, tmp_path):
    run = start(arrays, tmp_path / "run")
    return run, run.fit()


def test_what_a_run_leaves(finished, arrays):
    run, summary = finished
    names = {path.name for path in run.folder.iterdir() if not path.name.startswith("events")}
    assert names == {"config.json", "history.csv", "history.pkl", "best.safetensors", "last.pt", "summary.json"}
    history = pd.read_csv(run.folder / "history.csv")
    assert list(history) == [
        "epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
        "epoch_seconds", "images_per_second", "data_wait_seconds",
    ]  # fmt: skip
    pd.testing.assert_frame_equal(history, pd.read_pickle(run.folder / "history.pkl"))
    assert history["epoch"].tolist() == [1, 2, 3]
    assert json.loads((run.folder / "summary.json").read_text()) == summary
    assert TrainConfig.from_json(json.loads((run.folder / "config.json").read_text())) == run.config

    best = history.loc[history["test_accuracy"].idxmax()]
    assert summary["best_accuracy"] == pytest.approx(best["test_accuracy"])
    assert summary["test_loss"] == pytest.approx(best["test_loss"], rel=1e-6)
    assert summary["best_epoch"] == best["epoch"]
    assert summary["last_accuracy"] == pytest.approx(history["test_accuracy"].iloc[-1])
    assert summary["epoch_seconds"] == pytest.approx(history["epoch_seconds"].median())
    assert summary["params_millions"] == pytest.approx(9.224258)
    for name in ("device", "loader", "amp", "channels_last", "compile", "fused", "seed", "versions", "commit"):
        assert name in summary
    assert len(load_file(run.folder / "best.safetensors")) == len(run.trainer.model.state_dict())


def test_tensorboard_has_the_history(finished):
    run, _ = finished
    events = EventAccumulator(str(run.folder)).Reload()
    logged = [event.value for event in events.Scalars("test_accuracy")]
    assert logged == pytest.approx([row["test_accuracy"] for row in run.history])


class InterruptedByTestError(Exception):
    pass


@pytest.mark.parametrize(
    "settings",
    [
        {"amp": "off", "loader": "dali"},
        {"amp": "bf16", "loader": "eager", "augmentation": "crop-flip-cutout"},
        {"amp": "off", "model": "vgg19_4096", "lr": 0.001, "zero_gamma": False},  # dropout
    ],
)
def test_a_resumed_run_ends_bit_identically(settings, arrays, tmp_path):
    whole = start(arrays, tmp_path / "whole", **settings)
    whole.fit()

    def interrupt(row):
        if row["epoch"] == 1:
            raise InterruptedByTestError

    part = start(arrays, tmp_path / "part", **settings)
    with pytest.raises(InterruptedByTestError):
        part.fit(on_epoch=interrupt)
    resumed = start(arrays, tmp_path / "part", read_checkpoint(tmp_path / "part"), **settings)
    resumed.fit()
    torch.testing.assert_close(
        load_file(whole.folder / "best.safetensors"), load_file(resumed.folder / "best.safetensors"), rtol=0, atol=0
    )
    for whole_row, row in zip(whole.history, resumed.history, strict=True):
        for name in ("epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            assert row[name] == whole_row[name], name
    last = [read_checkpoint(run.folder) for run in (whole, resumed)]
    torch.testing.assert_close(last[0]["model"], last[1]["model"], rtol=0, atol=0)


def test_the_best_is_selected_on_the_held_out_part(arrays, tmp_path):
    run = start(arrays, tmp_path / "run", val_fraction=0.25, epochs=2)
    summary = run.fit()
    assert (summary["best_selected_on"], summary["train_images"]) == ("validation", 45)
    assert all({"val_loss", "val_accuracy"} <= set(row) for row in run.history)


def test_best_row_prefers_validation_and_the_first_of_equals():
    rows = [{"epoch": i, "test_accuracy": t, "val_accuracy": v} for i, (t, v) in enumerate([(9, 1), (1, 5), (2, 5)])]
    assert best_row(rows)["epoch"] == 1
    assert best_row([{"epoch": 0, "test_accuracy": 3}, {"epoch": 1, "test_accuracy": 3}])["epoch"] == 0


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("code ran while a checkpoint was opened",))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", pickle.dumps({"format": "fastres checkpoint 1"}), pickle.dumps(Hostile())],
    ids=["empty", "text", "pickle", "hostile"],
)
def test_what_is_no_checkpoint(content, tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"--resume .*last.pt: not a checkpoint"):
        read_checkpoint(path)


def test_a_truncated_checkpoint(finished):
    run, _ = finished
    path = run.folder / "last.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="not a checkpoint of fastres, or damaged"):
        read_checkpoint(path)
