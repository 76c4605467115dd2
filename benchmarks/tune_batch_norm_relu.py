"""Times ResNet-50's training step on a GPU under other tunings of the operator than its own.

    python benchmarks/tune_batch_norm_relu.py FILE

One constant is varied after the other, each from the best that was found so far. FILE gets lines of JSON: where and
when this was measured, then one a tuning, with the milliseconds of a captured step, the median of interleaved rounds,
and how many times as long the best so far takes in the same round. FASTRES_BENCHMARK_BATCH sets the batch size.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from timing import provenance

from fastres.config import TrainConfig
from fastres.data.datasets import synthetic
from fastres.data.splits import Dataset
from fastres.ops.batch_norm_relu import launch
from fastres.profiling.measure import RepeatedBatch, create_trainer, first_batch, interleave, train
from fastres.training.hardware import resolve, tune_libraries

BATCH = int(os.environ.get("FASTRES_BENCHMARK_BATCH", "128"))
CHOICES = {
    "num_warps": (4, 8),
    "single_pass_width": (8, 16),
    "programs": (132, 264, 528),
    "width": (32, 64, 128),
    "tile": (2048, 4096, 8192),
}
STEPS, ROUNDS = 20, 5


def step(tuning: launch.Tuning, config: TrainConfig, dataset: Dataset) -> Callable[[], object]:
    """Takes ``STEPS`` steps, captured with the operator's kernels under this tuning."""
    own, launch.TUNING = launch.TUNING, tuning
    launch.launcher.cache_clear()
    try:
        trainer = create_trainer(config, dataset)
        trainer.warm_up(evaluation=False)
    finally:
        launch.TUNING = own
        launch.launcher.cache_clear()
    batch = RepeatedBatch(first_batch(config, dataset), STEPS)
    return lambda: train(trainer, batch)


def main(path: Path) -> None:
    tune_libraries("cuda")
    dataset = synthetic(50_000)
    config, _ = resolve(TrainConfig(model="resnet50", batch_size=BATCH, fused=True, cuda_graphs=True), dataset)
    best = launch.TUNING
    steps = {best: step(best, config, dataset)}
    where = provenance(f"python benchmarks/tune_batch_norm_relu.py {path}", config.device)
    with path.open("w", encoding="utf-8") as file:
        print(json.dumps(where), file=file)
        for name, values in CHOICES.items():
            tried = [best, *(replace(best, **{name: value}) for value in values if value != getattr(best, name))]
            steps = {tuning: steps.get(tuning) or step(tuning, config, dataset) for tuning in tried}
            seconds = interleave({str(tuning): run for tuning, run in steps.items()}, ROUNDS)
            for tuning in tried:
                values = seconds[str(tuning)]
                row = asdict(tuning) | {
                    "batch": BATCH,
                    "step_ms": round(1000 * float(np.median(values)) / STEPS, 4),
                    "best_so_far": round(float(np.median(seconds[str(best)] / values)), 4),
                }
                print(json.dumps(row), file=file, flush=True)
            best = min(tried, key=lambda tuning: np.median(seconds[str(tuning)]))


if __name__ == "__main__":
    if len(sys.argv) != 2 or not torch.cuda.is_available():
        print("tune_batch_norm_relu.py FILE: needs a GPU, and the file to write", file=sys.stderr)
        sys.exit(2)
    main(Path(sys.argv[1]))
