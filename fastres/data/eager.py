"""The eager baseline: torchvision transforms on one image at a time in a DataLoader, as the studies wrote it."""

import gc
import multiprocessing
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F

from fastres.data import Batch, PlanLoader
from fastres.data.image_folder import decode_image
from fastres.data.plan import EpochPlan, crop_padding
from fastres.data.splits import Split
from fastres.errors import RunError

# A worker must not collect the garbage of the process that it was forked from: the threads of a DALI pipeline, say, do
# not exist in it.
os.register_at_fork(after_in_child=gc.freeze)

SHARED_MEMORY = "shared memory|Bus error"  # in torch's message if /dev/shm is full


class EagerLoader(PlanLoader):
    """Applies the plan image by image, in ``workers`` processes that are started again for every epoch.

    Batches are on the CPU (pinned for a CUDA ``device``), the images in contiguous memory.
    """

    starts_anew = True
    default_decode = "every-epoch"

    def _set_up(self) -> None:
        if self.split.encoded and self.decode == "once":
            images = [np.asarray(_image(self.split, i)) for i in range(len(self.split))]
            self.split = Split(np.stack(images), self.split.labels, size=self.split.size)

    def _batches(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        images = _PlannedImages(self.split, self.plan_of_epoch(epoch), self.mean, self.std)
        batches = DataLoader(
            images,
            self.batch_size,
            sampler=range(first_batch * self.batch_size, len(images)),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or every iteration would draw from the global one, which dropout uses
            worker_init_fn=_begin_worker,
            multiprocessing_context=_context() if self.workers else None,
        )
        try:
            yield from batches
        except RuntimeError as error:
            if not re.search(SHARED_MEMORY, str(error)):
                raise
            raise RunError(
                "--loader eager: its workers' batches do not fit into shared memory; enlarge /dev/shm (docker run "
                "--shm-size=1g), or take --loader dali"
            ) from error


def _context() -> multiprocessing.context.BaseContext:
    """The start method of workers. In a job under CPython 3.11 it is a fork server: a fork would hang if one of Gloo's
    threads held the lock of the interpreter's list of threads at that moment; 3.12 renews the lock in the child."""
    if sys.version_info >= (3, 12) or not dist.is_initialized():
        return multiprocessing.get_context()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _begin_worker(worker: int) -> None:
    """Takes a worker out of the parent's process group, which torchrun and terminals signal: the parent still needs it
    to finish the step. It ends with its parent, also if a fork server stands between them."""
    os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # in a worker
    parent.join()
    os._exit(1)


def _image(split: Split, index: int) -> Image.Image:
    """An image of the split, of its size."""
    pixels = split.images[index]
    image = decode_image(pixels) if split.encoded else Image.fromarray(pixels)
    return F.resize(image, [split.size, split.size]) if split.resize else image


def mean_and_std(split: Split) -> tuple[Any, Any]:
    """Of each channel's pixels, in [0, 1]; the std of a constant channel is 1."""
    sums = np.zeros((2, 3))
    for i in range(len(split)):
        pixels = np.asarray(_image(split, i)).reshape(-1, 3) / 255
        sums += pixels.mean(0), (pixels**2).mean(0)
    mean, square = sums / len(split)
    std = np.sqrt((square - mean**2).clip(0))
    return tuple(mean.tolist()), tuple(np.where(std < 1e-6, 1.0, std).tolist())


@dataclass(frozen=True)
class _PlannedImages(Dataset):
    """Item i is the i-th image of the plan, augmented and normalised, and its label."""

    split: Split
    plan: EpochPlan
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        plan, index = self.plan, self.plan.order[i]
        full, padding = self.split.size, crop_padding(self.split.size)
        image = _image(self.split, index)
        for crop, mode in ((plan.crop, "constant"), (plan.reflectcrop, "reflect")):
            if crop is not None:
                top, left = (crop[i] + padding).tolist()
                image = F.crop(F.pad(image, padding, padding_mode=mode), top, left, full, full)
        if plan.flip is not None and plan.flip[i]:
            image = F.hflip(image)
        tensor = F.normalize(F.to_tensor(image), self.mean, self.std)
        if plan.size is not None and plan.size[i] < full:
            size = int(plan.size[i])  # beyond its border the image goes on with the border's values, as in DALI
            around = F.resize(F.pad(tensor, full, padding_mode="edge"), [3 * size] * 2, antialias=True)
            tensor = around[:, size : 2 * size, size : 2 * size].contiguous()
        for box in (plan.cutout, plan.erasing):
            if box is not None:
                top, left, height, width = box[i].astype(int).tolist()
                tensor[:, top : top + height, left : left + width] = 0
        return tensor, int(self.split.labels[index])
