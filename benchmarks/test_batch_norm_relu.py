"""batch_norm_relu against PyTorch and the machine's limit, on every shape that ResNet-50 and VGG-16 have.

    python -m pytest benchmarks/test_batch_norm_relu.py --benchmark-only

bfloat16 activations, float32 parameters, channels-last. `copy` is the time that copying takes for the bytes that two
passes must move, as fastres.profiling.roofline counts them; a cache may make the operator faster.
FASTRES_BENCHMARK_BATCH=32 makes a quick run. On a GPU each candidate is a CUDA graph, and takes in turn as many sets of
tensors as its cache does not hold; the compiler's kernels are those of max-autotune without coordinate descent.
"""

import os
from collections.abc import Callable

import pytest
import torch
from timing import as_cuda_graph, sets_beyond_cache

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


class Inputs:
    """`sets` of x, residual and gradient `[BATCH, channels, size, size]`, and the norm's parameters and statistics."""

    def __init__(self, channels: int, size: int) -> None:
        like = torch.empty(BATCH, channels, size, size, device=DEVICE, dtype=torch.bfloat16)
        like = like.to(memory_format=torch.channels_last)
        self.sets = sets_beyond_cache(like.nbytes)
        self.bytes = self.sets * like.nbytes
        self.tensors = [[torch.randn_like(like) for _ in range(3)] for _ in range(self.sets)]
        self.weight, self.bias = torch.randn(2, channels, device=DEVICE).unbind()
        self.running = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)

    def passes(self, function: Callable[..., torch.Tensor], backward: bool, has_residual: bool) -> Callable[[], object]:
        """The forward pass of `function` in training on every set, and its backward pass if `backward`."""
        weight, bias = (tensor.detach().requires_grad_(backward) for tensor in (self.weight, self.bias))
        sets = [[tensor.detach().requires_grad_(backward) for tensor in tensors] for tensors in self.tensors]

        def run() -> list[torch.Tensor]:
            results = []  # kept, or every set would write to the same memory, which stays in the cache
            for x, residual, grad in sets:
                y = function(x, *self.running, weight, bias, residual=residual if has_residual else None)
                results.append(y.detach())
                if backward:
                    results += torch.autograd.grad(y, [x, weight, bias, residual][: 3 + has_residual], grad)
            return results

        return run


def tensors_moved(backward, has_residual):
    """Read or written: x twice and y, and the residual; then grad and x twice and dx, and the residual's gradient."""
    return 3 + has_residual + (5 + has_residual if backward else 0)


@pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}x{shape[1]}")
def test_batch_norm_relu(report, request, shape, backward, has_residual):
    torch.compiler.reset()
    inputs = Inputs(*shape)
    source = torch.empty(inputs.bytes, dtype=torch.uint8, device=DEVICE)
    copied = torch.empty_like(source)
    candidates = {
        "fused": batch_norm_relu,
        "eager": reference.batch_norm_relu,
        "compile": torch.compile(reference.batch_norm_relu, dynamic=False, options=COMPILE_OPTIONS),
    }
    runs = {name: inputs.passes(function, backward, has_residual) for name, function in candidates.items()}
    runs["copy"] = lambda: copied.copy_(source)
    measured = interleave({name: as_cuda_graph(run) for name, run in runs.items()}, ROUNDS)
    seconds = {name: values / inputs.sets for name, values in measured.items()}
    seconds["copy"] *= tensors_moved(backward, has_residual) / 2
    report("operator", request.node.callspec.id.replace("-", " "), BATCH, DEVICE, seconds)
