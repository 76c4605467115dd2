"""The epoch plan: the one source of randomness in the data path.

A plan says, for a whole epoch at once, in which order the images come and how each is augmented. It is a pure function
of (seed, epoch, number of images, augmentation), drawn with a counter-based generator, so every loader that applies it
gives the same batches, a resumed run sees the data that the interrupted one would have seen, and N ranks can take
slices of one plan.
"""

import reprlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastres.data.splits import IMAGE_SIZE
from fastres.errors import UserError

# torchvision's defaults for RandomErasing
ERASING_PROBABILITY = 0.5
ERASING_AREA = 0.02, 0.33  # of the image's, uniform
ERASING_ASPECT = 0.3, 3.3  # height over width, uniform in its logarithm
ERASING_ATTEMPTS = 10  # to draw a rectangle that is smaller than the image
CUTMIX_PROBABILITY = 0.5  # as the paper has it for CIFAR


@dataclass(frozen=True)
class EpochPlan:
    """One epoch of N images; row i of every array belongs to the i-th image that is shown.

    order: int64 ``[N]``, which image of the split it is.
    crop: int32 ``[N, 2]``, top and left of the window, as large as the image, in the unpadded image: up to an eighth of
        its side beyond it, -4 to 4 of 32 pixels; None: not cropped. Around the image are zeros (step ``crop``).
    reflectcrop: like ``crop``, but around the image is its reflection without the border pixel, as NumPy's ``reflect``.
    flip: int32 ``[N]``, 1 where the cropped image is mirrored left to right; None: not flipped. Drawn anew in every
        epoch (step ``flip``), or drawn once for each image and then alternating (``altflip``, Jordan 2024,
        arXiv:2404.00498, section 3.6), so that two epochs show every image both ways.
    size: int32 ``[N]``, pixels a side to which the image is resized after flip and normalisation, antialiased; the
        same in a whole batch; None: as it is.
    cutout: float32 ``[N, 4]``, top, left, height and width of the rectangle that is set to the mean after
        normalisation: a square of half the image's side, centred on any pixel and clipped at the border (DeVries &
        Taylor 2017, arXiv:1708.04552); None: no cutout.
    erasing: float32 ``[N, 4]``, top, left, height and width of the rectangle that is set to the mean after
        normalisation, drawn as torchvision's RandomErasing does (Zhong et al. 2017, arXiv:1708.04896); height and
        width are 0 where nothing is erased; None: no erasing.
    mixup: float32 ``[N]``, the image's share of the mean with its partner's, uniform in [0, 1] (Zhang et al. 2017,
        arXiv:1710.09412, with alpha 1); None: not mixed. Rows 2k and 2k + 1 of a batch are each other's partners; a
        last one without a partner is its own.
    cutmix: float32 ``[N, 4]``, top, left, height and width of the rectangle that shows the partner's pixels, with a
        uniform share of the image before it is clipped at the border (Yun et al. 2019, arXiv:1905.04899, with alpha
        1); height and width are 0 where nothing is; None: not mixed.
    """

    order: np.ndarray
    crop: np.ndarray | None = None
    reflectcrop: np.ndarray | None = None
    flip: np.ndarray | None = None
    size: np.ndarray | None = None
    cutout: np.ndarray | None = None
    erasing: np.ndarray | None = None
    mixup: np.ndarray | None = None
    cutmix: np.ndarray | None = None

    @property
    def mixes(self) -> bool:
        return self.mixup is not None or self.cutmix is not None

    def __len__(self) -> int:
        return len(self.order)

    def shard(self, rank: int, processes: int, batch_size: int, drop_last: bool = False) -> "EpochPlan":
        """The plan of process ``rank`` of ``processes``: a contiguous part of every batch of ``batch_size`` images.

        The parts of a batch differ by one image at most, or by one pair of images that are mixed. ``drop_last`` leaves
        out a last batch that is smaller.
        """
        unit = 2 if self.mixes else 1
        images = len(self) - len(self) % batch_size if drop_last else len(self)
        row = np.arange(images)
        place = row % batch_size // unit  # in its batch
        units = -(-np.minimum(batch_size, images - row + row % batch_size) // unit)
        least, larger = np.divmod(units, processes)
        first = rank * least + np.minimum(rank, larger)  # the first `larger` processes show one more than `least`
        rows = row[(first <= place) & (place < first + least + (rank < larger))]
        return replace(self, **{name: column[rows] for name, column in vars(self).items() if column is not None})


def crop_padding(size: int) -> int:
    """Pixels around an image of ``size`` before the random crop: 4 around 32."""
    return size // 8


def draw_crop(rng: np.random.Generator, num_images: int, size: int) -> np.ndarray:
    return rng.integers(-crop_padding(size), crop_padding(size) + 1, (num_images, 2), np.int32)


def draw_flip(rng: np.random.Generator, num_images: int, size: int) -> np.ndarray:
    return rng.integers(0, 2, num_images, np.int32)


def draw_cutout(rng: np.random.Generator, num_images: int, size: int) -> np.ndarray:
    return clipped(rng.integers(0, size, (num_images, 2)), size // 2, size)


def clipped(centre: np.ndarray, side: Any, size: int) -> np.ndarray:
    """Squares ``[N, 4]`` of ``side`` pixels, even numbers, around ``centre``, clipped at the border."""
    corners = [np.clip(centre + offset, 0, size) for offset in (-side // 2, side // 2)]
    return np.hstack([corners[0], corners[1] - corners[0]]).astype(np.float32)


def draw_erasing(rng: np.random.Generator, num_images: int, size: int) -> np.ndarray:
    boxes = np.zeros((num_images, 4), np.float32)
    flattest, tallest = np.log(ERASING_ASPECT)
    rows = np.flatnonzero(rng.random(num_images) < ERASING_PROBABILITY)
    for _ in range(ERASING_ATTEMPTS):
        area = size**2 * rng.uniform(*ERASING_AREA, len(rows))
        aspect = np.exp(rng.uniform(flattest, tallest, len(rows)))
        sides = np.rint(np.sqrt([area * aspect, area / aspect])).astype(int).T
        fits = (sides < size).all(axis=1)
        corner = rng.integers(0, size + 1 - sides[fits])
        boxes[rows[fits]] = np.hstack([corner, sides[fits]])
        rows = rows[~fits]
    return boxes


def draw_mixup(rng: np.random.Generator, num_images: int, size: int) -> np.ndarray:
    return rng.random(num_images, np.float32)


def draw_cutmix(rng: np.random.Generator, num_images: int, size: int) -> np.ndarray:
    side = 2 * (size / 2 * np.sqrt(rng.random((num_images, 1)))).astype(int)
    centre = rng.integers(0, size, (num_images, 2))
    return clipped(centre, side, size) * (rng.random((num_images, 1), np.float32) < CUTMIX_PROBABILITY)


# The steps of augmentation in the order in which they are drawn and applied: crop and flip to the pixels, the others
# after normalisation, mixup and cutmix to whole batches. Each draws the EpochPlan's column of its name, altflip draws
# flip; both loaders apply that.
STEPS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "crop": draw_crop,
    "reflectcrop": draw_crop,
    "flip": draw_flip,
    "altflip": draw_flip,
    "cutout": draw_cutout,
    "erasing": draw_erasing,
    "mixup": draw_mixup,
    "cutmix": draw_cutmix,
}
ALTERNATIVES = {"flip", "altflip"}, {"crop", "reflectcrop"}, {"mixup", "cutmix"}
MIXING = {"mixup", "cutmix"}


def mixes(augmentation: str) -> bool:
    """Whether ``augmentation`` mixes images."""
    return bool(MIXING & set(augmentation.split("-")))


def canonical_augmentation(augmentation: str) -> str:
    """``none``, or the steps that ``augmentation`` joins by dashes in any order, in the order of ``STEPS``."""
    names = augmentation.split("-")
    steps = [name for name in STEPS if name in names]
    together = any(pair <= set(steps) for pair in ALTERNATIVES)
    if (len(steps) < len(names) and augmentation != "none") or together:
        raise UserError(
            f"--augmentation {reprlib.repr(augmentation)}: must be none, or steps joined by dashes, each at most once, "
            f"for instance crop-flip; the steps are {', '.join(STEPS)}; not flip with altflip, crop with "
            "reflectcrop, or mixup with cutmix"
        )
    return "-".join(steps) or "none"


def with_steps(augmentation: str, steps: str) -> str:
    """``augmentation`` with ``steps``, which replace their alternatives in it."""
    if steps == "none":
        return steps
    added = canonical_augmentation(steps).split("-")
    replaced = {step for pair in ALTERNATIVES if pair & set(added) for step in pair} | {*added, "none"}
    return canonical_augmentation(
        "-".join([*(step for step in augmentation.split("-") if step not in replaced), *added])
    )


def training_plan(seed: int, epoch: int, num_images: int, augmentation: str, image_size: int = IMAGE_SIZE) -> EpochPlan:
    """The shuffled and augmented epoch ``epoch`` (from 0); ``augmentation`` as in ``canonical_augmentation``."""
    steps = canonical_augmentation(augmentation).split("-")
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    order = rng.permutation(num_images)
    columns = {name: draw(rng, num_images, image_size) for name, draw in STEPS.items() if name in steps}
    if columns.pop("altflip", None) is not None:  # it has drawn as many numbers as flip, so that the rest is the same
        first = draw_flip(np.random.Generator(np.random.Philox(np.random.SeedSequence([seed]))), num_images, image_size)
        columns["flip"] = (first[order] + epoch).astype(np.int32) % 2
    return EpochPlan(order, **columns)


def resized(plan: EpochPlan, size: np.ndarray, image_size: int = IMAGE_SIZE) -> EpochPlan:
    """``plan``, of images of ``image_size``, with its column ``size``; rectangles are scaled, too, to whole pixels."""
    boxes = {name: getattr(plan, name) for name in ("cutout", "erasing", "cutmix") if getattr(plan, name) is not None}
    scale = (size / image_size).astype(np.float32)[:, None]
    return replace(plan, size=size, **{name: np.rint(box * scale) for name, box in boxes.items()})


def evaluation_plan(num_images: int) -> EpochPlan:
    """Every image once, in order, as it is."""
    return EpochPlan(order=np.arange(num_images))
