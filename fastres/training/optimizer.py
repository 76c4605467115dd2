"""The optimizers by name."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import SGD, AdamW, Optimizer

from fastres.training.muon import Muon

if TYPE_CHECKING:
    from fastres.config import TrainConfig

IMAGE_CHANNELS = 3
SGD_MOMENTUM, SGD_WEIGHT_DECAY = 0.9, 5e-4  # beside Muon
Parameters = Iterable[torch.nn.Parameter]


def sgd(parameters: Parameters, config: "TrainConfig", lr: Any) -> Optimizer:
    return SGD(
        parameters,
        lr=lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def adamw(parameters: Parameters, config: "TrainConfig", lr: Any) -> Optimizer:
    """Loshchilov & Hutter 2017, arXiv:1711.05101."""
    return AdamW(
        parameters,
        lr=lr,
        betas=(config.momentum, 0.999),
        weight_decay=config.weight_decay,
        fused=True,
        capturable=bool(config.cuda_graphs),
    )


def muon(parameters: Parameters, config: "TrainConfig", lr: Any) -> Optimizer:
    """Muon for all convolutions but the stem, SGD for everything else; its vectors, those of norms and biases, are not
    decayed."""
    parameters = list(parameters)
    vectors = [p for p in parameters if p.squeeze().ndim <= 1]
    others = [p for p in parameters if p.squeeze().ndim > 1]
    convolutions = [p for p in others if p.ndim == 4 and p.size(1) != IMAGE_CHANNELS]
    matrices = [p for p in others if p.ndim != 4 or p.size(1) == IMAGE_CHANNELS]
    sgd_options = {"lr_ratio": config.sgd_lr / config.lr, "momentum": SGD_MOMENTUM, "nesterov": True}
    return Muon(
        convolutions,
        [
            {"params": matrices, "weight_decay": SGD_WEIGHT_DECAY, "lr": deepcopy(lr), **sgd_options},
            {"params": vectors, "weight_decay": 0.0, "lr": deepcopy(lr), **sgd_options},
        ],
        lr=lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )


OPTIMIZERS: dict[str, Callable[[Parameters, "TrainConfig", Any], Optimizer]] = {
    "sgd": sgd, "adamw": adamw, "muon": muon,
}  # fmt: skip


def create_optimizer(model: torch.nn.Module, config: "TrainConfig", device: torch.device) -> Optimizer:
    """The optimizer of ``config`` for all parameters of ``model``, its state allocated and zero.

    The learning rate is 0 until it is set. With CUDA graphs it is a tensor, which a replay reads anew.
    """
    lr = torch.zeros((), device=device) if config.cuda_graphs else 0.0
    optimizer = OPTIMIZERS[config.optimizer](model.parameters(), config, lr)
    # The state exists before the first step, so that a checkpoint has a known structure and a captured graph fixed
    # addresses, and so that SGD in fp16 does not keep an uninitialised buffer if the scaler skips step 1.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for tensor in state_tensors(optimizer):
        tensor.zero_()
    return optimizer


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of the next step, in place where it is a tensor, times a group's ``lr_ratio``."""
    for group in optimizer.param_groups:
        value = lr * group.get("lr_ratio", 1.0)
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def state_tensors(optimizer: Optimizer) -> list[torch.Tensor]:
    """All tensors of the optimizer's state."""
    return [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
