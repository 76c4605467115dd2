"""Fixtures that many tests share: tiny images, as arrays and as files, and the command line in this process."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastres import models, train
from fastres.data.image_folder import folder
from fastres.data.splits import Dataset, Split
from fastres.models import MODELS

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
os.fsync = lambda file: None  # a test does not outlive a power failure
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a script's background jobs would ignore


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "last" in item.keywords)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def arrays(rng: np.random.Generator) -> Dataset:
    return noise(rng)


def noise(rng: np.random.Generator) -> Dataset:
    """60 training and 20 test images of noise in two classes that differ in brightness."""

    def split(images: int) -> Split:
        labels = np.arange(images) % 2
        pixels = rng.integers(0, 128, (images, 32, 32, 3)) + 100 * labels[:, None, None, None]
        return Split(pixels.astype(np.uint8), labels)

    return Dataset("arrays", ("dark", "bright"), split(60), split(20))


def write_folder(root: Path, dataset: Dataset, suffix: str = ".jpg", size: int = 32) -> Path:
    """``dataset`` as an image folder."""
    for part, split in (("train", dataset.train), ("test", dataset.test)):
        for i, (pixels, label) in enumerate(zip(split.images, split.labels, strict=True)):
            path = root / part / dataset.classes[label] / f"{i:04d}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize((size, size)).save(path)
    return root


@pytest.fixture
def image_folder(tmp_path: Path, arrays: Dataset) -> Path:
    return write_folder(tmp_path / "images", arrays)


@pytest.fixture
def cifar10_jpeg() -> Dataset:
    """Airplane, automobile and bird of the real CIFAR-10 as JPEG files, where there is a folder of it."""
    root = os.environ.get("FASTRES_CIFAR10_JPEG")
    if not root:
        pytest.skip("FASTRES_CIFAR10_JPEG is not set")
    return folder(Path(root), ("airplane", "automobile", "bird"))


def tiny_model(num_classes: int, norm_layer: Callable[..., nn.Module]) -> nn.Module:
    """A model that trains in milliseconds."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        norm_layer(8),
        nn.Conv2d(8, 16, 3, stride=2, bias=False),
        norm_layer(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16, num_classes),
    )


@pytest.fixture
def tiny_vgg11(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the tiny model in vgg11's place, and draws no picture of its runs, which would take longer than they do."""
    monkeypatch.setitem(MODELS, "vgg11", tiny_model)
    monkeypatch.setattr("fastres.report.plots.plot_curves", lambda folder, title: folder / "curves.png")


@pytest.fixture
def own_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes the import of networks of one's own."""
    monkeypatch.setattr(models, "MODELS", dict(MODELS))
    monkeypatch.setattr(sys, "path", list(sys.path))


class CommandLine:
    """Calls an entry point with flags and keeps what it printed."""

    def __init__(self, capfd: pytest.CaptureFixture[str], main: Callable[[list[str]], int] = train.main) -> None:
        self.capfd, self.main = capfd, main

    def __call__(self, *arguments: object) -> int:
        self.capfd.readouterr()
        try:
            code = self.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = int(exit.code or 0)
        self.out, self.err = self.capfd.readouterr()
        return code

    def one_line(self, *arguments: object) -> str:
        """The error line of a call that must end with code 2 and print nothing else."""
        assert self(*arguments) == 2
        assert self.err.count("\n") == 1
        assert "Traceback" not in self.out + self.err
        return self.err


@pytest.fixture
def command_line(capfd: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capfd)


@pytest.fixture
def flags(image_folder, tmp_path):
    """A run of seconds."""
    return [
        "--model", "vgg11", "--dataset", "folder", "--data-dir", image_folder, "--epochs", 2, "--batch-size", 20,
        "--lr", 0.02, "--device", "cpu", "--output-dir", tmp_path / "run",
    ]  # fmt: skip
