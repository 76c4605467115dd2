"""The results of an epoch of training and of an evaluation."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from fastres.training import distributed


@dataclass
class Epoch:
    """The progress of one epoch of training, in this process; ``of_all_processes`` sums over the job.

    number: counted from 0.
    loss_sum: float64 scalar on the device; sum over the images seen, label smoothing included.
    correct: int64 scalar on the device; correctly classified images.
    finite_steps: int64 scalar on the device; steps before the first with a NaN or infinite loss.
    lr: learning rate of the last step.
    seconds: training time, without evaluation and checkpoints.
    data_wait_seconds: the part of ``seconds`` in which the device was idle, waiting for a batch; updated by
        ``Trainer.settle``.
    """

    number: int
    loss_sum: torch.Tensor
    correct: torch.Tensor
    finite_steps: torch.Tensor
    steps: int = 0
    images: int = 0
    lr: float = 0.0
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

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> "Epoch":
        tensors = {name: value.to(device) for name, value in state.items() if torch.is_tensor(value)}
        return cls(**{**state, **tensors})

    def of_all_processes(self) -> "Epoch":
        """The epoch with the sums of all processes, and this process's times."""
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
    """Mean cross-entropy, accuracy in percent, and ``confusion[true][predicted]`` in images.

    top5_accuracy: percentage of images whose label is among the five highest logits; None below 100 classes.
    """

    loss: float
    accuracy: float
    confusion: list[list[int]]
    top5_accuracy: float | None = None

    @property
    def per_class_accuracy(self) -> list[float]:
        return [100 * row[label] / max(sum(row), 1) for label, row in enumerate(self.confusion)]
