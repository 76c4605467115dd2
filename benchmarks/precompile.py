"""Compiles the fused operator's Triton kernels for the studies' models, in as many processes as there are cores.

    python benchmarks/precompile.py [BATCH...]

Triton compiles a kernel when it is first called, one after the other. Here each process calls the operator on some of
the shapes that the models give it in training, and all of them fill the cache on disk that later processes read.
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from fastres.models import create_model
from fastres.nn import BatchNormReLU2d

MODELS = ("resnet18", "resnet50", "vgg16", "vgg19_bn_4096")
Call = tuple[torch.Size, bool, bool]  # [N, C, H, W], with a residual, with ReLU


def calls_of(name: str, batch: int) -> set[Call]:
    """The calls of the operator in a training step of the model ``name``."""
    found = set()

    def note(module: Any, inputs: tuple[torch.Tensor], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        found.add((inputs[0].shape, kwargs.get("residual") is not None, module.relu))

    with torch.device("meta"):
        model = create_model(name, 10)
        for module in model.modules():
            if isinstance(module, BatchNormReLU2d):
                module.register_forward_hook(note, with_kwargs=True)
        model(torch.empty(batch, 3, 32, 32))
    return found


def run(call: Call) -> None:
    """Forward and backward in training, and forward in evaluation, in bfloat16 and channels-last."""
    shape, has_residual, relu = call
    device = "cuda" if torch.cuda.is_available() else "cpu"
    norm = BatchNormReLU2d(shape[1], relu=relu, device=device)
    x, residual = (
        torch.randn(shape, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
        for _ in range(2)
    )
    inputs = {"residual": residual} if has_residual else {}
    norm(x, **inputs).sum().backward()
    if has_residual:
        torch.stack(norm(x, **inputs, twin=True)).sum().backward()
    with torch.no_grad():
        norm.eval()(x, **inputs)


def main(batches: list[int]) -> None:
    start = time.perf_counter()
    calls = set().union(*(calls_of(name, batch) for name in MODELS for batch in batches))
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        list(pool.map(run, sorted(calls)))
    print(f"{len(calls)} calls in {time.perf_counter() - start:.1f} s, in {os.cpu_count()} processes")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [128, 512])
