"""python -m fastres.train: trains a model, or evaluates a run's best weights again."""

import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastres.config import (
    DATASET_DEFAULTS,
    ENGINE,
    Parser,
    TrainConfig,
    add_flags,
    as_flag,
    check_effect,
    over_recipe,
    read_json,
)
from fastres.data.datasets import Dataset, Track, load_dataset
from fastres.data.plan import canonical_augmentation
from fastres.errors import Interrupted, UserError
from fastres.report.plots import plot_curves
from fastres.report.tables import summary_table
from fastres.training import distributed
from fastres.training.checkpoint import read_checkpoint
from fastres.training.hardware import tune_libraries
from fastres.training.run import Row, Run, resolve

# what may differ between a checkpoint and the run that goes on from it, and between a run and its evaluation
RESUMABLE = {
    "data_dir", "device", "loader", "workers", "compile", "compile_mode", "cuda_graphs", "epochs",
    "eval_batch_size", "checkpoint_every", "checkpoint_minutes", "checkpoint_steps",
}  # fmt: skip
EVALUABLE = {"data_dir", "device", "workers", "eval_batch_size", *ENGINE}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 2 for bad input, 1 for a run that could not go on, and 128
    and the signal's number for one that was interrupted."""
    parser = Parser("python -m fastres.train", description=__doc__)
    add_flags(parser, TrainConfig)
    actions = parser.add_argument_group("Instead of a new run").add_mutually_exclusive_group()
    actions.add_argument("--resume", type=Path, metavar="PATH", help="go on with the run of this folder or last.pt")
    actions.add_argument("--eval", type=Path, metavar="RUN", help="test the best weights of this run's folder again")
    with distributed.job():
        given = distributed.from_rank_0(lambda: parser.parse_flags(arguments))
        resume, evaluate = given.pop("resume"), given.pop("eval")
        rank = distributed.rank()
        console = Console(highlight=False, soft_wrap=True, quiet=rank > 0)
        try:
            with distributed.loss_of_processes_named():
                if evaluate:
                    evaluate_run(evaluate, given, console)
                else:
                    if not resume:
                        distributed.from_rank_0(lambda: check_effect(given))
                    train(given, resume, console)
        except UserError as error:
            print(f"{parser.prog}: error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
            return error.exit_code
        except Interrupted as stop:  # by a signal to all of the job
            if rank == 0:
                print(f"{parser.prog}: {stop}", file=sys.stderr)
            return stop.exit_code
        except KeyboardInterrupt:  # before there was anything to save
            print(f"{parser.prog}: interrupted", file=sys.stderr)
            return 130
    return 0


def train(given: dict[str, Any], resume: Path | None, console: Console) -> dict[str, Any]:
    """Trains with the flags ``given`` over the recipe's and the dataset's defaults, or over those of the run that
    ``resume`` names, and returns the summary."""
    run = prepare(given, resume, console)
    config = run.config
    with progress_bar(console) as progress:

        def on_epoch(row: Row) -> None:
            progress.console.print(epoch_line(row, config.epochs))
            progress.reset(task, description=f"epoch {row['epoch'] + 1}", visible=row["epoch"] < config.epochs)

        done = run.epoch.steps if run.epoch else 0
        task = progress.add_task(f"epoch {len(run.history) + 1}", total=len(run.train_loader), completed=done)
        with signals_noted() as signalled:
            summary = run.fit(lambda: progress.advance(task), on_epoch, signalled)
    if distributed.rank() == 0:
        picture = plot_curves(run.folder, f"{summary['model']} on {summary['dataset']}")
        console.print(summary_table(summary))
        console.print(f"run:     {run.folder}\npicture: {picture}")
    return summary


def prepare(given: dict[str, Any], resume: Path | None, console: Console) -> Run:
    """The run that ``train`` trains; nothing is written yet."""
    config, dataset, checkpoint = distributed.from_rank_0(lambda: choose(given, resume, console))
    tune_libraries(config.device)
    return Run(config, dataset, checkpoint)


def choose(
    given: dict[str, Any], resume: Path | None, console: Console
) -> tuple[TrainConfig, Dataset, dict[str, Any] | None]:
    """What ``prepare`` makes a run of: settings, dataset, and the checkpoint that it goes on from, if any."""
    load = partial(load_dataset, track=tracked(console))
    if resume:
        checkpoint = read_checkpoint(resume)
        config = TrainConfig.from_json(checkpoint["config"], f"--resume {resume}")
        folder = resume if resume.is_dir() else resume.parent
        return *configure(settings_of_run(folder, config, given, RESUMABLE), console, load), checkpoint
    restart, most_restarts = distributed.restarts()
    if most_restarts and "output_dir" not in given:
        raise UserError("--output-dir: needed with torchrun's --max-restarts, so that a restart finds its run")
    config, dataset = configure(over_recipe(given), console, load)
    assert config.output_dir is not None
    if not restart or not (config.output_dir / "last.pt").exists():
        return config, dataset, None
    checkpoint = read_checkpoint(config.output_dir)
    saved = TrainConfig.from_json(checkpoint["config"], config.output_dir)
    settings_of_run(config.output_dir, saved, vars(config), RESUMABLE)  # or it is another run's
    console.print(f"restart {restart} of {most_restarts}: goes on from {config.output_dir / 'last.pt'}")
    return config, dataset, checkpoint


def configure(
    settings: dict[str, Any], console: Console, load: Callable[..., tuple[Dataset, str]]
) -> tuple[TrainConfig, Dataset]:
    """``settings`` with nothing left to choose, and the dataset that they name, which ``load`` reads."""
    requested = TrainConfig(**settings)  # checks the values before a dataset is read
    dataset, line = load(requested.dataset, requested.data_dir, requested.classes, requested.skip_bad_images)
    console.print(f"dataset: {line}")
    if requested.train_fraction < 1:
        dataset = dataset.sample(requested.train_fraction, requested.seed)
        console.print(f"training on {len(dataset.train):,} of its images (train fraction {requested.train_fraction:g})")
    requested = TrainConfig(**{**DATASET_DEFAULTS.get(dataset.name, {}), **settings, "dataset": dataset.name})
    config, line = resolve(requested, dataset)
    console.print(line)
    return config, dataset


@contextmanager
def signals_noted() -> Iterator[Callable[[], int]]:
    """Gives a function that says which of SIGINT and SIGTERM has come, 0 for none; a second one acts at once."""
    noted = 0

    def note(number: int, frame: object) -> None:
        nonlocal noted
        noted = number
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: noted
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is note:  # and nothing has replaced it
                signal.signal(number, handler)


def settings_of_run(folder: Path, config: TrainConfig, given: dict[str, Any], may_differ: set[str]) -> dict[str, Any]:
    """The settings ``config`` of the run in ``folder``, where it is now, with those ``given``.

    Raises UserError where one of them differs that must not.
    """
    if "augmentation" in given:
        given = given | {"augmentation": canonical_augmentation(given["augmentation"])}
    for name, value in given.items():
        if name not in may_differ and value != getattr(config, name):
            flag = as_flag(name, value)
            raise UserError(f"{flag}: {folder} is a run with {getattr(config, name)}; leave the flag off")
    return {**vars(config), **given, "output_dir": folder}


def evaluate_run(folder: Path, given: dict[str, Any], console: Console) -> None:
    """Prints the test loss and accuracy of the best weights in ``folder`` beside those that the run recorded."""
    config, dataset, (loss, accuracy) = distributed.from_rank_0(lambda: finished_run(folder, given, console))
    evaluation = Run(config, dataset).evaluate_best()
    console.print(f"test loss     {evaluation.loss:.6f}   recorded {loss:.6f}")
    console.print(f"test accuracy {evaluation.accuracy:.2f} %   recorded {accuracy:.2f} %")


def finished_run(
    folder: Path, given: dict[str, Any], console: Console
) -> tuple[TrainConfig, Dataset, tuple[float, float]]:
    """Settings, dataset, and test loss and accuracy of the run in ``folder``. Raises UserError where it did not end
    there."""
    if (folder / "last.pt").exists() and not (folder / "summary.json").exists():
        raise UserError(f"--eval {folder}: the run has not come to its end; --resume {folder} goes on with it")
    try:
        saved = TrainConfig.from_json(read_json(folder / "config.json"), "config.json")
        summary = read_json(folder / "summary.json")
        recorded = float(summary["test_loss"]), float(summary["best_accuracy"])
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--eval {folder}: not the folder of a finished run ({error})") from error
    settings = settings_of_run(folder, saved, given, EVALUABLE)
    return *configure(settings, console, partial(load_dataset, track=tracked(console))), recorded


def tracked(console: Console) -> Track:
    """Shows how many images have been checked."""

    def track(items: Iterable[Any], total: int) -> Iterator[Any]:
        with progress_bar(console) as progress:
            yield from progress.track(items, total, description="checking images")

    return track


def progress_bar(console: Console) -> Progress:
    """Live on a terminal; silent elsewhere, where the line of each epoch is enough."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal or console.quiet,
    )


def epoch_line(row: Row, epochs: int) -> str:
    validation = f"val {row['val_accuracy']:6.2f} %  " if "val_accuracy" in row else ""
    return (
        f"epoch {row['epoch']:3d}/{epochs}  loss {row['train_loss']:.4f}  train {row['train_accuracy']:6.2f} %  "
        f"{validation}test {row['test_accuracy']:6.2f} %  {row['epoch_seconds']:7.2f} s  "
        f"{row['images_per_second']:8,.0f} images/s  wait {100 * row['data_wait_seconds'] / row['epoch_seconds']:.1f} %"
    )


if __name__ == "__main__":
    sys.exit(main())
