"""The eager baseline: torchvision transforms on one image at a time in a DataLoader, as the studies wrote it."""

import gc
import os
import re
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F

from fastres.data import Batch
from fastres.data.datasets import IMAGE_SIZE, Split, decode_image
from fastres.data.plan import CROP_PADDING, CUTOUT_SIZE, EpochPlan
from fastres.errors import RunError

# A worker must not collect the garbage of the process that it was forked from: the threads of a DALI pipeline, say, do
# not exist in it.
os.register_at_fork(after_in_child=gc.freeze)


SHARED_MEMORY = "shared memory|Bus error"  # in torch's message if /dev/shm is full


class EagerLoader:
    """Applies the plan of an epoch to a split, in ``workers`` processes that are started anew for every epoch.

    ``plan_of_epoch(epoch)`` gives the EpochPlan, always of one length. Batches are float32 ``[B, 3, 32, 32]``
    contiguous, normalised with ``mean`` and ``std`` of pixels in [0, 1], and int64 ``[B]``, on the CPU (pinned for a
    CUDA ``device``).
    """

    starts_anew = True

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
    ) -> None:
        self.images = _PlannedImages(split, mean, std)
        self.images.plan = plan_of_epoch(0)
        self.plan_of_epoch = plan_of_epoch
        self.batch_size, self.workers = batch_size, workers
        self.pin_memory = device.type == "cuda"

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._batches(0))

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``epoch`` from ``first_batch`` on, both counted from 0."""
        self.images.plan = self.plan_of_epoch(epoch)
        try:
            yield from self._batches(first_batch)
        except RuntimeError as error:
            if not re.search(SHARED_MEMORY, str(error)):
                raise
            raise RunError(
                "--loader eager: its workers' batches do not fit into shared memory; enlarge /dev/shm (docker run "
                "--shm-size=1g), or take --loader dali"
            ) from error

    def _batches(self, first_batch: int) -> DataLoader:
        return DataLoader(
            self.images,
            self.batch_size,
            sampler=range(first_batch * self.batch_size, len(self.images)),
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),  # or every iteration would draw from the global one, which dropout uses
            worker_init_fn=_leave_the_group,
        )


def _leave_the_group(worker: int) -> None:
    """A signal to the group of processes, as torchrun and terminals send it, is the parent's to act on: it still needs
    its workers to come to the end of the step."""
    os.setpgrp()


class _PlannedImages(Dataset):
    """Item i is the i-th image of the plan, augmented and normalised."""

    plan: EpochPlan

    def __init__(self, split: Split, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        self.split, self.mean, self.std = split, mean, std

    def __len__(self) -> int:
        return len(self.plan)

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
        if plan.erasing is not None:
            top, left, height, width = plan.erasing[i].astype(int).tolist()
            tensor[:, top : top + height, left : left + width] = 0
        return tensor, int(self.split.labels[index])
