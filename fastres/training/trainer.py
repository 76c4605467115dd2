"""The training loop: one step, one epoch, one evaluation."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastres.config import TrainConfig
from fastres.data import Loader
from fastres.data.mixing import larger_part
from fastres.data.plan import mixes
from fastres.data.sizes import image_sizes
from fastres.errors import RunError
from fastres.training import distributed
from fastres.training.casts import with_cast_weights
from fastres.training.cuda_graph import Step, captured
from fastres.training.epoch import Epoch, Evaluation
from fastres.training.optimizer import create_optimizer, set_lr, state_tensors
from fastres.training.schedule import lr_factor

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
# of a compile mode that torch has no name for
COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    "max-autotune-no-coordinate-descent": {"max_autotune": True, "triton.cudagraphs": True}
}
Mark = Any  # CPU: seconds; GPU: a recorded CUDA event
TOP5_CLASSES = 100  # from so many on, an evaluation has a top-5 accuracy
FIRST_STEPS = 10  # whose losses are kept
CPU_OUT_OF_MEMORY = "can't allocate memory"  # in the message of torch's plain RuntimeError


@contextmanager
def explain_out_of_memory(flag: str, value: int | str) -> Iterator[None]:
    """Turns running out of memory into a RunError that advises half the ``value`` of ``flag``, or a smaller model."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        cause: BaseException | None = error
        while not isinstance(cause, torch.OutOfMemoryError | MemoryError) and CPU_OUT_OF_MEMORY not in str(cause):
            if cause is None:
                raise
            cause = cause.__context__  # an aborted capture raises an error of its own
        mend = "choose a smaller --model"
        if isinstance(value, int) and value > 1:
            mend = f"try {flag} {value // 2}"
        raise RunError(f"{flag} {value}: out of memory; {mend}") from error


@contextmanager
def trials_of_cudnn(wanted: bool) -> Iterator[None]:
    """Unless ``wanted``, cuDNN tries no algorithms to choose one, which takes seconds for a batch of a new size."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before and wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def seconds_between(start: Mark, end: Mark) -> float:
    """Between two marks of one device that have been reached."""
    return start.elapsed_time(end) / 1000 if isinstance(start, torch.cuda.Event) else end - start


def compiled(model: nn.Module, config: TrainConfig) -> Callable[..., torch.Tensor]:
    """``model``, through torch.compile if ``config.compile``."""
    if not config.compile:
        return model
    options = COMPILE_OPTIONS.get(config.compile_mode)
    return torch.compile(model, dynamic=False, mode=None if options else config.compile_mode, options=options)


class Trainer:
    """Trains and evaluates ``model`` as the resolved ``config`` says.

    The model is moved to the device and its memory format in place. In a job of several processes each trains on its
    shard of every batch, and the step is that of the whole batch.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, device: torch.device, num_classes: int, steps_per_epoch: int
    ) -> None:
        self.config, self.device, self.num_classes = config, device, num_classes
        self.steps_per_epoch = steps_per_epoch
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device).to(memory_format=self.memory_format)
        self.predict = self.forward = compiled(self.model, config)
        if distributed.world_size() > 1:
            self.forward = compiled(DistributedDataParallel(self.model), config)
        elif device.type == "cuda" and config.amp != "off" and not config.compile:  # a compiler fuses the casts itself
            self.forward = with_cast_weights(self.model, AMP_DTYPES[config.amp])
        self.replays: dict[torch.Size, Step] = {}  # the step as a CUDA graph, for batches of a shape
        self.loss = torch.zeros((), device=device)  # of the last step; a graph's next replay overwrites it
        self.losses: list[torch.Tensor] = []  # of the run's first steps, on this process's shards of the batches
        self.waits: list[tuple[Mark, Mark]] = []  # start and end of each wait for a batch since the last settle
        with explain_out_of_memory("--model", config.model):
            self.optimizer = create_optimizer(self.model, config, device)
        self.lr_factor = lr_factor(
            config.schedule,
            epochs=config.epochs,
            steps_per_epoch=steps_per_epoch,
            warmup_epochs=config.warmup_epochs or 0.0,
            milestones=config.milestones,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")

    def warm_up(self, evaluation: bool = True) -> float:
        """Runs training steps and an ``evaluation`` on noise, which compile, capture, and let libraries choose kernels.

        Weights, statistics, optimizer and random state are restored. Returns the seconds that it took.
        """
        start = time.perf_counter()
        tensors = [*self.model.state_dict().values(), *state_tensors(self.optimizer)]
        values, scaler = [tensor.clone() for tensor in tensors], self.scaler.state_dict()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            with explain_out_of_memory("--batch-size", self.config.batch_size):
                for size, _ in image_sizes(self.config.image_size_schedule, self.config.image_size):
                    self._warm_up(self.config.batch_size, size, training=True)
            if evaluation:
                with explain_out_of_memory("--eval-batch-size", self.config.eval_batch_size):
                    self._warm_up(self.config.eval_batch_size, self.config.image_size, training=False)
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)  # in place, at the address that a graph uses
        self.scaler.load_state_dict(scaler)
        self.synchronize()
        return time.perf_counter() - start

    def _warm_up(self, batch_size: int, size: int, training: bool) -> None:
        batch = distributed.largest_shard(batch_size)
        labels = torch.zeros(batch, dtype=torch.int64)
        if training and mixes(self.config.augmentation):
            labels = torch.zeros(batch, self.num_classes)
        images, labels = self._to_device(torch.randn(batch, 3, size, size), labels)
        self.model.train(training)
        if not training:
            with torch.no_grad(), self._autocast():
                self.predict(images)
        elif self.config.cuda_graphs:
            self.replays[images.shape] = captured(self._step, images, labels)
        else:
            for _ in range(min(distributed.world_size(), 2)):  # DDP misses a gradient at the second step
                self._step(images, labels)

    def train_epoch(self, loader: Loader, epoch: Epoch, after_step: Callable[[], None] = lambda: None) -> None:
        """Trains on the rest of ``epoch``, updates it, and calls ``after_step`` after each step.

        There is no synchronisation inside, except that the host is at most a few batches ahead. The clock stops during
        ``after_step``, which calls ``settle`` before it reads or saves the epoch.
        """
        self.model.train()
        steps = len(loader)
        self.synchronize()
        self.waits.clear()
        start, asked = time.perf_counter(), self._mark()
        for images, labels in loader.epoch(epoch.number, epoch.steps):
            self.waits.append((asked, self._mark()))
            last = epoch.steps + 1 == steps  # the only step whose batch may have unequal shards
            weight = self._weight(len(labels)) if last else 1.0
            epoch.lr = self._set_lr(epoch.number * self.steps_per_epoch + epoch.steps)
            with explain_out_of_memory("--batch-size", self.config.batch_size):
                images, labels = self._to_device(images, labels)
                if replay := self.replays.get(images.shape):
                    self.loss, logits = replay(images, labels)
                else:
                    with trials_of_cudnn(len(images) == distributed.largest_shard(self.config.batch_size)):
                        self.loss, logits = self._step(images, labels, weight)
            if epoch.number == 0 and epoch.steps == len(self.losses) < FIRST_STEPS:
                self.losses.append(self.loss.clone())
            epoch.loss_sum += self.loss * len(labels)
            epoch.finite_steps += epoch.loss_sum.isfinite()
            epoch.correct += (logits.argmax(1) == larger_part(labels)).sum()
            epoch.images += len(labels)
            epoch.steps += 1
            epoch.seconds += time.perf_counter() - start
            after_step()
            start, asked = time.perf_counter(), self._mark()
        epoch.seconds += time.perf_counter() - start
        self.settle(epoch)

    def settle(self, epoch: Epoch) -> None:
        """Synchronises (counted as training time), then adds the data wait to ``epoch``."""
        start = time.perf_counter()
        self.synchronize()
        epoch.seconds += time.perf_counter() - start
        epoch.data_wait_seconds += sum(seconds_between(asked, given) for asked, given in self.waits)
        self.waits.clear()

    def _mark(self) -> Mark:
        """The present time; on a GPU, an event that it reaches after the work queued so far."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _set_lr(self, step: int) -> float:
        """Sets the learning rate of a step, counted from the start of the run, and returns it."""
        lr = self.config.lr * self.lr_factor(step)
        set_lr(self.optimizer, lr)
        return lr

    def _step(
        self, images: torch.Tensor, labels: torch.Tensor, weight: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Trains on a batch and returns its mean loss and its logits."""
        with self._autocast():
            logits = self.forward(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        self.scaler.scale(loss if weight == 1 else loss * weight).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), logits.detach()

    def _weight(self, images: int) -> float:
        """Loss weight that makes DDP's average of gradients the mean over the whole batch."""
        sizes = distributed.gather(images)
        return images * len(sizes) / sum(sizes)

    @torch.no_grad()
    def predictions(
        self, loader: Loader, epoch: int, mirrored: bool = False
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Images, labels and float32 logits of each batch, on the device; ``mirrored`` as in ``evaluate``."""
        self.model.eval()
        for images, labels in loader.epoch(epoch):
            with explain_out_of_memory("--eval-batch-size", self.config.eval_batch_size), self._autocast():
                images, labels = self._to_device(images, labels)
                with trials_of_cudnn(len(images) == distributed.largest_shard(self.config.eval_batch_size)):
                    logits = self.predict(images).float()
                    if mirrored:
                        both = torch.stack([logits, self.predict(images.flip(3)).float()])
                        logits = both.log_softmax(2).logsumexp(0) - math.log(2)
            yield images, labels, logits

    @torch.no_grad()
    def evaluate(self, loader: Loader, epoch: int, mirrored: bool = False) -> Evaluation:
        """Loss and confusion matrix over the loader's epoch ``epoch`` in all processes, with rank 0's statistics.

        mirrored: by the mean of the probabilities of each image and its mirror image.
        """
        distributed.copy_from_rank_0(self.model.buffers())
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        counts = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64, device=self.device)
        in_top5 = torch.zeros((), dtype=torch.int64, device=self.device)
        for _, labels, logits in self.predictions(loader, epoch, mirrored):
            loss_sum += F.cross_entropy(logits, labels, reduction="sum")
            cell = labels * self.num_classes + logits.argmax(1)
            counts.view(-1).index_add_(0, cell, torch.ones_like(cell))
            if self.num_classes >= TOP5_CLASSES:
                in_top5 += (logits.topk(5).indices == labels[:, None]).sum()
        own = loss_sum.item(), counts.cpu(), in_top5.item()
        losses, parts, top5 = zip(*distributed.gather(own), strict=True)
        counts = sum(parts)
        images = counts.sum().item()
        return Evaluation(
            loss=sum(losses) / images,
            accuracy=100 * counts.diag().sum().item() / images,
            confusion=counts.tolist(),
            top5_accuracy=100 * sum(top5) / images if self.num_classes >= TOP5_CLASSES else None,
        )

    def synchronize(self) -> None:
        """Waits for all work queued on the GPU; does nothing on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _autocast(self) -> torch.autocast:
        # no weight is cast twice in a step, and a graph must not refer to the cache's tensors
        return torch.autocast(
            self.device.type, AMP_DTYPES[self.config.amp], enabled=self.config.amp != "off", cache_enabled=False
        )

    def _to_device(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            images.to(self.device, non_blocking=True, memory_format=self.memory_format),
            labels.to(self.device, non_blocking=True),
        )
