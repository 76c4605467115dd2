"""The command line, on real files: what a run prints, and one clear line with exit code 2 for whatever is wrong."""

import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fastres
from fastres import train
from fastres.report.plots import plot_curves
from fastres.report.tables import class_table
from fastres.train import catch_signals
from fastres.training.trainer import Trainer
from tests.conftest import write_folder

pytestmark = pytest.mark.usefixtures("tiny_vgg11")


@pytest.mark.parametrize("loader", ["dali", "eager"])
def test_trains_reports_and_evaluates_again(loader, command_line, flags, tmp_path, monkeypatch):
    monkeypatch.setattr("fastres.report.plots.plot_curves", plot_curves)
    assert command_line(*flags, "--loader", loader, "--augmentation", "crop-flip-cutout") == 0
    run = tmp_path / "run"
    assert f"loader {loader} (asked for)" in command_line.out
    assert len(re.findall(r"^epoch +\d/2 ", command_line.out, re.M)) == 2
    for line in (
        "accuracy, last epoch",
        "accuracy, best on test",
        "whole process",
        f"run:     {run}",
        f"picture: {run}/curves.png",
    ):
        assert line in command_line.out
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((run / "summary.json").read_text())

    run = run.rename(tmp_path / "elsewhere")
    assert command_line("--eval", run) == 0
    loss = re.search(r"test loss +(\S+) +recorded (\S+)", command_line.out)
    assert loss.group(1) == loss.group(2) == f"{summary['test_loss']:.6f}"
    accuracy = re.search(r"test accuracy (\S+) % +recorded (\S+) %", command_line.out)
    assert accuracy.group(1) == accuracy.group(2) == f"{summary['last_accuracy']:.2f}"
    assert command_line("--eval", run, "--weights", "best") == 0
    assert "weights of the best epoch" in command_line.out
    assert "mirrored" not in command_line.out
    loss = re.search(r"test loss +(\S+) +recorded (\S+)", command_line.out)
    assert loss.group(1) == loss.group(2) == f"{summary['best_test_loss']:.6f}"
    assert command_line("--eval", run, "--tta") == 0
    assert re.search(r"with mirrored images \S+ %", command_line.out)
    assert "--weights best: needs --eval" in command_line.one_line(*flags, "--weights", "best")


def test_a_folder_may_have_any_name(command_line, flags, tmp_path):
    run = tmp_path / "run[lr=0.1][/]:car:é\udce9"  # its last byte is not UTF-8
    shown = str(run).replace("\udce9", r"\udce9")
    assert command_line(*flags[:-1], run) == 0
    assert f"run:     {shown}\npicture: {shown}/curves.png\n" in command_line.out
    assert command_line("--eval", run) == 0
    assert command_line("--resume", run, "--epochs", 3) == 0
    assert "already holds a run" in command_line.one_line(*flags[:-1], run)


def test_resume_goes_on_where_the_run_stopped(command_line, flags, tmp_path):
    assert command_line(*flags) == 0
    assert command_line("--resume", tmp_path / "run", "--epochs", 3) == 0
    assert re.findall(r"^epoch +(\d)/3 ", command_line.out, re.M) == ["3"]
    assert json.loads((tmp_path / "run/summary.json").read_text())["epochs"] == 3


@pytest.mark.parametrize(
    ("arguments", "warmup_epochs"),
    [
        ([], 1.0),
        (["--epochs", 1], 0.5),
        (["--schedule", "onecycle"], 0.6),
        (["--schedule", "onecycle", "--warmup-epochs", 0], 0.0),
        (["--schedule", "constant"], 0.0),
        (["--warmup-epochs", 0.25], 0.25),
    ],
)
def test_warm_up_fits_the_run(arguments, warmup_epochs, command_line, flags, tmp_path):
    assert command_line(*flags, *arguments) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["asked"] | config["chosen"])["warmup_epochs"] == warmup_epochs


def test_a_signal_ends_a_run_with_its_exit_code(command_line, flags, tmp_path, monkeypatch):
    steps, step = itertools.count(1), Trainer._step

    def interrupted(self, *batch):
        if next(steps) == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    assert command_line(*flags) == 143
    assert re.search(r"stopped by SIGTERM; --resume .*run goes on", command_line.err)
    assert "the run has not come to its end; --resume" in command_line.one_line("--eval", tmp_path / "run")
    assert command_line("--resume", tmp_path / "run") == 0


def test_a_second_signal_acts_at_once():
    with catch_signals() as noted:
        assert noted() == 0
        signal.raise_signal(signal.SIGINT)
        assert noted() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_help_groups_the_flags(command_line):
    assert command_line("--help") == 0
    for group in ("Recipe:", "Model:", "Data:", "Optimization:", "Engine:", "Output:"):
        assert f"\n{group}\n" in command_line.out
    assert "(default: 128)" in command_line.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet17"], "--model: invalid choice 'resnet17'; .*resnet18.*vgg16"),
        (["--dataset", "imagenet"], "--dataset: invalid choice: 'imagenet' .*digits.*folder"),
        (["--learning-rate", "1"], "unknown argument --learning-rate"),
        (["--batchsize", "1"], "unknown argument --batchsize; did you mean --batch-size"),
        (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--lr", "-1"], "--lr -1: must be above 0"),
        (["--lr", "nan"], "--lr nan: must be above 0"),
        (["--lr", "inf"], "--lr inf: must be below inf"),
        (["--epoch", "5"], "unknown argument --epoch; did you mean --epochs"),
        (["--train-fraction", "0"], r"--train-fraction 0: must be above 0"),
        (["--batch-size", "61"], "--batch-size 61: larger than the training set of 60 images"),
        (["--val-fraction", "0.999"], "the training set of 0 images that --val-fraction 0.999 leaves"),
        (["--schedule", "multistep"], "--schedule multistep: needs --milestones"),
        (["--milestones", "5,x"], "--milestones: invalid list of integers value: '5,x'"),
        (["--epochs", "1", "--warmup-epochs", "1"], "--warmup-epochs 1.0: must be less than --epochs 1"),
        (["--warmup-epochs", "2"], "--warmup-epochs 2.0: must be less than --epochs 2"),
        (["--warmup-epochs", "-1"], "--warmup-epochs -1: must be at least 0"),
        (["--milestones", "1"], "--milestones 1: needs --schedule multistep"),
        (["--optimizer", "adamw", "--nesterov"], "--nesterov: needs --optimizer sgd"),
        (["--sgd-lr", "0.1"], "--sgd-lr 0.1: needs --optimizer muon"),
        (["--recipe", "study-a", "--warmup-epochs", "1"], "--warmup-epochs 1: needs another --schedule"),
        (["--compile-mode", "max-autotune"], "--compile-mode max-autotune: needs --compile"),
        (["--zero-gamma"], "--zero-gamma: vgg11 has no residual blocks"),
        (["--augmentation", "crop-blur"], "--augmentation 'crop-blur': .*; the steps are crop, reflectcrop, flip, "),
        (["--augmentation", "flip-flip"], "--augmentation 'flip-flip': must be none, or .* each at most once"),
        (["--amp", "fp16"], "--amp fp16: needs a GPU"),
        (["--classes", "dark,cow"], "--classes: .* has no cow; it has bright, dark"),
        (["--resume", "nowhere"], "--resume nowhere: no such file"),
        (["--data-dir", "two\nlines"], r"--data-dir two\\nlines: no such folder"),
        (["--eval", "nowhere"], "--eval nowhere: not the folder of a finished run"),
    ],
)
def test_bad_flags(arguments, message, command_line, flags, tmp_path):
    assert re.search(message, command_line.one_line(*flags, *arguments))
    assert not (tmp_path / "run").exists()


def test_without_the_extension(command_line, flags, tmp_path, monkeypatch):
    monkeypatch.setattr("fastres.training.hardware.extension_error", "the C++ extension does not load; build it")
    message = command_line.one_line(*flags, "--fused")
    assert "--fused: the C++ extension does not load; build it; or take --no-fused" in message
    message = command_line.one_line(*flags, "--sync-bn")
    assert "--sync-bn: needs the fused operator: the C++ extension does not load; build it" in message
    assert not (tmp_path / "run").exists()
    assert command_line(*flags) == 0
    assert "fused off (the C++ extension does not load; build it)" in command_line.out
    assert json.loads((tmp_path / "run/summary.json").read_text())["fused"] is False


def test_a_run_goes_on_where_its_extension_is_missing(command_line, flags, tmp_path, monkeypatch):
    assert command_line(*flags, "--epochs", "1") == 0
    assert "fused on (C++ kernels)" in command_line.out
    monkeypatch.setattr("fastres.training.hardware.extension_error", "the C++ extension does not load; build it")
    resume = ["--resume", tmp_path / "run", "--epochs", "2"]
    assert "--fused: the C++ extension does not load; build it; or take --no-fused" in command_line.one_line(
        *resume, "--fused"
    )
    assert command_line(*resume) == 0  # it was auto, and is chosen anew
    assert "fused off (the C++ extension does not load; build it)" in command_line.out
    assert command_line("--eval", tmp_path / "run") == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(command_line, flags):
    assert "--device cuda: torch sees no CUDA device" in command_line.one_line(*flags, "--device", "cuda")


def test_a_bad_folder(command_line, flags, image_folder):
    (image_folder / "test/dark/0000.jpg").write_bytes(b"no image")
    assert "megapixels: test/dark/0000.jpg; replace" in command_line.one_line(*flags)


def test_bad_images_are_left_out_and_counted(command_line, flags, image_folder, tmp_path):
    (image_folder / "test/dark/0000.jpg").write_bytes(b"no image")
    assert command_line(*flags, "--skip-bad-images") == 0
    assert "60 train, 19 test, 1 unreadable files left out)" in command_line.out
    assert json.loads((tmp_path / "run/summary.json").read_text())["skipped_images"] == 1
    assert command_line("--eval", tmp_path / "run") == 0


def test_wrong_checksum(command_line, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # unreachable
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    (base / "data_batch_1").write_bytes(b"no batch")
    message = command_line.one_line("--dataset", "cifar10", "--data-dir", tmp_path)
    assert "--dataset cifar10: cifar-10-python.tar.gz under --data-dir" in message


def test_a_folder_that_holds_another_run_is_left_as_it_is(command_line, flags, tmp_path):
    assert command_line(*flags) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert "already holds a run; choose another folder, or --resume" in command_line.one_line(*flags)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_one_folder_for_two_runs_at_once(command_line, flags, tmp_path, monkeypatch):
    seen, warm_up = [], Trainer.warm_up

    def while_it_compiles(trainer):
        if not seen:
            before = sorted(path.name for path in (tmp_path / "run").iterdir())
            seen.append(command_line.one_line(*flags))
            assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
        return warm_up(trainer)

    monkeypatch.setattr(Trainer, "warm_up", while_it_compiles)
    assert command_line(*flags) == 0
    assert "run: another process is writing to it; choose another folder" in seen[0]


def test_a_folder_with_files_of_somebody_else(command_line, flags, tmp_path):
    own = tmp_path / "run"
    own.mkdir()
    (own / "log").write_text("mine")  # as of `> own/log`
    for name in ("config.json", "history.csv", "last.safetensors"):
        (own / name).write_text("mine")
        assert f"{name} in it would be overwritten" in command_line.one_line(*flags)
        assert {path.name for path in own.iterdir()} == {"log", name}
        (own / name).unlink()
    assert command_line(*flags) == 0
    assert (own / "log").read_text() == "mine"


def test_a_start_that_died_may_be_begun_again(command_line, flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "warm_up", lambda trainer: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command_line(*flags)
    assert (tmp_path / "run/config.json").exists()
    assert not (tmp_path / "run/last.pt").exists()
    assert command_line(*flags) == 0


def test_a_tilde_that_the_shell_has_left(command_line, flags, image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    flags = [*flags[:4], "--data-dir=~/images", *flags[6:-2], "--output-dir=~/run"]
    assert command_line(*flags) == 0
    assert command_line("--resume=~/run", "--epochs", 3) == 0
    assert command_line("--eval=~/run") == 0
    assert (tmp_path / "run/summary.json").exists()
    assert not (tmp_path / "~").exists()


def test_larger_images_normalised_by_their_own_statistics(command_line, flags, arrays, tmp_path):
    write_folder(tmp_path / "large", arrays, size=48)
    own = ["--data-dir", tmp_path / "large", "--image-size", 64, "--normalize", "dataset", "--init", "dirac"]
    assert command_line(*flags, *own) == 0
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["asked"]["image_size"] == 64
    mean = (arrays.train.images / 255).mean((0, 1, 2))
    assert record["mean"] == pytest.approx(mean, abs=0.01)
    shown = " ".join(f"{value:.4f}" for value in record["mean"])
    assert f"mean {shown} and std " in command_line.out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    small = tmp_path / "small"
    assert command_line(*flags, "--output-dir", small) == 0
    assert summary["train_flop"] > 3.9 * json.loads((small / "summary.json").read_text())["train_flop"]
    for path in (tmp_path / "large/train").rglob("*.jpg"):  # what the run has recorded counts
        path.write_bytes(next((tmp_path / "large/train/dark").iterdir()).read_bytes())
    assert command_line("--eval", tmp_path / "run") == 0
    loss = re.search(r"test loss +(\S+) +recorded (\S+)", command_line.out)
    assert loss.group(1) == loss.group(2)
    assert fastres.load_model(tmp_path / "run")(torch.zeros(1, 3, 64, 64)).shape == (1, 2)
    for arguments, message in (
        (["--image-size", 60], "--image-size 60: must be a multiple of 8"),
        (["--image-size", 24], "--image-size 24: must be at least 32"),
        (["--image-size", 64, "--dataset", "digits"], "--image-size 64: images of digits have 32 pixels; needs"),
        (["--image-size-schedule", "40:0.5"], "increasing sizes from 8 to 31 and"),
    ):
        assert message in command_line.one_line(*flags, *arguments)


def test_the_classes_by_accuracy(command_line, flags, tmp_path):
    table = class_table({"select": "last", "per_class_accuracy": {f"c{i}": float(i * 7 % 30) for i in range(30)}})
    assert table.title == "accuracy by class, last epoch, 10 lowest of 30"
    assert list(table.columns[1].cells) == [f"{i}.00 %" for i in range(10)]
    assert command_line(*flags) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    below = command_line.out.split("accuracy by class, last epoch")[1]
    assert f"{min(summary['per_class_accuracy'].values()):.2f} %" in below.splitlines()[2]


def test_renamed_classes(command_line, flags, image_folder, tmp_path):
    assert command_line(*flags) == 0
    for part in ("train", "test"):
        (image_folder / part / "bright").rename(image_folder / part / "zebra")
    message = r"holds the classes dark, zebra, but the run in .*run was trained on bright, dark"
    assert re.search(message, command_line.one_line("--resume", tmp_path / "run", "--epochs", 3))
    assert re.search(message, command_line.one_line("--eval", tmp_path / "run"))


def test_a_checkpoint_without_its_best_weights(command_line, flags, tmp_path):
    assert command_line(*flags) == 0
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "run/last.pt").rename(tmp_path / "moved/last.pt")
    message = command_line.one_line("--resume", moved, "--epochs", 3)
    assert re.search(r"best.safetensors, the weights of epoch \d, is missing beside last.pt", message)
    assert [path.name for path in (tmp_path / "moved").iterdir()] == ["last.pt"]
    (tmp_path / "run/best.safetensors").rename(tmp_path / "moved/best.safetensors")
    assert command_line("--resume", moved, "--epochs", 3) == 0


def test_trains_in_a_thread(command_line, flags, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train.main, [str(flag) for flag in flags]).result() == 0
    assert (tmp_path / "run/summary.json").exists()


def started(*arguments, options=(), module="fastres.train", shell="{}", **settings):
    """A process of its own: exit code and standard error."""
    command = shlex.join([sys.executable, *options, "-m", module, *map(str, arguments)])
    done = subprocess.run(
        ["sh", "-c", shell.format(command)], stderr=subprocess.PIPE, text=True, timeout=180, **settings
    )
    return done.returncode, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_stdout(flags):
    code, error = started(*flags, shell="{} > /dev/full")
    assert (code, error) == (
        1, "python -m fastres.train: error: cannot write to stdout (No space left on device); redirect it elsewhere\n"
    )  # fmt: skip


def test_a_closed_stdout_keeps_the_run(flags, tmp_path):
    _, error = started(*flags, shell="{} | true")
    assert error == "python -m fastres.train: error: cannot write to stdout (Broken pipe); redirect it elsewhere\n"


SMALL_SHARED_MEMORY = "unshare --mount sh -c 'mount -t tmpfs -o size=256k tmpfs /dev/shm && {}'"


@pytest.mark.skipif(started("-V", shell="unshare --mount true")[0] != 0, reason="no mount namespaces")
def test_a_small_shared_memory(flags):
    code, error = started(*flags, "--loader", "eager", shell=SMALL_SHARED_MEMORY, stdout=subprocess.DEVNULL)
    assert code == 1
    assert error.splitlines()[-1].startswith(
        "python -m fastres.train: error: --loader eager: its workers' batches do not"
    )
    assert "Traceback" not in error


def test_starts_in_the_packages_own_folder():
    code, error = started("--help", cwd=Path(train.__file__).parent, stdout=subprocess.DEVNULL)
    assert (code, error) == (0, "")


def test_without_docstrings(flags):
    code, error = started(*flags, "--loader", "dali", options=["-OO"], stdout=subprocess.DEVNULL)
    assert code == 2
    assert error.count("\n") == 1
    assert "--loader dali: DALI does not import" in error
    assert "take --loader eager" in error


def test_resume_of_another_model(command_line, flags, tmp_path):
    assert command_line(*flags) == 0
    for arguments, message in (
        (["--model", "resnet18"], "--model resnet18: .* is a run with vgg11; leave the flag off"),
        (["--lr", "0.5"], "--lr 0.5: .* is a run with 0.02"),
    ):
        assert re.search(message, command_line.one_line("--resume", tmp_path / "run", *arguments))
        assert re.search(message, command_line.one_line("--eval", tmp_path / "run", *arguments))


def test_fewer_epochs_than_are_done(command_line, flags, tmp_path):
    assert command_line(*flags, "--epochs", 3) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    message = command_line.one_line("--resume", tmp_path / "run", "--epochs", 2)
    assert "--epochs 2: the run is past that already; --eval" in message
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_ctrl_c_before_training(command_line, flags, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastres.training.start.load_dataset", interrupted)
    assert command_line(*flags) == 130
    assert command_line.err == "python -m fastres.train: interrupted\n"
