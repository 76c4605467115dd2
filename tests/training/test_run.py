"""A run's folder, and what ends a run."""

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastres.data.image_folder import folder as image_files
from fastres.data.plan import training_plan
from fastres.data.splits import Split
from fastres.errors import Interrupted, RunError
from fastres.models import MODELS, create_model
from fastres.nn import BatchNormReLU2d, EagerBatchNormReLU2d
from fastres.profiling.roofline import Machine
from fastres.training import cost
from fastres.training.checkpoint import read_checkpoint
from fastres.training.cost import flop_an_image
from fastres.training.history import best_row
from fastres.training.start import read_saved
from tests.conftest import noise, tiny_model, write_folder
from tests.data.test_loaders import reference
from tests.training.conftest import start

pytestmark = pytest.mark.usefixtures("tiny_vgg11")


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "-m", "fastres.train", "--data-dir", "my images"])


def test_what_a_run_leaves(command, finished, arrays):
    run, summary = finished
    names = {path.name for path in run.folder.iterdir() if not path.name.startswith("events")}
    assert names == {
        ".lock", "config.json", "history.csv", "history.pkl", "best.safetensors", "last.safetensors", "last.pt",
        "summary.json",
    }  # fmt: skip
    history = pd.read_csv(run.folder / "history.csv")
    assert list(history) == [
        "epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
        "epoch_seconds", "images_per_second", "data_wait_seconds",
    ]  # fmt: skip
    pd.testing.assert_frame_equal(history, pd.read_pickle(run.folder / "history.pkl"))
    assert history["epoch"].tolist() == [1, 2, 3]
    assert json.loads((run.folder / "summary.json").read_text()) == summary
    saved = read_saved(json.loads((run.folder / "config.json").read_text()), "config.json")
    assert (saved.config, saved.class_names) == (run.config, ("dark", "bright"))

    best = history.loc[history["test_accuracy"].idxmax()]
    last = history.iloc[-1]
    assert summary["best_accuracy"] == summary["best_on_test_accuracy"] == best["test_accuracy"]
    assert summary["best_test_loss"] == best["test_loss"]
    assert summary["best_epoch"] == best["epoch"]
    assert summary["last_accuracy"] == summary["accuracy"] == last["test_accuracy"]
    assert summary["test_loss"] == pytest.approx(last["test_loss"], rel=1e-6)
    assert summary["selection_gain"] == best["test_accuracy"] - last["test_accuracy"]
    assert summary["test_evaluations"] == 4  # three epochs, and once more with the weights of the file
    for name in ("epoch_seconds", "images_per_second"):
        assert summary[name] == pytest.approx(history[name].median())
    np.testing.assert_allclose(history["images_per_second"] * history["epoch_seconds"], 60)
    assert summary["train_seconds"] == pytest.approx(history["epoch_seconds"].sum())
    wait = history["data_wait_seconds"].sum() / history["epoch_seconds"].sum()
    assert summary["data_wait_fraction"] == pytest.approx(wait)
    (right_dark, _), (_, right_bright) = summary["confusion_matrix"]
    assert summary["per_class_accuracy"] == {"dark": 10 * right_dark, "bright": 10 * right_bright}
    assert summary["train_flop"] == 3 * 60 * flop_an_image(run.config, 2)[32]
    assert summary["epochs_work"] == 3
    assert summary["train_flop_per_second"] == summary["train_flop"] / summary["train_seconds"]
    assert summary["machine_rates"] == []  # a short run
    assert summary["share_of_limit"] is summary["joules"] is summary["price"] is summary["target_epoch"] is None
    assert len(summary["first_losses"]) == 3  # of the first epoch
    assert np.mean(summary["first_losses"]) == pytest.approx(history["train_loss"][0])
    assert 100 < summary["peak_memory_mb"] < 10_000
    assert summary["params_millions"] == pytest.approx(1.450e-3, abs=1e-6)
    for name in ("device", "loader", "amp", "channels_last", "compile", "fused", "seed", "versions", "commit"):
        assert name in summary
    assert summary["command"] == "python -m fastres.train --data-dir 'my images'"
    assert (datetime.now() - datetime.fromisoformat(summary["date"])).total_seconds() < 600
    assert len(load_file(run.folder / "best.safetensors")) == len(run.trainer.model.state_dict())


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 3},
        {"augmentation": "crop-flip-erasing"},
        {"batch_size": 25},
        {"batch_size": 25, "drop_last": False},
        {"init": "study-b"},
    ],
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
    expected = create_model("vgg11", 2, init=config.init).state_dict()
    torch.testing.assert_close(run.trainer.model.state_dict(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("loader", ["dali", "eager"])
def test_smaller_images_first(loader, arrays, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "resnet18", tiny_model)
    settings = {"model": "resnet18", "image_size_schedule": "12:.45, 24:0.7", "loader": loader}
    run = start(arrays, tmp_path / "run", **settings)
    shown = [images.size(3) for epoch in range(3) for images, _ in run.train_loader.epoch(epoch)]
    assert shown == [12] * 4 + [24] * 2 + [32] * 3  # of 9 steps
    summary = run.fit()
    by_size = flop_an_image(run.config, 2)
    flop = sum(20 * by_size[size] for size in shown)
    assert summary["train_flop"] == pytest.approx(flop)
    assert summary["epochs_work"] == pytest.approx(flop / (60 * by_size[32]))
    assert by_size[12] < 0.2 * by_size[32]
    assert run.config.image_size_schedule == "12:0.45,24:0.7"


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
    assert (len(state["history"]), state["epoch"]) == (1, None)
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
    with pytest.raises(RunError, match="--batch-size 1: out of memory; choose a smaller --model"):
        run.fit()


LIMITED = """
import resource, sys
import torch._dynamo  # which the first optimizer step imports
from fastres import train
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + int(sys.argv[1]),) * 2)
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (3 * 2**27, "--model resnet50: out of memory; choose a smaller --model"),
        (3 * 2**29, "--batch-size 60: out of memory; try --batch-size 30"),
    ],
)
def test_memory_that_is_really_too_little(memory, message, image_folder, tmp_path):
    flags = ["--model", "resnet50", "--dataset", "folder", "--data-dir", image_folder, "--batch-size", 60]
    flags += ["--device", "cpu", "--amp", "off", "--output-dir", tmp_path / "run"]
    command = [sys.executable, "-c", LIMITED, str(memory), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == f"python -m fastres.train: error: {message}\n"


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


def in_use():
    """MiB of resident memory, open files and threads of this process."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 2**10, len(os.listdir("/proc/self/fd")), int(status["Threads"])


def test_no_batch_is_larger_than_its_split(arrays, tmp_path, monkeypatch):
    run = start(arrays, tmp_path / "run", batch_size=30, eval_batch_size=4000, val_fraction=0.25, epochs=1)
    assert run.config.eval_batch_size == 20
    assert (run.test_loader.batch_size, run.validation_loader.batch_size) == (20, 15)
    sizes, predict = set(), run.trainer.predict
    monkeypatch.setattr(run.trainer, "predict", lambda images: sizes.add(len(images)) or predict(images))
    run.fit()
    assert sizes == {20, 15}


def test_every_file_has_the_mode_of_the_umask(arrays, tmp_path):
    before = os.umask(0o027)
    try:
        run = start(arrays, tmp_path / "run", epochs=1)
        run.fit()
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in run.folder.iterdir()}
    assert set(modes.values()) == {"0o640"}, modes


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(arrays, tmp_path, monkeypatch):
    class Noon(datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 1, 12)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastres.training.run.datetime", Noon)
    for seed in range(3):
        start(arrays, None, seed=seed, epochs=1).fit()
    seeds = {}
    for folder in (tmp_path / "runs").iterdir():
        config = json.loads((folder / "config.json").read_text())
        seeds[folder.name] = config["asked"]["seed"]
        assert read_checkpoint(folder)["run"]["chosen"]["output_dir"] == str(Path("runs") / folder.name)
    name = "vgg11-arrays-20260101-120000"
    assert seeds == {name: 0, f"{name}-2": 1, f"{name}-3": 2}


def test_the_phases_of_a_run_are_its_time(arrays, tmp_path):
    run = start(arrays, tmp_path / "run", epochs=5)
    before, begin = sum(run.clock.read().values()), time.monotonic()
    summary = run.fit()
    wall = before + time.monotonic() - begin
    phases = summary["phase_seconds"]
    assert sum(phases.values()) == summary["wall_seconds"] == pytest.approx(wall, rel=0.01, abs=0.05)
    assert phases["training"] >= summary["train_seconds"]
    assert phases["warm_up"] >= summary["warm_up_seconds"]
    assert all(phases[name] > 0 for name in ("data", "evaluation", "writing", "start_up"))


def test_the_clock_of_a_resumed_run_has_the_seconds_of_both_processes(arrays, tmp_path):
    def stop():
        return signal.SIGTERM if len(run.history) == 2 else 0

    run = start(arrays, tmp_path / "run")
    with pytest.raises(Interrupted):
        run.fit(signalled=stop)
    before = read_checkpoint(tmp_path / "run")["seconds"]
    assert before["training"] > 0
    rest = start(arrays, tmp_path / "run", read_checkpoint(tmp_path / "run"))
    assert rest.fit()["phase_seconds"]["training"] > before["training"]


def test_seconds_count_from_the_start_of_the_process():
    script = (
        "import time; time.sleep(0.3); start = time.monotonic(); from fastres.training.clock import process_age; "
        "print(process_age(), time.monotonic() - start)"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    age, importing = map(float, done.stdout.split())
    assert 0.3 + importing < age < time.monotonic() - begin + 0.02


def test_a_run_stops_at_its_target(arrays, tmp_path):
    summary = start(arrays, tmp_path / "run", epochs=50, lr=0.05, target_accuracy=60).fit()
    history = pd.read_csv(tmp_path / "run/history.csv")
    assert 1 <= len(history) < 50
    assert (history["test_accuracy"] >= 60).tolist() == [False] * (len(history) - 1) + [True]
    assert summary["target_epoch"] == summary["epochs"] == len(history)
    assert summary["target_seconds"] == pytest.approx(history["epoch_seconds"].sum())
    again = start(arrays, tmp_path / "run", read_checkpoint(tmp_path / "run"), epochs=50, target_accuracy=60)
    assert again.fit()["epochs"] == len(history)  # it has been reached


def test_a_target_is_of_the_validation_images_where_there_are_any(arrays, tmp_path):
    settings = {"epochs": 50, "lr": 0.05, "val_fraction": 0.3, "target_accuracy": 60, "checkpoint_every": 50}
    start(arrays, tmp_path / "run", **settings).fit()
    history = pd.read_csv(tmp_path / "run/history.csv")
    assert (history["val_accuracy"] >= 60).tolist() == [False] * (len(history) - 1) + [True]
    assert len(read_checkpoint(tmp_path / "run")["history"]) == len(history)


def test_the_rates_of_the_machine_are_measured_before_and_after_a_long_run(arrays, tmp_path, monkeypatch):
    rates = [Machine(1e12, 1e10), Machine(3e12, 3e10)]
    monkeypatch.setattr(cost, "measure_machine", lambda device, dtype: rates.pop(0))
    monkeypatch.setitem(cost.MEASURED_FLOP, "cpu", 1.0)
    run = start(arrays, tmp_path / "run", price_per_hour=3600)
    summary = run.fit()
    assert summary["machine_rates"] == [
        {"flops_per_second": 1e12, "bytes_per_second": 1e10}, {"flops_per_second": 3e12, "bytes_per_second": 3e10},
    ]  # fmt: skip
    share = cost.share_of_limit(run.config, 2, {32: 9}, summary["train_seconds"], [Machine(2e12, 2e10)])
    assert summary["share_of_limit"] == share
    assert 0 < share < 1
    assert summary["price"] == pytest.approx(summary["wall_seconds"])


def test_best_weights_are_the_result_where_they_are_selected(arrays, tmp_path):
    run = start(arrays, tmp_path / "run", select="best", epochs=4)
    summary = run.fit()
    assert summary["accuracy"] == summary["best_accuracy"]
    assert summary["test_loss"] == pytest.approx(summary["best_test_loss"], rel=1e-6)


def test_joules_are_those_of_nvml(monkeypatch):
    class Library:
        def nvmlInit_v2(self):  # noqa: N802
            return 0

        def nvmlDeviceGetHandleByUUID(self, uuid, handle):  # noqa: N802
            assert uuid == b"GPU-1-2"
            return 0

        def nvmlDeviceGetTotalEnergyConsumption(self, handle, energy):  # noqa: N802
            energy._obj.value = 12_500
            return self.error

    library = Library()
    monkeypatch.setattr(cost.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    library.error = 0
    assert cost.energy(torch.device("cuda")) == 12.5
    library.error = 3  # not supported
    assert cost.energy(torch.device("cuda")) is None
    assert cost.energy(torch.device("cpu")) is None


def long_run(loader, images, folder):
    """Trains 200 epochs; memory, files and threads at their end must be what they were after 20."""
    gc.freeze()  # or each look at the memory would take a fifth of a second
    MODELS["vgg11"], dataset = tiny_model, image_files(Path(images))
    dataset = replace(dataset, train=dataset.train.take(np.arange(8)), test=dataset.test.take(np.arange(4)))
    settings = {"loader": loader, "workers": 1, "epochs": 200, "batch_size": 4, "eval_batch_size": 4}
    early, late = [], []

    def on_epoch(row):
        if 16 <= row["epoch"] <= 20:
            early.append(in_use())
        if row["epoch"] > 195:
            late.append(in_use())

    start(dataset, Path(folder), **settings).fit(on_epoch=on_epoch)
    # several epochs each, since memory, files and threads also come and go within one
    memory, files, threads = np.min(late, axis=0) - np.max(early, axis=0)
    assert memory < 8  # MiB, for the allocator's freedom; each epoch's row takes 1 KiB
    assert files <= 0
    assert threads <= 0


@pytest.fixture(scope="session", autouse=True)
def long_runs(request, tmp_path_factory):
    """Processes of `long_run`, started with the first test of this file: small ones, because forking a large one, as
    the eager loader does in every epoch, takes long."""
    script = "import sys; from tests.training.test_run import long_run; long_run(*sys.argv[1:])"
    started = {}
    for item in request.session.items:
        if item.name.startswith("test_a_long_run_keeps_nothing"):
            loader, folder = item.callspec.params["loader"], tmp_path_factory.mktemp("long")
            images = write_folder(folder / "images", noise(np.random.default_rng(0)))
            command = ["nice", sys.executable, "-c", script, loader, images, folder / "run"]
            started[loader] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.last
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("loader", ["dali", "eager"])
def test_a_long_run_keeps_nothing(loader, long_runs):
    output, _ = long_runs[loader].communicate()
    assert long_runs[loader].returncode == 0, output
