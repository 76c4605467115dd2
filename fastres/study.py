"""python -m fastres.study: trains all the runs of a study, each as fastres.train does, and writes its report."""

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fastres.config import ENGINE, Parser, TrainConfig, add_flags, flag, over_recipe, read_json
from fastres.data.datasets import MINI_CIFAR10_CLASSES, Dataset, load_dataset
from fastres.errors import Interrupted, UserError
from fastres.models import create_model
from fastres.report.plots import plot_curves
from fastres.report.study import read_summary, write_report
from fastres.roofline import forward_macs
from fastres.studies import RunDefinition, Study, list_studies, load_study
from fastres.train import RESUMABLE, configure, prepare, signals_noted
from fastres.training import distributed
from fastres.training.baseline import EAGER
from fastres.training.hardware import tune_libraries
from fastres.training.measure import Window, train
from fastres.training.run import Run, make_folder, resolve, write_json

# whose cost is compared; the schedule costs nothing
EAGER_RUN = EAGER | {"schedule": "constant", "warmup_epochs": 0.0, "milestones": ()}
EAGER_EPOCHS = 3
MEASURED_STEPS = 2  # of each model, for --dry-run
RATE = ("model", "batch_size", "augmentation", "device", "workers", *ENGINE)  # what images a second depend on
PROCESSES = multiprocessing.get_context("forkserver")  # CUDA does not survive a plain fork


@dataclass(frozen=True)
class StudyConfig:
    """How a study is done. Raises UserError where a value is out of its range."""

    seeds: tuple[int, ...] = flag("Study", "comma-separated; every run is done once with each of them", (0,))
    scale: float = flag("Study", "fraction of the epochs, with milestones and warm-up; for a first look", 1.0)
    data_scale: float = flag("Study", "fraction of the training images; the test set stays whole", 1.0)
    eager_cost: bool = flag(
        "Study", f"also train {EAGER_EPOCHS} epochs of each model in eager PyTorch, to compare", True
    )
    price_per_hour: float = flag(
        "Study", "of the machine, in any currency, for the cost of each run; 0: not shown", 0.0
    )
    output_dir: Path | None = flag("Study", "folder of the study; auto: runs/study-NAME", None)

    def __post_init__(self) -> None:
        for condition, message in (
            (self.seeds and min(self.seeds) >= 0, "--seeds: must not be negative, for instance --seeds 0,1,2"),
            (len(set(self.seeds)) == len(self.seeds), "--seeds: a seed is named twice"),
            (0 < self.scale <= 1, f"--scale {self.scale}: must be in (0, 1]"),
            (0 < self.data_scale <= 1, f"--data-scale {self.data_scale}: must be in (0, 1]"),
            (0 <= self.price_per_hour < float("inf"), f"--price-per-hour {self.price_per_hour}: must not be negative"),
        ):
            if not condition:
                raise UserError(message)


@dataclass(frozen=True)
class PlannedRun:
    """A run of the study, with nothing left to choose. ``forward_gflop`` is of one image."""

    name: str
    config: TrainConfig
    dataset: Dataset
    forward_gflop: float

    @property
    def folder(self) -> Path:
        assert self.config.output_dir is not None
        return self.config.output_dir

    @property
    def work(self) -> float:
        """GFLOP of its training, which is what the progress of a study is counted in."""
        return 3 * self.forward_gflop * self.config.epochs * len(self.dataset.train)

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 2 for bad input, 1 for a run that could not go on, 130 for
    an interrupt."""
    parser = Parser(
        "python -m fastres.study",
        description=f"{__doc__.split(': ', 1)[1]} Flags of fastres.train replace the study's own in all of its runs.",
    )
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(list_studies())}, or a .toml file of the same form")
    add_flags(parser, StudyConfig)
    actions = parser.add_argument_group("Actions").add_mutually_exclusive_group()
    actions.add_argument("--resume", action="store_true", help="keep finished runs and go on with interrupted ones")
    actions.add_argument("--dry-run", action="store_true", help="only say what would run, and about how long")
    add_flags(parser, TrainConfig, leave_out=("seed", "output_dir", "sync_bn"), default="the study's")
    distributed.refuse(parser)
    given = parser.parse_flags(arguments)
    name, resume, dry_run = given.pop("name"), given.pop("resume"), given.pop("dry_run")
    console = Console(highlight=False, soft_wrap=True)
    try:
        config = StudyConfig(**{key: given.pop(key) for key in vars(StudyConfig()) if key in given})
        study = load_study(name)
        folder = config.output_dir or Path("runs") / f"study-{study.name}"
        planned = plan(study, config, given, folder)
        if dry_run:
            print_estimate(planned, console)
            return 0
        prepare_folder(folder, planned, resume)
        description = describe(study, config, given, planned)
        if resume:
            description["date"] = begun(folder)
        write_json(folder / "study.json", description)
        with study_progress(console, planned) as progress:
            for run in planned:
                if not run.finished:
                    progress(run)
        report = write_report(folder, config.price_per_hour)
        console.print(f"report: {report} and {report.with_suffix('.md').name}")
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; --resume goes on with the next step", file=sys.stderr)
        return 130
    return 0


def plan(study: Study, config: StudyConfig, overrides: dict[str, Any], folder: Path) -> list[PlannedRun]:
    """Every run of ``study`` for every seed, and the eager one of each model.

    Raises UserError for whatever ``fastres.train`` would refuse, so that it is known before anything runs.
    """
    load = cache(load_dataset)
    planned: list[PlannedRun] = []
    eager: dict[str, PlannedRun] = {}
    for definition in study.runs:
        for seed in config.seeds:
            try:
                run = plan_run(definition, seed, config, overrides, folder, load)
            except UserError as error:
                raise UserError(f"{study.name}, run {definition.name}: {error}") from error
            planned.append(run)
            if config.eager_cost and run.config.model not in eager:
                epochs = min(EAGER_EPOCHS, run.config.epochs)
                settings = EAGER_RUN | {"epochs": epochs, "output_dir": folder / f"eager-{run.config.model}"}
                eager[run.config.model] = replace(
                    run, name=f"{run.config.model}, eager", config=replace(run.config, **settings)
                )
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
    settings = over_recipe(flags)
    if overrides.get("dataset") == "folder" and _dataset(definition) == "mini-cifar10":
        settings.setdefault("classes", MINI_CIFAR10_CLASSES)
    settings |= {"seed": seed, "output_dir": folder / f"{definition.name}-seed{seed}"}
    settings["train_fraction"] = settings.get("train_fraction", 1.0) * config.data_scale
    full, dataset = configure(settings, Console(quiet=True), load)
    epochs = max(round(full.epochs * config.scale), 1)
    scaled = replace(
        full,
        epochs=epochs,
        warmup_epochs=(full.warmup_epochs or 0.0) * epochs / full.epochs,
        milestones=tuple(sorted({max(round(milestone * epochs / full.epochs), 1) for milestone in full.milestones})),
        compile=settings.get("compile"),  # chosen by the length of the run, which has changed
        cuda_graphs=settings.get("cuda_graphs"),
    )
    final, _ = resolve(scaled, dataset)
    return PlannedRun(f"{definition.label}, seed {seed}", final, dataset, forward_gflop(final, dataset))


def _dataset(definition: RunDefinition) -> str:
    """The dataset that a run has in its study, before anything is overridden."""
    return over_recipe(definition.flags).get("dataset", TrainConfig.dataset)


def forward_gflop(config: TrainConfig, dataset: Dataset) -> float:
    """Floating-point operations of the convolutions and linear layers for one image, forward, in units of 1e9.

    A multiply-add counts as two. Raises UserError for a model that cannot be made as ``config`` says.
    """
    with torch.device("meta"):
        model = create_model(config.model, len(dataset.classes), config.zero_gamma, fused=False)
    return 2 * forward_macs(model) / 1e9


def prepare_folder(folder: Path, planned: list[PlannedRun], resume: bool) -> None:
    """Makes ``folder``; raises UserError where it holds a study that this one does not go on with."""
    started = [run for run in planned if (run.folder / "config.json").exists()]
    if not resume and (started or (folder / "study.json").exists()):
        raise UserError(f"--output-dir {folder}: already holds a study; add --resume, or choose another folder")
    if resume and not (folder / "study.json").exists():
        raise UserError(f"--resume: {folder} holds no study; leave --resume off, or name its folder with --output-dir")
    for run in started:
        try:
            saved = TrainConfig.from_json(read_json(run.folder / "config.json"), run.folder / "config.json")
        except UserError as error:
            raise UserError(f"{error}; remove that run's folder") from error
        for name, value in vars(run.config).items():
            if value != getattr(saved, name) and name not in RESUMABLE - {"epochs"} | {"output_dir"}:
                raise UserError(
                    f"--resume: {run.folder} was started with {name.replace('_', '-')} {getattr(saved, name)}, "
                    f"and would now have {value}; take the first call's flags, or another --output-dir"
                )
    make_folder(folder)


def begun(folder: Path) -> str:
    """When the study in ``folder`` was begun. Raises UserError where its study.json does not say so."""
    study = read_json(folder / "study.json")
    if not isinstance(study, dict) or "date" not in study:
        raise UserError(f"{folder / 'study.json'}: does not say when the study was begun; take another --output-dir")
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
        "conjectures": [vars(conjecture) for conjecture in study.conjectures],
    }


@contextmanager
def study_progress(console: Console, planned: list[PlannedRun]) -> Iterator[Callable[[PlannedRun], None]]:
    """Gives a function that executes a run under one display of the whole study: live on a terminal, otherwise a line
    for each finished run."""
    with Progress(
        TextColumn("{task.description}"),
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
    """Trains ``run``, or the rest of it, in a process of its own, and returns its summary.

    One's own process makes the peak memory that of this run alone. ``advance`` is called with the ``work`` done.
    """
    checkpoint = run.folder / "last.pt"
    resume = run.folder if checkpoint.exists() else None
    given = {key: value for key, value in vars(run.config).items() if not resume or key in RESUMABLE}
    PROCESSES.set_forkserver_preload([__name__])
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_train, args=(given, resume, sender, sys.orig_argv))
    process.start()
    sender.close()
    try:
        while True:
            message = receiver.recv()
            if isinstance(message, UserError):
                raise type(message)(f"{run.name}: {message}")
            advance(message * run.work)
    except EOFError:
        process.join()
    finally:
        process.terminate()  # which an interrupted run takes as the signal to save
        process.join()
    if not run.finished:
        raise UserError(f"{run.folder}: the run ended with exit code {process.exitcode}; mend it and add --resume")
    return read_summary(run.folder)


def _train(given: dict[str, Any], resume: Path | None, sender: Connection, command: list[str]) -> None:
    """In the run's process: sends the fraction of the run that each step is. ``command`` is the study's."""
    sys.orig_argv = command
    # this process inherits the study's start method, and the eager loader's workers would start seconds later with it
    multiprocessing.set_start_method(None, force=True)
    try:
        run = prepare(given, resume, Console(quiet=True))
        steps = len(run.train_loader)

        def advance(by: int = 1) -> None:
            try:
                sender.send(by / (run.config.epochs * steps))
            except BrokenPipeError:  # the study's process is gone: save what there is and end
                signal.raise_signal(signal.SIGTERM)

        with signals_noted() as signalled:
            advance(len(run.history) * steps + (run.epoch.steps if run.epoch else 0))
            summary = run.fit(advance, signalled=signalled)
        plot_curves(run.folder, f"{summary['model']} on {summary['dataset']}")
    except UserError as error:
        sender.send(error)
    except (Interrupted, KeyboardInterrupt):  # the study's process says so, or is gone
        pass


def print_estimate(planned: list[PlannedRun], console: Console) -> None:
    """A table of the runs and about how long each would take."""
    rates: dict[tuple[Any, ...], tuple[float, str]] = {}
    rate_of = attrgetter(*RATE)
    for run in planned:
        if run.finished:
            rates[rate_of(run.config)] = read_summary(run.folder)["images_per_second"], "finished run"
    table = Table(title=f"{len(planned)} runs", title_justify="left")
    for header in ("run", "epochs", "images", "about", "from"):
        table.add_column(header, justify="left" if header in ("run", "from") else "right")
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
        table.add_row(run.name, str(run.config.epochs), f"{len(run.dataset.train):,}", duration(seconds), source)
    console.print(table)
    console.print(f"about {duration(total)} in all, without start-up and compilation")


def measure(run: PlannedRun) -> float:
    """Training images a second over a few steps, uncompiled, once the loader has started; writes nothing."""
    few = np.arange((MEASURED_STEPS + 1) * run.config.batch_size) % len(run.dataset.train)
    config = replace(run.config, compile=False, val_fraction=0.0)
    tune_libraries(config.device)
    trial = Run(config, replace(run.dataset, train=run.dataset.train.take(few)))
    trial.trainer.warm_up()
    epoch = train(trial.trainer, Window(trial.train_loader, MEASURED_STEPS))
    return epoch.images / epoch.seconds


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


if __name__ == "__main__":
    sys.exit(main())
