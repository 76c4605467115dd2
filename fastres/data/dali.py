"""The loader that users get: DALI pipelines, for CPU and GPU, that apply the epoch plan to whole batches."""

from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from PIL import Image

from fastres.data import Batch
from fastres.data.datasets import IMAGE_SIZE, Split, decode_image
from fastres.data.plan import CUTOUT_SIZE, EpochPlan

AHEAD = 8  # batches that a GPU may lag behind the host
DECODE_BATCH, DECODE_BATCH_LARGE = 512, 16  # of 32x32 images; of images that may have many megapixels


class DaliLoader:
    """Applies the plan of an epoch to a split with DALI, in ``workers`` threads and, for CUDA, on the device.

    Encoded images are decoded (and resized) once, here, by the CPU, and kept as 3 KiB of pixels each.
    ``plan_of_epoch(epoch)`` gives the EpochPlan, always of one length. Batches are float32 ``[B, 3, 32, 32]``
    channels-last, normalised with ``mean`` and ``std`` of pixels in [0, 1], and int64 ``[B]``, both on ``device``. The
    pipeline runs ahead, also over the end of an epoch, so that the next epoch's first batch is ready when it is asked
    for.
    """

    starts_anew = False

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
        self.images = decode(split, workers) if isinstance(split.images, list) else split.images
        self.labels, self.plan_of_epoch = split.labels, plan_of_epoch
        self.batch_size = batch_size
        self.mean, self.std = mean, std
        self.device, self.workers = device, workers
        self.num_batches = -(-len(plan_of_epoch(0)) // batch_size)
        self.pipeline: Pipeline | None = None
        self.upcoming = 0, 0  # the epoch and the batch that the pipeline gives next
        self.lent: deque[tuple[torch.cuda.Event, Batch]] = deque()  # with the end of what was to be done with it

    def __len__(self) -> int:
        """Batches an epoch."""
        return self.num_batches

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``epoch`` from ``first_batch`` on, both counted from 0.

        Out of sequence, the pipeline is built anew.
        """
        if self.pipeline is None or (epoch, first_batch) != self.upcoming:
            self.pipeline = self._build(epoch, first_batch)
        for batch in range(first_batch, self.num_batches):
            images, labels = self.pipeline.run()
            self.upcoming = (epoch, batch + 1) if batch + 1 < self.num_batches else (epoch + 1, 0)
            tensors = (
                torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2),
                torch.from_dlpack(labels.as_tensor()),
            )
            try:
                yield tensors
            finally:
                if self.device.type == "cuda":
                    self._keep_until_done(tensors)

    def _keep_until_done(self, batch: Batch) -> None:
        """Keeps ``batch`` until the device has done what it was told to do so far.

        The memory is DALI's, which would take it back as soon as the host has forgotten the batch.
        """
        done = torch.cuda.Event()
        done.record()
        self.lent.append((done, batch))
        if len(self.lent) > AHEAD:
            self.lent[0][0].synchronize()
            self.lent.popleft()

    def _build(self, epoch: int, first_batch: int) -> Pipeline:
        """The pipeline that begins with ``first_batch`` of ``epoch``."""
        plan = self.plan_of_epoch(epoch)
        columns = {  # name: dtype, ndim and layout of a sample
            "images": (types.UINT8, 3, "HWC"),
            "labels": (types.INT64, 0, None),
            "crop": (types.INT32, 1, None),
            "flip": (types.INT32, 0, None),
            "cutout": (types.FLOAT, 1, None),
            "erasing": (types.FLOAT, 1, None),
        }
        for name, column in vars(plan).items():
            if column is None:
                del columns[name]
        dtypes, ndims, layouts = zip(*columns.values(), strict=True)

        # The source must not refer to this loader: in a cycle of references the pipeline would outlive it, until the
        # garbage collector finds it, perhaps in a forked process where the pipeline's threads do not exist.
        source = _PlannedBatches(
            {"images": self.images, "labels": self.labels},
            self.plan_of_epoch,
            epoch * self.num_batches + first_batch,
            self.num_batches,
            self.batch_size,
            list(columns),
        )
        pipeline = _pipeline(self.batch_size, self.device, self.workers)
        with pipeline:
            arrays = fn.external_source(
                source=source,
                num_outputs=len(columns),
                batch=True,
                dtype=list(dtypes),
                ndim=list(ndims),
                layout=list(layouts),
            )
            batch = dict(zip(columns, arrays, strict=True))
            images, labels = batch["images"], batch["labels"]
            if self.device.type == "cuda":
                images, labels = images.gpu(), labels.gpu()
            if "crop" in batch:
                images = fn.slice(
                    images,
                    start=batch["crop"],
                    shape=[IMAGE_SIZE, IMAGE_SIZE],
                    axes=[0, 1],
                    out_of_bounds_policy="pad",
                    fill_values=0,
                )
            images = fn.crop_mirror_normalize(
                images,
                mirror=batch.get("flip", 0),
                mean=[255 * value for value in self.mean],
                std=[255 * value for value in self.std],
                dtype=types.FLOAT,
                output_layout="HWC",
            )
            if "cutout" in batch:
                images = fn.erase(
                    images,
                    anchor=batch["cutout"],
                    shape=[float(CUTOUT_SIZE)] * 2,
                    axes=[0, 1],
                    centered_anchor=True,
                    fill_value=0.0,
                )
            if "erasing" in batch:
                box = batch["erasing"]
                images = fn.erase(images, anchor=box[:2], shape=box[2:], axes=[0, 1], fill_value=0.0)
            pipeline.set_outputs(images, labels)
        pipeline.build()
        return pipeline


class _PlannedBatches:
    """What DALI calls with the number of the batch since the pipeline was built: it gives that batch's ``columns``.

    ``arrays`` has a row an image, in the split's order; the plan's own columns have a row a position. ``first`` is the
    number of the pipeline's first batch, counted from the start of epoch 0.
    """

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        plan_of_epoch: Callable[[int], EpochPlan],
        first: int,
        num_batches: int,
        batch_size: int,
        columns: list[str],
    ) -> None:
        self.arrays, self.columns = arrays, columns
        self.first, self.num_batches, self.batch_size = first, num_batches, batch_size
        self.plan_of_epoch = lru_cache(maxsize=1)(plan_of_epoch)

    def __call__(self, iteration: int) -> tuple[np.ndarray, ...]:
        epoch, batch = divmod(self.first + iteration, self.num_batches)
        plan = self.plan_of_epoch(epoch)
        rows = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
        index = plan.order[rows]
        return tuple(
            self.arrays[name][index] if name in self.arrays else getattr(plan, name)[rows] for name in self.columns
        )


def decode(split: Split, workers: int) -> np.ndarray:
    """The pixels of an encoded split, uint8 ``[N, 32, 32, 3]``.

    By the CPU, whose JPEG decoder agrees with Pillow's to within 3 of 255 levels. Pillow decodes a batch that DALI,
    which is stricter about damage, refuses.
    """
    pixels = np.empty((len(split), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    batch_size = DECODE_BATCH_LARGE if split.resize else DECODE_BATCH
    batches = [slice(start, start + batch_size) for start in range(0, len(split), batch_size)]
    pipeline: Pipeline | None = None
    for i, batch in enumerate(batches):
        pipeline = pipeline or _decoder(split, batches[i:], workers)
        try:
            (images,) = pipeline.run()
            pixels[batch] = images.as_array()
        except RuntimeError:
            pipeline = None  # which the error has ended
            images = (decode_image(file) for file in split.images[batch])
            size = (IMAGE_SIZE, IMAGE_SIZE)
            pixels[batch] = [np.asarray(image.resize(size, Image.Resampling.BILINEAR)) for image in images]
    return pixels


def _decoder(split: Split, batches: list[slice], workers: int) -> Pipeline:
    """The pipeline that gives the images of ``batches``, which are all of one size, at most."""
    pipeline = _pipeline(batches[0].stop - batches[0].start, torch.device("cpu"), workers)
    with pipeline:
        files = fn.external_source(source=(split.images[batch] for batch in batches), dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(files, device="cpu", output_type=types.RGB)
        if split.resize:
            images = fn.resize(images, size=[IMAGE_SIZE, IMAGE_SIZE], interp_type=types.INTERP_LINEAR)
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _pipeline(batch_size: int, device: torch.device, workers: int) -> Pipeline:
    return Pipeline(
        batch_size=batch_size,
        num_threads=workers,
        device_id=(device.index or 0) if device.type == "cuda" else None,
        exec_dynamic=True,
    )
