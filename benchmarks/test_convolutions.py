"""Each network's convolutions against the machine's limit: forward, the gradient of the input and that of the weight.

    python -m pytest benchmarks/test_convolutions.py --benchmark-only

bfloat16, channels-last. `limit` is the roofline's, at the rates of a product of matrices and of a copy in the same
rounds; `all` is the sum over a network's convolutions. FASTRES_BENCHMARK_BATCH=32 makes a quick run.
"""

import os
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from timing import as_cuda_graph
from torch import nn

from fastres.models import create_model
from fastres.profiling.measure import interleave
from fastres.profiling.roofline import COPY_BYTES, MATRIX_SIZE

BATCH = int(os.environ.get("FASTRES_BENCHMARK_BATCH", "128"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 7
DIRECTIONS = "forward", "input", "weight"


class Layer(NamedTuple):
    """A square convolution with padding that keeps the size at stride 1; ``size``: pixels a side of its input."""

    channels: int
    out_channels: int
    kernel: int
    stride: int
    size: int

    def __str__(self) -> str:
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{stride} {self.channels} to {self.out_channels} at {self.size}x{self.size}"


def layers_of(model: str) -> Counter[Layer]:
    """The network's distinct convolutions, and how often it has each."""
    found: Counter[Layer] = Counter()

    def count(conv: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found[Layer(conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], inputs[0].shape[-1])] += 1

    with torch.device("meta"):
        network = create_model(model, 10, fused=False)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(count)
        network(torch.empty(2, 3, 32, 32))
    return found


def passes(layer: Layer):
    """The layer's forward and backward passes on random tensors, and their operations and bytes."""
    like = {"device": DEVICE, "dtype": torch.bfloat16}
    x, weight = (
        torch.randn(shape, **like).to(memory_format=torch.channels_last)
        for shape in (
            (BATCH, layer.channels, layer.size, layer.size),
            (layer.out_channels, layer.channels, layer.kernel, layer.kernel),
        )
    )
    where = [layer.stride] * 2, [layer.kernel // 2] * 2, [1, 1]
    y = torch.conv2d(x, weight, None, *where)
    grad = torch.randn_like(y)

    def backward(*mask: bool):
        return lambda: torch.ops.aten.convolution_backward(
            grad, x, weight, None, *where, False, [0, 0], 1, [*mask, False]
        )

    runs = {
        "forward": lambda: torch.conv2d(x, weight, None, *where),
        "input": backward(True, False),
        "weight": backward(False, True),
    }
    return runs, 2 * y.numel() * weight[0].numel(), x.nbytes + weight.nbytes + y.nbytes


def rates():
    """A product of matrices and a copy, and their operations and bytes."""
    n = MATRIX_SIZE[DEVICE]
    left, right = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    runs = {"matrix": lambda: torch.mm(left, right, out=product), "copy": lambda: target.copy_(source)}
    return runs, 2 * n**3, 2 * COPY_BYTES


@pytest.mark.parametrize("model", ["resnet18", "resnet50", "vgg16"])
def test_convolutions(report, model):
    reference, matrix_flops, copy_bytes = rates()
    total: dict[str, dict[str, np.ndarray]] = {
        direction: defaultdict(lambda: np.zeros(ROUNDS)) for direction in DIRECTIONS
    }
    for layer, number in layers_of(model).items():
        runs, flops, moved = passes(layer)
        seconds = interleave({name: as_cuda_graph(run) for name, run in (reference | runs).items()}, ROUNDS)
        limit = np.maximum(seconds["matrix"] * flops / matrix_flops, seconds["copy"] * moved / copy_bytes)
        for direction in DIRECTIONS:
            if direction == "input" and layer.channels == 3:
                continue  # nobody needs the gradient of the images
            measured = {"limit": limit, "convolution": seconds[direction]}
            report("convolution", f"{model} {direction}: {number} x {layer}", BATCH, DEVICE, measured)
            for name, values in measured.items():
                total[direction][name] += number * values
    for direction in DIRECTIONS:
        report("convolution", f"{model} {direction}: all", BATCH, DEVICE, total[direction])
