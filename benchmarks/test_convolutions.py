"""Each network's convolutions on a CPU against its limit: forward, gradient of the input and gradient of the weight.

    python -m pytest benchmarks/test_convolutions.py --benchmark-only

bfloat16, channels-last. `limit` is the roofline's, without what would be multiplied with padding, at the rates of a
product of matrices and of a copy in the same rounds; `all` is the sum over a network's convolutions.
FASTRES_BENCHMARK_BATCH=32 makes a quick run. On a GPU kernel_table.py breaks a step down.
"""

import os
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from fastres.models import create_model
from fastres.profiling.measure import interleave
from fastres.profiling.roofline import COPY_BYTES, MATRIX_SIZE

BATCH = int(os.environ.get("FASTRES_BENCHMARK_BATCH", "128"))
ROUNDS = 7
DIRECTIONS = "forward", "input", "weight"


class Layer(NamedTuple):
    """A convolution by its kernel, stride and channels; ``size``: pixels a side of its input."""

    kernel: int
    stride: int
    channels: int
    out_channels: int
    size: int

    def __str__(self) -> str:
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{stride} {self.channels} to {self.out_channels} at {self.size}x{self.size}"


def layers_of(model: str) -> dict[Layer, list[nn.Conv2d]]:
    """The network's convolutions, those that are alike together."""
    found: dict[Layer, list[nn.Conv2d]] = defaultdict(list)

    def note(conv, inputs, output):
        sizes = conv.kernel_size[0], conv.stride[0], conv.in_channels, conv.out_channels, inputs[0].shape[-1]
        found[Layer(*sizes)].append(conv)

    network = create_model(model, 10)
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    handles = [conv.register_forward_hook(note) for conv in convs]
    network(torch.zeros(2, 3, 32, 32))
    for handle in handles:
        handle.remove()
    return found


def passes(conv, layer):
    """The passes of a convolution on random tensors, and the operations and bytes of each."""
    conv = conv.to(torch.bfloat16, memory_format=torch.channels_last)
    x = torch.randn(BATCH, layer.channels, layer.size, layer.size, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = conv(x)
    grad = torch.randn_like(y)
    runs = {
        "forward": lambda: conv(x),
        "input": lambda: torch.autograd.grad(y, x, grad, retain_graph=True),
        "weight": lambda: torch.autograd.grad(y, conv.weight, grad, retain_graph=True),
    }
    ones = torch.ones(1, 1, layer.size, layer.size), torch.ones(1, 1, layer.kernel, layer.kernel)
    inside = torch.conv2d(*ones, stride=layer.stride, padding=layer.kernel // 2).sum()  # products with pixels
    flops = 2 * BATCH * layer.channels * layer.out_channels * int(inside)
    return runs, flops, x.nbytes + conv.weight.nbytes + y.nbytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the CPU")
@pytest.mark.parametrize("model", ["resnet18", "resnet50", "vgg16"])
def test_convolutions(report, model):
    n = MATRIX_SIZE["cpu"]
    left, right = torch.randn(2, n, n, dtype=torch.bfloat16)
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    rates = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}
    total = {direction: defaultdict(lambda: np.zeros(ROUNDS)) for direction in DIRECTIONS}
    for layer, convs in layers_of(model).items():
        runs, flops, moved = passes(convs[0], layer)
        seconds = interleave(rates | runs, ROUNDS)
        limit = np.maximum(seconds["product"] * flops / (2 * n**3), seconds["copy"] * moved / (2 * COPY_BYTES))
        # nobody needs the gradient of the images
        for direction in (name for name in DIRECTIONS if name != "input" or layer.channels > 3):
            measured = {"limit": limit, "convolution": seconds[direction]}
            report("convolution", f"{model} {direction}: {len(convs)} x {layer}", BATCH, "cpu", measured)
            for name, values in measured.items():
                total[direction][name] += len(convs) * values
    for direction in DIRECTIONS:
        report("convolution", f"{model} {direction}: all", BATCH, "cpu", total[direction])
