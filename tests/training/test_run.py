"""A run's folder, and that a run which was interrupted ends as if it had not been."""

import json
import multiprocessing
import pickle
import random
import time

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastres.config import TrainConfig
from fastres.errors import Interrupted, RunError, UserError
from fastres.models import MODELS
from fastres.training.checkpoint import read_checkpoint, write_atomically
from fastres.training.run import Run, best_row, resolve
from tests.conftest import tiny_model

SETTINGS = {"model": "vgg11", "dataset": "folder", "epochs": 3, "batch_size": 20, "lr": 0.02, "device": "cpu"}


pytestmark = pytest.mark.usefixtures("tiny_vgg11")


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
    assert TrainConfig.from_json(json.loads((run.folder / "config.json").read_text()), "config.json") == run.config

    best = history.loc[history["test_accuracy"].idxmax()]
    assert summary["best_accuracy"] == pytest.approx(best["test_accuracy"])
    assert summary["test_loss"] == pytest.approx(best["test_loss"], rel=1e-6)
    assert summary["best_epoch"] == best["epoch"]
    assert summary["last_accuracy"] == pytest.approx(history["test_accuracy"].iloc[-1])
    assert summary["epoch_seconds"] == pytest.approx(history["epoch_seconds"].median())
    assert summary["params_millions"] == pytest.approx(1.450e-3, abs=1e-6)
    for name in ("device", "loader", "amp", "channels_last", "compile", "fused", "seed", "versions", "commit"):
        assert name in summary
    assert len(load_file(run.folder / "best.safetensors")) == len(run.trainer.model.state_dict())


def test_tensorboard_has_the_history(finished):
    run, _ = finished
    events = EventAccumulator(str(run.folder)).Reload()
    logged = [event.value for event in events.Scalars("test_accuracy")]
    assert logged == pytest.approx([row["test_accuracy"] for row in run.history])


RESUMED_SETTINGS = [
    {"amp": "off", "loader": "dali", "augmentation": "crop-flip"},
    {"amp": "bf16", "loader": "eager", "augmentation": "crop-flip-cutout"},
]


def assert_same_run(one, other):
    """Bit-identical weights, states and history, times aside."""
    first, second = read_checkpoint(one), read_checkpoint(other)
    for state in (first, second):
        state["config"].pop("output_dir")
        for row in state["history"]:
            for name in ("epoch_seconds", "images_per_second", "data_wait_seconds"):
                row.pop(name)
    for name in ("config", "history", "format", "step"):
        assert first.pop(name) == second.pop(name)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    best = [load_file(folder / "best.safetensors") for folder in (one, other)]
    torch.testing.assert_close(*best, rtol=0, atol=0)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    for name in ("best_accuracy", "best_epoch", "test_loss", "last_accuracy", "confusion_matrix"):
        assert summaries[0][name] == summaries[1][name]


@pytest.mark.parametrize("settings", RESUMED_SETTINGS)
def test_a_run_stopped_by_signals_ends_bit_identically(settings, arrays, tmp_path):
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
    if checkpoint is None and (folder / "config.json").exists():
        (folder / "config.json").unlink()  # killed before the first checkpoint: as a user would, begin again
    start(dataset, folder, checkpoint, checkpoint_minutes=1e-9, epochs=20).fit()


def test_a_run_killed_at_random_moments_ends_bit_identically(arrays, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_run"])

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
        process.join(delays.uniform(0, 0.3) * duration)
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills >= 10
    last = begin(tmp_path / "part")
    last.join()
    assert last.exitcode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "part")


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(arrays, tmp_path):
    run = start(arrays, tmp_path / "run", schedule="constant", warmup_epochs=0.0)
    train_epoch = run.trainer.train_epoch

    def poisoned(loader, epoch, after_step):
        if epoch.number == 1:
            with torch.no_grad():
                run.trainer.model[-1].bias.fill_(float("nan"))
        train_epoch(loader, epoch, after_step)

    run.trainer.train_epoch = poisoned
    with pytest.raises(
        RunError, match=r"the loss was nan from step 1 of epoch 2 on .*lower --lr.*last.pt is from before"
    ):
        run.fit()
    state = read_checkpoint(run.folder)
    assert len(state["history"]) == 1
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


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

    with pytest.raises(RunError, match=r"file: cannot be written \(disk full\); make room, then --resume"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


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


def test_a_damaged_checkpoint_is_refused_or_read_as_it_was(finished):
    run, _ = finished
    path = run.folder / "last.pt"
    content, state = path.read_bytes(), read_checkpoint(path)
    draw = random.Random(0)
    refused = 0
    for case in range(200):
        damaged = bytearray(content)
        if case % 4 == 0:
            del damaged[draw.randrange(len(damaged)) :]
        else:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            again = read_checkpoint(path)
        except UserError:
            refused += 1
        else:  # the flip hit padding
            assert again["history"] == state["history"]
            torch.testing.assert_close(again["model"], state["model"], rtol=0, atol=0)
    assert refused > 50
