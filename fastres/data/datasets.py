"""The datasets: arrays or encoded image files, with labels and class names. Random draws and augmentation: plan.py."""

import io
import os
import stat
import subprocess
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import rich
from PIL import Image, ImageOps
from rich.progress import track

from fastres.errors import UserError, first_line

IMAGE_SIZE = 32
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # Pillow and DALI differ on TIFF and PPM; DALI does not decode GIF
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp")
LEFTOVERS = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}  # of archives, Windows and Synology; in lower case
MAX_PIXELS = 2**26  # of an encoded image; 192 MiB decoded
FILES_AT_ONCE = 64  # per task of a thread: handing over a result costs as much as reading a small image
EXAMPLES = 3  # bad files or suffixes named in a line
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)
MINI_CIFAR10_CLASSES = ("airplane", "automobile", "bird")
DOWNLOAD_SECONDS = 20  # limit of a download by `auto`, including the start of its process

EncodedImage = tuple[np.ndarray, tuple[int, int]]  # a file's bytes, and the width and height of its image


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

    source: where the data comes from, in words.
    skipped_images: number of damaged image files that were left out.
    other_files: suffixes of the files that were left out as they are no images (``IMAGE_SUFFIXES``) or in no class.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: tuple[float, float, float] = CIFAR10_MEAN
    std: tuple[float, float, float] = CIFAR10_STD
    source: str = ""
    skipped_images: int = 0
    other_files: tuple[str, ...] = ()

    def subset(self, classes: Sequence[str]) -> "Dataset":
        """Only the images of ``classes``, relabelled in that order."""
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
        """Moves a random ``fraction`` of the training images, drawn from ``seed``, to a validation split."""
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


@contextmanager
def _unreadable_explained() -> Iterator[None]:
    """Turns an OSError about a file into a UserError."""
    try:
        yield
    except OSError as error:
        path = Path(error.filename)
        broken = isinstance(error, FileNotFoundError) and path.is_symlink()
        reason = f"broken symlink to {path.readlink()}" if broken else error.strerror
        mend = "make it readable (--skip-bad-images leaves out damaged images only)"
        raise UserError(f"{path}: {reason}; {mend}") from error


@_unreadable_explained()
def folder(data_dir: Path, classes: Sequence[str] = (), skip_bad_images: bool = False) -> Dataset:
    """Image files (``IMAGE_SUFFIXES``) anywhere in ``DIR/train/<class>/`` and ``DIR/test/<class>/``, kept encoded.

    Only ``classes`` are read, if given; their names and the folders' are compared in Unicode's NFC. Hidden files and
    folders and ``LEFTOVERS`` are ignored. Every file is decoded once, so that damaged ones are reported before training
    begins, or left out with ``skip_bad_images``.
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
    images = _read_images(list(chain(*chain(*paths))))
    bad = [path.relative_to(data_dir) for path, image in images.items() if image is None]
    if bad and not skip_bad_images:
        raise UserError(
            f"--data-dir {data_dir}: not readable as JPEG, PNG, WebP or BMP images of up to {MAX_PIXELS / 1e6:.0f} "
            f"megapixels: {_examples(bad)}; replace or remove them, or add --skip-bad-images"
        )
    for files in chain(*paths):
        if not any(images[path] for path in files):
            raise UserError(
                f"{files[0].parent}: none of its files is readable; replace them or leave it out through --classes"
            )
    return Dataset(
        name="folder",
        classes=names,
        train=_encoded_split(paths[0], images),
        test=_encoded_split(paths[1], images),
        source=f"folder {data_dir}",
        skipped_images=len(bad),
        other_files=tuple(path.suffix.lower() or "no suffix" for path in others),
    )


def _examples(items: Sequence[object]) -> str:
    more = f" and {len(items) - EXAMPLES:,} more" if len(items) > EXAMPLES else ""
    return ", ".join(map(str, items[:EXAMPLES])) + more


def _is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder or a symlink to one. Raises OSError where that can't be found out."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        if path.is_symlink():
            raise
        return False


def _entries(root: Path) -> Iterator[tuple[Path, bool]]:
    """The entries of ``root``, sorted, without hidden ones and ``LEFTOVERS``, and whether each is a folder."""
    for path in sorted(root.iterdir()):
        if not path.name.startswith(".") and path.name.lower() not in LEFTOVERS:
            yield path, _is_folder(path)


def _class_folders(root: Path, others: list[Path]) -> dict[str, Path]:
    """The folders in ``root`` by their names in NFC; macOS writes NFD. The files go to ``others``."""
    folders: dict[str, Path] = {}
    for path, is_folder in _entries(root):
        name = unicodedata.normalize("NFC", path.name)
        if not is_folder:
            others.append(path)
        elif name in folders:
            raise UserError(f"{root}: two folders are called {name}, in two Unicode spellings; merge them")
        else:
            folders[name] = path
    return folders


def _image_files(root: Path, others: list[Path]) -> list[Path]:
    """The images in ``root`` and, as in torchvision's ImageFolder, its subfolders. Other files go to ``others``.

    A symlink to a folder above it is followed until the operating system reports ELOOP.
    """
    folders = [root]
    images: list[Path] = []
    while folders:
        for path, is_folder in _entries(folders.pop()):
            (folders if is_folder else images if path.suffix.lower() in IMAGE_SUFFIXES else others).append(path)
    if not images:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise UserError(f"{root}: holds no image file ({suffixes}); fill it or leave it out through --classes")
    return sorted(images)


def _read_images(paths: Sequence[Path]) -> dict[Path, EncodedImage | None]:
    """The image files at ``paths``, None for the damaged ones. Shows its progress on a terminal."""
    chunks = [paths[start : start + FILES_AT_ONCE] for start in range(0, len(paths), FILES_AT_ONCE)]
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(os.cpu_count()) as pool:
        read = chain.from_iterable(pool.map(lambda chunk: [_read_image(path) for path in chunk], chunks))
        silent = not rich.get_console().is_terminal
        shown = track(read, "checking images", len(paths), transient=True, disable=silent)
        return dict(zip(paths, shown, strict=True))


def _read_image(path: Path) -> EncodedImage | None:
    try:
        data = path.read_bytes()
    except OSError as error:
        error.filename = path  # is missing where the file opens and then can't be read
        raise
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
        for key in ("xmp", "XML:com.adobe.xmp", "transparency"):  # which DALI ignores
            image.info.pop(key, None)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow clips rather than scales
            return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def _encoded_split(paths: Sequence[Sequence[Path]], images: dict[Path, EncodedImage | None]) -> Split:
    """The readable images at ``paths``, a list of files for each class."""
    labelled = [(image, label) for label, files in enumerate(paths) for path in files if (image := images[path])]
    read, labels = zip(*labelled, strict=True)
    contents, sizes = zip(*read, strict=True)
    return Split(list(contents), np.array(labels), resize=set(sizes) != {(IMAGE_SIZE, IMAGE_SIZE)})


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
    name: str, data_dir: Path, classes: Sequence[str] = (), skip_bad_images: bool = False
) -> tuple[Dataset, str]:
    """The dataset called ``name`` (one of ``DATASETS``), restricted to ``classes`` if any, and a line that says which.

    ``skip_bad_images`` applies to ``folder``.
    """
    if name not in DATASETS:
        raise UserError(f"--dataset {name}: unknown; choose from {', '.join(DATASETS)}")
    if name == "folder":
        dataset = folder(data_dir, classes, skip_bad_images)  # reads only these classes
    else:
        dataset = DATASETS[name](data_dir)
        dataset = dataset.subset(classes) if classes else dataset
    counts = f"{len(dataset.classes)} classes, {len(dataset.train):,} train, {len(dataset.test):,} test"
    if dataset.skipped_images:
        counts += f", {dataset.skipped_images:,} unreadable files left out"
    if dataset.other_files:
        suffixes = [suffix for suffix, _ in Counter(dataset.other_files).most_common()]
        counts += f", {len(dataset.other_files):,} other files left out ({_examples(suffixes)})"
    return dataset, f"{dataset.source} ({counts})"
