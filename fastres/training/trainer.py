"""The training loop: one step, one epoch, one evaluation. It knows nothing of studies, plots or files."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from fastres.config import TrainConfig
from fastres.data import Loader
from fastres.errors import RunError
from fastres.training.schedule import lr_factor

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
CPU_OUT_OF_MEMORY = "can't allocate memory"  # in torch's RuntimeError, which is of no type of its own


@contextmanager
def enough_memory(flag: str, size: int) -> Iterator[None]:
    """Turns running out of memory into RunError, with what to take in place of ``size``, the value of ``flag``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and CPU_OUT_OF_MEMORY not in str(error):
            raise
        mend = f"try {flag} {size // 2}" if size > 1 else "take a smaller --model"
        raise RunError(f"{flag} {size}: out of memory; {mend}") from error


@dataclass
class Epoch:
    """An epoch of training, as far as it has come; with the trainer's own state, enough to go on with it.

    Sums are over the images seen and stay on the device: ``loss_sum`` (float64, label smoothing included),
    ``correct`` and ``finite_steps`` (int64), the steps before the first whose loss was NaN or infinite. ``seconds``
    covers training alone and ``data_wait_seconds`` is the part of it in which the step stood waiting for a batch.
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


class Trainer:
    """SGD on ``model`` as ``config`` says, with ``device``, ``amp`` and ``compile`` no longer ``auto``.

    The model is moved to the device and its memory format in place.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, device: torch.device, num_classes: int, steps_per_epoch: int
    ) -> None:
        self.config, self.device, self.num_classes = config, device, num_classes
        self.steps_per_epoch = steps_per_epoch
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device).to(memory_format=self.memory_format)
        self.forward = torch.compile(self.model, dynamic=False) if config.compile else self.model
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lr_factor(
                config.schedule,
                epochs=config.epochs,
                steps_per_epoch=steps_per_epoch,
                warmup_epochs=config.warmup_epochs,
                milestones=config.milestones,
            ),
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")

    def warm_up(self) -> float:
        """Compiles, if so configured, and lets libraries choose their kernels: one step and one evaluation of noise.

        Weights, statistics, optimizer and random state stay as they are. Returns the seconds that it took.
        """
        start = time.perf_counter()
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            with enough_memory("--batch-size", self.config.batch_size):
                self._warm_up(self.config.batch_size, training=True)
            with enough_memory("--eval-batch-size", self.config.eval_batch_size):
                self._warm_up(self.config.eval_batch_size, training=False)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.load_state_dict(state)
        self.synchronize()
        return time.perf_counter() - start

    def _warm_up(self, size: int, training: bool) -> None:
        images, labels = self._to_device(torch.randn(size, 3, 32, 32), torch.zeros(size, dtype=torch.int64))
        self.model.train(training)
        with torch.set_grad_enabled(training), self._autocast():
            loss = F.cross_entropy(self.forward(images), labels)
        if training:
            loss.backward()

    def train_epoch(self, loader: Loader, epoch: Epoch, after_step: Callable[[], None] = lambda: None) -> None:
        """Trains on the rest of ``epoch``, bringing it up to date, and calls ``after_step`` after each step.

        The host never waits for the device inside. The clock stands still in ``after_step``, which is expected to
        synchronise the device if it does more than look.
        """
        self.model.train()
        self.synchronize()
        start = asked = time.perf_counter()
        for images, labels in loader.epoch(epoch.number, epoch.steps):
            epoch.data_wait_seconds += time.perf_counter() - asked
            epoch.lr = self.optimizer.param_groups[0]["lr"]
            with enough_memory("--batch-size", self.config.batch_size):
                images, labels = self._to_device(images, labels)
                loss, logits = self._step(images, labels)
            epoch.loss_sum += loss * len(labels)
            epoch.finite_steps += epoch.loss_sum.isfinite()
            epoch.correct += (logits.argmax(1) == labels).sum()
            epoch.images += len(labels)
            epoch.steps += 1
            epoch.seconds += time.perf_counter() - start
            after_step()
            start = asked = time.perf_counter()
        self.synchronize()
        epoch.seconds += time.perf_counter() - start

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with self._autocast():
            logits = self.forward(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return loss.detach(), logits.detach()

    @torch.no_grad()
    def evaluate(self, loader: Loader, epoch: int) -> Evaluation:
        """Loss and confusion over the images of the loader's epoch ``epoch``."""
        self.model.eval()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        confusion = MulticlassConfusionMatrix(self.num_classes, validate_args=False).to(self.device)
        for images, labels in loader.epoch(epoch):
            with enough_memory("--eval-batch-size", self.config.eval_batch_size), self._autocast():
                images, labels = self._to_device(images, labels)
                logits = self.forward(images).float()
            loss_sum += F.cross_entropy(logits, labels, reduction="sum")
            confusion.update(logits, labels)
        counts = confusion.compute()
        return Evaluation(
            loss=loss_sum.item() / counts.sum().item(),
            accuracy=100 * counts.diag().sum().item() / counts.sum().item(),
            confusion=counts.tolist(),
        )

    def synchronize(self) -> None:
        """Waits until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, AMP_DTYPES[self.config.amp], enabled=self.config.amp != "off")

    def _to_device(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            images.to(self.device, non_blocking=True, memory_format=self.memory_format),
            labels.to(self.device, non_blocking=True),
        )
