"""python -m fastres.study: trains the runs of a study by fastres.train, and writes its report."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastres.config import TrainConfig
from fastres.errors import UserError
from fastres.files import claimed, read_json, write_json
from fastres.flags import Parser, add_flags, in_words, open_console, run_command
from fastres.models import register_model
from fastres.report.results import read_results
from fastres.report.study import decisions, write_report
from fastres.studies import list_studies, load_study
from fastres.studies.estimate import print_estimate
from fastres.studies.execute import Executor, copy_run, places, reusable, share_gpus
from fastres.studies.plan import PlannedRun, Planner, StudyConfig, eager_name
from fastres.training import distributed
from fastres.training.start import RESUMABLE, read_saved


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
    add_flags(parser, TrainConfig, leave_out=("seed", "output_dir", "sync_bn", "price_per_hour"), default="the study's")
    distributed.refuse(parser)

    def command() -> None:
        flags = parser.parse_flags(arguments)
        name, resume, dry_run = (flags.pop(key) for key in ("name", "resume", "dry_run"))
        config = StudyConfig(**{key: flags.pop(key) for key in vars(StudyConfig()) if key in flags})
        if "model" in flags:
            register_model(flags["model"])
        study = load_study(name, config.ablate)
        folder = config.output_dir or Path("runs") / f"study-{study.name}"
        planner, console = Planner(study, config, flags, folder), open_console()
        if dry_run:
            print_estimate(planner.plan(config.seeds), console)
        else:
            run_study(planner, resume, console)

    return run_command(parser.prog, command, interrupted="interrupted; --resume goes on with the next step")


def run_study(planner: Planner, resume: bool, console: Console) -> None:
    """Trains the study's runs, decides it if that was asked for, and writes the report."""
    folder, config, start = planner.folder, planner.config, time.monotonic()
    if config.decide and len(planner.study.runs) < 2:
        raise UserError(f"--decide {config.decide:g}: {planner.study.name} has a single run; it takes two to differ")
    seeds, planned = list(config.seeds), planner.plan(config.seeds)
    new = len(seeds)
    check_folder(folder, planned, resume)
    executor = Executor(places(config.jobs, planned[0].config.device))
    if share_gpus(config.jobs, planned[0].config.device):
        console.print(f"--jobs {config.jobs}: the runs share GPUs, so the report has no seconds")
    find = reusable(config.reuse) if config.reuse else lambda run: None
    with claimed(folder, () if resume else ("study.json", "report.md", "report.html")):
        date = start_date(folder) if resume else f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        while True:
            begin = time.monotonic()
            write_json(folder / "study.json", describe(planner, planned, seeds, date))
            for run in planned:
                if not run.folder.exists() and (found := find(run)):
                    copy_run(found, run.folder)
                    console.print(f"{run.name}: taken from {found}")
            with study_progress(console, planned) as (advance, done):
                executor.train([run for run in planned if not run.finished], advance, done)
            report = write_report(folder, config.price_per_hour)
            now = time.monotonic()
            if not config.decide or settled(folder, config, seeds, now - start + (now - begin) / new, console):
                break
            seeds.append(max(seeds) + 1)
            new = 1
            planned = planner.plan(seeds)
        console.print(f"report: {report} and {report.with_suffix('.md').name}")


def settled(folder: Path, config: StudyConfig, seeds: list[int], seconds: float, console: Console) -> bool:
    """Whether the study is decided, or has reached its limits; says which. ``seconds``: with another seed."""
    assert config.decide
    found = decisions(read_results(folder, read_json(folder / "study.json")), config.decide)
    for decision in found:
        console.print(decision.line)
    if all(decision.decided for decision in found):
        return True
    if len(seeds) >= config.max_seeds:
        console.print(f"undecided with --max-seeds {config.max_seeds}")
        return True
    hours = seconds / 3600
    if 0 < config.max_hours < hours:
        console.print(f"undecided: another seed would make it {hours:.2g} hours, --max-hours is {config.max_hours:g}")
        return True
    return False


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


def describe(planner: Planner, planned: list[PlannedRun], seeds: Sequence[int], date: str) -> dict[str, Any]:
    """study.json: what the report needs to know beside the runs' own folders."""
    study, config = planner.study, planner.config
    by_folder = {run.folder.name: run for run in planned}
    runs = []
    for definition in study.runs:
        folders = [f"{definition.name}-seed{seed}" for seed in seeds]
        run = by_folder[folders[0]]
        eager = eager_name(run.config)
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
    overrides = {name: value for name, value in planner.overrides.items() if name != "data_dir"}
    return asdict(study) | {
        "study": study.name,
        "date": date,
        "scale": config.scale,
        "data_scale": config.data_scale,
        "jobs": config.jobs,
        "report_seconds": config.report_seconds and not share_gpus(config.jobs, planned[0].config.device),
        "decide": config.decide,
        "overrides": {name.replace("_", "-"): in_words(value) for name, value in overrides.items()},
        "runs": runs,
        "conjectures": [
            {
                "text": item.text,
                "expect": item.expect,
                "metric": item.metric,
                "margin": item.margin,
                "before": item.before or item.runs,
                "after": item.after or item.runs,
            }
            for item in study.conjectures
        ],
    }


Advance = Callable[[PlannedRun, float], None]
Done = Callable[[PlannedRun, dict[str, Any]], None]


@contextmanager
def study_progress(console: Console, planned: list[PlannedRun]) -> Iterator[tuple[Advance, Done]]:
    """Yields the functions that ``Executor.train`` calls, which show the study's progress: live on a terminal, and by a
    line for each finished run."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    off = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=off) as progress:
        whole = progress.add_task("study", total=sum(run.work for run in planned))
        progress.advance(whole, sum(run.work for run in planned if run.finished))
        bars: dict[str, TaskID] = {}

        def advance(run: PlannedRun, work: float) -> None:
            if run.name not in bars:
                bars[run.name] = progress.add_task(run.name, total=run.work)
            progress.advance(whole, work)
            progress.advance(bars[run.name], work)

        def done(run: PlannedRun, summary: dict[str, Any]) -> None:
            if run.name in bars:
                progress.remove_task(bars.pop(run.name))
            progress.console.print(
                f"{planned.index(run) + 1}/{len(planned)} {run.name}: best {summary['best_accuracy']:.2f} %, last "
                f"{summary['last_accuracy']:.2f} %, {summary['epoch_seconds']:.2f} s an epoch, "
                f"{summary['images_per_second']:,.0f} images/s"
            )

        yield advance, done


if __name__ == "__main__":
    sys.exit(main())
