"""The roofline limit of a training step: a model's FLOPs and bytes over the machine's measured rates.

Williams, Waterman & Patterson, "Roofline: an insightful visual performance model" (2009): a kernel takes the longer of
its arithmetic at the rate of a large matrix product and its traffic at the rate of a large copy. A kernel can beat this
bound if it needs fewer operations, like Winograd's convolution, or finds its tensors in a cache. Products with padding
are counted, as in published FLOPs; oneDNN leaves most of them out.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fastres.data.splits import IMAGE_SIZE

COPY_BYTES = 2**28  # far more than a cache holds
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
COUNTED_IMAGES = 2  # the fewest that a norm trains on
CALLS = {"cpu": 1, "cuda": 10}  # between two synchronisations, which take 5% of the time of a copy on an H100
MEASURE_SECONDS = 1.0
POOLING = nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d
COUNTED = nn.Conv2d, nn.Linear, nn.BatchNorm2d, *POOLING
FREE = nn.Identity, nn.Flatten, nn.Dropout, nn.ReLU  # part of what comes before


class Kernel(NamedTuple):
    """Floating-point operations (a multiply-add is two) and bytes read and written, each tensor once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Machine:
    """FLOP/s of a large matrix product; bytes read plus bytes written a second of a large copy."""

    flops_per_second: float
    bytes_per_second: float


def forward_macs(model: nn.Module, size: int = IMAGE_SIZE) -> int:
    """Multiply-adds of convolutions and linear layers for one image ``[3, size, size]``: a model's published FLOPs or
    MACs.

    ``model`` is on the meta device or the CPU.
    """
    # imports Triton, whose bindings print the types that gc.freeze keeps as leaks
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(_images(model, 1, size))
    return counter.get_total_flops() // 2


def step_kernels(model: nn.Module, batch_size: int, dtype: torch.dtype, size: int = IMAGE_SIZE) -> list[Kernel]:
    """The kernels of a training step on images ``[batch_size, 3, size, size]``, with activations and gradients in
    ``dtype``.

    A convolution or linear layer is three products of the same size: output, gradient of the input (not for the first
    layer) and gradient of the weight. A batch norm with its residual and ReLU is one kernel in two passes: forward it
    reads the input twice and writes the output, 3 tensors (4 with a residual); backward it reads the input and the
    output's gradient twice and writes the input's gradient, 5 tensors (6 with the residual's gradient). Pooling moves
    its input and its output once in each direction. Loss and optimizer are left out. ``model`` is on the meta device or
    the CPU, and sees two images.
    """
    kernels: list[Kernel] = []

    def count(module: Any, inputs: tuple[torch.Tensor, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        x = inputs[0] if inputs else kwargs["input"]
        read, written = (tensor.numel() * batch_size // COUNTED_IMAGES for tensor in (x, output))
        if isinstance(module, nn.BatchNorm2d):
            tensors = 10 if kwargs.get("residual") is not None else 8
            kernels.append(Kernel(0, tensors * read * dtype.itemsize))
            return
        if isinstance(module, POOLING):
            kernels.append(Kernel(0, 2 * (read + written) * dtype.itemsize))
            return
        products = 3 if x.requires_grad else 2
        flops = 2 * written * module.weight[0].numel()  # an output sums over the weights of its channel or unit
        traffic = (read + module.weight.numel() + written) * dtype.itemsize
        kernels.extend([Kernel(flops, traffic)] * products)

    modules = [module for module in model.train().modules() if isinstance(module, COUNTED)]
    handles = [module.register_forward_hook(count, with_kwargs=True) for module in modules]
    with torch.random.fork_rng(devices=()):
        model(_images(model, COUNTED_IMAGES, size))
    for handle in handles:
        handle.remove()
    return kernels


def _images(model: nn.Module, number: int, size: int) -> torch.Tensor:
    return torch.zeros(number, 3, size, size, device=next(model.parameters()).device)


def unknown_layers(model: nn.Module) -> list[str]:
    """The types of layers in ``model`` that ``step_kernels`` does not count."""
    leaves = [module for module in model.modules() if not any(module.children())]
    return sorted({type(module).__name__ for module in leaves if not isinstance(module, (*COUNTED, *FREE))})


def limit_seconds(kernels: Iterable[Kernel], machine: Machine) -> float:
    """The sum of the kernels' bounds on ``machine``."""
    return sum(
        max(kernel.flops / machine.flops_per_second, kernel.bytes / machine.bytes_per_second) for kernel in kernels
    )


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The best rates of ``device`` in MEASURE_SECONDS of products of square matrices in ``dtype``, and of copies."""
    n = MATRIX_SIZE[device.type]
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Machine(
        flops_per_second=2 * n**3 / _best_seconds(lambda: torch.mm(left, right, out=product), device),
        bytes_per_second=2 * COPY_BYTES / _best_seconds(lambda: target.copy_(source), device),
    )


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds a call, at best."""
    best, end = float("inf"), time.perf_counter() + MEASURE_SECONDS
    run()
    while best == float("inf") or time.perf_counter() < end:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(CALLS[device.type]):
            run()
        _synchronize(device)
        best = min(best, (time.perf_counter() - start) / CALLS[device.type])
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
