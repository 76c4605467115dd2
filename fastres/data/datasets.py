"""What the images are: arrays or encoded files, with labels and class names. Nothing is drawn or augmented here."""

import io
import os
import stat
import subprocess
import sys
import unicodedata
import warnings
from collections import Counter
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
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # Pillow and DALI differ on TIFF and PPM; DALI does not decode GIF
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp")
LEFTOVERS = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}  # of archives, Windows and Synology; in lower case
MAX_PIXELS = 2**26  # of an encoded image: 192 MiB decoded, and far more than 32x32 needs
FILES_AT_ONCE = 64  # that a thread reads before it hands them over: a small image takes no longer than that
EXAMPLES = 3  # of bad files, or of suffixes, that a line names
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

    images: uint8 ``[N, 32, 32, 3]``, or N encoded files (``IMAGE_FORMATS``), each a uint8 array of its bytes.
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

    skipped_images: how many files were left out because they are damaged.
    other_files: the suffix of each file that was left out because it is no image of ``IMAGE_SUFFIXES`` in a class.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, float, float] = CIFAR10_MEAN
    std: tuple[float, float, float] = CIFAR10_STD
    skipped_images: int = 0
    other_files: tuple[str, ...] = ()

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
    except PermissionError as error:
        path = error.filename or data_dir
        raise UserError(f"{path}: {error.strerror}; make it readable and writable, or take --dataset digits") from error
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
    """Image files (``IMAGE_SUFFIXES``) anywhere in ``DIR/train/<class>/`` and ``DIR/test/<class>/``, kept encoded.

    Hidden files and folders and ``LEFTOVERS`` are ignored. Class names and ``classes`` are compared in Unicode's NFC.
    Every file is decoded once here, so that the damaged ones are named before training begins, or left out with
    ``skip_bad_images``. ``classes`` are the only ones read, if given. ``track`` is given the files as they are read.
    Raises UserError for a missing folder, an empty class, classes that differ between train and test, unknown or
    repeated ``classes``, whatever can't be read, and files that don't decode or have more than ``MAX_PIXELS``.
    """
    if not _is_folder(data_dir):
        raise UserError(f"--data-dir {data_dir}: no such folder")
    for part in ("train", "test"):
        if not _is_folder(data_dir / part):
            raise UserError(f"--data-dir {data_dir}: no folder {part}/ in it; expected images in {part}/<class>/")
    others: list[Path] = []
    train, test = (_class_folders(data_dir / part, others) for part in ("train", "test"))
    if train.keys() != test.keys():
        differing = ", ".join(sorted(train.keys() ^ test.keys()))
        raise UserError(f"--data-dir {data_dir}: train/ and test/ must hold the same classes; only one has {differing}")
    if not train:
        raise UserError(f"--data-dir {data_dir}: train/ holds no class folders; expected images in train/<class>/")
    names = tuple(unicodedata.normalize("NFC", name) for name in classes) or tuple(sorted(train))
    _check_classes(names, data_dir, sorted(train))
    paths = [[_image_files(folders[name], others) for name in names] for folders in (train, test)]
    images = _read_images([path for part in paths for files in part for path in files], track)
    bad = [path.relative_to(data_dir) for path, image in images.items() if image is None]
    if bad and not skip_bad_images:
        raise UserError(
            f"--data-dir {data_dir}: not readable as JPEG, PNG, WebP or BMP images of up to {MAX_PIXELS / 1e6:.0f} "
            f"megapixels: {_examples(bad)}; replace or remove them, or add --skip-bad-images"
        )
    return Dataset(
        name="folder",
        classes=names,
        train=_encoded_split(paths[0], images),
        test=_encoded_split(paths[1], images),
        skipped_images=len(bad),
        other_files=tuple(path.suffix.lower() or "no suffix" for path in others),
    )


def _examples(items: Sequence[object]) -> str:
    more = f" and {len(items) - EXAMPLES:,} more" if len(items) > EXAMPLES else ""
    return ", ".join(map(str, items[:EXAMPLES])) + more


def _unreadable(path: Path, error: OSError) -> UserError:
    broken = isinstance(error, FileNotFoundError) and path.is_symlink()
    reason = f"broken symlink to {path.readlink()}" if broken else error.strerror
    return UserError(f"{path}: {reason}; make it readable (--skip-bad-images leaves out damaged images only)")


def _is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder or a symlink to one. Raises UserError where that can't be found out."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            return False
        raise _unreadable(path, error) from error


def _entries(root: Path) -> list[Path]:
    """The files and folders in ``root``, sorted, without hidden ones and ``LEFTOVERS``."""
    try:
        paths = sorted(root.iterdir())
    except OSError as error:
        raise _unreadable(root, error) from error
    return [path for path in paths if not path.name.startswith(".") and path.name.lower() not in LEFTOVERS]


def _class_folders(root: Path, others: list[Path]) -> dict[str, Path]:
    """The folders in ``root`` by their names in NFC; what macOS has written may be NFD. The files go to ``others``."""
    folders: dict[str, Path] = {}
    for path in _entries(root):
        name = unicodedata.normalize("NFC", path.name)
        if not _is_folder(path):
            others.append(path)
        elif name in folders:
            raise UserError(f"{root}: two folders are called {name}, in two Unicode spellings; merge them")
        else:
            folders[name] = path
    return folders


def _image_files(root: Path, others: list[Path]) -> list[Path]:
    """The images in ``root`` and, as in torchvision's ImageFolder, its subfolders. Other files go to ``others``.

    Raises UserError where there are none, and where a symlink leads back (the operating system's ELOOP).
    """
    folders = [root]
    images: list[Path] = []
    while folders:
        for path in _entries(folders.pop()):
            if _is_folder(path):
                folders.append(path)
            else:
                (images if path.suffix.lower() in IMAGE_SUFFIXES else others).append(path)
    if not images:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise UserError(f"{root}: holds no image file ({suffixes}); fill it or leave it out through --classes")
    return sorted(images)


def _read_images(paths: Sequence[Path], track: Track) -> dict[Path, EncodedImage | None]:
    """The image files at ``paths``, None for the damaged ones. Raises UserError where one can't be read."""
    chunks = [paths[start : start + FILES_AT_ONCE] for start in range(0, len(paths), FILES_AT_ONCE)]
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(os.cpu_count()) as pool:
        read = pool.map(lambda chunk: [_read_image(path) for path in chunk], chunks)
        return dict(zip(paths, track(chain.from_iterable(read), len(paths)), strict=True))


def _read_image(path: Path) -> EncodedImage | None:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        content = np.frombuffer(data, np.uint8)
        return content, decode_image(content).size
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        return None


def decode_image(content: np.ndarray) -> Image.Image:
    """The RGB image in the bytes of a file of ``IMAGE_FORMATS``, turned as its EXIF says, as DALI decodes it.

    Raises whatever Pillow's decoders raise, and ValueError for more than ``MAX_PIXELS`` or a BMP of 16 bits a pixel.
    """
    with Image.open(io.BytesIO(content.data), formats=IMAGE_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels")
        if image.format == "BMP" and "BGR;1" in str(image.tile):  # BGR;15, BGR;16: DALI's levels differ by up to 7
            raise ValueError("16 bits a pixel")
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
        return digits(), f"digits, because CIFAR-10 is not readable under {data_dir} and its download {why}"
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
    counts = f"{len(dataset.classes)} classes, {len(dataset.train):,} train, {len(dataset.test):,} test"
    if dataset.skipped_images:
        counts += f", {dataset.skipped_images:,} unreadable files left out"
    if dataset.other_files:
        suffixes = [suffix for suffix, _ in Counter(dataset.other_files).most_common()]
        counts += f", {len(dataset.other_files):,} other files left out ({_examples(suffixes)})"
    return dataset, f"{note} ({counts})"
