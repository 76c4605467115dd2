"""Times the Triton kernels under other tilings than the one that they choose.

    python benchmarks/tune_batch_norm_relu.py FILE

For some shapes of ResNet-50, with residual, bfloat16, channels-last. A line a tiling goes to FILE as soon as its
shape is measured: JSON, with microseconds of forward and backward, medians of interleaved rounds of the kernels
without Python, and how many times as long the kernels' own tiling takes. FASTRES_BENCHMARK_BATCH sets the batch size;
TRITON_INTERPRET=1 tries the script where there is no GPU.
"""

import json
import os
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from timing import kernels_alone, sets_beyond_cache

from fastres.ops.batch_norm_relu import triton_kernels
from fastres.profiling.measure import interleave

BATCH = int(os.environ.get("FASTRES_BENCHMARK_BATCH", "128"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4))
TILES = ((2048, 4), (4096, 4), (4096, 8), (8192, 8))  # elements, warps
CHANNELS = (32, 64, 128)
PROGRAMS = (132, 264, 528)
ROUNDS = 9


def tilings(own: triton_kernels.Tiling, rows: int, channels: int) -> list[triton_kernels.Tiling]:
    """Those to try beside the kernels' own, which comes first."""
    others = [
        replace(
            own,
            block_rows=tile // width,
            block_channels=width,
            splits=max(1, min(programs * width // channels, rows * width // tile)),
            num_warps=warps,
        )
        for (tile, warps), width, programs in product(TILES, CHANNELS, PROGRAMS)
        if width <= channels
    ]
    return [own, *dict.fromkeys(tiling for tiling in others if tiling != own)]


def passes(channels, size):
    """Forward and backward over sets of tensors."""
    like = torch.empty(BATCH, channels, size, size, device=DEVICE, dtype=torch.bfloat16)
    like = like.to(memory_format=torch.channels_last)
    sets = sets_beyond_cache(like.nbytes)
    inputs = [[torch.randn_like(like) for _ in range(3)] for _ in range(sets)]
    weight, bias, *running = torch.ones(4, channels, device=DEVICE).unbind()
    mean, var = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)

    # results are kept, or every set would write to the same memory, which stays in the cache
    def forward():
        return [triton_kernels.forward(x, r, weight, bias, *running, True, 0.1, 1e-5, True) for x, r, _ in inputs]

    def backward():
        return [triton_kernels.backward(g, x, y, weight, bias, mean, var, True, 1e-5, True) for x, y, g in inputs]

    return forward, backward, sets


def main(path: Path) -> None:
    choose = triton_kernels.tiling
    with path.open("w", encoding="utf-8") as file:
        for channels, size in SHAPES:
            rows = BATCH * size * size
            own = choose(rows, channels, True)
            if own.single_pass:
                continue
            forward, backward, sets = passes(channels, size)
            # on a CPU a candidate is no CUDA graph, and would run with the last tiling
            tried = tilings(own, rows, channels) if DEVICE == "cuda" else [own]
            candidates = {}
            pool = torch.cuda.graph_pool_handle() if DEVICE == "cuda" else None
            for i, tiling in enumerate(tried):
                triton_kernels.tiling = lambda *_, tiling=tiling: tiling
                candidates[f"forward {i}"] = kernels_alone(forward, pool)
                candidates[f"backward {i}"] = kernels_alone(backward, pool)
            seconds = interleave(candidates, ROUNDS if DEVICE == "cuda" else 1)
            for i, tiling in enumerate(tried):
                row = {"channels": channels, "size": size, "batch": BATCH, **asdict(tiling)}
                for name in ("forward", "backward"):
                    values = seconds[f"{name} {i}"]
                    row[f"{name}_us"] = round(1e6 * float(np.median(values)) / sets, 2)
                    row[f"own_{name}"] = round(float(np.median(seconds[f"{name} 0"] / values)), 3)
                print(json.dumps(row), file=file, flush=True)
    triton_kernels.tiling = choose


if __name__ == "__main__":
    if len(sys.argv) != 2 or (DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"):
        print(
            "tune_batch_norm_relu.py FILE: needs a GPU, or TRITON_INTERPRET=1, and the file to write", file=sys.stderr
        )
        sys.exit(2)
    main(Path(sys.argv[1]))
