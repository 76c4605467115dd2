"""python -m fastres.profile: what each step from eager PyTorch to fastres gains on this machine, and what is left."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler reports a missing GPU as an error
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and warns of memory that was there before it

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastres.config import ENGINE, TrainConfig
from fastres.data.datasets import DATASETS, load_dataset, synthetic
from fastres.data.plan import STEPS
from fastres.data.splits import Dataset
from fastres.errors import UserError
from fastres.fields import as_json, check_fields, flag
from fastres.files import claimed, new_folder, write_json
from fastres.flags import Parser, add_flags, open_console, run_command
from fastres.machine import device_name, provenance
from fastres.models import create_to_count, function_name, is_function, register_model
from fastres.profiling.measure import (
    EAGER,
    Candidate,
    ContinuingLoader,
    RepeatedBatch,
    create_trainer,
    first_batch,
    loader_rates,
    planned_loader,
    train,
)
from fastres.profiling.roofline import forward_macs, limit_seconds, measure_machine, step_kernels
from fastres.report.profile import advice, plot_profile, profile_table
from fastres.training import distributed
from fastres.training.cost import describe_model
from fastres.training.hardware import choose_device, resolve, steps_per_epoch, tune_libraries
from fastres.training.trainer import AMP_DTYPES, explain_out_of_memory

BATCH_SIZES = {"cuda": 128, "cpu": 32}  # the studies' 128 takes a CPU longer than one waits for a profile
COMPILE_ON_CPU = "takes minutes on a CPU; --compile measures it"
MIN_STEPS = {"cuda": 20, "cpu": 2}  # of a round; the eager loader prefetches 4 batches
TRAINING: dict[str, Any] = TrainConfig.__dataclass_fields__  # a field taken from it has the same flag and default here


@dataclass(frozen=True)
class ProfileConfig:
    """The settings of a profile."""

    model: str = TRAINING["model"]

    dataset: str = flag(
        "Data", "synthetic: random images; they cost what real ones cost", "synthetic", ("synthetic", *DATASETS)
    )
    images: int = flag("Data", "of an epoch of synthetic images", 50_000, interval="[1, inf)")
    data_dir: Path = TRAINING["data_dir"]
    classes: tuple[str, ...] = TRAINING["classes"]
    skip_bad_images: bool = TRAINING["skip_bad_images"]
    augmentation: str = flag(
        "Data", f"steps for training images, joined by dashes: any of {', '.join(STEPS)}; or none", "crop-flip"
    )
    decode: str = TRAINING["decode"]
    workers: int = TRAINING["workers"]

    batch_size: int | None = flag("Engine", "training images a step; auto: 128 on CUDA, 32 on a CPU", None)
    device: str = TRAINING["device"]
    fused: bool | None = TRAINING["fused"]
    compile: bool | None = flag(
        "Engine", "also measure the rows with torch.compile; auto: on CUDA, because compiling takes a CPU minutes", None
    )

    seconds: float = flag(
        "Measurement", "time for the rounds; warm-up and loaders come on top", 80.0, interval="(0, inf)"
    )
    rows: tuple[str, ...] = flag(
        "Measurement", "comma-separated rows of the table that are measured beside eager and fastres; none: all", ()
    )
    rounds: int = flag("Measurement", "rounds at most; each measures every row of the table", 5, interval="[1, inf)")
    trace: bool = flag("Measurement", "also write trace.json, a Chrome trace of two steps of fastres", False)
    output_dir: Path | None = flag("Output", "folder of the results; auto: runs/profile-MODEL-TIME", None)

    def __post_init__(self) -> None:
        check_fields(self)
        register_model(self.model)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m fastres.profile") -> int:
    """Runs the command line and returns its exit code, which ``run_command`` describes."""
    parser = Parser(prog, description=__doc__)
    add_flags(parser, ProfileConfig)
    distributed.refuse(parser)

    def command() -> None:
        profile(ProfileConfig(**parser.parse_flags(arguments)), open_console())

    return run_command(parser.prog, command, interrupted="interrupted; profile.json holds the finished rounds, if any")


def profile(config: ProfileConfig, console: Console) -> dict[str, Any]:
    """Measures everything, prints the table, and writes profile.json, profile.png and, if asked, trace.json."""
    defaults, dataset, why = prepare(config)
    folder = config.output_dir
    if folder is None:
        folder = new_folder(Path("runs") / f"profile-{function_name(config.model)}-{datetime.now():%Y%m%d-%H%M%S}")
    with claimed(folder, ("profile.json", "profile.png", "trace.json")):
        if (folder / "profile.json").exists():
            raise UserError(f"--output-dir {folder}: already holds a profile; choose another folder")
        console.print(f"dataset: {dataset.name}, {len(dataset.train):,} training images\n{why}")
        if is_function(defaults.model):
            console.print(describe_model(defaults, len(dataset.classes)))
        result, fastres = measure(config, defaults, dataset, folder, console)
        picture = plot_profile(folder)
        console.print(profile_table(result))
        console.print(result["advice"])
        console.print(f"result:  {folder / 'profile.json'}\npicture: {picture}")
        if config.trace:
            trace = folder / "trace.json"
            with torch.profiler.profile(profile_memory=True) as recorded:
                train(fastres.trainer, RepeatedBatch(first_batch(defaults, dataset), 2))
            with TemporaryDirectory() as scratch:  # the profiler takes only paths that are UTF-8
                recorded.export_chrome_trace(f"{scratch}/{trace.name}")
                shutil.move(f"{scratch}/{trace.name}", trace)
            console.print(f"trace:   {trace}, for chrome://tracing or ui.perfetto.dev")
    return result


def prepare(config: ProfileConfig) -> tuple[TrainConfig, Dataset, str]:
    """The settings that fastres.train would choose, the dataset, and the line that says why."""
    given = {name: value for name, value in vars(config).items() if name in TRAINING and value is not None}
    # checks the values before a dataset is read; compile only chooses rows
    requested = TrainConfig(**given | {"dataset": "auto", "compile": None})
    if config.dataset == "synthetic":
        dataset = synthetic(config.images)
    else:
        dataset, _ = load_dataset(config.dataset, config.data_dir, config.classes, config.skip_bad_images)
    if config.batch_size is None:
        device, _ = choose_device(config.device)
        requested = replace(requested, batch_size=min(BATCH_SIZES[device.type], len(dataset.train)))
    chosen, why = resolve(requested, dataset)
    return chosen, dataset, why


def measure(
    config: ProfileConfig, defaults: TrainConfig, dataset: Dataset, folder: Path, console: Console
) -> tuple[dict[str, Any], Candidate]:
    """Writes profile.json after every round; returns its content, and fastres among the candidates."""
    device, dtype = torch.device(defaults.device), AMP_DTYPES[defaults.amp]
    planned, left_out = plan_rows(config.compile, defaults, config.rows)
    tune_libraries(device.type)
    tuned = "freed memory is kept" if device.type == "cpu" else "cuDNN tries its algorithms"
    console.print(f"{tuned} for every row: it is a setting of the process, from which eager gains, too")
    machine = measure_machine(device, dtype)
    console.print(
        f"machine: {machine.flops_per_second / 1e12:.3g} TFLOP/s in {dtype} products, "
        f"{machine.bytes_per_second / 1e9:.3g} GB/s in copies"
    )
    shapes = create_to_count(defaults.model, len(dataset.classes), bool(defaults.fused))
    steps_of_epoch = steps_per_epoch(defaults, len(dataset.train))
    images = steps_of_epoch * defaults.batch_size
    limit = steps_of_epoch * limit_seconds(step_kernels(shapes, defaults.batch_size, dtype), machine)

    candidates = [
        Candidate(name, settings, create_trainer(settings, dataset, plain)) for name, settings, plain in planned
    ]
    for line in left_out:
        console.print(f"left out: {line}")
    step_seconds = []
    for candidate in candidates:
        with explain_out_of_memory("--batch-size", defaults.batch_size):
            step_seconds.append(candidate.warm_up(dataset))
        console.print(
            f"{candidate.name}: first step {candidate.warm_up_seconds:.2f} s, third {step_seconds[-1]:.2f} s, "
            f"peak memory {candidate.peak_memory_mb:,.0f} MiB"
        )
    names = list(dict.fromkeys(candidate.config.loader for candidate in candidates))
    rates = loader_rates(defaults, names, dataset)

    affordable = config.seconds / (sum(step_seconds) + step_seconds[-1])
    least = MIN_STEPS[device.type]
    rounds = int(min(max(affordable // least, 1), config.rounds))
    steps = int(min(max(affordable // rounds, least), steps_of_epoch))
    # the loaders are local, because exit hangs on the workers of loaders that are still there
    loaders = [
        ContinuingLoader(planned_loader(candidate.config, dataset, steps_of_epoch), steps) for candidate in candidates
    ]
    loaders.append(RepeatedBatch(first_batch(defaults, dataset), steps))
    measured = [*candidates, Candidate("model alone", defaults, candidates[-1].trainer)]
    result = {
        "model": defaults.model,
        "dataset": dataset.name,
        "images_per_epoch": images,
        "batch_size": defaults.batch_size,
        "augmentation": defaults.augmentation,
        "steps_per_round": steps,
        "steps_per_epoch": steps_of_epoch,
        "device": device_name(device),
        "forward_gmac": forward_macs(shapes) / 1e9,
        "machine": {"dtype": str(dtype).removeprefix("torch."), **asdict(machine)},
        "limit_epoch_seconds": limit,
        "limit_images_per_second": images / limit,
        "loader_alone_images_per_second": rates,
        "left_out": left_out,
        "config": as_json(config),
        **provenance(),
    }
    for number in range(rounds):
        for candidate, loader in zip(measured, loaders, strict=True):
            candidate.measure(loader, number, steps_of_epoch)
        *rows, alone = (row(candidate, images, limit, candidates[0]) for candidate in measured)
        result |= {"rounds": number + 1, "candidates": rows, "model_alone": alone}
        result["advice"] = advice(result)
        write_json(folder / "profile.json", result)
        console.print(f"round {number + 1}/{rounds}, {steps} of {steps_of_epoch} steps: done")
    return result, candidates[-1]


def plan_rows(
    compile: bool | None, defaults: TrainConfig, chosen: Sequence[str] = ()
) -> tuple[list[tuple[str, TrainConfig, bool]], list[str]]:
    """Name, settings, and whether in a plain loop, of each row; and a line with the reason for each that is left out.

    The first is eager PyTorch in a plain loop, to which each further one adds one thing. In fastres' own loop follow
    torch's modules compiled (on CUDA by max-autotune without coordinate descent, in CUDA graphs of the compiler's own),
    on CUDA fastres compiled (by max-autotune, inside fastres' graph), and fastres.
    """
    on_cuda = defaults.device == "cuda"
    compile_too = on_cuda if compile is None else compile
    current = replace(defaults, **EAGER)
    rows, left_out = [("eager", current, True)], []
    change: dict[str, Any]
    for name, change, reason in (
        ("channels-last", {"channels_last": True}, ""),
        ("AMP", {"amp": defaults.amp}, "this CPU has no bf16"),
        ("DALI loader", {"loader": defaults.loader}, "DALI does not import"),
        ("fused operator", {"fused": defaults.fused}, "--no-fused, or its kernels are missing"),
        ("compile", {"compile": compile_too}, "--no-compile" if compile is False else COMPILE_ON_CPU),
    ):
        changed = replace(current, **change)
        if changed == current:
            left_out.append(f"+ {name} ({reason})")
        else:
            current = changed
            rows.append((f"+ {name}", current, True))
    compiled = replace(defaults, compile=True)
    if compile_too and on_cuda:
        rival = replace(compiled, fused=False, compile_mode="max-autotune-no-coordinate-descent", cuda_graphs=False)
        strongest = replace(compiled, compile_mode="max-autotune-no-cudagraphs")
        rows += [("max-autotune without descent", rival, False), ("fastres with max-autotune", strongest, False)]
    elif compile_too:
        rows.append(("compile without fused operator", replace(compiled, fused=False), False))
    rows.append(("fastres", defaults, False))
    names = [name for name, *_ in rows]
    for name in chosen:
        if name not in names:
            raise UserError(f"--rows {name}: is not measured here; choose from {', '.join(names[1:-1])}")
    measured = {"eager", "fastres", *(chosen or names)}
    left_out += [f"{name} (not among --rows)" for name in names if name not in measured]
    return [row for row in rows if row[0] in measured], left_out


def row(candidate: Candidate, images: int, limit: float, eager: Candidate) -> dict[str, Any]:
    """The candidate's figures for profile.json; percentiles are over the rounds."""
    median, p20, p80 = (float(np.percentile(candidate.epoch_seconds, q)) for q in (50, 20, 80))
    return {
        "name": candidate.name,
        "epoch_seconds": {"median": median, "p20": p20, "p80": p80, "rounds": candidate.epoch_seconds},
        "images_per_second": images / median,
        "times_eager": float(np.median(eager.epoch_seconds)) / median,
        "data_wait_fraction": sum(candidate.wait_seconds) / sum(candidate.epoch_seconds),
        "peak_memory_mb": candidate.peak_memory_mb,
        "limit_share": limit / median,
        "warm_up_seconds": candidate.warm_up_seconds,
        "engine": {name: getattr(candidate.config, name) for name in ENGINE},
    }


if __name__ == "__main__":
    sys.exit(main())
