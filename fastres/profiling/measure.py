"""Measuring training: a few steps that stand for an epoch, the memory of a step, loaders without a model, and the plain
loop to compare with."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, count, islice, repeat
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fastres.config import TrainConfig
from fastres.data import Batch, Loader, create_loader
from fastres.data.mixing import larger_part
from fastres.data.plan import training_plan
from fastres.data.splits import Dataset
from fastres.models import create_model
from fastres.training.epoch import Epoch
from fastres.training.hardware import steps_per_epoch
from fastres.training.optimizer import state_tensors
from fastres.training.trainer import AMP_DTYPES, Trainer, compiled

# The settings of eager PyTorch. Profile and benchmarks take them with PlainTrainer. A study trains by fastres.train, so
# its eager run has fastres' own loop, whose gain is therefore missing from the study's "x eager".
EAGER: dict[str, Any] = {
    "channels_last": False, "amp": "off", "loader": "eager", "fused": False, "compile": False, "cuda_graphs": False,
}  # fmt: skip
LOADER_IMAGES = 20_000  # of a pass
LOADER_PASSES = 3


class PlainTrainer:
    """The loop of most training scripts: SGD at its defaults; loss and accuracy are brought to the host at every step.

    Memory format, precision and compilation follow ``config``, so that each can be added by itself. It shares no step
    with Trainer, and so does not change when that becomes faster.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device).to(memory_format=self.memory_format)
        self.forward = compiled(self.model, config)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")

    def train_epoch(self, loader: Loader, epoch: Epoch) -> None:
        """Trains on ``epoch`` and updates it."""
        self.model.train()
        start = asked = time.perf_counter()
        for images, labels in loader.epoch(epoch.number):
            epoch.data_wait_seconds += time.perf_counter() - asked
            images = images.to(self.device, memory_format=self.memory_format)
            labels = labels.to(self.device)
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, AMP_DTYPES[self.config.amp], enabled=self.config.amp != "off"):
                logits = self.forward(images)
                loss = F.cross_entropy(logits, labels)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            epoch.loss_sum += loss.item() * len(labels)
            epoch.correct += (logits.argmax(1) == larger_part(labels)).sum().item()
            epoch.images += len(labels)
            epoch.steps += 1
            asked = time.perf_counter()
        epoch.seconds += time.perf_counter() - start


def create_trainer(config: TrainConfig, dataset: Dataset, plain: bool = False) -> PlainTrainer | Trainer:
    """A trainer with new weights for the resolved ``config``."""
    torch.manual_seed(config.seed)
    device, classes = torch.device(config.device), len(dataset.classes)
    model = create_model(config.model, classes, config.zero_gamma, bool(config.fused))
    if plain:
        return PlainTrainer(model, config, device)
    return Trainer(model, config, device, classes, steps_per_epoch(config, len(dataset.train)))


class ContinuingLoader:
    """A loader of ``steps`` batches, which continues another one, epoch after epoch, from one call to the next.

    A few steps then show that loader's pace; if it were started for them, worker start-up would be measured.
    ``first_wait`` is the time in seconds that each epoch waits for its first batch: 0 for a loader that continues from
    one epoch to the next by itself.
    """

    starts_anew = False
    first_wait = 0.0

    def __init__(self, loader: Loader, steps: int) -> None:
        self.steps = steps
        self.batches: Iterator[Batch] = chain.from_iterable(map(loader.epoch, count()))
        start = time.perf_counter()
        next(self.batches)
        if loader.starts_anew:
            self.first_wait = time.perf_counter() - start

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        return islice(self.batches, self.steps - first_batch)


class RepeatedBatch(ContinuingLoader):
    """A loader of ``steps`` times the same batch, already on the device, so that loading takes no time."""

    def __init__(self, batch: Batch, steps: int) -> None:
        self.steps, self.batches = steps, repeat(batch)


@dataclass
class Candidate:
    """One way to train, and its measurements; lists have an entry for each round.

    warm_up_seconds: of the first step, with compilation, tuning and capture.
    peak_memory_mb: as ``measure_memory`` returns it.
    epoch_seconds, wait_seconds: of a whole epoch, and of the wait for data in it.
    """

    name: str
    config: TrainConfig
    trainer: PlainTrainer | Trainer
    warm_up_seconds: float = 0.0
    peak_memory_mb: float = 0.0
    epoch_seconds: list[float] = field(default_factory=list)
    wait_seconds: list[float] = field(default_factory=list)

    def warm_up(self, dataset: Dataset) -> float:
        """Takes a first step, one for its memory, and a third, whose seconds it returns.

        torch.compile may capture its graphs in the second. Trainer captures its step after that, because replaying a
        graph allocates nothing.
        """
        step = RepeatedBatch(first_batch(self.config, dataset), 1)
        start = time.perf_counter()
        train(self.trainer, step)
        self.warm_up_seconds = time.perf_counter() - start
        self.peak_memory_mb = measure_memory(self.trainer, step)
        if self.config.cuda_graphs and isinstance(self.trainer, Trainer):
            self.warm_up_seconds += self.trainer.warm_up(evaluation=False)
        return train(self.trainer, step).seconds

    def measure(self, loader: ContinuingLoader, number: int, steps_of_epoch: int) -> None:
        """Trains on ``loader`` and scales the time to a whole epoch: the first wait counts once, the rest per step.

        A loader as long as an epoch includes the next one's first wait.
        """
        result = train(self.trainer, loader, number)
        wait, work = result.data_wait_seconds, result.seconds - result.data_wait_seconds
        if result.steps < steps_of_epoch:
            wait = loader.first_wait + wait / result.steps * (steps_of_epoch - 1)
            work *= steps_of_epoch / result.steps
        self.wait_seconds.append(wait)
        self.epoch_seconds.append(work + wait)


def train(trainer: PlainTrainer | Trainer, loader: Loader, number: int = 0) -> Epoch:
    """Trains on epoch ``number`` of ``loader``."""
    epoch = Epoch.begin(number, trainer.device)
    trainer.train_epoch(loader, epoch)
    return epoch


def planned_loader(config: TrainConfig, dataset: Dataset, steps: int) -> Loader:
    """Training batches as ``config`` says, of ``steps * batch_size`` random images."""
    rng = np.random.default_rng(config.seed)
    split = dataset.train.take(rng.permutation(len(dataset.train))[: steps * config.batch_size])
    return create_loader(
        config.loader,
        split,
        lambda epoch: training_plan(config.seed, epoch, len(split), config.augmentation, split.size),
        batch_size=config.batch_size,
        mean=dataset.mean,
        std=dataset.std,
        device=torch.device(config.device),
        workers=config.workers,
        decode=config.decode,
        num_classes=len(dataset.classes),
    )


def first_batch(config: TrainConfig, dataset: Dataset) -> Batch:
    """A copy of one training batch, on the device, in the model's memory format."""
    batches = planned_loader(config, dataset, 1).epoch(0)  # held, because a loader that is freed may reuse the memory
    images, labels = next(batches)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    device = torch.device(config.device)
    return images.to(device, memory_format=memory_format).clone(), labels.to(device).clone()


def measure_memory(trainer: PlainTrainer | Trainer, step: Loader) -> float:
    """The peak in MiB of what torch's allocator holds for this trainer during a training step on ``step``.

    That is its weights and optimizer state, and the peak of the step's own allocations.
    """
    held = [*trainer.model.parameters(), *trainer.model.buffers(), *state_tensors(trainer.optimizer)]
    own = sum(tensor.numel() * tensor.itemsize for tensor in held)
    trainer.optimizer.zero_grad()  # so that the step allocates its gradients, rather than free the last ones
    if trainer.device.type == "cuda":
        before = torch.cuda.memory_allocated(trainer.device)
        torch.cuda.reset_peak_memory_stats(trainer.device)
        train(trainer, step)
        allocated = torch.cuda.max_memory_allocated(trainer.device) - before
    else:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as recorded:
            train(trainer, step)
        events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        allocated = max(accumulate(event.nbytes() for event in events), default=0)
    return (own + allocated) / 2**20


def loader_rates(config: TrainConfig, names: Sequence[str], dataset: Dataset) -> dict[str, float]:
    """Images a second of each loader with no model consuming the batches: the median of interleaved passes."""
    steps = max(min(LOADER_IMAGES, len(dataset.train)) // config.batch_size, 1)

    def passes(name: str) -> Callable[[], object]:
        loader, numbers = planned_loader(replace(config, loader=name), dataset, steps), count()
        return lambda: deque(loader.epoch(next(numbers)), maxlen=0)

    seconds = interleave({name: passes(name) for name in names}, LOADER_PASSES)
    return {name: steps * config.batch_size / float(np.median(values)) for name, values in seconds.items()}


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each candidate in each round, ``[rounds]``; a round calls every candidate once, in random order.

    Other load on the machine, and the caches as the candidate before has left them, then slow all alike. Each candidate
    is called once to warm up. A GPU is synchronised before and after each measurement.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for name in rng.permutation(list(candidates)):
            wait()
            start = time.perf_counter()
            candidates[name]()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}
