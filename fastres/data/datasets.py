"""What the images are: arrays or encoded files, with labels and class names. Nothing is drawn or augmented here."""

import io
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fastres.errors import UserError

IMAGE_SIZE = 32
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)
MINI_CIFAR10_CLASSES = ("airplane", "automobile", "bird")
DOWNLOAD_SECONDS = 20  # what `auto` grants a download, the start of its process included


@dataclass(frozen=True)
class Split:
    """N images and their labels.

    images: uint8 ``[N, 32, 32, 3]``, or N encoded files (JPEG, PNG), each a uint8 array of its bytes.
    labels: int64 ``[N]``, indices into the dataset's classes.
    resize: the encoded images are not all 32x32, so a loader resizes them after decoding.
    """

    images: np.ndarray | list[np.ndarray]
    labels: np.ndarray
    resize: bool = False

    @property
    def encoded(self) -> bool:
        return isinstance(self.images, list)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> "Split":
        """The images at ``index``, an int64 array."""
        images = [self.images[i] for i in index] if self.encoded else self.images[index]
        return replace(self, images=images, labels=self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """Two splits, the class names, and the per-channel mean and standard deviation that normalise pixels in [0, 1]."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, float, float] = CIFAR10_MEAN
    std: tuple[float, float, float] = CIFAR10_STD

    def subset(self, classes: Sequence[str]) -> "Dataset":
        """Only the images of ``classes``, relabelled in that order.

        Raises UserError for an unknown or repeated class.
        """
        _check_classes(classes, self.name, self.classes)
        new_label = np.full(len(self.classes), -1)
        new_label[[self.classes.index(name) for name in classes]] = np.arange(len(classes))

        def pick(split: Split) -> Split:
            kept = split.take(np.flatnonzero(new_label[split.labels] >= 0))
            return replace(kept, labels=new_label[kept.labels])

        return replace(self, classes=tuple(classes), train=pick(self.train), test=pick(self.test))

    def sample(self, fraction: float, seed: int) -> "Dataset":
        """Only a random ``fraction`` of the training images, drawn from ``seed``; at least one."""
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(self.train))
        return replace(self, train=self.train.take(np.sort(order[: max(round(len(order) * fraction), 1)])))

    def hold_out(self, fraction: float, seed: int) -> tuple["Dataset", Split]:
        """Moves a random ``fraction`` of the training images, drawn from ``seed``, to a validation split.

        Raises UserError where that leaves either part empty.
        """
        held = round(len(self.train) * fraction)
        if not 0 < held < len(self.train):
            raise UserError(f"--val-fraction {fraction}: leaves {held} of {len(self.train)} images to validate on")
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(self.train))
        return replace(self, train=self.train.take(np.sort(order[held:]))), self.train.take(np.sort(order[:held]))


def _check_classes(classes: Sequence[str], source: object, known: Sequence[str]) -> None:
    unknown = [name for name in classes if name not in known]
    if unknown:
        raise UserError(f"--classes: {source} has no {', '.join(unknown)}; it has {', '.join(known)}")
    if len(set(classes)) != len(classes):
        raise UserError("--classes: a class is named twice")


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, resized to 32x32 RGB; a fixed, stratified 1,437/360 split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    grey = np.round(source.images * (255 / 16)).astype(np.uint8)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    resized = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in grey])
    images = np.repeat(resized[..., None], 3, axis=-1)
    train, test = train_test_split(np.arange(len(images)), test_size=360, stratify=source.target, random_state=0)
    labels = source.target.astype(np.int64)
    pixels = images[train, ..., 0] / 255
    return Dataset(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        train=Split(images[train], labels[train]),
        test=Split(images[test], labels[test]),
        mean=(float(pixels.mean()),) * 3,
        std=(float(pixels.std()),) * 3,
    )


def cifar(name: str, data_dir: Path, download: bool = True) -> Dataset:
    """``cifar10``, ``cifar100``, or ``mini-cifar10`` (airplane, automobile and bird of CIFAR-10), through torchvision.

    Raises UserError where the files are missing and can't be downloaded, or don't match their checksums.
    """
    from torchvision import datasets

    source = datasets.CIFAR100 if name == "cifar100" else datasets.CIFAR10
    try:
        train, test = (source(str(data_dir), train=is_train, download=download) for is_train in (True, False))
    except Exception as error:  # torchvision raises whatever urllib, tarfile, pickle and its own checks raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--dataset {name}: {source.url.rsplit('/', 1)[1]} under --data-dir {data_dir} is missing or damaged "
            f"and the download failed ({reason}); put the archive there, or take --dataset digits"
        ) from error
    dataset = Dataset(
        name=name,
        classes=tuple(train.classes),
        train=Split(train.data, np.array(train.targets)),
        test=Split(test.data, np.array(test.targets)),
    )
    if name == "cifar100":
        return replace(dataset, mean=CIFAR100_MEAN, std=CIFAR100_STD)
    return dataset.subset(MINI_CIFAR10_CLASSES) if name == "mini-cifar10" else dataset


def folder(data_dir: Path, classes: Sequence[str] = ()) -> Dataset:
    """Image files as ``DIR/train/<class>/*.jpg|png`` and ``DIR/test/<class>/*``, kept encoded.

    Every file is decoded once here, so that a damaged one is named before training begins. ``classes`` are the only
    ones read, if given. Raises UserError for a missing folder, an empty class, classes that differ between train and
    test, unknown or repeated ``classes``, and files that don't decode.
    """
    for part in ("train", "test"):
        if not (data_dir / part).is_dir():
            raise UserError(f"--data-dir {data_dir}: no folder {part}/ in it; expected {part}/<class>/*.jpg or *.png")
    found, test_found = (
        tuple(sorted(path.name for path in (data_dir / part).iterdir() if path.is_dir())) for part in ("train", "test")
    )
    if found != test_found:
        differing = ", ".join(sorted(set(found) ^ set(test_found)))
        raise UserError(f"--data-dir {data_dir}: train/ and test/ must hold the same classes; only one has {differing}")
    if not found:
        raise UserError(f"--data-dir {data_dir}: train/ holds no class folders; expected train/<class>/*.jpg or *.png")
    _check_classes(classes, data_dir, found)
    names = tuple(classes) or found
    return Dataset(
        name="folder",
        classes=names,
        train=_read_folder(data_dir / "train", names),
        test=_read_folder(data_dir / "test", names),
    )


def _read_folder(root: Path, classes: Sequence[str]) -> Split:
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(path for path in (root / name).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UserError(f"{root / name}: holds no .jpg or .png file; fill it or leave it out through --classes")
        paths += files
        labels += [label] * len(files)
    with ThreadPoolExecutor() as pool:
        images, sizes = zip(*pool.map(_read_image, paths, chunksize=64), strict=True)
    return Split(list(images), np.array(labels), resize=set(sizes) != {(IMAGE_SIZE, IMAGE_SIZE)})


def _read_image(path: Path) -> tuple[np.ndarray, tuple[int, int]]:
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            image.load()
            return np.frombuffer(content, np.uint8), image.size
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"{path}: not a readable JPEG or PNG image; replace or remove it") from error


def auto(data_dir: Path) -> tuple[Dataset, str]:
    """mini-cifar10 if it lies under ``data_dir`` or downloads within seconds, otherwise digits; and why, in a line."""
    try:
        return cifar("mini-cifar10", data_dir, download=False), f"mini-cifar10, found under {data_dir}"
    except UserError:
        pass
    fetch = "import sys; from torchvision.datasets import CIFAR10; CIFAR10(sys.argv[1], download=True)"
    try:
        subprocess.run(
            [sys.executable, "-c", fetch, str(data_dir)], timeout=DOWNLOAD_SECONDS, check=True, capture_output=True
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        why = "did not finish" if isinstance(error, subprocess.TimeoutExpired) else "failed"
        return digits(), f"digits, because CIFAR-10 is not under {data_dir} and its download {why}"
    return cifar("mini-cifar10", data_dir, download=False), f"mini-cifar10, downloaded to {data_dir}"


DATASETS = ("auto", "digits", "cifar10", "cifar100", "mini-cifar10", "folder")


def load_dataset(name: str, data_dir: Path, classes: Sequence[str] = ()) -> tuple[Dataset, str]:
    """The dataset called ``name`` (one of ``DATASETS``), restricted to ``classes`` if any, and a line that says which.

    Raises UserError for whatever is wrong with the name, the folder, the files or the classes.
    """
    if name == "folder":
        dataset = folder(data_dir, classes)
        note = f"folder {data_dir}"
    elif name == "auto":
        dataset, note = auto(data_dir)
    elif name == "digits":
        dataset, note = digits(), "digits"
    elif name in DATASETS:
        dataset = cifar(name, data_dir)
        note = f"{name} under {data_dir}"
    else:
        raise UserError(f"--dataset {name}: unknown; there are {', '.join(DATASETS)}")
    if classes and name != "folder":  # which has read these alone
        dataset = dataset.subset(classes)
    return dataset, f"{note} ({len(dataset.classes)} classes, {len(dataset.train):,} train, {len(dataset.test):,} test)"
