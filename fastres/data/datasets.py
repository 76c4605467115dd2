"""What the images are: arrays or encoded files, with labels and class names. Nothing is drawn or augmented here."""

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fastres.errors import UserError

IMAGE_SIZE = 32
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}
MAX_PIXELS = 2**26  # of an encoded image: 192 MiB decoded, and far more than 32x32 needs
FILES_AT_ONCE = 64  # that a thread reads before it hands them over: a small image takes no longer than that
BAD_FILES_NAMED = 3
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)
MINI_CIFAR10_CLASSES = ("airplane", "automobile", "bird")
DOWNLOAD_SECONDS = 20  # what `auto` grants a download, the start of its process included

EncodedImage = tuple[np.ndarray, tuple[int, int]]  # a file's bytes, and the width and height of its image
Track = Callable[[Iterable[Any], int], Iterable[Any]]  # gives on that many items, showing how many have come


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
    """Two splits, the class names, and the per-channel mean and standard deviation that normalise pixels in [0, 1].

    skipped_images: how many files were left out because they are not readable.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, float, float] = CIFAR10_MEAN
    std: tuple[float, float, float] = CIFAR10_STD
    skipped_images: int = 0

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


def untracked(items: Iterable[Any], total: int) -> Iterable[Any]:
    return items


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


def folder(
    data_dir: Path, classes: Sequence[str] = (), skip_bad_images: bool = False, track: Track = untracked
) -> Dataset:
    """Image files as ``DIR/train/<class>/*.jpg|png`` and ``DIR/test/<class>/*``, kept encoded.

    Every file is decoded once here, so that the damaged ones are named before training begins, or left out with
    ``skip_bad_images``. ``classes`` are the only ones read, if given. ``track`` is given the files as they are read.
    Raises UserError for a missing folder, an empty class, classes that differ between train and test, unknown or
    repeated ``classes``, and files that don't decode or have more than ``MAX_PIXELS``.
    """
    if not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder")
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
    paths = {part: [_image_files(data_dir / part / name) for name in names] for part in ("train", "test")}
    images = _read_images([path for part in paths.values() for files in part for path in files], track)
    bad = [path.relative_to(data_dir) for path, image in images.items() if image is None]
    if bad and not skip_bad_images:
        listed = ", ".join(map(str, bad[:BAD_FILES_NAMED]))
        more = f" and {len(bad) - BAD_FILES_NAMED:,} more" if len(bad) > BAD_FILES_NAMED else ""
        raise UserError(
            f"--data-dir {data_dir}: not readable as JPEG or PNG images of up to {MAX_PIXELS / 1e6:.0f} megapixels: "
            f"{listed}{more}; replace or remove them, or add --skip-bad-images"
        )
    return Dataset(
        name="folder",
        classes=names,
        train=_encoded_split(paths["train"], images),
        test=_encoded_split(paths["test"], images),
        skipped_images=len(bad),
    )


def _image_files(root: Path) -> list[Path]:
    files = sorted(path for path in root.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"{root}: holds no .jpg or .png file; fill it or leave it out through --classes")
    return files


def _read_images(paths: Sequence[Path], track: Track) -> dict[Path, EncodedImage | None]:
    """The image files at ``paths``, None for those that no loader could decode."""
    chunks = [paths[start : start + FILES_AT_ONCE] for start in range(0, len(paths), FILES_AT_ONCE)]
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(os.cpu_count()) as pool:
        read = pool.map(lambda chunk: [_read_image(path) for path in chunk], chunks)
        return dict(zip(paths, track(chain.from_iterable(read), len(paths)), strict=True))


def _read_image(path: Path) -> EncodedImage | None:
    try:
        content = np.frombuffer(path.read_bytes(), np.uint8)
        return content, decode_image(content).size
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        return None


def decode_image(content: np.ndarray) -> Image.Image:
    """The RGB image in the bytes of a JPEG or PNG file, turned as its EXIF says, as DALI decodes it.

    Raises whatever Pillow's decoders raise, and ValueError for more than ``MAX_PIXELS``.
    """
    with Image.open(io.BytesIO(content.data), formats=("JPEG", "PNG")) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels")
        for key in ("xmp", "XML:com.adobe.xmp", "transparency"):  # of which DALI takes no notice
            image.info.pop(key, None)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow clips rather than scales
            return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def _encoded_split(paths: Sequence[Sequence[Path]], images: dict[Path, EncodedImage | None]) -> Split:
    """The readable ones of ``paths``, a list for each class."""
    read: list[EncodedImage] = []
    labels: list[int] = []
    for label, files in enumerate(paths):
        readable = [image for path in files if (image := images[path])]
        if not readable:
            raise UserError(
                f"{files[0].parent}: none of its files is readable; replace them or leave it out through --classes"
            )
        read += readable
        labels += [label] * len(readable)
    contents, sizes = zip(*read, strict=True)
    return Split(list(contents), np.array(labels), resize=set(sizes) != {(IMAGE_SIZE, IMAGE_SIZE)})


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


def load_dataset(
    name: str,
    data_dir: Path,
    classes: Sequence[str] = (),
    skip_bad_images: bool = False,
    track: Track = untracked,
) -> tuple[Dataset, str]:
    """The dataset called ``name`` (one of ``DATASETS``), restricted to ``classes`` if any, and a line that says which.

    ``skip_bad_images`` and ``track`` are as in ``folder``, and mean nothing to the others. Raises UserError for
    whatever is wrong with the name, the folder, the files or the classes.
    """
    if name == "folder":
        dataset = folder(data_dir, classes, skip_bad_images, track)
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
    skipped = f", {dataset.skipped_images:,} unreadable files left out" if dataset.skipped_images else ""
    counts = f"{len(dataset.classes)} classes, {len(dataset.train):,} train, {len(dataset.test):,} test{skipped}"
    return dataset, f"{note} ({counts})"
