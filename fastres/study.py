"""python -m fastres.study: trains the runs of a study by fastres.train, one after another, and writes its report."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastres.config import ENGINE, TrainConfig, over_recipe
from fastres.data.datasets import MINI_CIFAR10_CLASSES, Dataset, load_dataset
from fastres.errors import RunError, UserError, named
from fastres.fields import as_arguments, check_fields, flag
from fastres.files import claimed, read_json, write_json
from fastres.flags import STOP_WITH_STDIN, Parser, add_flags, open_console, run_command
from fastres.models import create_model
from fastres.profiling.measure import EAGER, ContinuingLoader, train
from fastres.profiling.roofline import forward_macs
from fastres.report.results import read_summary
from fastres.report.study import write_report
from fastres.studies import RunDefinition, Study, list_studies, load_study
from fastres.training import distributed
from fastres.training.hardware import resolve, tune_libraries
from fastres.training.run import Run
from fastres.training.start import RESUMABLE, choose_dataset, read_saved

# the cost of a step is compared; the schedule costs nothing
EAGER_RUN = EAGER | {"schedule": "constant", "warmup_epochs": 0.0}
SPEED_SETTINGS = ("model", "batch_size", "augmentation", "device", "workers", *ENGINE)  # decide the images a second
EAGER_EPOCHS = 3
MEASURED_STEPS = 2  # of each model, for --dry-run


@dataclass(frozen=True)
class StudyConfig:
    """How a study is carried out."""

    seeds: tuple[int, ...] = flag("Study", "comma-separated; every run is done once with each of them", (0,))
    scale: float = flag(
        "Study", "fraction of the epochs, with milestones and warm-up; for a first look", 1.0, interval="(0, 1]"
    )
    data_scale: float = flag(
        "Study", "fraction of the training images; the test set stays whole", 1.0, interval="(0, 1]"
    )
    eager_cost: bool = flag(
        "Study", f"also train {EAGER_EPOCHS} epochs of each model in eager PyTorch, to compare", True
    )
    price_per_hour: float = flag(
        "Study", "of the machine, in any currency, for the cost of each run; 0: not shown", 0.0, interval="[0, inf)"
    )
    output_dir: Path | None = flag("Study", "folder of the study; auto: runs/study-NAME", None)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.seeds or min(self.seeds) < 0:
            raise UserError("--seeds: must not be negative, for instance --seeds 0,1,2")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError("--seeds: a seed is named twice")


@dataclass(frozen=True)
class PlannedRun:
    """A run of the study: the ``flags`` of its command, and the settings and data that they stand for.

    forward_gflop: floating-point operations of one image in a forward pass, in units of 1e9.
    """

    name: str
    flags: dict[str, Any]
    config: TrainConfig
    dataset: Dataset
    forward_gflop: float

    @property
    def folder(self) -> Path:
        return self.flags["output_dir"]

    @property
    def work(self) -> float:
        """GFLOP of its training, the unit of a study's progress."""
        return 3 * self.forward_gflop * self.config.epochs * len(self.dataset.train)

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()


def main(arguments: Sequence[str] | None = None, prog: str = "python -m fastres.study") -> int:
    """Runs the command line and returns its exit code, which ``run_command`` describes."""
    parser = Parser(
        prog,
        description="Trains all the runs of a study, each as fastres.train does, and writes its report. Flags of "
        "fastres.train replace the study's own in all of its runs.",
    )
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(list_studies())}, or a .toml file of the same form")
    add_flags(parser, StudyConfig)
    actions = parser.add_argument_group("Actions").add_mutually_exclusive_group()
    actions.add_argument("--resume", action="store_true", help="keep finished runs and go on with interrupted ones")
    actions.add_argument("--dry-run", action="store_true", help="only say what would run, and about how long")
    add_flags(parser, TrainConfig, leave_out=("seed", "output_dir", "sync_bn"), default="the study's")
    distributed.refuse(parser)

    def command() -> None:
        flags = parser.parse_flags(arguments)
        name, resume, dry_run = flags.pop("name"), flags.pop("resume"), flags.pop("dry_run")
        config = StudyConfig(**{key: flags.pop(key) for key in vars(StudyConfig()) if key in flags})
        run_study(load_study(name), config, flags, resume, dry_run, open_console())

    return run_command(parser.prog, command, interrupted="interrupted; --resume goes on with the next step")


def run_study(
    study: Study, config: StudyConfig, overrides: dict[str, Any], resume: bool, dry_run: bool, console: Console
) -> None:
    folder = config.output_dir or Path("runs") / f"study-{study.name}"
    planned = plan(study, config, overrides, folder)
    if dry_run:
        print_estimate(planned, console)
        return
    check_folder(folder, planned, resume)
    with claimed(folder, () if resume else ("study.json", "report.md", "report.html")):
        description = describe(study, config, overrides, planned)
        if resume:
            description["date"] = start_date(folder)
        write_json(folder / "study.json", description)
        with study_progress(console, planned) as progress:
            for run in planned:
                if not run.finished:
                    progress(run)
        report = write_report(folder, config.price_per_hour)
        console.print(f"report: {report} and {report.with_suffix('.md').name}")


def plan(study: Study, config: StudyConfig, overrides: dict[str, Any], folder: Path) -> list[PlannedRun]:
    """Every run of ``study`` for every seed, and the eager one of each model.

    Refuses whatever ``fastres.train`` would refuse, before anything runs.
    """
    load = cache(load_dataset)
    planned: list[PlannedRun] = []
    eager: dict[str, PlannedRun] = {}
    for definition in study.runs:
        for seed in config.seeds:
            with named(f"{study.name}, run {definition.name}"):
                run = plan_run(definition, seed, config, overrides, folder, load)
                planned.append(run)
                if config.eager_cost and run.config.model not in eager:
                    eager[run.config.model] = eager_run(run, folder, load)
    return planned + list(eager.values())


def plan_run(
    definition: RunDefinition,
    seed: int,
    config: StudyConfig,
    overrides: dict[str, Any],
    folder: Path,
    load: Callable[..., tuple[Dataset, str]],
) -> PlannedRun:
    flags = definition.flags | overrides
    if overrides.get("dataset") == "folder" and _dataset(definition) == "mini-cifar10":
        flags.setdefault("classes", MINI_CIFAR10_CLASSES)
    flags |= {"seed": seed, "output_dir": folder / f"{definition.name}-seed{seed}"}
    flags["train_fraction"] = flags.get("train_fraction", 1.0) * config.data_scale
    if config.scale < 1:
        full, _ = resolve(*choose_dataset(over_recipe(flags), lambda line: None, load))
        epochs = max(round(full.epochs * config.scale), 1)
        ratio = epochs / full.epochs
        flags |= {"epochs": epochs, "warmup_epochs": (full.warmup_epochs or 0.0) * ratio}
        if full.milestones:
            flags["milestones"] = tuple(sorted({max(round(milestone * ratio), 1) for milestone in full.milestones}))
    return planned_run(f"{definition.label}, seed {seed}", flags, load)


def planned_run(name: str, flags: dict[str, Any], load: Callable[..., tuple[Dataset, str]]) -> PlannedRun:
    config, dataset = choose_dataset(over_recipe(flags), lambda line: None, load)
    config, _ = resolve(config, dataset)
    with torch.device("meta"):
        model = create_model(config.model, len(dataset.classes), config.zero_gamma, fused=False)
    return PlannedRun(name, flags, config, dataset, 2 * forward_macs(model) / 1e9)


def eager_run(run: PlannedRun, folder: Path, load: Callable[..., tuple[Dataset, str]]) -> PlannedRun:
    """A few epochs of the run in eager PyTorch."""
    model, epochs = run.config.model, min(EAGER_EPOCHS, run.config.epochs)
    flags = run.flags | EAGER_RUN | {"epochs": epochs, "output_dir": folder / f"eager-{model}"}
    for name in ("compile_mode", "milestones"):  # mean nothing there, and fastres.train would refuse them
        flags.pop(name, None)
    return planned_run(f"{model}, eager", flags, load)


def _dataset(definition: RunDefinition) -> str:
    """The dataset of a run without overrides."""
    return over_recipe(definition.flags).get("dataset", TrainConfig.dataset)


def check_folder(folder: Path, planned: list[PlannedRun], resume: bool) -> None:
    """Refuses a folder whose study is not the one to begin or to go on with."""
    started = [run for run in planned if (run.folder / "config.json").exists()]
    if not resume and (started or (folder / "study.json").exists()):
        raise UserError(f"--output-dir {folder}: already holds a study; add --resume, or choose another folder")
    if resume and not (folder / "study.json").exists():
        raise UserError(f"--resume: {folder} holds no study; leave --resume off, or name its folder with --output-dir")
    for run in started:
        path = run.folder / "config.json"
        try:
            saved = read_saved(read_json(path), path).config
        except UserError as error:
            raise UserError(f"{error}; remove that run's folder") from error
        for name, value in vars(run.config).items():
            if value != getattr(saved, name) and name not in RESUMABLE - {"epochs"} | {"output_dir"}:
                raise UserError(
                    f"--resume: {run.folder} was started with {name.replace('_', '-')} {getattr(saved, name)}, "
                    f"and would now have {value}; take the first call's flags, or another --output-dir"
                )


def start_date(folder: Path) -> str:
    """When the study in ``folder`` was started, from its study.json."""
    study = read_json(folder / "study.json")
    if not isinstance(study, dict) or "date" not in study:
        raise UserError(f"{folder / 'study.json'}: does not say when the study was started; take another --output-dir")
    return study["date"]


def describe(study: Study, config: StudyConfig, overrides: dict[str, Any], planned: list[PlannedRun]) -> dict[str, Any]:
    """study.json: what the report needs to know beside the runs' own folders."""
    by_folder = {run.folder.name: run for run in planned}
    runs = []
    for definition in study.runs:
        folders = [f"{definition.name}-seed{seed}" for seed in config.seeds]
        run = by_folder[folders[0]]
        eager = f"eager-{run.config.model}"
        runs.append(
            {
                "name": definition.name,
                "label": definition.label,
                "folders": folders,
                "eager_folder": eager if eager in by_folder else None,
                "forward_gflop": run.forward_gflop,
                "published": definition.published,
            }
        )
    return {
        "study": study.name,
        "title": study.title,
        "source": study.source,
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "scale": config.scale,
        "data_scale": config.data_scale,
        "overrides": {name.replace("_", "-"): str(value) for name, value in overrides.items() if name != "data_dir"},
        "runs": runs,
        "notes": study.notes,
        "repeated": study.repeated,
        "figures": [vars(figure) for figure in study.figures],
        "phases": [vars(phase) for phase in study.phases],
        "conjectures": [
            {
                "text": item.text,
                "expect": item.expect,
                "metric": item.metric,
                "before": item.before or item.runs,
                "after": item.after or item.runs,
            }
            for item in study.conjectures
        ],
    }


@contextmanager
def study_progress(console: Console, planned: list[PlannedRun]) -> Iterator[Callable[[PlannedRun], None]]:
    """Yields a function that executes a run and shows the study's progress: live on a terminal, otherwise a line for
    each finished run."""
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        whole = progress.add_task("study", total=sum(run.work for run in planned))
        progress.advance(whole, sum(run.work for run in planned if run.finished))
        part = progress.add_task("")

        def run_it(run: PlannedRun) -> None:
            number = f"{planned.index(run) + 1}/{len(planned)}"
            progress.reset(part, description=f"{number} {run.name}", total=run.work)

            def advance(work: float) -> None:
                progress.advance(whole, work)
                progress.advance(part, work)

            summary = execute(run, advance)
            progress.console.print(
                f"{number} {run.name}: best {summary['best_accuracy']:.2f} %, last {summary['last_accuracy']:.2f} %, "
                f"{summary['epoch_seconds']:.2f} s an epoch, {summary['images_per_second']:,.0f} images/s"
            )

        yield run_it


def execute(run: PlannedRun, advance: Callable[[float], None]) -> dict[str, Any]:
    """Trains ``run``, or the rest of it, by fastres.train in a process of its own, and returns its summary.

    ``advance`` is called with the ``work`` of every epoch. The process saves and stops when this one is interrupted, or
    when it dies, which closes the pipe to the process's standard input.
    """
    command = [sys.executable, "-m", "fastres.train"]
    flags, done = run.flags, 0
    if (run.folder / "last.pt").exists():
        command += ["--resume", str(run.folder)]
        flags = {name: value for name, value in flags.items() if name in RESUMABLE}
    environment = {**os.environ, STOP_WITH_STDIN: "1", "PYTHONIOENCODING": "utf-8"}
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command + as_arguments(flags), env=environment, stdin=pipe, stdout=pipe, stderr=errors, encoding="utf-8"
        )
        try:
            for line in process.stdout or ():
                if epoch := re.match(r"epoch +(\d+)/", line):
                    advance((int(epoch[1]) - done) / run.config.epochs * run.work)
                    done = int(epoch[1])
            code = process.wait()
        except BaseException:
            process.terminate()  # the run saves
            process.wait()
            raise
        errors.seek(0)
        said = errors.read()
    if code in (RunError.exit_code, UserError.exit_code) and "Traceback" not in said:
        message = said.strip().splitlines()[-1].removeprefix("python -m fastres.train: error: ")
        raise (RunError if code == RunError.exit_code else UserError)(f"{run.name}: {message}")
    sys.stderr.write(said)
    if code:
        raise RunError(f"{run.folder}: the run ended with exit code {code}; mend it and add --resume")
    return read_summary(run.folder)


def print_estimate(planned: list[PlannedRun], console: Console) -> None:
    """A table of the runs and about how long each would take."""
    rates: dict[tuple[Any, ...], tuple[float, str]] = {}
    rate_of = attrgetter(*SPEED_SETTINGS)
    for run in planned:
        if run.finished:
            rates[rate_of(run.config)] = read_summary(run.folder)["images_per_second"], "finished run"
    table = Table(title=f"{len(planned)} runs", title_justify="left")
    for header in ("run", "epochs", "images", "about", "from"):
        table.add_column(header, justify="left" if header in ("run", "from") else "right", overflow="fold")
    total = 0.0
    for run in planned:
        if run.finished:
            seconds, source = 0.0, "is finished"
        else:
            if rate_of(run.config) not in rates:
                rates[rate_of(run.config)] = measure(run), f"{MEASURED_STEPS} measured steps"
            rate, source = rates[rate_of(run.config)]
            # a forward pass is a third of a training step's arithmetic
            seconds = run.config.epochs * (len(run.dataset.train) + len(run.dataset.test) / 3) / rate
        total += seconds
        table.add_row(Text(run.name), str(run.config.epochs), f"{len(run.dataset.train):,}", duration(seconds), source)
    console.print(table)
    console.print(f"about {duration(total)} in all, without start-up and compilation")


def measure(run: PlannedRun) -> float:
    """Training images a second over a few steps, uncompiled, once the loader has started; writes nothing."""
    few = np.arange((MEASURED_STEPS + 1) * run.config.batch_size) % len(run.dataset.train)
    config = replace(run.config, compile=False, val_fraction=0.0)
    tune_libraries(config.device)
    trial = Run(config, replace(run.dataset, train=run.dataset.train.take(few)))
    trial.trainer.warm_up()
    epoch = train(trial.trainer, ContinuingLoader(trial.train_loader, MEASURED_STEPS))
    return epoch.images / epoch.seconds


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


if __name__ == "__main__":
    sys.exit(main())
