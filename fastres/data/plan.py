"""The epoch plan: the one source of randomness in the data path.

A plan says, for a whole epoch at once, in which order the images come and how each is augmented. It is a pure function
of (seed, epoch, number of images, augmentation), drawn with a counter-based generator, so every loader that applies it
gives the same batches, a resumed run sees the data that the interrupted one would have seen, and N ranks can take
slices of one plan.
"""

from dataclasses import dataclass, replace

import numpy as np

from fastres.data.datasets import IMAGE_SIZE

CROP_PADDING = 4  # pixels of zeros around the image before the random crop
CUTOUT_SIZE = 16  # pixels, both sides

AUGMENTATIONS = {
    "none": frozenset[str](),
    "crop-flip": frozenset({"crop", "flip"}),
    "crop-flip-cutout": frozenset({"crop", "flip", "cutout"}),
}


@dataclass(frozen=True)
class EpochPlan:
    """One epoch of N images; row i of every array belongs to the i-th image that is shown.

    order: int64 ``[N]``, which image of the split it is.
    crop: int32 ``[N, 2]``, top and left of the 32x32 window in the unpadded image, -4 to 4; None: not cropped.
    flip: int32 ``[N]``, 1 where the cropped image is mirrored left to right; None: not flipped.
    cutout: float32 ``[N, 2]``, row and column of the centre of the 16x16 square that is set to the mean after all
        else, 0 to 31, clipped at the border (DeVries & Taylor 2017, arXiv:1708.04552); None: no cutout.
    """

    order: np.ndarray
    crop: np.ndarray | None = None
    flip: np.ndarray | None = None
    cutout: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.order)

    def shard(self, rank: int, processes: int, batch_size: int, drop_last: bool = False) -> "EpochPlan":
        """What process ``rank`` of ``processes`` shows: a contiguous part of every batch of ``batch_size`` images.

        The parts of a batch differ by one image at most. ``drop_last`` leaves out a last batch that is smaller.
        """
        images = len(self) - len(self) % batch_size if drop_last else len(self)
        row = np.arange(images)
        place = row % batch_size  # in its batch
        least, larger = np.divmod(np.minimum(batch_size, images - row + place), processes)
        first = rank * least + np.minimum(rank, larger)  # the first `larger` processes show one more than `least`
        rows = row[(first <= place) & (place < first + least + (rank < larger))]
        return replace(self, **{name: column[rows] for name, column in vars(self).items() if column is not None})


def training_plan(seed: int, epoch: int, num_images: int, augmentation: str) -> EpochPlan:
    """The shuffled and augmented epoch ``epoch`` (from 0). ``augmentation`` is a key of ``AUGMENTATIONS``."""
    steps = AUGMENTATIONS[augmentation]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    return EpochPlan(
        order=rng.permutation(num_images),
        crop=rng.integers(-CROP_PADDING, CROP_PADDING + 1, (num_images, 2), np.int32) if "crop" in steps else None,
        flip=rng.integers(0, 2, num_images, np.int32) if "flip" in steps else None,
        cutout=rng.integers(0, IMAGE_SIZE, (num_images, 2)).astype(np.float32) if "cutout" in steps else None,
    )


def evaluation_plan(num_images: int) -> EpochPlan:
    """Every image once, in order, as it is."""
    return EpochPlan(order=np.arange(num_images))
