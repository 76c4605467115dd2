"""The training loop: one step, one epoch, one evaluation. It knows nothing of studies, plots or files."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchmetrics.functional.classification import multiclass_confusion_matrix

from fastres.config import TrainConfig
from fastres.data import Loader
from fastres.errors import RunError
from fastres.training import distributed
from fastres.training.schedule import lr_factor

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
Mark = Any  # a time in seconds, or an Event among what a GPU has been given to do
Step = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # images, labels -> loss, logits
CPU_OUT_OF_MEMORY = "can't allocate memory"  # in torch's RuntimeError, which is of no type of its own


@contextmanager
def enough_memory(flag: str, size: int) -> Iterator[None]:
    """Turns running out of memory into RunError, with what to take in place of ``size``, the value of ``flag``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        cause: BaseException | None = error
        while not isinstance(cause, torch.OutOfMemoryError | MemoryError) and CPU_OUT_OF_MEMORY not in str(cause):
            if cause is None:
                raise
            cause = cause.__context__  # a capture that is broken off raises another error
        mend = f"try {flag} {size // 2}" if size > 1 else "take a smaller --model"
        raise RunError(f"{flag} {size}: out of memory; {mend}") from error


@dataclass
class Epoch:
    """An epoch of training, as far as it has come; with the trainer's own state, enough to go on with it.

    Sums are over the images seen and stay on the device: ``loss_sum`` (float64, label smoothing included),
    ``correct`` and ``finite_steps`` (int64), the steps before the first whose loss was NaN or infinite. ``seconds``
    covers training alone and ``data_wait_seconds`` is the part of it in which the device had nothing to do but wait for
    a batch, as far as the trainer has settled it.
    Each of the processes of a job has its own; ``of_all_processes`` joins them.
    """

    number: int  # from 0
    loss_sum: torch.Tensor
    correct: torch.Tensor
    finite_steps: torch.Tensor
    steps: int = 0
    images: int = 0
    lr: float = 0.0  # of the last step
    seconds: float = 0.0
    data_wait_seconds: float = 0.0

    @classmethod
    def begin(cls, number: int, device: torch.device) -> "Epoch":
        return cls(
            number,
            loss_sum=torch.zeros((), dtype=torch.float64, device=device),
            correct=torch.zeros((), dtype=torch.int64, device=device),
            finite_steps=torch.zeros((), dtype=torch.int64, device=device),
        )

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> "Epoch":
        tensors = {name: value.to(device) for name, value in state.items() if torch.is_tensor(value)}
        return cls(**{**state, **tensors})

    def of_all_processes(self) -> "Epoch":
        """The epoch with the images of all processes; the times are still this one's."""
        own = self.loss_sum.item(), self.correct.item(), self.images, self.finite_steps.item()
        losses, correct, images, finite_steps = zip(*distributed.gather(own), strict=True)
        return replace(
            self,
            loss_sum=torch.full_like(self.loss_sum, sum(losses)),
            correct=torch.full_like(self.correct, sum(correct)),
            finite_steps=torch.full_like(self.finite_steps, min(finite_steps)),
            images=sum(images),
        )

    @property
    def loss(self) -> float:
        return self.loss_sum.item() / self.images

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.correct.item() / self.images


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, accuracy in percent, and ``confusion[true][predicted]`` image counts."""

    loss: float
    accuracy: float
    confusion: list[list[int]]

    @property
    def per_class_accuracy(self) -> list[float]:
        return [100 * row[label] / max(sum(row), 1) for label, row in enumerate(self.confusion)]


def seconds_between(start: Mark, end: Mark) -> float:
    """Between two marks of one device, which has passed both."""
    return start.elapsed_time(end) / 1000 if isinstance(start, torch.cuda.Event) else end - start


def compiled(model: nn.Module, config: TrainConfig) -> Callable[..., torch.Tensor]:
    """``model`` under torch.compile, if ``config`` says so."""
    return torch.compile(model, dynamic=False, mode=config.compile_mode) if config.compile else model


def capture(run: Callable[[], Any], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """``run`` as a CUDA graph, after a few runs, and what it returned. Graphs of one ``pool`` share memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # in which libraries compile and choose kernels, and take their memory
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # a graph that died in the midst of a capture would spoil it
    # in the threads of a loader CUDA may be called meanwhile
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        results = run()
    return graph, results


def captured(step: Step, images: torch.Tensor, labels: torch.Tensor) -> Step:
    """``step`` as one CUDA graph, for batches like ``images`` and ``labels``, which it keeps.

    What it returns is overwritten by its next call.
    """
    graph, results = capture(lambda: step(images, labels))

    def replay(new_images: torch.Tensor, new_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images.copy_(new_images)
        labels.copy_(new_labels)
        graph.replay()
        return results

    return replay


class Trainer:
    """SGD on ``model`` as ``config`` says, which ``resolve`` has left no ``auto`` in.

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
        self.replay: Step | None = None  # of the step as a CUDA graph
        self.waits: list[tuple[Mark, Mark]] = []  # for batches, which are not settled yet
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=torch.tensor(config.lr, device=device) if config.cuda_graphs else config.lr,  # a graph reads it anew
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=True,
        )
        if config.momentum:
            # SGD would take memory as it comes for it, and keep that if it skips the first step, as fp16 often does
            for parameter in self.model.parameters():
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.lr_factor = lr_factor(
            config.schedule,
            epochs=config.epochs,
            steps_per_epoch=steps_per_epoch,
            warmup_epochs=config.warmup_epochs or 0.0,
            milestones=config.milestones,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")

    def warm_up(self) -> float:
        """Compiles or captures, if so configured, and lets libraries choose their kernels: steps and an evaluation of
        noise.

        Weights, statistics, optimizer and random state stay as they are. Returns the seconds that it took.
        """
        start = time.perf_counter()
        tensors = [*self.model.state_dict().values(), *self.momentum_buffers().values()]
        values, scaler = [tensor.clone() for tensor in tensors], self.scaler.state_dict()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            with enough_memory("--batch-size", self.config.batch_size):
                self._warm_up(self.config.batch_size, training=True)
            with enough_memory("--eval-batch-size", self.config.eval_batch_size):
                self._warm_up(self.config.eval_batch_size, training=False)
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)  # in place, where a graph finds it
        self.scaler.load_state_dict(scaler)
        self.synchronize()
        return time.perf_counter() - start

    def _warm_up(self, batch_size: int, training: bool) -> None:
        size = distributed.largest_shard(batch_size)
        images, labels = self._to_device(torch.randn(size, 3, 32, 32), torch.zeros(size, dtype=torch.int64))
        self.model.train(training)
        if not training:
            with torch.no_grad(), self._autocast():
                self.predict(images)
        elif self.config.cuda_graphs:
            self.replay = captured(self._step, images, labels)
        else:
            self._step(images, labels)

    def train_epoch(self, loader: Loader, epoch: Epoch, after_step: Callable[[], None] = lambda: None) -> None:
        """Trains on the rest of ``epoch``, bringing it up to date, and calls ``after_step`` after each step.

        The host never waits for the device inside, unless it is several batches ahead of it. The clock stands still in
        ``after_step``, which is expected to ``settle`` the epoch if it does more than look.
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
            with enough_memory("--batch-size", self.config.batch_size):
                images, labels = self._to_device(images, labels)
                if self.replay and len(labels) == self.config.batch_size:
                    loss, logits = self.replay(images, labels)
                else:
                    loss, logits = self._step(images, labels, weight)
            epoch.loss_sum += loss * len(labels)
            epoch.finite_steps += epoch.loss_sum.isfinite()
            epoch.correct += (logits.argmax(1) == labels).sum()
            epoch.images += len(labels)
            epoch.steps += 1
            epoch.seconds += time.perf_counter() - start
            after_step()
            start, asked = time.perf_counter(), self._mark()
        epoch.seconds += time.perf_counter() - start
        self.settle(epoch)

    def settle(self, epoch: Epoch) -> None:
        """Waits until the device has done what it was given, which counts as training, and adds to ``epoch`` what the
        device has waited for batches."""
        start = time.perf_counter()
        self.synchronize()
        epoch.seconds += time.perf_counter() - start
        epoch.data_wait_seconds += sum(seconds_between(asked, given) for asked, given in self.waits)
        self.waits.clear()

    def _mark(self) -> Mark:
        """Now; on a GPU, when it comes to this point of what it was given, which it may long be behind."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _set_lr(self, step: int) -> float:
        """Sets the learning rate of a step, counted from the start of the run, and returns it."""
        lr = self.config.lr * self.lr_factor(step)
        for group in self.optimizer.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
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
        """Of this process's mean loss over ``images``, so that the mean of all is that over the images of all."""
        sizes = distributed.gather(images)
        return images * len(sizes) / sum(sizes)

    @torch.no_grad()
    def evaluate(self, loader: Loader, epoch: int) -> Evaluation:
        """Loss and confusion over the images of the loaders' epoch ``epoch`` in all processes, as on rank 0."""
        self.model.eval()
        distributed.copy_from_rank_0(self.model.buffers())
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        counts = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64, device=self.device)
        for images, labels in loader.epoch(epoch):
            with enough_memory("--eval-batch-size", self.config.eval_batch_size), self._autocast():
                images, labels = self._to_device(images, labels)
                logits = self.predict(images).float()
            loss_sum += F.cross_entropy(logits, labels, reduction="sum")
            counts += multiclass_confusion_matrix(logits, labels, self.num_classes, validate_args=False)
        losses, parts = zip(*distributed.gather((loss_sum.item(), counts.cpu())), strict=True)
        counts = sum(parts)
        return Evaluation(
            loss=sum(losses) / counts.sum().item(),
            accuracy=100 * counts.diag().sum().item() / counts.sum().item(),
            confusion=counts.tolist(),
        )

    def momentum_buffers(self) -> dict[str, torch.Tensor]:
        """By the names of the parameters; empty without momentum."""
        state = self.optimizer.state
        return {name: state[p]["momentum_buffer"] for name, p in self.model.named_parameters() if state[p]}

    def synchronize(self) -> None:
        """Waits until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _autocast(self) -> torch.autocast:
        # nothing is cast twice in a step, and a graph must not hold what a cache would give it
        return torch.autocast(
            self.device.type, AMP_DTYPES[self.config.amp], enabled=self.config.amp != "off", cache_enabled=False
        )

    def _to_device(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            images.to(self.device, non_blocking=True, memory_format=self.memory_format),
            labels.to(self.device, non_blocking=True),
        )
