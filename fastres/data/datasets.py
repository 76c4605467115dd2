"""The datasets by name. Random draws and augmentation: plan.py."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from fastres.data.image_folder import folder
from fastres.data.splits import CIFAR10_MEAN, CIFAR10_STD, IMAGE_SIZE, Dataset, Split
from fastres.errors import UserError, examples, first_line

CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)
MINI_CIFAR10_CLASSES = ("airplane", "automobile", "bird")
DOWNLOAD_SECONDS = 20  # limit of a download by `auto`, including the start of its process


def synthetic(images: int) -> Dataset:
    """``images`` random images in ten classes."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    split = Split(pixels, rng.integers(0, 10, images))
    return Dataset("synthetic", tuple(str(label) for label in range(10)), split, split.take(np.arange(0)))


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, resized to 32x32 RGB; a fixed, stratified 1,437/360 split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    grey = [Image.fromarray(image) for image in np.round(raw.images * (255 / 16)).astype(np.uint8)]
    resized = [np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)) for image in grey]
    images = np.repeat(np.stack(resized)[..., None], 3, axis=-1)
    whole = Split(images, raw.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(whole)), test_size=360, stratify=raw.target, random_state=0)
    pixels = images[train, ..., 0] / 255
    return Dataset(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        train=whole.take(train),
        test=whole.take(test),
        mean=(float(pixels.mean()),) * 3,
        std=(float(pixels.std()),) * 3,
        source="digits",
    )


def cifar(name: str, data_dir: Path, download: bool = True) -> Dataset:
    """``cifar10``, ``cifar100`` or ``mini-cifar10`` (``MINI_CIFAR10_CLASSES``); torchvision checks the files' MD5."""
    from torchvision import datasets

    source = datasets.CIFAR100 if name == "cifar100" else datasets.CIFAR10
    try:
        train, test = (source(str(data_dir), train=is_train, download=download) for is_train in (True, False))
    except PermissionError as error:
        path = error.filename or data_dir
        raise UserError(f"{path}: {error.strerror}; make it readable and writable, or take --dataset digits") from error
    except Exception as error:  # torchvision raises whatever urllib, tarfile, pickle and its own checks raise
        raise UserError(
            f"--dataset {name}: {source.url.rsplit('/', 1)[1]} under --data-dir {data_dir} is missing or damaged "
            f"and the download failed ({first_line(error)}); put the archive there, or take --dataset digits"
        ) from error
    dataset = Dataset(
        name=name,
        classes=tuple(train.classes),
        train=Split(train.data, np.array(train.targets)),
        test=Split(test.data, np.array(test.targets)),
        mean=CIFAR100_MEAN if name == "cifar100" else CIFAR10_MEAN,
        std=CIFAR100_STD if name == "cifar100" else CIFAR10_STD,
        source=f"{name} under {data_dir}",
    )
    return dataset.subset(MINI_CIFAR10_CLASSES) if name == "mini-cifar10" else dataset


def auto(data_dir: Path) -> Dataset:
    """mini-cifar10 if it is in ``data_dir`` or downloads within seconds, otherwise digits."""
    try:
        return replace(cifar("mini-cifar10", data_dir, download=False), source=f"mini-cifar10, found under {data_dir}")
    except UserError:
        pass
    download = "import sys; from torchvision.datasets import CIFAR10; CIFAR10(sys.argv[1], download=True)"
    command = [sys.executable, "-c", download, str(data_dir)]
    try:
        subprocess.run(command, timeout=DOWNLOAD_SECONDS, check=True, capture_output=True)
    except subprocess.SubprocessError as error:
        how = "did not finish" if isinstance(error, subprocess.TimeoutExpired) else "failed"
        source = f"digits, because CIFAR-10 is not readable under {data_dir} and its download {how}"
        return replace(digits(), source=source)
    return replace(cifar("mini-cifar10", data_dir, download=False), source=f"mini-cifar10, downloaded to {data_dir}")


# --dataset: its function, called with --data-dir
DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "auto": auto,
    "digits": lambda data_dir: digits(),
    "cifar10": partial(cifar, "cifar10"),
    "cifar100": partial(cifar, "cifar100"),
    "mini-cifar10": partial(cifar, "mini-cifar10"),
    "folder": folder,
}


def load_dataset(
    name: str,
    data_dir: Path,
    classes: Sequence[str] = (),
    skip_bad_images: bool = False,
    image_size: int = IMAGE_SIZE,
) -> tuple[Dataset, str]:
    """The dataset called ``name`` (one of ``DATASETS``), restricted to ``classes`` if any, and a line that says which.

    ``skip_bad_images`` and ``image_size``, to which images are resized, apply to ``folder``.
    """
    if name not in DATASETS:
        raise UserError(f"--dataset {name}: unknown; choose from {', '.join(DATASETS)}")
    if name == "folder":
        dataset = folder(data_dir, classes, skip_bad_images, image_size)  # reads only these classes
    elif image_size != IMAGE_SIZE:
        raise UserError(f"--image-size {image_size}: images of {name} have {IMAGE_SIZE} pixels; needs --dataset folder")
    else:
        dataset = DATASETS[name](data_dir)
        dataset = dataset.subset(classes) if classes else dataset
    counts = f"{len(dataset.classes)} classes, {len(dataset.train):,} train, {len(dataset.test):,} test"
    if dataset.skipped_images:
        counts += f", {dataset.skipped_images:,} unreadable files left out"
    if dataset.other_files:
        suffixes = [suffix for suffix, _ in Counter(dataset.other_files).most_common()]
        counts += f", {len(dataset.other_files):,} other files left out ({examples(suffixes)})"
    return dataset, f"{dataset.source} ({counts})"
