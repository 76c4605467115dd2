"""Where the time of a training step goes: by kind of kernel, and by kernel.

    python benchmarks/kernel_table.py [FLAGS OF fastres.train]

The step is the one that fastres.train takes with these flags, captured or compiled as they say, on a batch of random
images that is already on the device. It is timed without the profiler first; the tables are from torch.profiler, per
step. On a GPU, *idle* is the time in which no kernel ran. On a CPU the kernels are PyTorch's operators, each without
the operators that it calls.
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler reports a missing GPU as an error

import re
import shlex
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from fastres.config import TrainConfig, over_recipe
from fastres.data.datasets import synthetic
from fastres.flags import Parser, add_flags, run_command
from fastres.machine import commit, device_name, versions
from fastres.profiling.measure import Candidate, RepeatedBatch, create_trainer, first_batch, train
from fastres.training.hardware import resolve, tune_libraries

STEPS = {"cuda": 20, "cpu": 1}  # of a round, of which synchronising at its end is then a small part
ROUNDS = {"cuda": 15, "cpu": 3}
PROFILED_STEPS = 5
KERNELS = 40  # rows of the second table
KINDS = {  # by a kernel's name: the first that fits
    "fused operator": r"^(split_|normalize|input_gradient|\w+_once)|fastres::|BatchNormReLU",
    "fused by Inductor": r"^triton_(red|per|poi)_|CompiledFxGraph",
    "copies and casts": r"[Cc]opy|[Cc]ast|Mem(cpy|set)|nchwToNhwc|nhwcToNchw|fill|aten::(to|empty|zero)",
    "optimizer": r"multi_tensor|_foreach|_fused_|[Ss][Gg][Dd]|[Aa]dam",
    "batch norm": r"batch_norm|batchnorm|bn_(fw|bw)",
    "convolution, weight gradient": r"wgrad",
    "convolution, input gradient": r"dgrad",
    "convolutions and products": r"conv|gemm|cutlass|xmma|sm[0-9]{2}_|nvjet|triton_(tem|mm)|implicit|cudnn|addmm",
    "pooling": r"pool",
    "loss and accuracy": r"[Ss]oft_?[Mm]ax|nll|cross_entropy|arg_?max|ArgMax",
    "element-wise and sums": r"elementwise|CUDAFunctor|reduce_kernel|aten::",
}


def kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def kernels(events: Iterable[Any], device: str) -> pd.DataFrame:
    """A row for each kernel in the profiler's ``events``: name, kind, start, end, and its own microseconds."""
    on_gpu = device == "cuda"
    rows = []
    for event in events:
        on_device = event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU)
        if on_device and not event.is_user_annotation:
            start, end = event.time_range.start, event.time_range.end
            us = end - start if on_gpu else event.self_cpu_time_total
            rows.append({"kernel": event.name, "kind": kind(event.name), "start": start, "end": end, "us": us})
    return pd.DataFrame(rows).sort_values("start")


def idle(frame: pd.DataFrame) -> float:
    """Microseconds between the first kernel and the last in which none ran; kernels may overlap."""
    gaps = frame.start - frame.end.cummax().shift()
    return float(gaps.clip(lower=0).sum())


def table(frame: pd.DataFrame, by: str, steps: int) -> pd.DataFrame:
    """Time and calls a step of each kind or kernel, those that take most of it first."""
    groups = frame.groupby(by).us.agg(["sum", "count"]).sort_values("sum", ascending=False)
    columns = {
        "us/step": groups["sum"] / steps,
        "%": 100 * groups["sum"] / frame.us.sum(),
        "calls": groups["count"] / steps,
        "us each": groups["sum"] / groups["count"],
    }
    return pd.DataFrame(columns).rename_axis(None)


def main(arguments: list[str]) -> int:
    parser = Parser("kernel_table.py", description=__doc__)
    add_flags(parser, TrainConfig)

    def command() -> None:
        given = TrainConfig(**over_recipe(parser.parse_flags(arguments)))
        dataset = synthetic(max(given.batch_size, 50_000))
        config, why = resolve(given, dataset)
        device = torch.device(config.device)
        tune_libraries(device.type)
        print(f"# kernel_table.py {shlex.join(arguments)}\n# {why}")
        print(f"# {device_name(device)}, {versions()}, commit {commit()}, {datetime.now():%Y-%m-%d %H:%M}", flush=True)

        candidate = Candidate(config.model, config, create_trainer(config, dataset))
        candidate.warm_up(dataset)
        warm_up, memory = candidate.warm_up_seconds, candidate.peak_memory_mb
        batch, steps = first_batch(config, dataset), STEPS[device.type]
        seconds = [
            train(candidate.trainer, RepeatedBatch(batch, steps)).seconds / steps for _ in range(ROUNDS[device.type])
        ]
        low, middle, high = 1000 * np.percentile(seconds, (20, 50, 80))
        print(f"# step: {middle:.3f} ms (p20 {low:.3f}, p80 {high:.3f}); warm-up {warm_up:.1f} s, {memory:,.0f} MiB")

        activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as recorded:
            train(candidate.trainer, RepeatedBatch(batch, PROFILED_STEPS))
        frame = kernels(recorded.events(), device.type)
        busy = f"{frame.us.sum() / PROFILED_STEPS / 1000:.3f} ms in {len(frame) / PROFILED_STEPS:,.0f} kernels"
        gaps = f", {idle(frame) / PROFILED_STEPS / 1000:.3f} ms idle" if device.type == "cuda" else ""
        print(f"# profiled step: {busy}{gaps}")
        for by in ("kind", "kernel"):
            rows = table(frame, by, PROFILED_STEPS).head(KERNELS)
            rows.index = rows.index.str.slice(0, 110)
            print(f"\nby {by}\n{rows.to_string(float_format='{:,.1f}'.format)}")

    return run_command(parser.prog, command, interrupted="interrupted")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
