"""Datasets, the epoch plan, and the two loaders that apply it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike

from fastres.data.mixing import Batch, mixed
from fastres.data.plan import EpochPlan, crop_padding
from fastres.data.splits import CIFAR10_MEAN, CIFAR10_STD, IMAGE_SIZE, Split
from fastres.errors import UserError, first_line
from fastres.machine import free_memory

DECODE = ("auto", "once", "every-epoch")  # when image files are decoded


class Loader(Protocol):
    """Gives the batches of an epoch: float32 images ``[B, 3, 32, 32]``, or of the plan's size, int64 labels ``[B]``; or
    where images are mixed, the classes' shares, float32 ``[B, C]``.

    ``starts_anew``: every epoch starts the workers again, so its first batch takes longer.
    """

    starts_anew: bool

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]: ...


class PlanLoader(ABC):
    """Base of DaliLoader and EagerLoader, which take the same arguments and apply the same plan.

    Batches are float32 images ``[B, 3, 32, 32]``, or of the plan's size, normalised with ``mean`` and ``std``, and
    int64 labels ``[B]``; where the plan mixes images, the classes' shares, float32 ``[B, num_classes]``. In a training
    loop of your own, with ``images``, uint8 ``[N, 32, 32, 3]``, and ``labels``, integers ``[N]``::

        loader = DaliLoader((images, labels), lambda epoch: training_plan(0, epoch, len(images), "crop-flip"))
        for epoch in range(30):
            for x, y in loader.epoch(epoch):
                ...

    Args:
        data: a Split, or a pair of images and labels.
        plan_of_epoch: returns the EpochPlan of an epoch, counted from 0; all have the same length and columns.
        batch_size: images in a batch; the last one of an epoch may have fewer.
        mean, std: of each channel, of pixels in [0, 1]; CIFAR-10's by default.
        device: where the batches are used. DaliLoader puts them there; EagerLoader leaves them on the CPU, in pinned
            memory for CUDA.
        workers: threads (DaliLoader) or processes (EagerLoader) that prepare batches.
        decode: image files are decoded ``once``, at construction, and kept as pixels, or in ``every-epoch``; ``auto``:
            once by DaliLoader, in every epoch by EagerLoader.
        num_classes: for a plan that mixes images; by default the largest label plus one.
    """

    default_decode: str

    def __init__(
        self,
        data: Split | tuple[ArrayLike, ArrayLike],
        plan_of_epoch: Callable[[int], EpochPlan],
        batch_size: int = 128,
        *,
        mean: tuple[float, float, float] = CIFAR10_MEAN,
        std: tuple[float, float, float] = CIFAR10_STD,
        device: torch.device | str = "cpu",
        workers: int = 2,
        decode: str = "auto",
        num_classes: int | None = None,
    ) -> None:
        self.split = as_split(data)
        self.plan_of_epoch, self.batch_size = lru_cache(maxsize=2)(plan_of_epoch), batch_size  # this one and the next
        self.num_classes = num_classes or int(self.split.labels.max(initial=0)) + 1
        self.mean, self.std = mean, std
        self.device, self.workers = torch.device(device), workers
        self.num_batches = -(-len(self.plan_of_epoch(0)) // batch_size)
        if decode not in DECODE:
            raise UserError(f"decode {decode!r}: must be one of {', '.join(DECODE)}")
        self.decode = self.default_decode if decode == "auto" else decode
        self._set_up()

    @abstractmethod
    def _set_up(self) -> None:
        """The rest of the construction."""

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``epoch`` from ``first_batch`` on, both counted from 0."""
        batches = self._batches(epoch, first_batch)
        plan = self.plan_of_epoch(epoch)
        if not plan.mixes:
            yield from batches
            return
        for number, (images, labels) in enumerate(batches, first_batch):
            rows = slice(number * self.batch_size, (number + 1) * self.batch_size)
            yield mixed(images, labels, plan, rows, self.num_classes)

    @abstractmethod
    def _batches(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        """The batches before images are mixed."""

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.num_batches


def as_split(data: Split | tuple[ArrayLike, ArrayLike]) -> Split:
    """``data`` itself, or of its images uint8 ``[N, 32, 32, 3]`` and labels, integers ``[N]``. Raises UserError."""
    if isinstance(data, Split):
        return data
    images, labels = map(np.asarray, data)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise UserError(f"labels: must be integers [N], not {labels.dtype} {list(labels.shape)}")
    shape = (len(labels), IMAGE_SIZE, IMAGE_SIZE, 3)
    if images.dtype != np.uint8 or images.shape != shape:
        raise UserError(f"images: must be uint8 {list(shape)} like the labels, not {images.dtype} {list(images.shape)}")
    return Split(images, labels.astype(np.int64))


def choose_loader(name: str, fault: str = "") -> tuple[str, str]:
    """``dali`` or ``eager``, and the reason; a loader named explicitly is kept. ``fault``: found by a check of DALI."""
    if name == "eager":
        return name, "asked for"
    try:
        import nvidia.dali  # noqa: F401
    except Exception as error:  # python -OO makes it a TypeError
        if name == "auto":
            return "eager", f"DALI does not import: {first_line(error)}"
        mend = "pip install nvidia-dali-cuda130" if isinstance(error, ImportError) else "take --loader eager"
        raise UserError(f"--loader dali: DALI does not import ({first_line(error)}); {mend}") from error
    if fault and name == "auto":
        return "eager", fault
    if fault:
        raise UserError(f"--loader dali: {fault}; or take --loader eager")
    return "dali", "asked for" if name == "dali" else "DALI imports"


def pixels_on_gpu(images: int, device: torch.device, size: int = IMAGE_SIZE) -> bool:
    """Whether DaliLoader keeps the pixels of so many images on ``device``: on a GPU with four times the memory free."""
    return device.type == "cuda" and 4 * _pixel_bytes(images, size) <= torch.cuda.mem_get_info(device)[0]


def pixels_in_memory(images: int, size: int = IMAGE_SIZE) -> bool:
    """Whether the pixels of so many images take at most a quarter of the memory that the host has free."""
    return 4 * _pixel_bytes(images, size) <= free_memory()


def _pixel_bytes(images: int, size: int) -> int:
    """With what a crop may show around them, where that is kept, too."""
    return images * 3 * (size + 2 * crop_padding(size)) ** 2


def create_loader(name: str, *args: Any, **options: Any) -> Loader:
    """The loader called ``name``, ``dali`` or ``eager``, with the arguments of PlanLoader."""
    if name == "dali":
        from fastres.data.dali import DaliLoader

        return DaliLoader(*args, **options)
    from fastres.data.eager import EagerLoader

    return EagerLoader(*args, **options)
