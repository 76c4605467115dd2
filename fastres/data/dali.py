"""The loader that users get: one DALI pipeline, for CPU and GPU, that applies the epoch plan to whole batches."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from fastres.data.datasets import IMAGE_SIZE, Split
from fastres.data.plan import CUTOUT_SIZE, EpochPlan

Batch = tuple[torch.Tensor, torch.Tensor]


class DaliLoader:
    """Applies the plan of an epoch to a split with DALI, in ``workers`` threads and, for CUDA, on the device.

    ``plan_of_epoch(epoch)`` gives the EpochPlan. Batches are float32 ``[B, 3, 32, 32]`` channels-last, normalised with
    ``mean`` and ``std`` of pixels in [0, 1], and int64 ``[B]``, both on ``device``. The pipeline runs ahead, also over
    the end of an epoch, so that the next epoch's first batch is ready when it is asked for.
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
        self.split, self.plan_of_epoch = split, plan_of_epoch
        self.batch_size = batch_size
        self.mean, self.std = mean, std
        self.device, self.workers = device, workers
        self.num_batches = len(split) // batch_size if drop_last else -(-len(split) // batch_size)
        self.pipeline: Pipeline | None = None
        self.upcoming = 0  # the epoch that the pipeline gives next; -1 in the middle of one

    def __len__(self) -> int:
        """Batches an epoch."""
        return self.num_batches

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of epoch ``epoch``, counted from 0. Out of sequence, the pipeline is built anew."""
        if self.pipeline is None or epoch != self.upcoming:
            self.pipeline = self._build(epoch)
        self.upcoming = -1
        for _ in range(self.num_batches):
            images, labels = self.pipeline.run()
            yield (
                torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2),
                torch.from_dlpack(labels.as_tensor()),
            )
        self.upcoming = epoch + 1

    def _build(self, first_epoch: int) -> Pipeline:
        """The pipeline whose first batch is the first of ``first_epoch``."""
        plan = self.plan_of_epoch(first_epoch)
        gpu = self.device.type == "cuda"
        columns = {  # name: dtype, ndim and layout of a sample
            "images": (types.UINT8, 1, None) if self.split.encoded else (types.UINT8, 3, "HWC"),
            "labels": (types.INT64, 0, None),
        }
        if plan.crop is not None:
            columns["crop"] = (types.INT32, 1, None)
        if plan.flip is not None:
            columns["flip"] = (types.INT32, 0, None)
        if plan.cutout is not None:
            columns["cutout"] = (types.FLOAT, 1, None)
        dtypes, ndims, layouts = zip(*columns.values(), strict=True)

        pipeline = Pipeline(
            batch_size=self.batch_size,
            num_threads=self.workers,
            device_id=(self.device.index or 0) if gpu else None,
            exec_dynamic=True,
        )
        with pipeline:
            sources = fn.external_source(
                source=_PlannedBatches(
                    self.split, self.plan_of_epoch, first_epoch, self.num_batches, self.batch_size, list(columns)
                ),
                num_outputs=len(columns),
                batch=True,
                dtype=list(dtypes),
                ndim=list(ndims),
                layout=list(layouts),
            )
            batch = dict(zip(columns, sources, strict=True))
            images, labels = batch["images"], batch["labels"]
            if self.split.encoded:
                images = fn.decoders.image(images, device="mixed" if gpu else "cpu", output_type=types.RGB)
            elif gpu:
                images = images.gpu()
            if self.split.resize:
                images = fn.resize(images, size=[IMAGE_SIZE, IMAGE_SIZE], interp_type=types.INTERP_LINEAR)
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
            pipeline.set_outputs(images, labels.gpu() if gpu else labels)
        pipeline.build()
        return pipeline


class _PlannedBatches:
    """What DALI calls with the number of the batch since the pipeline was built; gives the batch's ``columns``.

    It must not refer to the loader: in a cycle of references the pipeline would outlive the loader, until the garbage
    collector finds it, perhaps in a forked process where its threads do not exist.
    """

    def __init__(
        self,
        split: Split,
        plan_of_epoch: Callable[[int], EpochPlan],
        first_epoch: int,
        num_batches: int,
        batch_size: int,
        columns: list[str],
    ) -> None:
        self.split, self.plan_of_epoch = split, plan_of_epoch
        self.epoch, self.plan = first_epoch, plan_of_epoch(first_epoch)
        self.first_epoch, self.num_batches, self.batch_size = first_epoch, num_batches, batch_size
        self.columns = columns

    def __call__(self, iteration: int) -> tuple[np.ndarray, ...]:
        ahead, batch = divmod(iteration, self.num_batches)
        if self.first_epoch + ahead != self.epoch:
            self.epoch = self.first_epoch + ahead
            self.plan = self.plan_of_epoch(self.epoch)
        rows = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
        drawn = self.split.take(self.plan.order[rows])
        images = _pad(drawn.images) if isinstance(drawn.images, list) else drawn.images
        values = {"images": images, "labels": drawn.labels}
        return tuple(values[name] if name in values else getattr(self.plan, name)[rows] for name in self.columns)


def _pad(files: list[np.ndarray]) -> np.ndarray:
    """Encoded files as one uint8 array ``[B, longest]``: DALI takes it at a tenth of the cost of B arrays, and
    decoders stop at the end marker of a file."""
    padded = np.zeros((len(files), max(map(len, files))), np.uint8)
    for row, content in zip(padded, files, strict=True):
        row[: len(content)] = content
    return padded
