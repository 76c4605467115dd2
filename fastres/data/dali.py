"""The default loader: DALI pipelines, for CPU and GPU, that apply the epoch plan to whole batches."""

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode
from PIL import Image

from fastres.data import Batch, PlanLoader, pixels_on_gpu
from fastres.data.image_folder import decode_image
from fastres.data.plan import EpochPlan, crop_padding
from fastres.data.splits import IMAGE_SIZE, Split

Images = np.ndarray | torch.Tensor | list[np.ndarray]  # pixels uint8 [N, S, S, 3], on a GPU if a tensor; or files
MAX_BATCHES_IN_FLIGHT = 8  # that the GPU may still read; then the host waits
DECODE_BATCH, DECODE_BATCH_LARGE = 512, 16  # 32x32 images; images of up to MAX_PIXELS
REFLECTED_AT_ONCE = 1024


class DaliLoader(PlanLoader):
    """Applies the plan with DALI, in ``workers`` threads and, for CUDA, on the device.

    Batches are on ``device``, the images in channels-last memory. Image files are decoded (and resized) there, too; the
    pixels stay on a GPU where they take at most a quarter of its free memory. The pipeline prefetches, also across the
    end of an epoch, so that the next epoch's first batch is ready when it is needed.
    """

    starts_anew = False
    default_decode = "once"

    def _set_up(self) -> None:
        split = self.split
        self.images: Images = split.images
        if split.encoded and self.decode == "every-epoch":
            self.images = accepted(split, self.workers, self.device)
        elif split.encoded:
            self.images = decode(split, self.workers, self.device)
        elif pixels_on_gpu(len(split), self.device, split.size):
            self.images = torch.from_numpy(np.asarray(split.images)).to(self.device)
        plan, self.padded = self.plan_of_epoch(0), False
        if plan.reflectcrop is not None and plan.crop is None and not isinstance(self.images, list):
            self.images, self.padded = with_reflection(self.images), True  # once, rather than in every batch
        self.pipeline: Pipeline | None = None
        self.upcoming = 0, 0  # epoch and batch that the pipeline gives next
        self.in_flight: deque[tuple[torch.cuda.Event, Batch]] = deque()  # what the GPU may still read

    def _batches(self, epoch: int, first_batch: int) -> Iterator[Batch]:
        """The pipeline is built again where these batches don't follow those before."""
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
        encoded, on_gpu = isinstance(self.images, list), isinstance(self.images, torch.Tensor)
        plan_of_epoch = self.plan_of_epoch
        augmentations = {  # dtype, ndim and layout of a sample
            "crop": (types.INT32, 1, None),
            "reflectcrop": (types.INT32, 1, None),
            "flip": (types.INT32, 0, None),
            "size": (types.INT32, 0, None),
            "cutout": (types.FLOAT, 1, None),
            "erasing": (types.FLOAT, 1, None),
        }
        columns = {"labels": (types.INT64, 0, None)}
        columns |= {
            name: kind for name, kind in augmentations.items() if getattr(plan_of_epoch(epoch), name) is not None
        }

        def source(names: Sequence[str], device: str, *kinds: Sequence[object]) -> Sequence[DataNode]:
            # It must not refer to this loader: in a cycle of references the pipeline would outlive it, until the
            # garbage collector finds it, perhaps in a forked process where the pipeline's threads do not exist.
            batches = _PlannedBatches(
                arrays={"images": self.images, "labels": self.split.labels},
                columns=names,
                plan_of_epoch=plan_of_epoch,
                first=epoch * self.num_batches + first_batch,
                num_batches=self.num_batches,
                batch_size=self.batch_size,
            )
            dtype, ndim, layout = map(list, zip(*kinds, strict=True))
            return fn.external_source(
                batches, len(names), batch=True, device=device, dtype=dtype, ndim=ndim, layout=layout
            )

        pipeline = _pipeline(self.batch_size, self.device, self.workers)
        with pipeline:
            batch = dict(zip(columns, source(list(columns), "cpu", *columns.values()), strict=True))
            image = (types.UINT8, 1, None) if encoded else (types.UINT8, 3, "HWC")
            (images,) = source(["images"], "gpu" if on_gpu else "cpu", image)
            labels = batch["labels"]
            if encoded:
                images = _decoded(images, self.split, self.device)
            elif self.device.type == "cuda" and not on_gpu:
                images = images.gpu()
            if self.device.type == "cuda":
                labels = labels.gpu()
            window: dict[str, Any] = {"shape": [self.split.size] * 2, "axes": [0, 1]}
            if "crop" in batch:
                images = fn.slice(images, start=batch["crop"], out_of_bounds_policy="pad", fill_values=0, **window)
            if "reflectcrop" in batch:
                images = fn.slice(
                    images if self.padded else _reflected(images, self.split.size),
                    start=batch["reflectcrop"] + crop_padding(self.split.size),
                    **window,
                )
            images = fn.crop_mirror_normalize(
                images,
                mirror=batch.get("flip", 0),
                mean=[255 * value for value in self.mean],
                std=[255 * value for value in self.std],
                dtype=types.FLOAT,
                output_layout="HWC",
            )
            if "size" in batch:
                size = fn.cast(batch["size"], dtype=types.FLOAT)
                images = fn.resize(images, resize_x=size, resize_y=size, interp_type=types.INTERP_LINEAR)
            for box in (batch[name] for name in ("cutout", "erasing") if name in batch):
                images = fn.erase(images, anchor=box[:2], shape=box[2:], axes=[0, 1], fill_value=0.0)
            pipeline.set_outputs(images, labels)
        pipeline.build()
        return pipeline


@dataclass
class _PlannedBatches:
    """DALI's source: called with the number of a batch since the pipeline was built, it returns the batch's columns.

    arrays: columns with a row for each image of the split; a tensor's batches are gathered on its device.
    columns: names of these and of the plan's columns, in the order in which they are returned.
    first: number of the pipeline's first batch, counted from the start of epoch 0.
    """

    arrays: dict[str, Images]
    columns: Sequence[str]
    plan_of_epoch: Callable[[int], EpochPlan]
    first: int
    num_batches: int
    batch_size: int
    uploaded: tuple[np.ndarray, torch.Tensor] | None = None  # an epoch's order, on the host and on the GPU

    def __call__(self, iteration: int) -> tuple[np.ndarray, ...]:
        epoch, batch = divmod(self.first + iteration, self.num_batches)
        plan = self.plan_of_epoch(epoch)
        rows = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
        return tuple(
            self._gather(self.arrays[name], plan.order, rows) if name in self.arrays else getattr(plan, name)[rows]
            for name in self.columns
        )

    def _gather(self, array: Images, order: np.ndarray, rows: slice) -> Any:
        if isinstance(array, list):
            return [array[i] for i in order[rows]]
        if isinstance(array, np.ndarray):
            return array[order[rows]]
        if self.uploaded is None or self.uploaded[0] is not order:  # once an epoch
            self.uploaded = order, torch.from_numpy(order).to(array.device)
        return array[self.uploaded[1][rows]]


def with_reflection(images: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """``images``, ``[N, S, S, 3]``, with their reflection in the pixels around them that a crop can show."""
    rows = np.pad(np.arange(images.shape[1]), crop_padding(images.shape[1]), mode="reflect")
    shape = len(images), len(rows), len(rows), 3
    padded: Any = np.empty(shape, np.uint8) if isinstance(images, np.ndarray) else images.new_empty(shape)
    for start in range(0, len(images), REFLECTED_AT_ONCE):  # so that no second copy is made of them all
        part = images[start : start + REFLECTED_AT_ONCE]
        padded[start : start + REFLECTED_AT_ONCE] = part[:, rows][:, :, rows]
    return padded


def _reflected(images: DataNode, size: int) -> DataNode:
    """``with_reflection`` as a part of a pipeline."""
    padding = crop_padding(size)
    for axis in (0, 1):
        before, after = (
            fn.flip(fn.slice(images, start=[start], shape=[padding], axes=[axis]), vertical=1 - axis, horizontal=axis)
            for start in (1, size - 1 - padding)
        )
        images = fn.cat(before, images, after, axis=axis)
    return images


def decode(split: Split, workers: int, device: torch.device) -> np.ndarray | torch.Tensor:
    """The pixels of an encoded split, uint8 ``[N, size, size, 3]``, on a GPU if they are to stay there.

    DALI's decoders agree with Pillow's to within 3 of 255 levels for JPEG. DALI is stricter about damage; Pillow
    decodes the batches that it refuses.
    """
    size = (split.size, split.size)
    shape, keep = (len(split), *size, 3), pixels_on_gpu(len(split), device, split.size)
    pixels = torch.empty(shape, dtype=torch.uint8, device=device if keep else "cpu")
    for rows, images in _decoded_batches(split, workers, device):
        if images is None:
            files = (decode_image(file).resize(size, Image.Resampling.BILINEAR) for file in split.images[rows])
            images = torch.from_numpy(np.stack([np.asarray(image) for image in files]))
        pixels[rows] = images.to(pixels.device)
    return pixels if keep else pixels.numpy()


def accepted(split: Split, workers: int, device: torch.device) -> list[np.ndarray]:
    """The files of an encoded split; where DALI refuses a batch, as PNG files of what Pillow decodes."""
    files: list[np.ndarray] = list(split.images)
    for rows, images in _decoded_batches(split, workers, device):
        if images is None:
            for i in range(*rows.indices(len(files))):
                png = io.BytesIO()
                decode_image(files[i]).save(png, "PNG")
                files[i] = np.frombuffer(png.getbuffer(), np.uint8)
    return files


def _decoded_batches(split: Split, workers: int, device: torch.device) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Slices of an encoded split with their pixels, which are valid until the next one; None if DALI refuses a file."""
    batch_size = DECODE_BATCH_LARGE if split.resize or split.size > IMAGE_SIZE else DECODE_BATCH
    batches = [slice(start, start + batch_size) for start in range(0, len(split), batch_size)]
    pipeline: Pipeline | None = None
    for i, rows in enumerate(batches):
        try:
            pipeline = pipeline or _decoder(split, batches[i:], workers, device)
            (images,) = pipeline.run()
        except RuntimeError:
            pipeline = None  # unusable after an error
            yield rows, None
        else:
            yield rows, torch.from_dlpack(images.as_tensor())


def _decoder(split: Split, batches: list[slice], workers: int, device: torch.device) -> Pipeline:
    """A pipeline that decodes ``batches``, one at a time; the first is the largest."""
    pipeline = _pipeline(batches[0].stop - batches[0].start, device, workers)
    with pipeline:
        files = fn.external_source(source=(split.images[batch] for batch in batches), dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(_decoded(files, split, device))
    pipeline.build()
    return pipeline


def _decoded(files: DataNode, split: Split, device: torch.device) -> DataNode:
    """Pixels from the files of ``split``: on a GPU by nvJPEG, with the same upsampling of colours as on a CPU."""
    images = fn.decoders.image(
        files,
        device="mixed" if device.type == "cuda" else "cpu",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,
        hw_decoder_load=0.0,
    )
    return fn.resize(images, size=[split.size] * 2, interp_type=types.INTERP_LINEAR) if split.resize else images


def _pipeline(batch_size: int, device: torch.device, workers: int) -> Pipeline:
    gpu = None
    if device.type == "cuda":
        gpu = torch.cuda.current_device() if device.index is None else device.index
    return Pipeline(batch_size=batch_size, num_threads=workers, device_id=gpu, exec_dynamic=True)
