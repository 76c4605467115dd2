"""python -m fastres.train: trains a model, or evaluates a finished run again."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastres.config import WEIGHTS, TrainConfig
from fastres.errors import UserError
from fastres.fields import path, read_fields
from fastres.files import read_json
from fastres.flags import STOP_WITH_STDIN, Parser, add_flags, open_console, run_command, terminate_with_stdin
from fastres.report.plots import plot_curves
from fastres.report.tables import class_table, summary_table
from fastres.training import distributed
from fastres.training.clock import Clock, process_age
from fastres.training.history import Row
from fastres.training.run import Run
from fastres.training.start import open_run


def main(arguments: Sequence[str] | None = None, prog: str = "python -m fastres.train") -> int:
    """Runs the command line and returns its exit code, which ``run_command`` describes."""
    parser = Parser(prog, description=__doc__)
    add_flags(parser, TrainConfig)
    actions = parser.add_argument_group("Instead of a new run").add_mutually_exclusive_group()
    actions.add_argument("--resume", type=path, metavar="PATH", help="go on with the run of this folder or last.pt")
    actions.add_argument("--eval", type=path, metavar="RUN", help="test the weights of this run's folder again")
    parser.add_argument("--weights", choices=WEIGHTS, help="with --eval: of which epoch; default: the run's --select")
    clock = Clock(process_age() if arguments is None else 0.0)

    with distributed.job():
        rank = distributed.rank()
        if STOP_WITH_STDIN in os.environ:
            threading.Thread(target=terminate_with_stdin, daemon=True).start()

        def command() -> None:
            flags = distributed.on_rank_0(parser.parse_flags, arguments)
            resume, finished, weights = flags.pop("resume"), flags.pop("eval"), flags.pop("weights")
            console = open_console(quiet=rank > 0)
            with distributed.explain_lost_process():
                if finished:
                    evaluate(finished, flags, weights, console)
                elif weights:
                    raise UserError(f"--weights {weights}: needs --eval; a new run has --select")
                else:
                    train(flags, resume, console, clock)

        return run_command(parser.prog, command, rank)


def train(flags: dict[str, Any], resume: Path | None, console: Console, clock: Clock) -> dict[str, Any]:
    """Trains a run of ``flags``, or the rest of the run ``resume``, and returns the summary."""
    run = open_run(flags, resume, say=console.print, clock=clock)
    summary = show_progress(run, console)
    if distributed.rank() == 0:
        picture = plot_curves(run.folder, f"{summary['model']} on {summary['dataset']}")
        console.print(summary_table(summary))
        console.print(class_table(summary))
        console.print(f"run:     {run.folder}\npicture: {picture}")
    return summary


def fit(*, resume: str | Path | None = None, quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """Trains as ``python -m fastres.train`` does, and returns the content of the run's summary.json.

        fastres.fit(model="resnet18", dataset="cifar10", epochs=10)["last_accuracy"]

    Args:
        resume: the folder or last.pt of a run to go on with.
        quiet: print nothing.
        settings: the command's flags, with underscores; ``output_dir`` is the run's folder.
    """
    return train(
        read_fields(TrainConfig, settings), path(str(resume)) if resume else None, open_console(quiet), Clock()
    )


def show_progress(run: Run, console: Console) -> dict[str, Any]:
    """Trains with a progress bar and a line for each epoch. SIGINT and SIGTERM stop the run after the step."""
    with progress_bar(console) as progress:

        def on_epoch(row: Row) -> None:
            progress.console.print(epoch_line(row, run.config.epochs))
            progress.reset(task, description=f"epoch {row['epoch'] + 1}", visible=row["epoch"] < run.config.epochs)

        done = run.epoch.steps if run.epoch else 0
        task = progress.add_task(f"epoch {len(run.history) + 1}", total=len(run.train_loader), completed=done)
        with catch_signals() as signalled:
            return run.fit(lambda: progress.advance(task), on_epoch, signalled)


@contextmanager
def catch_signals() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the number of the last SIGINT or SIGTERM, or 0; a second signal acts at once.

    In another thread than the main one, where Python allows no handlers, it always returns 0.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    caught = 0

    def catch(number: int, frame: object) -> None:
        nonlocal caught
        caught = number
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: caught
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is catch:  # and nothing has replaced it
                signal.signal(number, handler)


def evaluate(folder: Path, flags: dict[str, Any], weights: str | None, console: Console) -> None:
    """Prints the test loss and accuracy of the weights in ``folder`` beside those that the run recorded."""
    weights, loss, accuracy = distributed.on_rank_0(recorded, folder, weights)
    run = open_run(flags, finished=folder, say=console.print)
    evaluation = run.evaluate_weights(weights)
    console.print(f"weights of the {weights} epoch")
    console.print(f"test loss     {evaluation.loss:.6f}   recorded {loss:.6f}")
    console.print(f"test accuracy {evaluation.accuracy:.2f} %   recorded {accuracy:.2f} %")
    if run.config.tta:
        console.print(f"with mirrored images {run.evaluate_weights(weights, mirrored=True).accuracy:.2f} %")


def recorded(folder: Path, weights: str | None) -> tuple[str, float, float]:
    """``weights``, or those that the run in ``folder`` selected, and their recorded test loss and accuracy."""
    if (folder / "last.pt").exists() and not (folder / "summary.json").exists():
        raise UserError(f"--eval {folder}: the run has not come to its end; --resume {folder} goes on with it")
    try:
        summary = read_json(folder / "summary.json")
        weights = weights or summary["select"]
        return weights, float(summary[f"{weights}_test_loss"]), float(summary[f"{weights}_accuracy"])
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--eval {folder}: not the folder of a finished run ({error})") from error


def progress_bar(console: Console) -> Progress:
    """Live on a terminal; silent elsewhere, where the line of each epoch is enough."""
    return Progress(
        TextColumn("{task.description}", markup=False),
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
