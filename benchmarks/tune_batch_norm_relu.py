"""Times the operator on a GPU under other tilings than the one that it chooses.

    python benchmarks/tune_batch_norm_relu.py FILE

For some shapes of ResNet-50, with residual, bfloat16, channels-last. A line a tiling goes to FILE as soon as its shape
is measured: JSON, with microseconds of the forward pass and of both passes, medians of interleaved rounds of CUDA
graphs, and how many times as long the operator's own tiling takes. FASTRES_BENCHMARK_BATCH sets the batch size.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from test_batch_norm_relu import BATCH, DEVICE, Inputs
from timing import as_cuda_graph

from fastres.ops import batch_norm_relu
from fastres.ops.batch_norm_relu import launch
from fastres.profiling.measure import interleave

SHAPES = ((64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4))
TILES = ((2048, 4), (4096, 4), (4096, 8), (8192, 8))  # elements, warps
CHANNELS = (32, 64, 128)
PROGRAMS = (132, 264, 528)
ROUNDS = 9


def tilings(own: launch.Tiling, rows: int, channels: int) -> list[launch.Tiling]:
    """Those to try beside the operator's own, which comes first."""
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


def under(tiling: launch.Tiling, run: Callable[[], object], pool: object) -> Callable[[], object]:
    """`run` captured with the operator's kernels under this tiling."""
    choose = launch.tiling
    launch.tiling = lambda *_: tiling
    launch.launcher.cache_clear()
    try:
        return as_cuda_graph(run, pool)
    finally:
        launch.tiling = choose
        launch.launcher.cache_clear()


def main(path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for channels, size in SHAPES:
            rows = BATCH * size * size
            own = launch.tiling(rows, channels, True)
            if own.single_pass:
                continue
            inputs = Inputs(channels, size)
            passes = {name: inputs.passes(batch_norm_relu, name == "both", True) for name in ("forward", "both")}
            tried = tilings(own, rows, channels)
            pool = torch.cuda.graph_pool_handle() if DEVICE == "cuda" else None
            seconds = interleave(
                {f"{name} {i}": under(tiling, passes[name], pool) for name in passes for i, tiling in enumerate(tried)},
                ROUNDS,
            )
            for i, tiling in enumerate(tried):
                row = {"channels": channels, "size": size, "batch": BATCH, **asdict(tiling)}
                for name in passes:
                    values = seconds[f"{name} {i}"]
                    row[f"{name}_us"] = round(1e6 * float(np.median(values)) / inputs.sets, 2)
                    row[f"own_{name}"] = round(float(np.median(seconds[f"{name} 0"] / values)), 3)
                print(json.dumps(row), file=file, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or DEVICE == "cpu":
        print("tune_batch_norm_relu.py FILE: needs a GPU, and the file to write", file=sys.stderr)
        sys.exit(2)
    main(Path(sys.argv[1]))
