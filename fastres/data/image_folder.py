"""Folders of image files: found, checked and read once, and kept encoded."""

import io
import os
import stat
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import rich
from PIL import Image, ImageOps
from rich.progress import track

from fastres.data.splits import IMAGE_SIZE, Dataset, Split, check_classes
from fastres.errors import UserError, examples

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # Pillow and DALI differ on TIFF and PPM; DALI does not decode GIF
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp")
LEFTOVERS = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}  # of archives, Windows and Synology; in lower case
MAX_PIXELS = 2**26  # of an encoded image; 192 MiB decoded
FILES_AT_ONCE = 64  # per task of a thread: handing over a result costs as much as reading a small image

EncodedImage = tuple[np.ndarray, tuple[int, int]]  # a file's bytes, and the width and height of its image


@contextmanager
def _unreadable_explained() -> Iterator[None]:
    """Turns an OSError about a file into a UserError."""
    try:
        yield
    except OSError as error:
        if error.filename is None:  # of the progress bar's terminal, not of a file
            raise
        path = Path(error.filename)
        broken = isinstance(error, FileNotFoundError) and path.is_symlink()
        reason = f"broken symlink to {path.readlink()}" if broken else error.strerror
        mend = "make it readable (--skip-bad-images leaves out damaged images only)"
        raise UserError(f"{path}: {reason}; {mend}") from error


@_unreadable_explained()
def folder(
    data_dir: Path, classes: Sequence[str] = (), skip_bad_images: bool = False, size: int = IMAGE_SIZE
) -> Dataset:
    """Image files (``IMAGE_SUFFIXES``) anywhere in ``DIR/train/<class>/`` and ``DIR/test/<class>/``, kept encoded.

    Only ``classes`` are read, if given; their names and the folders' are compared in Unicode's NFC. Hidden files and
    folders and ``LEFTOVERS`` are ignored. Every file is decoded once, so that damaged ones are reported before training
    begins, or left out with ``skip_bad_images``. Loaders resize images to ``size`` pixels a side.
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
    check_classes(names, data_dir, sorted(train))
    paths = [[_image_files(folders[name], others) for name in names] for folders in (train, test)]
    images = _read_images(list(chain(*chain(*paths))))
    bad = [path.relative_to(data_dir) for path, image in images.items() if image is None]
    if bad and not skip_bad_images:
        raise UserError(
            f"--data-dir {data_dir}: not readable as JPEG, PNG, WebP or BMP images of up to {MAX_PIXELS / 1e6:.0f} "
            f"megapixels: {examples(bad)}; replace or remove them, or add --skip-bad-images"
        )
    for files in chain(*paths):
        if not any(images[path] for path in files):
            raise UserError(
                f"{files[0].parent}: none of its files is readable; replace them or leave it out through --classes"
            )
    return Dataset(
        name="folder",
        classes=names,
        train=_encoded_split(paths[0], images, size),
        test=_encoded_split(paths[1], images, size),
        source=f"folder {data_dir}",
        skipped_images=len(bad),
        other_files=tuple(path.suffix.lower() or "no suffix" for path in others),
    )


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
    images = images_in(root, others)
    if not images:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise UserError(f"{root}: holds no image file ({suffixes}); fill it or leave it out through --classes")
    return images


def images_in(root: Path, others: list[Path]) -> list[Path]:
    """The images in ``root`` and, as in torchvision's ImageFolder, its subfolders. Other files go to ``others``.

    A symlink to a folder above it is followed until the operating system reports ELOOP.
    """
    folders = [root]
    images: list[Path] = []
    while folders:
        for path, is_folder in _entries(folders.pop()):
            (folders if is_folder else images if path.suffix.lower() in IMAGE_SUFFIXES else others).append(path)
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


def _encoded_split(paths: Sequence[Sequence[Path]], images: dict[Path, EncodedImage | None], size: int) -> Split:
    """The readable images at ``paths``, a list of files for each class."""
    labelled = [(image, label) for label, files in enumerate(paths) for path in files if (image := images[path])]
    read, labels = zip(*labelled, strict=True)
    contents, sizes = zip(*read, strict=True)
    return Split(list(contents), np.array(labels), resize=set(sizes) != {(size, size)}, size=size)
