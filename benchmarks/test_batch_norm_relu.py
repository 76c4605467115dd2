"""batch_norm_relu against PyTorch and the machine's limit, on every shape that ResNet-50 and VGG-16 have.

    python -m pytest benchmarks/test_batch_norm_relu.py --benchmark-only

bfloat16 activations, float32 parameters, channels-last. `copy` is the time that copying takes for the bytes that two
passes must move, as fastres.profiling.roofline counts them; a cache may make the operator faster.
FASTRES_BENCHMARK_BATCH=32 makes a quick run. On a GPU the kernels are timed without Python, in turn on as many sets of
tensors as its cache does not hold, and the compiler's are those of max-autotune but for its last refinement, coordinate
descent.
"""

import os

import pytest
import torch
from timing import kernels_alone, sets_beyond_cache

from fastres.ops import batch_norm_relu
from fastres.ops.batch_norm_relu import reference
from fastres.profiling.measure import interleave

BATCH = int(os.environ.get("FASTRES_BENCHMARK_BATCH", "128"))
ROUNDS = 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILE_OPTIONS = {"max_autotune": True} if DEVICE == "cuda" else {}

SHAPES = (  # channels, height and width of the norms of ResNet-50 and VGG-16
    (64, 32), (256, 32), (128, 32), (128, 16), (512, 16), (256, 16),
    (256, 8), (1024, 8), (512, 8), (512, 4), (2048, 4), (512, 2),
)  # fmt: skip


def tensors_moved(direction, has_residual):
    """Read or written: x twice and y, and the residual; then grad and x twice and dx, and the residual's gradient."""
    return 3 + has_residual + (0 if direction == "forward" else 5 + has_residual)


@pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}x{shape[1]}")
def test_batch_norm_relu(report, shape, direction, has_residual):
    channels, size = shape

    def activation():
        x = torch.randn(BATCH, channels, size, size, device=DEVICE, dtype=torch.bfloat16)
        return x.to(memory_format=torch.channels_last)

    sets = sets_beyond_cache(BATCH * channels * size**2 * torch.bfloat16.itemsize)
    inputs = [[activation() for _ in range(3)] for _ in range(sets)]
    source = torch.randn(sets * BATCH * channels * size**2, device=DEVICE, dtype=torch.bfloat16)
    copied = torch.empty_like(source)
    weight, bias = torch.randn(2, channels, device=DEVICE).unbind()
    running = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)
    if direction != "forward":
        for tensor in (weight, bias, *(x for x, *_ in inputs), *(residual for _, residual, _ in inputs)):
            tensor.requires_grad_()

    def step(function):
        def run():
            results = []  # kept, or every set would write to the same memory, which stays in the cache
            for x, residual, grad in inputs:
                y = function(x, *running, weight, bias, residual=residual if has_residual else None)
                results.append(y.detach())
                if direction != "forward":
                    leaves = [x, weight, bias, residual][: 3 + has_residual]
                    results += torch.autograd.grad(y, leaves, grad)

        return run

    torch.compiler.reset()
    candidates = {
        "fused": step(batch_norm_relu),
        "eager": step(reference.batch_norm_relu),
        "compile": step(torch.compile(reference.batch_norm_relu, dynamic=False, options=COMPILE_OPTIONS)),
        "copy": lambda: copied.copy_(source),
    }
    candidates = {name: kernels_alone(run) for name, run in candidates.items()}
    seconds = {name: values / sets for name, values in interleave(candidates, ROUNDS).items()}
    seconds["copy"] *= tensors_moved(direction, has_residual) / 2
    case = f"{channels}x{size}x{size} {direction} {'residual' if has_residual else 'plain'}"
    report("operator", case, BATCH, DEVICE, seconds)
