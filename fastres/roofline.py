"""The limit of a training step: the model's own arithmetic and traffic over the machine's own rates.

Williams, Waterman & Patterson, "Roofline: an insightful visual performance model" (2009): a kernel takes the longer of
its arithmetic at the rate of a large matrix product and its traffic at that of a large copy. One may be faster that
needs fewer operations, like Winograd's convolution, or whose tensors are still in a cache.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

COPY_BYTES = 2**28  # far more than a cache holds
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
MEASURE_SECONDS = 1.0
POOLING = nn.MaxPool2d, nn.AdaptiveAvgPool2d


class Kernel(NamedTuple):
    """Floating-point operations (a multiply-add is two) and bytes read and written, each tensor once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Machine:
    """What it reaches in a large matrix product and a large copy: FLOP/s, and bytes read plus written a second."""

    flops_per_second: float
    bytes_per_second: float


def forward_macs(model: nn.Module) -> int:
    """Multiply-adds of convolutions and linear layers for one image ``[3, 32, 32]``; ``model`` is on the meta device.

    The figure that is published as a model's "FLOPs" or MACs.
    """
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, 32, 32, device="meta"))
    return counter.get_total_flops() // 2


def step_kernels(model: nn.Module, batch_size: int, dtype: torch.dtype) -> list[Kernel]:
    """What one training step on ``batch_size`` images must do, with activations and gradients in ``dtype``.

    A convolution or linear layer is three products of the same size: output, gradient of the input (not for the first
    layer) and gradient of the weight. A batch norm with its residual and ReLU is one kernel in two passes: forward it
    reads the input twice and writes the output, 3 tensors (4 with a residual); backward it reads the input and the
    output's gradient twice and writes the input's gradient, 5 tensors (6 with the residual's gradient). Pooling moves
    its input and its output once in each direction. Loss and optimizer are left out. ``model`` is on the meta device,
    which computes shapes and no numbers.
    """
    kernels: list[Kernel] = []

    def count(module: Any, inputs: tuple[torch.Tensor, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        x = inputs[0]
        if isinstance(module, nn.BatchNorm2d):
            tensors = 10 if kwargs.get("residual") is not None else 8
            kernels.append(Kernel(0, tensors * x.numel() * dtype.itemsize))
            return
        if isinstance(module, POOLING):
            kernels.append(Kernel(0, 2 * (x.numel() + output.numel()) * dtype.itemsize))
            return
        products = 3 if x.requires_grad else 2
        traffic = (x.numel() + module.weight.numel() + output.numel()) * dtype.itemsize
        kernels.extend([Kernel(2 * _macs(module, output), traffic)] * products)

    kinds = nn.Conv2d, nn.Linear, nn.BatchNorm2d, *POOLING
    modules = [module for module in model.train().modules() if isinstance(module, kinds)]
    handles = [module.register_forward_hook(count, with_kwargs=True) for module in modules]
    model(torch.empty(batch_size, 3, 32, 32, device="meta"))
    for handle in handles:
        handle.remove()
    return kernels


def limit_seconds(kernels: Iterable[Kernel], machine: Machine) -> float:
    """The least time for ``kernels``, one after another, on ``machine``."""
    return sum(
        max(kernel.flops / machine.flops_per_second, kernel.bytes / machine.bytes_per_second) for kernel in kernels
    )


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The rates of ``device`` now: the best of a second of products of square matrices in ``dtype``, and of copies."""
    n = MATRIX_SIZE[device.type]
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Machine(
        flops_per_second=2 * n**3 / _best_seconds(lambda: torch.mm(left, right, out=product), device),
        bytes_per_second=2 * COPY_BYTES / _best_seconds(lambda: target.copy_(source), device),
    )


def _best_seconds(function: Callable[[], object], device: torch.device) -> float:
    best, end = float("inf"), time.perf_counter() + MEASURE_SECONDS
    function()
    while time.perf_counter() < end:
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _macs(module: Any, output: torch.Tensor) -> int:
    """Every output value is a sum over one output channel's or unit's weights."""
    return output.numel() * module.weight[0].numel()
