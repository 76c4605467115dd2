"""What the profile and the benchmarks compare fastres with: the loop that the studies, and most scripts, train with."""

import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fastres.config import TrainConfig
from fastres.data import Loader
from fastres.training.trainer import AMP_DTYPES, Epoch, compiled

EAGER: dict[str, Any] = {  # the settings of plain PyTorch
    "channels_last": False, "amp": "off", "loader": "eager", "fused": False, "compile": False, "cuda_graphs": False,
}  # fmt: skip


class StudyLoop:
    """Plain PyTorch: SGD at its defaults, loss and accuracy brought to the host at every step.

    It takes memory format, precision and compilation from ``config``, so that each can be added to it alone.
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
        """Trains on ``epoch``, bringing it up to date."""
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
            epoch.correct += (logits.argmax(1) == labels).sum().item()
            epoch.images += len(labels)
            epoch.steps += 1
            asked = time.perf_counter()
        epoch.seconds += time.perf_counter() - start
