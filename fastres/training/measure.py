"""Measuring training: a few steps that stand for an epoch, the memory of a step, and loaders alone."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, chain, count, islice
from typing import Any

import numpy as np
import torch

from fastres.config import TrainConfig
from fastres.data import Batch, Loader, create_loader
from fastres.data.datasets import Dataset
from fastres.data.plan import training_plan
from fastres.training.baseline import StudyLoop
from fastres.training.trainer import Epoch, Trainer

LOADER_IMAGES = 20_000  # so that the start of the loader is a small part of a pass
LOADER_PASSES = 3


class Window:
    """``steps`` batches at a time of a ``loader`` that goes on from one call to the next, epoch after epoch.

    So a few steps show the loader's pace. Were it started for them, its workers would be seen to start up and to fill
    their queues. ``first_wait`` is what every epoch waits for its first batch, in seconds: nothing where the loader
    goes on from one epoch to the next.
    """

    starts_anew = False

    def __init__(self, loader: Loader, steps: int) -> None:
        self.steps = steps
        self.batches = chain.from_iterable(loader.epoch(number) for number in count())
        asked = time.perf_counter()
        next(self.batches)
        self.first_wait = time.perf_counter() - asked if loader.starts_anew else 0.0

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        return islice(self.batches, self.steps - first_batch)


class Resident:
    """The same batch again and again, already on the device: a loader that costs nothing."""

    starts_anew = False
    first_wait = 0.0

    def __init__(self, batch: Batch, steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        return iter([self.batch] * (self.steps - first_batch))


@dataclass
class Variant:
    """One way to train, and what was measured of it, a value a round."""

    name: str
    config: TrainConfig
    engine: StudyLoop | Trainer
    window: Any = None
    warm_up_seconds: float = 0.0
    peak_memory_mb: float = 0.0
    epoch_seconds: list[float] = field(default_factory=list)
    wait_seconds: list[float] = field(default_factory=list)

    def measure(self, number: int, steps_of_epoch: int) -> None:
        """Trains on the window and scales what it took to a whole epoch: the first wait is paid once, the rest each
        step. A window as long as an epoch has the first wait of the next one in it."""
        result = train(self.engine, self.window, number)
        wait, work = result.data_wait_seconds, result.seconds - result.data_wait_seconds
        if result.steps < steps_of_epoch:
            wait = self.window.first_wait + wait / result.steps * (steps_of_epoch - 1)
            work *= steps_of_epoch / result.steps
        self.wait_seconds.append(wait)
        self.epoch_seconds.append(work + wait)


def train(engine: StudyLoop | Trainer, loader: Loader, number: int = 0) -> Epoch:
    """Trains on epoch ``number`` of ``loader``."""
    epoch = Epoch.begin(number, engine.device)
    engine.train_epoch(loader, epoch)
    return epoch


def planned_loader(config: TrainConfig, dataset: Dataset, steps: int) -> Loader:
    """Training batches of ``config`` from as many random images as ``steps`` take."""
    rng = np.random.default_rng(config.seed)
    split = dataset.train.take(rng.permutation(len(dataset.train))[: steps * config.batch_size])
    return create_loader(
        config.loader,
        split,
        partial(training_plan, config.seed, num_images=len(split), augmentation=config.augmentation),
        batch_size=config.batch_size,
        mean=dataset.mean,
        std=dataset.std,
        device=torch.device(config.device),
        workers=config.workers,
    )


def first_batch(config: TrainConfig, dataset: Dataset) -> Batch:
    """One training batch, on the device, in the memory format that the model takes."""
    images, labels = next(planned_loader(config, dataset, 1).epoch(0))
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    device = torch.device(config.device)
    return images.to(device, memory_format=memory_format).clone(), labels.to(device).clone()


def warm_up(variant: Variant, dataset: Dataset) -> float:
    """Takes the first step, which compiles and tunes, a second under the eyes of the allocator, in which the compiler
    may capture, and a third; returns its seconds. fastres captures its step before that one: a replay allocates
    nothing."""
    step = Resident(first_batch(variant.config, dataset), 1)
    start = time.perf_counter()
    train(variant.engine, step)
    variant.warm_up_seconds = time.perf_counter() - start
    variant.peak_memory_mb = watch_memory(variant.engine, step)
    if variant.config.cuda_graphs and isinstance(variant.engine, Trainer):
        variant.warm_up_seconds += variant.engine.warm_up()
    return train(variant.engine, step).seconds


def watch_memory(engine: StudyLoop | Trainer, step: Loader) -> float:
    """The most MiB that torch's allocator held for this engine during a training step on ``step``.

    That is the engine's weights and optimizer state, and the peak of what the step allocated on top of what was there.
    """
    held = [*engine.model.parameters(), *engine.model.buffers()]
    held += [value for state in engine.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    own = sum(tensor.numel() * tensor.itemsize for tensor in held)
    engine.optimizer.zero_grad()  # the step's gradients count as allocated in it, not those that it frees
    if engine.device.type == "cuda":
        before = torch.cuda.memory_allocated(engine.device)
        torch.cuda.reset_peak_memory_stats(engine.device)
        train(engine, step)
        allocated = torch.cuda.max_memory_allocated(engine.device) - before
    else:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as recorded:
            train(engine, step)
        events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        allocated = max(accumulate(event.nbytes() for event in events), default=0)
    return (own + allocated) / 2**20


def loaders_alone(configs: Sequence[TrainConfig], dataset: Dataset) -> dict[str, float]:
    """Images a second of each loader with nobody at work on them; passes interleaved, and the median of them. A loader
    that goes on from one epoch to the next starts in the first pass alone."""
    steps = max(min(LOADER_IMAGES, len(dataset.train)) // configs[0].batch_size, 1)
    loaders = {config.loader: planned_loader(config, dataset, steps) for config in configs}
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(LOADER_PASSES):
        for name, loader in loaders.items():
            start = time.perf_counter()
            images = sum(len(labels) for _, labels in loader.epoch(number))
            if configs[0].device == "cuda":
                torch.cuda.synchronize()
            rates[name].append(images / (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in rates.items()}
