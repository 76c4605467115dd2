"""The training loop: one step, one epoch, one evaluation. It knows nothing of studies, plots or files."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from fastres.config import TrainConfig
from fastres.data import Loader
from fastres.training.schedule import lr_factor

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


@dataclass(frozen=True)
class EpochResult:
    """One epoch of training. Accuracy in percent, loss with label smoothing, times in seconds.

    ``seconds`` runs between two synchronisations of the device and covers training alone; ``data_wait_seconds`` is the
    part of it in which the step stood waiting for a batch.
    """

    lr: float
    loss: float
    accuracy: float
    images: int
    seconds: float
    data_wait_seconds: float


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

    def train_epoch(self, loader: Loader, epoch: int, on_step: Callable[[], None] = lambda: None) -> EpochResult:
        """Trains on epoch ``epoch`` (from 0) of ``loader``, calling ``on_step`` after each step.

        The host never waits for the device inside: loss and accuracy are summed there and read at the end.
        """
        self.model.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        images_seen, waited, lr = 0, 0.0, 0.0
        self._synchronize()
        start = asked = time.perf_counter()
        for images, labels in loader.epoch(epoch):
            waited += time.perf_counter() - asked
            images, labels = self._to_device(images, labels)
            lr = self.optimizer.param_groups[0]["lr"]
            loss, logits = self._step(images, labels)
            loss_sum += loss * len(labels)
            correct += (logits.argmax(1) == labels).sum()
            images_seen += len(labels)
            on_step()
            asked = time.perf_counter()
        self._synchronize()
        seconds = time.perf_counter() - start
        return EpochResult(
            lr=lr,
            loss=loss_sum.item() / images_seen,
            accuracy=100 * correct.item() / images_seen,
            images=images_seen,
            seconds=seconds,
            data_wait_seconds=waited,
        )

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
            images, labels = self._to_device(images, labels)
            with self._autocast():
                logits = self.forward(images).float()
            loss_sum += F.cross_entropy(logits, labels, reduction="sum")
            confusion.update(logits, labels)
        counts = confusion.compute()
        return Evaluation(
            loss=loss_sum.item() / counts.sum().item(),
            accuracy=100 * counts.diag().sum().item() / counts.sum().item(),
            confusion=counts.tolist(),
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, AMP_DTYPES[self.config.amp], enabled=self.config.amp != "off")

    def _to_device(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            images.to(self.device, non_blocking=True, memory_format=self.memory_format),
            labels.to(self.device, non_blocking=True),
        )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
