"""A study from its file to its report, on real runs of seconds, and one clear line for whatever is wrong with it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import get_type_hints

import pandas as pd
import pytest

from fastres import study
from fastres.config import TrainConfig, over_recipe
from fastres.errors import UserError
from fastres.fields import KINDS, required
from fastres.files import claimed
from fastres.flags import open_console
from fastres.studies import RESERVED, RunDefinition, Study, estimate, execute, list_studies, load_study
from fastres.studies.plan import Planner, StudyConfig
from fastres.training.checkpoint import read_checkpoint
from tests.conftest import CommandLine
from tests.report.test_study_report import write_run

TINY = """
title = "Two learning rates"
source = "nobody"
[flags]
model = "vgg11"
dataset = "folder"
epochs = 3
batch-size = 20
device = "cpu"
[runs.low]
flags = { lr = 0.01 }
published = { best_accuracy = 75.25, epoch_seconds = 4 }
[runs.high]
label = "high rate"
flags = { lr = 0.02 }
"""


@pytest.fixture
def study_file(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def command_line(capfd):
    return CommandLine(capfd, study.main)


@pytest.fixture
def tiny_runs(monkeypatch):
    """The study's runs train the tiny model."""
    monkeypatch.setattr(execute, "COMMAND", (sys.executable, "-m", "tests.training.tiny_job"))


@pytest.fixture
def flags(study_file, image_folder, tmp_path):
    return [study_file, "--data-dir", image_folder, "--output-dir", tmp_path / "out"]


def markdown_rows(report, heading):
    """Cells of the rows of the first table below a heading, by the text of the first cell."""
    below = report.split(f"# {heading}\n")[1]
    lines = below[below.index("| --- |") :].split("\n\n")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| **")]
    return {cells[0].strip("*"): cells[1:] for cells in rows}


def test_a_network_of_ones_own(own_models, command_line, only_high, flags, study_file, tmp_path):
    source = "from torch import nn\ndef net(n): return nn.Sequential(nn.Flatten(), nn.Linear(3072, n))"
    (tmp_path / "nets.py").write_text(source)
    name = f"{tmp_path}/nets.py:net"
    study_file.write_text(study_file.read_text().replace('"vgg11"', f'"{name}"'))
    assert "a function is imported only where it is given as a flag" in command_line.one_line(*flags)
    assert command_line(*flags, "--model", name) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"high-seed0", "eager-net"}
    (tmp_path / "out/high-seed0/summary.json").unlink()
    assert command_line(*flags, "--model", name, "--resume") == 0


def test_a_study_of_two_runs(command_line, tiny_runs, flags, tmp_path):
    assert command_line(*flags, "--scale", 0.5, "--data-scale", 0.7, "--price-per-hour", 3600) == 0
    out = tmp_path / "out"
    assert re.findall(r"^(\d)/3 (\S+.*):", command_line.out, re.M) == [
        ("1", "low, seed 0"), ("2", "high rate, seed 0"), ("3", "vgg11, eager"),
    ]  # fmt: skip
    report = (out / "report.md").read_text()
    assert "Scaled down: 50 % of the epochs and 70 % of the training images" in report
    assert "data-dir" not in report  # where the user keeps it
    accuracies, costs = markdown_rows(report, "Accuracy"), markdown_rows(report, "Cost")
    times = markdown_rows(report, "Accuracy against seconds of training")
    for name, label in (("low", "low"), ("high", "high rate")):
        history = pd.read_csv(out / f"{name}-seed0/history.csv")
        summary = json.loads((out / f"{name}-seed0/summary.json").read_text())
        assert summary["train_images"] == 42
        assert "-m tests.training.tiny_job --model vgg11 --dataset folder --epochs 2 " in summary["command"]
        assert accuracies[label] == [
            f"{history['test_accuracy'].max():.2f}",
            f"{history['test_accuracy'].iloc[-1]:.2f}",
            f"{history['test_accuracy'].mean():.2f}",
            f"{history['test_accuracy'].std():.2f}",
            f"{summary['test_loss']:,.4f}",
            f"{summary['params_millions']:.2f}",
            "2",
            f"{summary['epoch_seconds']:.2f}",
        ]
        assert times[label][-2:] == [f"{summary['train_seconds']:.1f}", f"{summary['train_seconds']:.4f}"]
    eager = json.loads((out / "eager-vgg11/summary.json").read_text())
    assert (eager["loader"], eager["amp"], eager["channels_last"], eager["fused"]) == ("eager", "off", False, False)
    low = json.loads((out / "low-seed0/summary.json").read_text())
    assert f"{low['images_per_second'] / eager['images_per_second']:.2f} x" in costs["vgg11"]

    assert "already holds a study; add --resume" in command_line.one_line(*flags)
    assert "was started with train-fraction 0.7, and would now have 1.0" in command_line.one_line(*flags, "--resume")


TRICKS = """
[tricks.reflect]
label = "reflection"
flags = { augmentation = "reflectcrop" }
[tricks.linear]
flags = { schedule = "linear", warmup-epochs = 0.5 }
"""


def test_tricks_are_added_and_left_out(study_file):
    study_file.write_text(TINY.split("[runs.high]")[0] + TRICKS)
    runs = {run.name: run for run in load_study(str(study_file), ablate=True).runs}
    shared = {"model": "vgg11", "dataset": "folder", "epochs": 3, "batch_size": 20, "device": "cpu", "lr": 0.01}
    linear, reflect = {"schedule": "linear", "warmup_epochs": 0.5}, {"augmentation": "reflectcrop-flip"}
    assert {name: run.flags for name, run in runs.items()} == {
        "low": shared,
        "low-all": shared | linear | reflect,
        "low-with-reflect": shared | reflect,
        "low-with-linear": shared | linear,
        "low-without-reflect": shared | linear,
        "low-without-linear": shared | reflect,
    }
    assert runs["low-without-reflect"].label == "low with all but reflection"
    assert runs["low"].published
    assert not runs["low-all"].published
    assert [run.name for run in load_study(str(study_file)).runs] == ["low", "low-all"]


def test_an_ablation(command_line, flags, study_file, tmp_path, monkeypatch):
    def train(executor, planned, advance, done):
        for i, run in enumerate(planned):
            write_run(run.folder, "vgg11", [50.0, 60.0 + i * i], 1.0 + i, run.config.seed, epochs_work=2.0 + i)

    monkeypatch.setattr(execute.Executor, "train", train)
    study_file.write_text(TINY.split("[runs.high]")[0] + TRICKS)
    assert command_line(*flags, "--ablate", "--seeds", "0", "--no-eager-cost") == 0
    report = (tmp_path / "out/report.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in report.splitlines() if re.match(r"\| low \| \*\*", line)]
    # in the order of the runs: low, all, with reflection, with linear, without reflection, without linear
    assert lines == [
        ["low", "**reflection**", "+4.00", "+2.00", "+4.00", "-15.00", "-3.00", "-6.00"],
        ["low", "**linear**", "+9.00", "+3.00", "+6.00", "-24.00", "-4.00", "-8.00"],
    ]


def test_a_file_named_like_a_built_in_study_can_include_its_runs(tmp_path):
    (tmp_path / "architecture.toml").write_text('include = ["architecture/vgg16"]')
    assert [run.name for run in load_study(str(tmp_path / "architecture.toml")).runs] == ["vgg16"]


def test_all_tricks_are_the_fast_recipe():
    _, whole = load_study("tricks").runs
    settings = over_recipe({"recipe": "fast", "model": "vgg16"}) | {"dataset": "mini-cifar10", "epochs": 3}
    assert vars(TrainConfig(**over_recipe(whole.flags))) == vars(TrainConfig(**settings | {"recipe": "default"}))


def test_no_tricks_to_ablate(command_line, flags):
    assert "tiny.toml: no tricks for --ablate; add a table" in command_line.one_line(*flags, "--ablate")


# fastres.study in a process of its own, whose runs train the tiny model
TINY_STUDY = [
    sys.executable,
    "-c",
    "import sys; from fastres import study; from fastres.studies import execute; "
    "execute.COMMAND = (sys.executable, '-m', 'tests.training.tiny_job'); sys.exit(study.main())",
]
LONG = ("--epochs", "60")  # long enough to be stopped in the middle of a run


def stopped(flags, out, stop):
    """A study that ``stop`` is called on in the middle of the run ``high``: its exit code and what it said."""
    command = [*TINY_STUDY, *map(str, flags), *LONG, "--no-eager-cost"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not (out / "high-seed0/history.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    stop(process)
    _, error = process.communicate(timeout=120)
    while True:  # until the run's own process, which the study may not have waited for, has come to its end
        try:
            with claimed(out / "high-seed0"):
                break
        except UserError:
            time.sleep(0.1)
    assert not (out / "high-seed0/summary.json").exists()
    return process.returncode, error


def test_an_interrupted_study_goes_on(command_line, tiny_runs, flags, tmp_path):
    out = tmp_path / "out"
    code, error = stopped(flags, out, lambda process: os.killpg(process.pid, signal.SIGINT))  # as a terminal's Ctrl-C
    assert code == 130
    assert error.count("\n") == 1
    assert "interrupted; --resume goes on" in error
    kept = {path: path.stat().st_mtime_ns for path in (out / "low-seed0").iterdir()}
    first = (out / "high-seed0/history.csv").read_text().splitlines()
    begun = "2026-01-02 03:04 UTC"
    (out / "study.json").write_text(json.dumps(json.loads((out / "study.json").read_text()) | {"date": begun}))

    message = command_line.one_line(*flags, "--no-eager-cost", "--resume", "--epochs", 5)
    assert "was started with epochs 60, and would now have 5" in message
    assert command_line(*flags, *LONG, "--no-eager-cost", "--resume") == 0
    assert re.findall(r"^\d/2 (.*):", command_line.out, re.M) == ["high rate, seed 0"]
    assert kept == {path: path.stat().st_mtime_ns for path in (out / "low-seed0").iterdir()}
    history = (out / "high-seed0/history.csv").read_text().splitlines()
    assert history[: len(first)] == first
    assert len(first) < len(history) == 1 + 60
    assert (out / "report.html").exists()
    assert f"begun {begun}" in (out / "report.md").read_text()


def write_finished(folder, accuracy):
    """The part of a finished run's folder that a study and its report read."""
    write_run(folder, "vgg11", [accuracy], 1.0, int(folder.name.rpartition("seed")[2]))


def decide(monkeypatch, command_line, flags, change):
    """A study of the runs ``low`` and ``high``, whose accuracies differ by ``change(seed)``: what it printed."""

    def train(executor, runs, advance, done):
        for run in runs:
            seed = run.config.seed
            write_finished(run.folder, 80 + seed + (change(seed) if run.name.startswith("high") else 0))
            done(run, json.loads((run.folder / "summary.json").read_text()))

    monkeypatch.setattr(execute.Executor, "train", train)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: path.touch())  # after every seed
    assert command_line(*flags, "--no-eager-cost") == 0
    return command_line.out


def test_a_study_adds_seeds_until_it_is_decided(monkeypatch, command_line, flags, tmp_path):
    out = decide(monkeypatch, command_line, [*flags, "--decide", 0.3], lambda seed: 2 + 0.1 * (-1) ** seed)
    lines = [line for line in out.splitlines() if line.startswith("high rate minus low")]
    assert lines[0].endswith("after 1 seed: not decided")
    assert "after 2 seeds: not decided; it would take about" in lines[1]
    assert "higher by more than 0.3 points" in lines[-1]
    assert 3 <= len(lines) <= 8
    described = json.loads((tmp_path / "out/study.json").read_text())
    assert len(described["runs"][0]["folders"]) == len(lines)
    report = (tmp_path / "out/report.md").read_text()
    assert lines[-1] in report
    assert "at most 5 %" in report


def test_runs_that_hardly_differ_are_the_same(monkeypatch, command_line, flags):
    out = decide(monkeypatch, command_line, [*flags, "--decide", 1], lambda seed: 0.1 * (-1) ** seed)
    assert "the same within 1 points" in out.splitlines()[-2]


def test_a_study_stops_at_its_limits(monkeypatch, command_line, flags, tmp_path):
    out = decide(monkeypatch, command_line, [*flags, "--decide", 0.3, "--max-seeds", 3], lambda seed: 3 * (-1) ** seed)
    assert out.splitlines()[-2] == "undecided with --max-seeds 3"
    assert re.search(r"after 3 seeds: not decided; it would take (about|over) [\d,]+ more seeds", out)
    flags = [*flags[:-1], tmp_path / "again", "--decide", 0.3, "--max-hours", 1e-9]
    assert "another seed would make it" in decide(monkeypatch, command_line, flags, lambda seed: 3 * (-1) ** seed)
    assert len(list((tmp_path / "again").glob("*-seed*"))) == 2


def test_runs_side_by_side_end_as_one_after_another(command_line, tiny_runs, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    histories = []
    for jobs in (1, 2):
        out = tmp_path / f"out{jobs}"
        assert command_line(*flags[:-1], out, "--no-eager-cost", "--jobs", jobs, "--epochs", 2) == 0
        runs = [pd.read_csv(out / f"{name}-seed0/history.csv") for name in ("low", "high")]
        histories.append(
            [run.drop(columns=["epoch_seconds", "images_per_second", "data_wait_seconds"]) for run in runs]
        )
    for alone, beside in zip(*histories, strict=True):
        pd.testing.assert_frame_equal(alone, beside, check_exact=True)
    assert "2 runs were trained side by side" in (tmp_path / "out2/report.md").read_text()
    assert "side by side" not in (tmp_path / "out1/report.md").read_text()


def test_epochs_are_counted_where_colours_are_forced(monkeypatch, tmp_path):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(execute, "COMMAND", (sys.executable, "-c", "import rich; rich.print('epoch  2/4')"))
    run = SimpleNamespace(name="x", folder=tmp_path, flags={}, work=6.0, config=SimpleNamespace(epochs=4))
    counted = []
    with pytest.raises(UserError, match=r"summary.json"):
        execute.Executor([execute.Place({})])._train(run, lambda run, work: counted.append(work))
    assert counted == [3.0]


def test_each_job_has_its_own_cores_or_gpu(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 4, 6, 8})
    assert execute.places(2, "cpu") == [
        execute.Place({"OMP_NUM_THREADS": "2"}, {0, 2}), execute.Place({"OMP_NUM_THREADS": "2"}, {4, 6}),
    ]  # fmt: skip
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [place.environment for place in execute.places(2, "cuda")] == [
        {"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"},
    ]  # fmt: skip
    assert not execute.share_gpus(2, "cuda")
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in execute.places(3, "cuda")] == ["3", "5", "3"]
    assert execute.share_gpus(3, "cuda")
    with pytest.raises(UserError, match="--jobs 6: there are 5 cores"):
        execute.places(6, "cpu")


def test_a_finished_run_is_reused(command_line, tiny_runs, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRES_COMMIT", "abc")
    alone = [*flags[:-1], tmp_path / "first", "--no-eager-cost", "--epochs", 1]
    assert command_line(*alone) == 0
    shutil.copytree(tmp_path / "first/low-seed0", tmp_path / "first/low-seed0.tmp")  # a copy that was cut off
    monkeypatch.setattr(execute, "COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    again = [*flags[:-1], tmp_path / "out", "--no-eager-cost", "--epochs", 1, "--reuse", tmp_path]
    assert command_line(*again) == 0
    assert f"low, seed 0: taken from {tmp_path / 'first/low-seed0'}" in command_line.out
    for name in ("summary.json", "history.csv", "last.safetensors"):
        assert (tmp_path / "out/low-seed0" / name).read_bytes() == (tmp_path / "first/low-seed0" / name).read_bytes()

    again[again.index(tmp_path / "out")] = tmp_path / "other"
    assert command_line(*again, "--label-smoothing", 0.1) == 1  # other settings, so it is trained
    monkeypatch.setenv("FASTRES_COMMIT", "abd")
    again[again.index(tmp_path / "other")] = tmp_path / "third"
    assert command_line(*again) == 1
    monkeypatch.setenv("FASTRES_COMMIT", "abc-dirty")
    again[again.index(tmp_path / "third")] = tmp_path / "fourth"
    assert "--reuse: the commit of fastres is not known, or files" in command_line.one_line(*again)


def test_the_first_run_that_fails_ends_the_others(command_line, flags, tmp_path, monkeypatch):
    script = (
        "import sys, time; sys.argv[sys.argv.index('--lr') + 1] == '0.02' and sys.exit('low memory'); time.sleep(60)"
    )
    monkeypatch.setattr(execute, "COMMAND", (sys.executable, "-c", script))
    start = time.monotonic()
    assert command_line(*flags, "--no-eager-cost", "--jobs", 2) == 1
    assert time.monotonic() - start < 50
    assert command_line.err.endswith("error: high rate, seed 0: low memory\n")
    monkeypatch.setattr(execute, "COMMAND", (sys.executable, "-c", "import os; os._exit(2)"))  # without a word
    assert command_line(*flags, "--no-eager-cost", "--resume") == 1
    assert command_line.err.endswith("low-seed0: the run ended with exit code 2; mend it and add --resume\n")


@pytest.fixture
def only_high(study_file):
    study_file.write_text(TINY.partition("[runs.low]")[0] + "[runs.high]")


@pytest.mark.usefixtures("only_high")
def test_a_run_saves_when_its_study_alone_is_interrupted(flags, tmp_path):
    code, _ = stopped(flags, tmp_path / "out", lambda process: process.send_signal(signal.SIGINT))
    assert code == 130
    assert (tmp_path / "out/high-seed0/last.pt").exists()


@pytest.mark.usefixtures("only_high")
def test_a_run_saves_when_its_study_is_killed(flags, tmp_path):
    flags = [*flags, "--checkpoint-every", 99]  # nothing is saved at the end of an epoch
    code, _ = stopped(flags, tmp_path / "out", lambda process: process.kill())
    assert code == -signal.SIGKILL
    assert read_checkpoint(tmp_path / "out/high-seed0")["epoch"]["steps"] > 0


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_names_are_read_and_written_as_utf_8_whatever_the_locale(study_file, image_folder, tmp_path):
    for part in ("train", "test"):
        (image_folder / part / "dark").rename(image_folder / part / "größe")
    study = TINY.split("[runs.high]")[0].replace("[runs.low]", '[runs.low]\nlabel = "ñ [/x] :car:"')
    study_file.write_text(study, encoding="utf-8-sig")
    started = {}
    for environment in (C_LOCALE, {"PYTHONIOENCODING": "latin-1"}):
        out = tmp_path / f"ergebnis ä {len(started)}"
        command = [*TINY_STUDY, study_file, "--data-dir", image_folder, "--output-dir", out]
        command += ["--scale", "0.3", "--no-eager-cost"]
        pipe = subprocess.PIPE
        started[out] = subprocess.Popen(command, env=os.environ | environment, stdout=pipe, stderr=pipe)
    for out, process in started.items():
        output, error = process.communicate()
        assert process.returncode == 0, error
        assert re.match(rb"1/1 (\xf1|\\xf1) \[/x\] :car:, seed 0: best", output)
        for name in ("report.md", "report.html"):
            assert "(bright, größe)" in (out / name).read_text(encoding="utf-8")


def test_a_run_whose_folder_the_locale_cannot_name_is_refused(study_file):
    study_file.write_text(TINY.replace("[runs.low]", '[runs."größe"]'), encoding="utf-8")
    command = [sys.executable, "-m", "fastres.study", study_file, "--dry-run"]
    done = subprocess.run(command, env=os.environ | C_LOCALE, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.match(r".*runs\.gr\\xf6\\xdfe: a run's name is its folder's, .*; set PYTHONUTF8=1\n$", done.stderr)


def test_labels_are_shown_as_they_are_on_a_terminal(monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    summary = {"best_accuracy": 0.0, "last_accuracy": 0.0, "epoch_seconds": 1.0, "images_per_second": 1.0}
    run = SimpleNamespace(name="[/x] :car:", work=1.0, finished=False)
    with study.study_progress(open_console(), [run]) as (advance, done):
        advance(run, 0.5)
        time.sleep(0.2)
    with study.study_progress(open_console(), [run]) as (_, done):
        done(run, summary)
        done(run, summary)  # a second one of that label
    shown = capfd.readouterr().out
    assert "[/x] :car: " in shown  # beside the bar
    assert "1/1 [/x] :car:: best 0.00 %" in shown


def test_a_dry_run_shows_labels_as_they_are(command_line, flags, study_file, monkeypatch):
    monkeypatch.setattr(estimate, "measure", lambda run: 1.0)
    label = f"[/x] :car: {100 * 'x'}"
    study_file.write_text(TINY.replace("high rate", label))
    assert command_line(*flags, "--dry-run", "--no-eager-cost") == 0
    assert "[/x] :car:" in command_line.out
    assert command_line.out.count("x") > 100


def test_a_dry_run_estimates(command_line, flags, monkeypatch):
    monkeypatch.setattr(estimate, "measure", lambda run: 1.0)  # images a second, of 60 to train on and 20 to test
    assert command_line(*flags, "--dry-run", "--no-eager-cost") == 0
    assert re.findall(r"about (.*) in all", command_line.out) == ["7 min"]  # 2 runs of 3 epochs of 60 + 20 / 3


def test_a_dry_run_leaves_out_what_is_finished(command_line, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "read_summary", lambda folder: {"images_per_second": 1.0})
    (tmp_path / "out/low-seed0").mkdir(parents=True)
    (tmp_path / "out/low-seed0/summary.json").touch()
    assert command_line(*flags, "--dry-run", "--no-eager-cost") == 0
    assert "is finished" in command_line.out
    assert "finished run" in command_line.out
    assert re.findall(r"about (.*) in all", command_line.out) == ["3 min"]


def test_dry_run_writes_nothing(command_line, flags, tmp_path):
    assert command_line(*flags, "--dry-run", "--seeds", "0,1") == 0
    assert "5 runs" in command_line.out
    assert "2 measured steps" in command_line.out
    assert re.search(r"about .* in all", command_line.out)
    assert not (tmp_path / "out").exists()


def test_built_in_studies():
    assert list_studies() == [
        "architecture",
        "augmentation",
        "equivalence",
        "fast",
        "residual",
        "schedule",
        "tricks",
        "zero-gamma",
    ]
    conjectures = load_study("schedule").conjectures
    assert len(conjectures) == 4
    runs = {run.name: run for run in load_study("schedule").runs}
    assert runs["resnet50-cosine"].flags["schedule"] == "cosine"
    assert not runs["resnet50-cosine"].published
    assert runs["vgg16-constant"].published == load_study("architecture").runs[0].published
    assert runs["vgg16-constant"].published["best_accuracy"] == 94.17


def test_study_a_is_as_published():
    """Its cutout is RandomErasing; one setting was published three times."""
    published = {run.name: run for run in load_study("augmentation").runs}["crop-flip-erasing"]
    assert published.flags["augmentation"] == "crop-flip-erasing"
    assert published.published["best_accuracy"] == 87.43
    same: dict[str, list[float]] = {"best_accuracy": [], "last_accuracy": []}
    for name in ("architecture", "augmentation", "zero-gamma"):
        for run in load_study(name).runs:
            settings = vars(TrainConfig(**over_recipe(run.flags)))
            if settings == vars(TrainConfig(**over_recipe({"recipe": "study-a", "model": "resnet50"}))):
                for metric, values in same.items():
                    values.append(run.published[metric])
    for name in ("architecture", "augmentation", "zero-gamma"):
        assert load_study(name).repeated == {metric: tuple(values) for metric, values in same.items()}
    assert same["best_accuracy"] == [85.80, 85.77, 90.33]


def test_study_b_is_as_published():
    study_b = load_study("residual")
    configs = [TrainConfig(**over_recipe(run.flags)) for run in study_b.runs]
    assert [(config.model, config.lr, config.init, config.eval_batch_size) for config in configs] == [
        ("resnet18", 0.1, "study-b", 128), ("vgg19_bn_4096", 0.1, "study-b", 128), ("vgg19_4096", 0.01, "study-b", 128),
    ]  # fmt: skip
    assert [(claim.metric, claim.expect, claim.runs) for claim in study_b.conjectures] == [
        ("mean_accuracy", "higher", ("resnet18", "vgg19-bn")),
        ("best_accuracy", "higher", ("resnet18", "vgg19-bn")),
        ("params_millions", "lower", ("resnet18", "vgg19-bn")),
    ]
    assert [phase.epochs for phase in study_b.phases] == [(10, 50), (50, 51), (80, 100)]


def test_a_variant_overrides_its_runs(study_file):
    study_file.write_text(TINY + '[variants.fast]\nlabel = "faster"\nflags = { lr = 0.2 }\n')
    assert [(run.name, run.label, run.flags["lr"]) for run in load_study(str(study_file)).runs] == [
        ("low-fast", "low, faster", 0.2),
        ("high-fast", "high rate, faster", 0.2),
    ]


@pytest.mark.parametrize("name", list_studies())
def test_built_in_studies_are_runs_that_train(name, arrays, tmp_path):
    def load(*_):
        return arrays, "arrays"

    flags = {"batch_size": 20, "device": "cpu"}
    planner = Planner(load_study(name), StudyConfig(scale=0.1), flags, tmp_path, load)
    for definition in planner.study.runs:
        planned = planner.run(definition, 0)
        assert planned.config.epochs == max(round(0.1 * over_recipe(definition.flags)["epochs"]), 1)
        assert planned.config.milestones == ((5, 8) if name == "residual" else ())
        assert planned.config.zero_gamma == ("gamma0" in definition.name)


def test_a_planned_run_has_its_seed(arrays, tmp_path):
    study, flags = load_study("architecture"), {"batch_size": 20, "device": "cpu"}
    planner = Planner(study, StudyConfig(), flags, tmp_path, lambda *_: (arrays, "arrays"))
    assert planner.run(study.runs[0], 7).config.seed == 7


MULTISTEP = {
    "model": "vgg11", "dataset": "folder", "epochs": 10, "schedule": "multistep", "milestones": (5, 8),
    "warmup_epochs": 2.0, "train_fraction": 0.5, "batch_size": 5, "device": "cpu",
}  # fmt: skip


def test_a_planned_run_is_scaled(arrays, tmp_path):
    definition, config = RunDefinition("x", "x", MULTISTEP, {}), StudyConfig(scale=0.5, data_scale=0.5)
    study = Study("x", "", "", (definition,))
    planned = Planner(study, config, {}, tmp_path, lambda *_: (arrays, "arrays")).run(definition, 0)
    assert (planned.config.epochs, planned.config.warmup_epochs, planned.config.milestones) == (5, 1.0, (2, 4))
    assert planned.config.train_fraction == 0.25
    assert len(planned.dataset.train) == 15


def test_what_eager_pytorch_costs_is_measured_in_a_few_epochs(arrays, tmp_path):
    study = Study("x", "", "", (RunDefinition("x", "x", MULTISTEP, {}),))
    run, eager = Planner(study, StudyConfig(), {}, tmp_path, lambda *_: (arrays, "arrays")).plan([0])
    assert (run.config.epochs, run.config.schedule) == (10, "multistep")
    assert (eager.config.epochs, eager.config.schedule) == (3, "constant")
    assert (eager.config.warmup_epochs, eager.config.milestones) == (0.0, ())


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min"), (3540, "59 min"), (7500, "2 h 05 min")]
)
def test_durations(seconds, words):
    assert estimate.duration(seconds) == words


def test_mini_cifar10_from_files_takes_its_three_classes(arrays, tmp_path):
    asked = []

    def load(*dataset):
        asked.append(dataset)
        return arrays, "arrays"

    overrides = {"dataset": "folder", "data_dir": tmp_path, "batch_size": 20}
    study = load_study("architecture")
    Planner(study, StudyConfig(), overrides, tmp_path, load).run(study.runs[0], 0)
    assert asked == [("folder", tmp_path, ("airplane", "automobile", "bird"), False, 32)]


PARTS = """
notes = ["One rate is high."]
[repeated]
best_accuracy = [75.25, 80]
[[phases]]
label = "late"
epochs = [2, 3]
[[conjectures]]
text = "a high rate is better"
expect = "higher"
metric = "last_accuracy"
runs = ["high", "low"]
[[conjectures]]
text = "and stays so"
expect = "stays positive"
before = ["high", "low"]
after = ["high", "low"]
[flags]"""


def test_all_parts_of_a_file_come_to_study_json(study_file, arrays, tmp_path):
    study_file.write_text(TINY.replace("[flags]", PARTS))
    config = StudyConfig(eager_cost=False)
    given = {"classes": ("dark", "bright"), "amp": "off", "fused": False}
    planner = Planner(load_study(str(study_file)), config, given, tmp_path, lambda *_: (arrays, "arrays"))
    described = json.loads(json.dumps(study.describe(planner, planner.plan([0]), [0], "today")))
    assert described["overrides"] == {"classes": "dark,bright", "amp": "off", "fused": "off"}
    assert described["notes"] == ["One rate is high."]
    assert described["repeated"] == {"best_accuracy": [75.25, 80]}
    assert described["phases"] == [{"label": "late", "epochs": [2, 3]}]
    pair = ["high", "low"]
    shared = {"margin": 0.0, "before": pair, "after": pair}
    assert described["conjectures"] == [
        {"text": "a high rate is better", "expect": "higher", "metric": "last_accuracy", **shared},
        {"text": "and stays so", "expect": "stays positive", "metric": "best_accuracy", **shared},
    ]


def conjecture(**values):
    """TINY's flags, and before them a conjecture with ``values``."""
    keys = {"text": '"x"', "expect": '"grows"', "before": '["low", "high"]', "after": '["low", "high"]'} | values
    return f"conjectures = [{{ {', '.join(f'{key} = {value}' for key, value in keys.items())} }}]\n[flags]"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "lr = 0.02",
            "learning-rate = 0.02",
            r"tiny.toml: unknown key runs.high.flags.learning_rate; choose from .*lr",
        ),
        ("epochs", "epoch", r"unknown key flags.epoch; did you mean epochs"),
        ("lr = 0.02", 'lr = "fast"', r"runs.high.flags.lr: must be a number, not 'fast'"),
        ("lr = 0.02", f"lr = {'9' * 400}", r"runs.high.flags.lr: must be a number, not 9+\.\.\.9+"),
        ("75.25", "9" * 400, r"runs.low.published.best_accuracy: must be a number"),
        ("lr = 0.02", "lr = nan", r"runs.high.flags.lr: must be a number, not nan"),
        ("epochs = 3", "epochs = true", r"flags.epochs: must be an integer, not True"),
        ("epochs = 3", "epochs = 3.5", r"flags.epochs: must be an integer, not 3.5"),
        ('"vgg11"', '"vgg12"', r"tiny, run low: --model: invalid choice 'vgg12'; choose from .*vgg11"),
        ("lr = 0.02", "lr = -1", r"tiny, run high: --lr -1: must be above 0"),
        ("lr = 0.02", "zero-gamma = true", r"tiny, run high: --zero-gamma: vgg11 has no residual blocks"),
        ("lr = 0.02", 'augmentation = "crop-x"', r"tiny, run high: --augmentation 'crop-x': .* the steps are crop, "),
        ("lr = 0.02", "seed = 1", r"runs.high.flags.seed: leave it out; --seeds gives the seeds"),
        ("lr = 0.02", "milestones = [1]", r"tiny, run high: --milestones 1: needs --schedule multistep"),
        ("lr = 0.02", 'classes = ["cow"]', r"tiny, run high: --classes: .* has no cow"),
        ("lr = 0.02", "batch-size = 90", r"tiny, run high: --batch-size 90: larger than the training set of 60"),
        ("best_accuracy", "accuracy", r"unknown key runs.low.published.accuracy; did you mean .*best_accuracy"),
        ("75.25", '"high"', r"runs.low.published.best_accuracy: must be a number"),
        ("[flags]", 'include = ["architecture/vgg17"]\n[flags]', r"include architecture/vgg17: .* has the runs vgg16"),
        ("[flags]", 'figures = [{title = "x", runs = ["lo"]}]\n[flags]', r"figures.runs: no run lo; choose from low"),
        ("[flags]", "flags", r"tiny.toml: not readable as TOML"),
        (
            "[flags]",
            "[runs.low-b]\n[variants.c]\n[variants.b-c]\n[flags]",
            r"tiny.toml: two runs are called low-b-c; rename one",
        ),
        (
            "[runs.low]",
            '[runs."a/b"]\n[runs.low]',
            r"runs.a/b: a run's name is its folder's, so it must not contain a /",
        ),
        (
            "[flags]",
            conjecture(before='["low"]'),
            r"conjectures: to expect 'grows', before and after must name two runs each",
        ),
        ("[flags]", conjecture(expect='"shrinks"'), r"conjectures: expect must be one of grows, stays positive"),
        (
            "[flags]",
            conjecture(expect='"lower"'),
            r"conjectures: to expect 'lower', runs must name two runs each, and nothing else",
        ),
        (
            "[flags]",
            conjecture(runs='["low", "high"]'),
            r"conjectures: to expect 'grows', before and after must name two runs each, and nothing else",
        ),
        ("[flags]", conjecture(metric='"accuracy"'), r"conjectures: metric must be one of best_accuracy, "),
        ("[flags]", "repeated = { best_accuracy = [1] }\n[flags]", r"repeated.best_accuracy: must be a list of two"),
        ("[flags]", "repeated = { accuracy = [1, 2] }\n[flags]", r"unknown key repeated.accuracy; did you mean"),
        ("[flags]", "phases = [{ label = 'x', epochs = [5, 5] }]\n[flags]", r"phases: epochs must be the first and"),
        ("[flags]", f"phases = [{{ label = 'x', epochs = [1, {'9' * 400}] }}]\n[flags]", r"phases: epochs must be the"),
        ("[flags]", "phases = [{ label = 'x' }]\n[flags]", r"phases.epochs: is missing"),
        ("[flags]", "notes = 'x'\n[flags]", r"tiny.toml: notes: must be a list of strings, not 'x'"),
        (TINY, "title = 'nothing'", r"tiny.toml: no runs; add a table"),
        (TINY, "runs = 3", r"tiny.toml: runs: must be a table, not 3"),
    ],
)
def test_bad_files(old, new, message, command_line, flags, study_file, tmp_path):
    assert old in TINY
    study_file.write_text(TINY.replace(old, new))
    assert re.search(message, command_line.one_line(*flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0,0"], "--seeds: a seed is named twice"),
        (["--seeds", "-1"], "--seeds: must not be negative"),
        (["--seeds", "a"], "--seeds: invalid list of integers value: 'a'"),
        (["--scale", "0"], "--scale 0: must be above 0"),
        (["--data-scale", "2"], "--data-scale 2: must be at most 1"),
        (["--decide", "0"], "--decide 0: must be above 0"),
        (["--max-seeds", "1"], "--max-seeds 1: must be at least 2"),
        (["--jobs", "1000"], "--jobs 1000: there are .* cores; take fewer"),
        (["--reuse", "/nowhere"], "--reuse"),
        (["--price-per-hour", "-1"], "--price-per-hour -1: must be at least 0"),
        (["--resume"], "--resume: .* holds no study"),
        (["--output-dir", "/dev/null/out"], "--output-dir /dev/null/out: cannot be made"),
        (["--data-dir", "nowhere"], "tiny, run low: --data-dir nowhere: no such folder"),
    ],
)
def test_bad_flags(arguments, message, command_line, flags, tmp_path):
    assert re.search(message, command_line.one_line(*flags, *arguments))
    assert not (tmp_path / "out").exists()


def test_an_unknown_study(command_line):
    for name in ("architectur", "~nobody9/x.toml"):
        assert f"{name}: no such study; choose from architecture, " in command_line.one_line(name)


def test_a_file_can_set_every_flag_but_the_reserved():
    hints = get_type_hints(TrainConfig)
    assert {name for name, kind in hints.items() if required(kind) not in KINDS} <= set(RESERVED)
