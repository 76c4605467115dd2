"""batch_norm_relu against PyTorch and the machine's limit, on every shape that ResNet-50 and VGG-16 have.

    python -m pytest benchmarks/test_batch_norm_relu.py --benchmark-only --benchmark-json=FILE

bfloat16 activations, float32 parameters, channels-last. The candidates run in interleaved rounds, and
`extra_info` holds how many times as long as the fused operator each took. `copy` is the time that copying takes for
the bytes that two passes must move, as fastres.roofline counts them; a cache may make the operator faster.
FASTRES_BENCHMARK_BATCH=32 makes a quick run. On a GPU the kernels alone are timed, in turn on as many sets of tensors
as its cache does not hold, and the compiler's are those of max-autotune but for its last refinement, coordinate
descent.
"""

import os

import pytest
import torch

from fastres.ops import batch_norm_relu
from fastres.ops.batch_norm_relu import reference

from interleave import interleave, kernels_alone, percentiles, ratios, sets_beyond_cache  # isort: skip

BATCH = int(os.environ.get("FASTRES_BENCHMARK_BATCH", "128"))
ROUNDS = 9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILE_OPTIONS = {"max_autotune": True} if DEVICE == "cuda" else {}

# (channels, height and width): how many layers of ResNet-50 and of VGG-16 have it.
SHAPES = {
    (64, 32): (7, 2),
    (256, 32): (4, 0),
    (128, 32): (1, 0),
    (128, 16): (7, 2),
    (512, 16): (5, 0),
    (256, 16): (1, 0),
    (256, 8): (11, 3),
    (1024, 8): (7, 0),
    (512, 8): (1, 0),
    (512, 4): (5, 3),
    (2048, 4): (4, 0),
    (512, 2): (0, 3),
}


def tensors_moved(direction, has_residual):
    """Read or written: x twice and y, and the residual; then grad and x twice and dx, and the residual's gradient."""
    return 3 + has_residual + (0 if direction == "forward" else 5 + has_residual)


@pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}x{shape[1]}")
def test_batch_norm_relu(benchmark, shape, direction, has_residual):
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
            results = []  # kept, lest every set write to the same memory, and to the cache alone
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
    resnet50, vgg16 = SHAPES[shape]
    benchmark.extra_info.update(
        batch=BATCH,
        sets=sets,
        layers={"resnet50": resnet50, "vgg16": vgg16},
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        fused_seconds=percentiles(seconds["fused"]),
        times_as_long=ratios(seconds, "fused"),
    )

    def fused():
        candidates["fused"]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(fused, rounds=ROUNDS, warmup_rounds=1)
