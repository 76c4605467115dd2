"""A dataset in memory: images and labels, class names, mean and standard deviation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastres.errors import UserError

IMAGE_SIZE = 32
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Split:
    """N images and their labels.

    images: uint8 ``[N, size, size, 3]``, or N encoded files (``IMAGE_FORMATS``), each a uint8 array of its bytes.
    labels: int64 ``[N]``, indices into the dataset's classes.
    resize: the encoded images are not all of ``size``, so a loader resizes them after decoding.
    size: pixels a side.
    """

    images: np.ndarray | list[np.ndarray]
    labels: np.ndarray
    resize: bool = False
    size: int = IMAGE_SIZE

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
        check_classes(classes, self.name, self.classes)
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


def check_classes(classes: Sequence[str], source: object, known: Sequence[str]) -> None:
    unknown = [name for name in classes if name not in known]
    if unknown:
        raise UserError(f"--classes: {source} has no {', '.join(unknown)}; it has {', '.join(known)}")
    if len(set(classes)) != len(classes):
        raise UserError("--classes: a class is named twice")
