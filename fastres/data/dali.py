"""The default loader: DALI pipelines, for CPU and GPU, that apply the epoch plan to whole batches."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from PIL import Image

from fastres.data import Batch, PlanLoader
from fastres.data.image_folder import decode_image
from fastres.data.plan import CUTOUT_SIZE, EpochPlan
from fastres.data.splits import IMAGE_SIZE, Split

MAX_BATCHES_IN_FLIGHT = 8  # that the GPU may still read; then the host waits
DECODE_BATCH, DECODE_BATCH_LARGE = 512, 16  # 32x32 images; images of up to MAX_PIXELS


class DaliLoader(PlanLoader):
    """Applies the plan with DALI, in ``workers`` threads and, for CUDA, on the device.

    Batches are on ``device``, the images in channels-last memory. Encoded images are decoded (and resized) once, at
    construction, by the CPU, and kept as 3 KiB of pixels each. The pipeline prefetches, also across the end of an
    epoch, so that the next epoch's first batch is ready when it is needed.
    """

    starts_anew = False

    def _set_up(self) -> None:
        if self.split.encoded:
            self.split = Split(decode(self.split, self.workers), self.split.labels)
        self.pipeline: Pipeline | None = None
        self.upcoming = 0, 0  # epoch and batch that the pipeline gives next
        self.in_flight: deque[tuple[torch.cuda.Event, Batch]] = deque()  # what the GPU may still read

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``epoch`` from ``first_batch`` on, both counted from 0.

        The pipeline is built again where they don't follow the batches before.
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
        """Keeps ``batch`` until the work enqueued on the device so far has finished.

        Its memory is DALI's, which reuses it as soon as the host has dropped the batch.
        """
        done = torch.cuda.Event()
        done.record()
        self.in_flight.append((done, batch))
        if len(self.in_flight) > MAX_BATCHES_IN_FLIGHT:
            self.in_flight[0][0].synchronize()
            self.in_flight.popleft()

    def _build(self, epoch: int, first_batch: int) -> Pipeline:
        """A pipeline whose first batch is ``first_batch`` of ``epoch``."""
        plan = self.plan_of_epoch(epoch)
        columns = {  # dtype, ndim and layout of a sample
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
            arrays={"images": np.asarray(self.split.images), "labels": self.split.labels},
            columns=list(columns),
            plan_of_epoch=lru_cache(maxsize=1)(self.plan_of_epoch),
            first=epoch * self.num_batches + first_batch,
            num_batches=self.num_batches,
            batch_size=self.batch_size,
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


@dataclass
class _PlannedBatches:
    """DALI's source: called with the number of a batch since the pipeline was built, it returns the batch's columns.

    arrays: columns with a row for each image of the split.
    columns: names of these and of the plan's columns, in the order in which they are returned.
    first: number of the pipeline's first batch, counted from the start of epoch 0.
    """

    arrays: dict[str, np.ndarray]
    columns: list[str]
    plan_of_epoch: Callable[[int], EpochPlan]
    first: int
    num_batches: int
    batch_size: int

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

    DALI's CPU decoder agrees with Pillow's to within 3 of 255 levels for JPEG. DALI is stricter about damage; Pillow
    decodes the batches that it refuses.
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
            pipeline = None  # unusable after an error
            images = (decode_image(file) for file in split.images[batch])
            size = (IMAGE_SIZE, IMAGE_SIZE)
            pixels[batch] = [np.asarray(image.resize(size, Image.Resampling.BILINEAR)) for image in images]
    return pixels


def _decoder(split: Split, batches: list[slice], workers: int) -> Pipeline:
    """A pipeline that decodes ``batches``, one at a time; the first is the largest."""
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
    gpu = None
    if device.type == "cuda":
        gpu = torch.cuda.current_device() if device.index is None else device.index
    return Pipeline(batch_size=batch_size, num_threads=workers, device_id=gpu, exec_dynamic=True)
