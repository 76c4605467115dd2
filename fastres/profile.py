"""python -m fastres.profile: what each step from eager PyTorch to fastres gains on this machine, and what is left."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler reports a missing GPU as an error
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and warns of memory that was there before it

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastres.config import ENGINE, TrainConfig
from fastres.data.datasets import DATASETS, Dataset, load_dataset, synthetic
from fastres.data.plan import STEPS
from fastres.errors import UserError
from fastres.fields import as_json, check_fields, flag
from fastres.files import claimed, new_folder, write_json
from fastres.flags import Parser, add_flags, open_console, run_command
from fastres.machine import commit, device_name, versions
from fastres.models import create_model
from fastres.report.profile import advice, plot_profile, profile_table
from fastres.roofline import forward_macs, limit_seconds, measure_machine, step_kernels
from fastres.training import distributed
from fastres.training.baseline import EAGER, StudyLoop
from fastres.training.hardware import resolve, steps_per_epoch, tune_libraries
from fastres.training.measure import (
    Resident,
    Variant,
    Window,
    first_batch,
    loaders_alone,
    planned_loader,
    train,
    warm_up,
)
from fastres.training.trainer import AMP_DTYPES, Trainer, explain_out_of_memory

BATCH_SIZES = {"cuda": 128, "cpu": 32}  # the studies' 128 takes a CPU longer than one waits for a profile
RIVAL = "compile, not fused"
COMPILED = "fastres, compiled"
LEAST_STEPS = {"cuda": 20, "cpu": 2}  # in a round; the eager loader has 4 batches in stock


def same_flag(name: str) -> Any:
    """The field of TrainConfig, flag and default included."""
    original = TrainConfig.__dataclass_fields__[name]
    return field(default=original.default, metadata=original.metadata)


@dataclass(frozen=True)
class ProfileConfig:
    """What is profiled, and for how long. Raises UserError where a value is out of its range."""

    model: str = same_flag("model")

    dataset: str = flag(
        "Data", "synthetic: random images; they cost what real ones cost", "synthetic", ("synthetic", *DATASETS)
    )
    images: int = flag("Data", "of an epoch of synthetic images", 50_000, interval="[1, inf)")
    data_dir: Path = same_flag("data_dir")
    classes: tuple[str, ...] = same_flag("classes")
    skip_bad_images: bool = same_flag("skip_bad_images")
    augmentation: str = flag(
        "Data", f"steps for training images, joined by dashes: any of {', '.join(STEPS)}; or none", "crop-flip"
    )
    workers: int = same_flag("workers")

    batch_size: int | None = flag("Engine", "training images a step; auto: 128 on CUDA, 32 on a CPU", None)
    device: str = same_flag("device")
    compile_variant: bool | None = flag(
        "Engine", "measure torch.compile, too; auto: on CUDA, because compiling takes a CPU minutes", None
    )

    seconds: float = flag(
        "Measurement", "time for the rounds; warm-up and loaders come on top", 80.0, interval="(0, inf)"
    )
    rounds: int = flag("Measurement", "rounds at most; in each, every variant runs in turn", 5, interval="[1, inf)")
    trace: bool = flag("Measurement", "also write trace.json, a Chrome trace of two steps of fastres", False)
    output_dir: Path | None = flag("Output", "folder of the results; auto: runs/profile-MODEL-TIME", None)

    def __post_init__(self) -> None:
        check_fields(self)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m fastres.profile") -> int:
    """Runs the command line and returns its exit code, which ``run_command`` describes."""
    parser = Parser(prog, description=__doc__)
    add_flags(parser, ProfileConfig)
    distributed.refuse(parser)

    def command() -> None:
        profile(ProfileConfig(**parser.parse_flags(arguments)), open_console())

    return run_command(parser.prog, command, interrupted="interrupted; nothing was written")


def profile(config: ProfileConfig, console: Console) -> dict[str, Any]:
    """Measures everything, prints the table, and writes profile.json, profile.png and, if asked, trace.json."""
    defaults, dataset, why = prepare(config)
    folder = config.output_dir
    if folder is None:
        folder = new_folder(Path("runs") / f"profile-{config.model}-{datetime.now():%Y%m%d-%H%M%S}")
    with claimed(folder, ("profile.json", "profile.png", "trace.json")):
        if (folder / "profile.json").exists():
            raise UserError(f"--output-dir {folder}: already holds a profile; choose another folder")
        console.print(f"dataset: {dataset.name}, {len(dataset.train):,} training images\n{why}")
        return measure(config, defaults, dataset, folder, console)


def measure(
    config: ProfileConfig, defaults: TrainConfig, dataset: Dataset, folder: Path, console: Console
) -> dict[str, Any]:
    device = torch.device(defaults.device)
    tune_libraries(device.type)
    tuned = "freed memory is kept" if device.type == "cpu" else "cuDNN tries its algorithms"
    console.print(f"{tuned} for every variant: that is a setting of the process, so eager gains from it, too")
    dtype = AMP_DTYPES[defaults.amp]
    machine = measure_machine(device, dtype)
    console.print(
        f"machine: {machine.flops_per_second / 1e12:.3g} TFLOP/s in {dtype} products, "
        f"{machine.bytes_per_second / 1e9:.3g} GB/s in copies"
    )
    with torch.device("meta"):
        shapes = create_model(defaults.model, len(dataset.classes))
    step_limit = limit_seconds(step_kernels(shapes, defaults.batch_size, dtype), machine)

    variants, left_out = build_variants(config, defaults, dataset, device)
    for line in left_out:
        console.print(f"left out: {line}")
    step_seconds = []
    for variant in variants:
        with explain_out_of_memory("--batch-size", defaults.batch_size):
            step_seconds.append(warm_up(variant, dataset))
        console.print(
            f"{variant.name}: first step {variant.warm_up_seconds:.2f} s, third {step_seconds[-1]:.2f} s, "
            f"peak memory {variant.peak_memory_mb:,.0f} MiB"
        )
    fastres = variants[-1]
    model_alone = Variant("model alone", fastres.config, fastres.engine)
    measured = [*variants, model_alone]

    steps_of_epoch = steps_per_epoch(defaults, len(dataset.train))
    affordable = config.seconds / (sum(step_seconds) + step_seconds[-1])
    least = LEAST_STEPS[device.type]
    rounds = int(min(max(affordable // least, 1), config.rounds))
    steps = int(min(max(affordable // rounds, least), steps_of_epoch))
    for variant in variants:
        variant.window = Window(planned_loader(variant.config, dataset, steps_of_epoch), steps)
    model_alone.window = Resident(first_batch(fastres.config, dataset), steps)
    for number in range(rounds):
        for variant in measured:
            variant.measure(number, steps_of_epoch)
        console.print(f"round {number + 1}/{rounds}, {steps} of {steps_of_epoch} steps: done")
    # closes the loaders: their workers would not hear the garbage collector, and be waited for
    for variant in variants:
        variant.window = None
    loaders = dict.fromkeys(variant.config.loader for variant in variants)
    loader_alone = loaders_alone([replace(defaults, loader=name) for name in loaders], dataset)

    images = steps_of_epoch * defaults.batch_size
    limit = step_limit * steps_of_epoch
    rows = [row(variant, images, limit, variants[0]) for variant in measured]
    result = {
        "model": defaults.model,
        "dataset": dataset.name,
        "images_per_epoch": images,
        "batch_size": defaults.batch_size,
        "augmentation": defaults.augmentation,
        "rounds": rounds,
        "steps_per_round": steps,
        "steps_per_epoch": steps_of_epoch,
        "device": device_name(device),
        "forward_gmac": forward_macs(shapes) / 1e9,
        "machine": {"dtype": str(dtype).removeprefix("torch."), **asdict(machine)},
        "limit_epoch_seconds": limit,
        "limit_images_per_second": images / limit,
        "variants": rows[:-1],
        "model_alone": rows[-1],
        "loader_alone_images_per_second": loader_alone,
        "left_out": left_out,
        "config": as_json(config),
        "versions": versions(),
        "commit": commit(),
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
    }
    result["advice"] = advice(result)
    write_json(folder / "profile.json", result)
    picture = plot_profile(folder)
    console.print(profile_table(result))
    console.print(result["advice"])
    console.print(f"result:  {folder / 'profile.json'}\npicture: {picture}")
    if config.trace:
        trace = folder / "trace.json"
        with torch.profiler.profile(profile_memory=True) as recorded:
            train(fastres.engine, Resident(first_batch(fastres.config, dataset), 2))
        with TemporaryDirectory() as scratch:  # the profiler takes only paths that are UTF-8
            recorded.export_chrome_trace(f"{scratch}/{trace.name}")
            shutil.move(f"{scratch}/{trace.name}", trace)
        console.print(f"trace:   {trace}, for chrome://tracing or ui.perfetto.dev")
    return result


def prepare(config: ProfileConfig) -> tuple[TrainConfig, Dataset, str]:
    """The settings that fastres.train would choose, the dataset, and the line that says why."""
    settings = {name: getattr(config, name) for name in ("model", "data_dir", "augmentation", "workers", "device")}
    requested = TrainConfig(**settings)  # checks the values before a dataset is read
    if config.dataset == "synthetic":
        dataset = synthetic(config.images)
    else:
        dataset, _ = load_dataset(config.dataset, config.data_dir, config.classes, config.skip_bad_images)
    batch_size = config.batch_size
    if batch_size is None:
        device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
        batch_size = min(BATCH_SIZES[device], len(dataset.train))
    requested = replace(requested, batch_size=batch_size)
    chosen, why = resolve(requested, dataset)
    return chosen, dataset, why


def build_variants(
    config: ProfileConfig, defaults: TrainConfig, dataset: Dataset, device: torch.device
) -> tuple[list[Variant], list[str]]:
    """The studies' loop, then that loop with one thing more at a time, fastres' loop with torch's own modules compiled
    instead of the fused operator, on CUDA with both, and fastres; and a line for each step that is left out, with the
    reason."""
    current = replace(defaults, **EAGER)
    compile_too = config.compile_variant
    if compile_too is None:
        compile_too = device.type == "cuda"
    variants = [("eager", current)]
    left_out = []
    change: dict[str, Any]
    for name, change, reason in (
        ("channels-last", {"channels_last": True}, ""),
        ("AMP", {"amp": defaults.amp}, "this CPU has no bf16"),
        ("DALI loader", {"loader": defaults.loader}, "DALI does not import"),
        ("fused operator", {"fused": defaults.fused}, "its kernels are missing"),
        ("compile", {"compile": compile_too}, "takes minutes on a CPU; --compile-variant measures it"),
    ):
        changed = replace(current, **change)
        if changed == current:
            left_out.append(f"+ {name} ({reason})")
        else:
            current = changed
            variants.append((f"+ {name}", current))

    def engine(name: str, config: TrainConfig) -> StudyLoop | Trainer:
        assert config.fused is not None
        torch.manual_seed(config.seed)
        model = create_model(config.model, len(dataset.classes), config.zero_gamma, bool(config.fused))
        if name not in ("fastres", RIVAL, COMPILED):
            return StudyLoop(model, config, device)
        return Trainer(model, config, device, len(dataset.classes), steps_per_epoch(config, len(dataset.train)))

    if compile_too:
        mode = "max-autotune" if device.type == "cuda" else "default"
        variants.append((RIVAL, replace(defaults, fused=False, compile=True, compile_mode=mode, cuda_graphs=False)))
        if defaults.cuda_graphs:
            variants.append((COMPILED, replace(defaults, compile=True)))
    variants.append(("fastres", defaults))
    return [Variant(name, settings, engine(name, settings)) for name, settings in variants], left_out


def row(variant: Variant, images: int, limit: float, eager: Variant) -> dict[str, Any]:
    """A variant's figures; percentiles over the rounds."""
    median, p20, p80 = (float(np.percentile(variant.epoch_seconds, q)) for q in (50, 20, 80))
    return {
        "name": variant.name,
        "epoch_seconds": {"median": median, "p20": p20, "p80": p80, "rounds": variant.epoch_seconds},
        "images_per_second": images / median,
        "times_eager": float(np.median(eager.epoch_seconds)) / median,
        "data_wait_fraction": sum(variant.wait_seconds) / sum(variant.epoch_seconds),
        "peak_memory_mb": variant.peak_memory_mb,
        "limit_share": limit / median,
        "warm_up_seconds": variant.warm_up_seconds,
        "engine": {name: getattr(variant.config, name) for name in ENGINE},
    }


if __name__ == "__main__":
    sys.exit(main())
