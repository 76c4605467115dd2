"""python -m fastres.train: trains a model, or evaluates a finished run again."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastres.config import WEIGHTS, TrainConfig
from fastres.errors import UserError
from fastres.fields import as_json, path, read_fields
from fastres.files import read_json
from fastres.flags import STOP_WITH_STDIN, Parser, add_flags, open_console, run_command, terminate_with_stdin
from fastres.report.tables import class_table, summary_table
from fastres.training import distributed
from fastres.training.clock import Clock, process_age
from fastres.training.history import Row
from fastres.training.run import OnStep, Run
from fastres.training.start import open_run

OnEpoch = Callable[[Row], object]


def main(arguments: Sequence[str] | None = None, prog: str = "python -m fastres.train") -> int:
    """Runs the command line and returns its exit code, which ``run_command`` describes."""
    parser = Parser(prog, description=__doc__)
    add_flags(parser, TrainConfig)
    parser.add_argument(
        "--config",
        type=path,
        metavar="FILE",
        help="settings of a new run, which flags override: a run's config.json, or a TOML file of flags",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the settings of a new run as such a TOML file, and end"
    )
    actions = parser.add_argument_group("Instead of a new run").add_mutually_exclusive_group()
    actions.add_argument("--resume", type=path, metavar="PATH", help="go on with the run of this folder or last.pt")
    actions.add_argument("--eval", type=path, metavar="RUN", help="test the weights of this run's folder again")
    parser.add_argument(
        "--gallery",
        action="store_true",
        help="with --eval: also draw the most confident mistakes and the confusion matrix",
    )
    parser.add_argument("--weights", choices=WEIGHTS, help="with --eval: of which epoch; default: the run's --select")
    clock = Clock(process_age() if arguments is None else 0.0)

    with distributed.job():
        rank = distributed.rank()
        if STOP_WITH_STDIN in os.environ:
            threading.Thread(target=terminate_with_stdin, daemon=True).start()

        def command() -> None:
            flags = distributed.on_rank_0(lambda: checked(parser.parse_flags(arguments)))
            resume, finished, weights, gallery = (flags.pop(key) for key in ("resume", "eval", "weights", "gallery"))
            file, print_config = flags.pop("config"), flags.pop("print_config")
            console = open_console(quiet=rank > 0)
            with distributed.explain_lost_process():
                if finished:
                    evaluate(finished, flags, weights, gallery, console)
                elif print_config:
                    run = open_run(flags, file=file)
                    console.print("\n".join(as_toml(run.asked, run.config)))
                else:
                    train(flags, resume, file, console, clock)

        return run_command(parser.prog, command, rank)


def checked(flags: dict[str, Any]) -> dict[str, Any]:
    """``flags``, after a check that those beside the settings go together."""
    new = not (flags["resume"] or flags["eval"])
    for given, fits, message in (
        (flags["config"], new, "--config: is for a new run; leave it off"),
        (flags["print_config"], new, "--print-config: is for a new run; leave it off"),
        (flags["weights"], flags["eval"], f"--weights {flags['weights']}: needs --eval; a new run has --select"),
        (flags["gallery"], flags["eval"], "--gallery: needs --eval and the folder of a finished run"),
        (flags["gallery"], distributed.world_size() == 1, "--gallery: is drawn in one process; leave torchrun off"),
    ):
        if given and not fits:
            raise UserError(message)
    return flags


def train(
    flags: dict[str, Any],
    resume: Path | None,
    file: Path | None,
    console: Console,
    clock: Clock,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
) -> dict[str, Any]:
    """Trains a run of ``flags`` over the settings in ``file``, or the rest of the run ``resume``, and returns the
    summary."""
    run = open_run(flags, resume, file=file, say=console.print, clock=clock)
    summary = show_progress(run, console, on_step, on_epoch)
    if distributed.rank() == 0:
        from fastres.report.plots import plot_curves  # matplotlib takes half a second to import

        picture = plot_curves(run.folder, f"{summary['model']} on {summary['dataset']}")
        console.print(summary_table(summary))
        console.print(class_table(summary))
        console.print(f"run:     {run.folder}\npicture: {picture}")
    return summary


def fit(
    *,
    resume: str | Path | None = None,
    config: str | Path | None = None,
    quiet: bool = False,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Trains as ``python -m fastres.train`` does, and returns the content of the run's summary.json.

        fastres.fit(model="resnet18", dataset="cifar10", epochs=10)["last_accuracy"]

    Args:
        resume: the folder or last.pt of a run to go on with.
        config: a run's config.json, or a TOML file of flags, whose settings ``settings`` override.
        quiet: print nothing.
        on_step: called after every step with its number in the run, from 1, and its loss, a scalar tensor on the
            device, which the next step may overwrite; to read it makes a GPU's host wait.
        on_epoch: called after every epoch, its evaluation and its checkpoint with the new row of history.csv, a dict.
            What both take is not in ``epoch_seconds``, but in the clock's phase "training".
        settings: the command's flags, with underscores; ``output_dir`` is the run's folder.
    """
    if distributed.launched() and int(os.environ["WORLD_SIZE"]) > 1:
        raise UserError("fit: trains in one process; under torchrun start python -m fastres.train")
    given = read_fields(TrainConfig, settings)
    resumed, file = (path(str(name)) if name else None for name in (resume, config))
    if resumed and file:
        raise UserError("config: is for a new run; leave it or resume off")
    return train(given, resumed, file, open_console(quiet), Clock(), on_step, on_epoch)


def show_progress(
    run: Run, console: Console, on_step: OnStep | None = None, on_epoch: OnEpoch | None = None
) -> dict[str, Any]:
    """Trains with a progress bar and a line for each epoch. SIGINT and SIGTERM stop the run after the step."""
    with progress_bar(console) as progress:

        def after_step(step: int, loss: torch.Tensor) -> None:
            progress.advance(task)
            if on_step:
                on_step(step, loss)

        def after_epoch(row: Row) -> None:
            if on_epoch:
                on_epoch(dict(row))
            progress.console.print(epoch_line(row, run.config.epochs))
            progress.reset(task, description=f"epoch {row['epoch'] + 1}", visible=row["epoch"] < run.config.epochs)

        done = run.epoch.steps if run.epoch else 0
        task = progress.add_task(f"epoch {len(run.history) + 1}", total=run.trainer.steps_per_epoch, completed=done)
        with catch_signals() as signalled:
            return run.fit(after_step, after_epoch, signalled)


def as_toml(asked: TrainConfig, chosen: TrainConfig) -> Iterator[str]:
    """The settings ``asked`` for, a line of TOML each, with what was ``chosen`` for an auto in a comment."""
    for name, value in as_json(asked).items():
        now = json.dumps(as_json(chosen)[name], ensure_ascii=False)
        if value is None:
            yield f"# {name}: auto" + (f", here {now}" if now != "null" else "")
        else:
            text = json.dumps(value, ensure_ascii=False)
            yield f"{name} = {text}" + (f"  # here {now}" if now != text else "")


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


def evaluate(folder: Path, flags: dict[str, Any], weights: str | None, gallery: bool, console: Console) -> None:
    """Prints the test loss and accuracy of the weights in ``folder`` beside those that the run recorded."""
    weights, loss, accuracy = distributed.on_rank_0(recorded, folder, weights)
    run = open_run(flags, finished=folder, say=console.print)
    evaluation = run.evaluate_weights(weights)
    console.print(f"weights of the {weights} epoch")
    console.print(f"test loss     {evaluation.loss:.6f}   recorded {loss:.6f}")
    console.print(f"test accuracy {evaluation.accuracy:.2f} %   recorded {accuracy:.2f} %")
    if gallery:
        from fastres.report.gallery import draw_gallery

        for picture in draw_gallery(run, evaluation.confusion):
            console.print(f"picture: {picture}")
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
