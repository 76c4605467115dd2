"""The command line, on real files: what a run prints, and one clear line with exit code 2 for whatever is wrong."""

import io
import json
import re

import pytest
import torch
from rich.console import Console

from fastres.config import TrainConfig
from fastres.train import tracked

pytestmark = pytest.mark.usefixtures("tiny_vgg11")


@pytest.fixture
def flags(image_folder, tmp_path):
    """A run of seconds."""
    return [
        "--model", "vgg11", "--dataset", "folder", "--data-dir", image_folder, "--epochs", 2, "--batch-size", 20,
        "--lr", 0.02, "--device", "cpu", "--output-dir", tmp_path / "run",
    ]  # fmt: skip


@pytest.mark.parametrize("loader", ["dali", "eager"])
def test_trains_reports_and_evaluates_again(loader, command_line, flags, tmp_path):
    assert command_line(*flags, "--loader", loader, "--augmentation", "crop-flip-cutout") == 0
    run = tmp_path / "run"
    assert f"loader {loader} (asked for)" in command_line.out
    assert len(re.findall(r"^epoch +\d/2 ", command_line.out, re.M)) == 2
    for line in ("best test accuracy", "last test accuracy", f"run:     {run}", f"picture: {run}/curves.png"):
        assert line in command_line.out
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((run / "summary.json").read_text())

    assert command_line("--eval", run) == 0
    loss = re.search(r"test loss +(\S+) +recorded (\S+)", command_line.out)
    assert loss.group(1) == loss.group(2) == f"{summary['test_loss']:.6f}"
    accuracy = re.search(r"test accuracy (\S+) % +recorded (\S+) %", command_line.out)
    assert accuracy.group(1) == accuracy.group(2)


def test_resume_goes_on_where_the_run_stopped(command_line, flags, tmp_path):
    assert command_line(*flags) == 0
    assert command_line("--resume", tmp_path / "run", "--epochs", 3) == 0
    assert re.findall(r"^epoch +(\d)/3 ", command_line.out, re.M) == ["3"]
    assert json.loads((tmp_path / "run/summary.json").read_text())["epochs"] == 3


def test_help_groups_the_flags(command_line):
    assert command_line("--help") == 0
    for group in ("Recipe:", "Model:", "Data:", "Optimization:", "Engine:", "Output:"):
        assert f"\n{group}\n" in command_line.out
    assert "(default: 128)" in command_line.out


def one_line(command_line, *arguments):
    """The error line of a call that must end with code 2 and print nothing else."""
    assert command_line(*arguments) == 2
    assert command_line.err.count("\n") == 1
    assert "Traceback" not in command_line.out + command_line.err
    return command_line.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet17"], "--model: invalid choice: 'resnet17' .*resnet18.*vgg16"),
        (["--dataset", "imagenet"], "--dataset: invalid choice: 'imagenet' .*digits.*folder"),
        (["--learning-rate", "1"], "unknown argument --learning-rate"),
        (["--batchsize", "1"], "unknown argument --batchsize; did you mean --batch-size"),
        (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--lr", "-1"], "--lr -1.0: must be positive"),
        (["--lr", "nan"], "--lr nan: must be positive"),
        (["--train-fraction", "0"], r"--train-fraction 0.0: must be in \(0, 1\]"),
        (["--batch-size", "61"], "--batch-size 61: larger than the training set of 60 images"),
        (["--schedule", "multistep"], "--schedule multistep: needs --milestones"),
        (["--milestones", "5,x"], "--milestones: invalid"),
        (["--warmup-epochs", "2"], "--warmup-epochs 2.0: must be less than --epochs 2"),
        (["--zero-gamma"], "--zero-gamma: vgg11 has no residual blocks"),
        (["--amp", "fp16"], "--amp fp16: needs a GPU"),
        (["--classes", "dark,cow"], "--classes: .* has no cow; it has bright, dark"),
        (["--resume", "nowhere"], "--resume nowhere: no such file"),
        (["--eval", "nowhere"], "--eval nowhere: not the folder of a finished run"),
    ],
)
def test_bad_flags(arguments, message, command_line, flags, tmp_path):
    assert re.search(message, one_line(command_line, *flags, *arguments))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(command_line, flags):
    assert "--device cuda: torch sees no CUDA device" in one_line(command_line, *flags, "--device", "cuda")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "train").rename(root / "elsewhere"), "no folder train/"),
        (lambda root: [path.unlink() for path in (root / "train/dark").iterdir()], "train/dark: holds no .jpg or .png"),
        (
            lambda root: (root / "test/dark/0000.jpg").write_bytes(b"no image"),
            "megapixels: test/dark/0000.jpg; replace",
        ),
    ],
)
def test_bad_folders(damage, message, command_line, flags, image_folder):
    damage(image_folder)
    assert message in one_line(command_line, *flags)


def test_bad_images_are_left_out_and_counted(command_line, flags, image_folder, tmp_path):
    (image_folder / "test/dark/0000.jpg").write_bytes(b"no image")
    assert command_line(*flags, "--skip-bad-images") == 0
    assert "60 train, 19 test, 1 unreadable files left out)" in command_line.out
    assert json.loads((tmp_path / "run/summary.json").read_text())["skipped_images"] == 1
    assert command_line("--eval", tmp_path / "run") == 0


def test_progress_of_the_check_is_shown_on_a_terminal_alone():
    for terminal in (True, False):
        written = io.StringIO()
        track = tracked(Console(file=written, force_terminal=terminal))
        assert list(track(iter("abc"), 3)) == ["a", "b", "c"]
        assert ("checking images" in written.getvalue()) == terminal


def test_wrong_checksum(command_line, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # unreachable
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    (base / "data_batch_1").write_bytes(b"no batch")
    message = one_line(command_line, "--dataset", "cifar10", "--data-dir", tmp_path)
    assert "--dataset cifar10: cifar-10-python.tar.gz under --data-dir" in message


def test_a_folder_that_holds_another_run_is_left_as_it_is(command_line, flags, tmp_path):
    assert command_line(*flags) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert "already holds a run; choose another folder, or --resume" in one_line(command_line, *flags)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_resume_of_another_model(command_line, flags, tmp_path):
    assert command_line(*flags) == 0
    for arguments, message in (
        (["--model", "resnet18"], "--model resnet18: .* is a run with vgg11; leave the flag off"),
        (["--lr", "0.5"], "--lr 0.5: .* is a run with 0.02"),
    ):
        assert re.search(message, one_line(command_line, "--resume", tmp_path / "run", *arguments))


def test_config_survives_json():
    config = TrainConfig(milestones=(5, 7), classes=("a", "b"), schedule="multistep", compile=True)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json())), "config.json") == config
