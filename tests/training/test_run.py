"""A run's folder, and that a run which was interrupted ends as if it had not been."""

import gc
import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastres.config import TrainConfig
from fastres.data.datasets import Split
from fastres.data.plan import training_plan
from fastres.errors import Interrupted, RunError, UserError
from fastres.models import MODELS, create_model
from fastres.nn import BatchNormReLU2d, EagerBatchNormReLU2d
from fastres.training.checkpoint import read_checkpoint, save_weights, write_atomically
from fastres.training.run import Run, best_row, resolve
from tests.conftest import tiny_model
from tests.data.test_loaders import reference

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
    for name in ("epoch_seconds", "images_per_second"):
        assert summary[name] == pytest.approx(history[name].median())
    np.testing.assert_allclose(history["images_per_second"] * history["epoch_seconds"], 60)
    assert summary["train_seconds"] == pytest.approx(history["epoch_seconds"].sum())
    wait = history["data_wait_seconds"].sum() / history["epoch_seconds"].sum()
    assert summary["data_wait_fraction"] == pytest.approx(wait)
    (right_dark, _), (_, right_bright) = summary["confusion_matrix"]
    assert summary["per_class_accuracy"] == {"dark": 10 * right_dark, "bright": 10 * right_bright}
    assert 100 < summary["peak_memory_mb"] < 10_000
    assert summary["params_millions"] == pytest.approx(1.450e-3, abs=1e-6)
    for name in ("device", "loader", "amp", "channels_last", "compile", "fused", "seed", "versions", "commit"):
        assert name in summary
    assert "pytest" in summary["command"]
    assert (datetime.now() - datetime.fromisoformat(summary["date"])).total_seconds() < 600
    assert len(load_file(run.folder / "best.safetensors")) == len(run.trainer.model.state_dict())


@pytest.mark.parametrize(
    "settings",
    [{"seed": 3}, {"augmentation": "crop-flip-cutout"}, {"batch_size": 25}, {"batch_size": 25, "drop_last": False}],
    ids=str,
)
def test_a_run_shows_the_plan_of_its_settings(settings, arrays, tmp_path):
    run = start(arrays, tmp_path / "run", **settings)
    config = run.config
    plan = training_plan(config.seed, 1, 60, config.augmentation)
    batches = list(run.train_loader.epoch(1))
    shown = 60 - 60 % config.batch_size if config.drop_last else 60
    assert [len(labels) for _, labels in batches[:-1]] == [config.batch_size] * (len(batches) - 1)
    images = torch.cat([images for images, _ in batches])
    np.testing.assert_allclose(images, reference(arrays, arrays.train, plan)[:shown], atol=2e-6)
    torch.manual_seed(config.seed)
    torch.testing.assert_close(run.trainer.model.state_dict(), create_model("vgg11", 2).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("loader", ["dali", "eager"])
def test_a_run_is_made_of_what_was_asked_for(fused, loader, arrays, tmp_path):
    run = start(arrays, tmp_path / "run", fused=fused, loader=loader)
    assert type(run.trainer.model[1]) is (BatchNormReLU2d if fused else EagerBatchNormReLU2d)
    assert type(run.train_loader).__name__ == {"dali": "DaliLoader", "eager": "EagerLoader"}[loader]


def test_tensorboard_has_the_history(finished, arrays):
    run, _ = finished
    run = start(arrays, run.folder, read_checkpoint(run.folder), epochs=4)
    run.fit()
    events = EventAccumulator(str(run.folder)).Reload()
    logged = [event.value for event in events.Scalars("test_accuracy")]
    assert logged == pytest.approx([row["test_accuracy"] for row in run.history])


RESUMED_SETTINGS = [
    {"amp": "off", "loader": "dali", "augmentation": "crop-flip"},
    {"amp": "bf16", "loader": "eager", "augmentation": "crop-flip-cutout"},
    pytest.param({"device": "cuda", "amp": "fp16"}, marks=pytest.mark.gpu),
    pytest.param({"device": "cuda", "cuda_graphs": False}, marks=pytest.mark.gpu),
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
def test_a_run_stopped_by_signals_ends_bit_identically(settings, arrays, tmp_path, monkeypatch):
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
        process.join(delays.uniform(0, 0.2) * duration)
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills >= 5
    last = begin(tmp_path / "part")
    last.join()
    assert last.exitcode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "part")


def run_that_dies(dataset, folder, last_step, settings):
    """In a process of its own: a run that is killed after ``last_step`` steps."""
    MODELS["vgg11"] = tiny_model
    steps = itertools.count(1)

    def on_step():
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
    assert read_checkpoint(tmp_path / "run")["step"] == saved_step


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


@pytest.mark.parametrize("settings", [{}, {"checkpoint_steps": 1}], ids=str)
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(settings, arrays, tmp_path):
    run = start(arrays, tmp_path / "run", schedule="constant", **settings)
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
    assert (len(state["history"]), state["step"]) == (1, 3)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:126] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("passes", "flag", "epochs_kept"),  # warm-up, then three steps and an evaluation an epoch
    [
        (0, "--batch-size 20: out of memory; try --batch-size 10", None),
        (1, "--eval-batch-size 7: out of memory; try --eval-batch-size 3", None),
        (4, "--batch-size 20: out of memory; try --batch-size 10", 0),
        (5, "--eval-batch-size 7: out of memory; try --eval-batch-size 3", 0),
        (8, "--batch-size 20: out of memory; try --batch-size 10", 1),
    ],
)
def test_too_little_memory_names_the_batch_size(passes, flag, epochs_kept, error, arrays, tmp_path):
    dataset = replace(arrays, test=arrays.test.take(np.arange(7)))
    run = start(dataset, tmp_path / "run", eval_batch_size=7, schedule="constant")
    forward = run.trainer.forward
    count = itertools.count()

    def fails_at_last(images):
        if next(count) == passes:
            raise error
        return forward(images)

    run.trainer.forward = run.trainer.predict = fails_at_last
    with pytest.raises(RunError) as raised:
        run.fit()
    assert str(raised.value) == flag
    if epochs_kept is None:
        assert not (run.folder / "last.pt").exists()
    else:
        assert len(read_checkpoint(run.folder)["history"]) == epochs_kept


def test_other_errors_are_not_taken_for_too_little_memory(arrays, tmp_path):
    run = start(arrays, tmp_path / "run")
    run.trainer.forward = lambda images: images.view(-1, 5)
    with pytest.raises(RuntimeError, match="shape"):
        run.fit()


def test_too_little_memory_for_one_image(arrays, tmp_path):
    run = start(arrays, tmp_path / "run", batch_size=1)

    def fails(images):
        raise torch.OutOfMemoryError

    run.trainer.forward = fails
    with pytest.raises(RunError, match="--batch-size 1: out of memory; take a smaller --model"):
        run.fit()


LIMITED = """
import resource, sys
from fastres import train
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**31,) * 2)
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_that_is_really_too_little(image_folder, tmp_path):
    flags = ["--model", "vgg11", "--dataset", "folder", "--data-dir", image_folder, "--batch-size", 20]
    flags += ["--device", "cpu", "--eval-batch-size", 1_000_000, "--output-dir", tmp_path / "run"]
    command = [sys.executable, "-c", LIMITED, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == (
        "python -m fastres.train: error: --eval-batch-size 1000000: out of memory; try --eval-batch-size 500000\n"
    )


def test_the_best_is_selected_on_the_held_out_part(arrays, tmp_path):
    arrays = replace(arrays, test=Split(arrays.test.images, 1 - arrays.test.labels))  # where the best is the worst
    run = start(arrays, tmp_path / "run", val_fraction=0.25, epochs=6)
    summary = run.fit()
    assert (summary["best_selected_on"], summary["train_images"]) == ("validation", 45)
    assert summary["best_epoch"] == max(run.history, key=lambda row: row["val_accuracy"])["epoch"]
    held_out = torch.cat([labels for _, labels in run.validation_loader.epoch(0)])
    assert len(held_out) == 15
    first, last = run.history[0], run.history[-1]
    assert last["val_accuracy"] > 90 > 10 > last["test_accuracy"], (first, last)


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


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
@pytest.mark.parametrize("name", ["last.pt", "best.safetensors"])
def test_a_full_disk_keeps_the_old_file(name, finished):
    run, _ = finished
    path = run.folder / name
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(RunError, match=rf"{name}: cannot be written \(.*make room, then --resume"):
            run._save() if name == "last.pt" else save_weights(run.trainer.model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert not list(run.folder.glob("*.tmp"))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", pickle.dumps({"format": "fastres checkpoint 2"})],
    ids=["empty", "text", "pickle"],
)
def test_what_is_no_checkpoint(content, tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"--resume .*last.pt: not a checkpoint"):
        read_checkpoint(path)


def test_a_compressed_checkpoint_is_refused(finished):
    """Since torch.save compresses nothing, a file that is larger inside than outside can only mean to fill memory."""
    run, _ = finished
    path = run.folder / "last.pt"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        if compression == zipfile.ZIP_STORED:
            read_checkpoint(path)
        else:
            with pytest.raises(UserError, match="not a checkpoint"):
                read_checkpoint(path)


def test_flipped_bits_in_the_best_weights_are_noticed(finished):
    run, _ = finished
    path = run.folder / "best.safetensors"
    content = path.read_bytes()
    weights = 8 + int.from_bytes(content[:8], "little")  # where the header ends
    draw = random.Random(0)
    for _ in range(50):
        damaged = bytearray(content)
        damaged[draw.randrange(weights, len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"best.safetensors: damaged, its checksum"):
            run.evaluate_best()


def test_weights_from_elsewhere_need_no_checksum(finished):
    run, summary = finished
    path = run.folder / "best.safetensors"
    state = load_file(path)
    save_file(state, path)
    assert run.evaluate_best().loss == pytest.approx(summary["test_loss"])
    save_file({name: tensor for name, tensor in state.items() if name != "7.bias"}, path)
    with pytest.raises(UserError, match=r"best.safetensors: does not hold weights of this model"):
        run.evaluate_best()


@pytest.fixture
def saved_within_an_epoch(arrays, tmp_path):
    """A checkpoint after one epoch and two steps of the second."""
    run = start(arrays, tmp_path / "run")
    stops = iter([0, 0, 0, 0, 2])
    with pytest.raises(Interrupted):
        run.fit(signalled=lambda: next(stops))
    return read_checkpoint(run.folder)


def change(*path, to):
    """A function that replaces, or with ``to`` None removes, the value at ``path`` in nested containers."""

    def damage(state):
        *parents, last = path
        for name in parents:
            state = state[name]
        if to is None:
            del state[last]
        else:
            state[last] = to(state[last]) if callable(to) else to

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("history", to=lambda rows: {}), "its history is no list"),
        (change("history", 0, to="row"), "no proper row of epoch 1"),
        (change("history", 0, "test_accuracy", to=None), "no proper row of epoch 1"),
        (change("history", 0, "test_accuracy", to="90"), "no proper row of epoch 1"),
        (change("history", 0, "epoch", to=2), "no proper row of epoch 1"),
        (change("history", 0, "epoch_seconds", to=0.0), "no proper row of epoch 1"),
        (change("epoch", "loss_sum", to=None), "epoch has no 'loss_sum'"),
        (change("epoch", "more", to=1), "epoch has an unknown 'more'"),
        (change("epoch", "steps", to=4), "it is at step 4 of epoch 2, after 1 finished ones"),
        (change("epoch", "number", to=5), "it is at step 2 of epoch 6, after 1 finished ones"),
        (change("epoch", "steps", to="2"), "epoch steps is str instead of int"),
        (change("step", to=7), "it is at step 7 instead of 5"),
        (change("model", "0.weight", to=None), "model has no '0.weight'"),
        (change("model", "0.weight", to=1.0), r"0.weight is float instead of a strided float32 \[8, 3, 3, 3\]"),
        (change("model", "0.weight", to=torch.ones(8, 3, 3, 2)), r"is a strided float32 \[8, 3, 3, 2\] instead of"),
        (change("model", "0.weight", to=lambda weight: weight.double()), "is a strided float64 "),
        (change("model", "0.weight", to=lambda weight: weight.to_sparse()), "is a sparse_coo float32 "),
        (change("model", "0.weight", to=lambda weight: weight.to("meta")), "is a meta strided float32 "),
        (change("epoch", "loss_sum", to=lambda sums: sums.requires_grad_()), "is a differentiable strided float64"),
        (change("momentum", "7.bias", to=None), "momentum has no '7.bias'"),
        (change("momentum", "7.bias", to=torch.ones(3)), r"momentum 7.bias is a strided float32 \[3\] instead of"),
        (change("momentum", to=lambda buffers: {}), "momentum has no '0.weight'"),
        (change("scaler", to=lambda scaler: []), "scaler is list instead of dict"),
        (change("rng", 0, to=lambda rng: rng[1:]), "rng is a strided uint8"),
        (change("rng", to=torch.zeros(9)), "rng has not a state for each process"),
        (change("cuda_rng", to=lambda states: []), "cuda_rng has not a state for each process"),
        (change("rng", 0, to=torch.zeros_like), "mt19937"),
    ],
)
def test_a_checkpoint_that_does_not_fit(damage, message, saved_within_an_epoch, arrays, tmp_path):
    start(arrays, tmp_path / "again", saved_within_an_epoch)
    damage(saved_within_an_epoch)
    with pytest.raises(UserError, match=r"--resume .*again: last.pt does not fit this run \(.*" + message) as error:
        start(arrays, tmp_path / "again", saved_within_an_epoch)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_a_checkpoint_with_another_random_state_of_cuda(arrays, tmp_path):
    settings = {"device": "cuda", "epochs": 1}
    start(arrays, tmp_path / "run", **settings).fit()
    checkpoint = read_checkpoint(tmp_path / "run") | {"cuda_rng": ["x"]}
    with pytest.raises(UserError, match="cuda_rng is str instead of a strided uint8"):
        start(arrays, tmp_path / "run", checkpoint, **settings)


def test_a_checkpoint_of_another_training_set(saved_within_an_epoch, arrays, tmp_path):
    smaller = replace(arrays, train=arrays.train.take(np.arange(40)))
    with pytest.raises(UserError, match="it is at step 5 instead of 4: was the training set another"):
        start(smaller, tmp_path / "run", saved_within_an_epoch)


def in_use():
    """MiB of resident memory, open files and threads of this process."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 2**10, len(os.listdir("/proc/self/fd")), int(status["Threads"])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("loader", ["dali", "eager"])
def test_a_long_run_keeps_nothing(loader, arrays, tmp_path):
    dataset = replace(arrays, train=arrays.train.take(np.arange(8)), test=arrays.test.take(np.arange(4)))
    settings = {"loader": loader, "workers": 1, "epochs": 200, "batch_size": 4, "eval_batch_size": 4}
    early, late = [], []

    def on_epoch(row):
        if 16 <= row["epoch"] <= 20:
            early.append(in_use())
        if row["epoch"] > 195:
            late.append(in_use())

    start(dataset, tmp_path / "run", **settings).fit(on_epoch=on_epoch)
    # several epochs each, since memory, files and threads also come and go within one
    memory, files, threads = np.min(late, axis=0) - np.max(early, axis=0)
    assert memory < 8  # MiB, for the allocator's freedom; each epoch's row takes 1 KiB
    assert files <= 0
    assert threads <= 0
