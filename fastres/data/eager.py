"""The eager baseline: torchvision transforms on one image at a time in a DataLoader, as the studies wrote it."""

import gc
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F

from fastres.data.datasets import IMAGE_SIZE, Split, decode_image
from fastres.data.plan import CROP_PADDING, CUTOUT_SIZE, EpochPlan

Batch = tuple[torch.Tensor, torch.Tensor]


class EagerLoader:
    """Applies the plan of an epoch to a split, in ``workers`` processes that are started anew for every epoch.

    ``plan_of_epoch(epoch)`` gives the EpochPlan. Batches are float32 ``[B, 3, 32, 32]`` contiguous, normalised with
    ``mean`` and ``std`` of pixels in [0, 1], and int64 ``[B]``, on the CPU (pinned for a CUDA ``device``).
    """

    def __init__(
        self,
        split: Split,
        plan_of_epoch: Callable[[int], EpochPlan],
        *,
        batch_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device,
        workers: int = 2,
        drop_last: bool = False,
    ) -> None:
        self.images = _PlannedImages(split, mean, std)
        self.plan_of_epoch = plan_of_epoch
        self.batch_size, self.workers, self.drop_last = batch_size, workers, drop_last
        self.pin_memory = device.type == "cuda"

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._batches(0))

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``epoch`` from ``first_batch`` on, both counted from 0."""
        self.images.plan = self.plan_of_epoch(epoch)
        return iter(self._batches(first_batch))

    def _batches(self, first_batch: int) -> DataLoader:
        return DataLoader(
            self.images,
            self.batch_size,
            sampler=range(first_batch * self.batch_size, len(self.images)),
            num_workers=self.workers,
            drop_last=self.drop_last,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # or every iteration would draw from the global one, which dropout uses
            worker_init_fn=_keep_what_was_inherited,
        )


def _keep_what_was_inherited(worker: int) -> None:
    """A forked process must not collect the parent's garbage: a DALI pipeline's threads, say, do not exist in it."""
    gc.freeze()


class _PlannedImages(Dataset):
    """Item i is the i-th image of the plan, augmented and normalised."""

    plan: EpochPlan

    def __init__(self, split: Split, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        self.split, self.mean, self.std = split, mean, std

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        plan, index = self.plan, self.plan.order[i]
        pixels = self.split.images[index]
        image = decode_image(pixels) if self.split.encoded else Image.fromarray(pixels)
        if self.split.resize:
            image = F.resize(image, [IMAGE_SIZE, IMAGE_SIZE])
        if plan.crop is not None:
            top, left = (plan.crop[i] + CROP_PADDING).tolist()
            image = F.crop(F.pad(image, CROP_PADDING), top, left, IMAGE_SIZE, IMAGE_SIZE)
        if plan.flip is not None and plan.flip[i]:
            image = F.hflip(image)
        tensor = F.normalize(F.to_tensor(image), self.mean, self.std)
        if plan.cutout is not None:
            row, column = plan.cutout[i].astype(int).tolist()
            half = CUTOUT_SIZE // 2
            tensor[:, max(row - half, 0) : row + half, max(column - half, 0) : column + half] = 0
        return tensor, int(self.split.labels[index])
