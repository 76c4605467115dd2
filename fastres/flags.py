"""Command lines: flags from the fields of dataclasses, and errors as one line with an exit code."""

import argparse
import gc
import io
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NoReturn, get_type_hints

from rich.console import Console

from fastres.errors import Interrupted, RunError, UserError
from fastres.fields import KINDS, hint, required

STOP_WITH_STDIN = "FASTRES_STOP_WITH_STDIN"  # in the environment of a study's runs, which stop when the study dies


class Parser(argparse.ArgumentParser):
    """Reports an error as one line with exit code 2. Flags cannot be abbreviated."""

    def __init__(self, prog: str, description: str | None = None) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_flags(self, arguments: Sequence[str] | None) -> dict[str, Any]:
        """The flags that were given, by the names of their fields."""
        given, unknown = self.parse_known_args(arguments)
        if unknown:
            flags = [name for action in self._actions for name in action.option_strings]
            self.error(f"unknown argument {unknown[0]}; {hint(unknown[0].split('=')[0], flags)}")
        return vars(given)


def add_flags(
    parser: argparse.ArgumentParser, config: type, leave_out: Collection[str] = (), default: str | None = None
) -> None:
    """Adds a flag for every field of the dataclass ``config`` except ``leave_out``, in the fields' groups. Help names
    each field's default, or ``default``.

    A flag that was not given is missing from the namespace, so that a recipe's or dataset's default can apply.
    """
    groups: dict[str, Any] = {}
    hints = get_type_hints(config)
    for item in fields(config):
        if item.name in leave_out:
            continue
        title = item.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind = required(hints[item.name])
        options: dict[str, Any] = {"type": KINDS[kind].parse, "metavar": "X"}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif item.metadata["choices"]:
            options |= {"choices": item.metadata["choices"], "metavar": None}
        groups[title].add_argument(
            "--" + item.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=f"{item.metadata['help']} (default: {default or in_words(item.default)})",
            **options,
        )


def in_words(value: Any) -> str:
    """A field's value as help and reports show it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return {"None": "auto", "True": "on", "False": "off"}.get(str(value), str(value))


class PlainConsole(Console):
    """A console that raises an error of one line if stdout refuses output."""

    def print(self, *objects: Any, **options: Any) -> None:
        with explain_stdout():
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        if STOP_WITH_STDIN not in os.environ:
            raise  # the error that rich is handling
        self.quiet = True  # the study is gone, and the signal that follows saves the run


@contextmanager
def explain_stdout() -> Iterator[None]:
    """Turns an error of writing to stdout, as on a full disk or a closed pipe, into a RunError."""
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would fail on it again at its exit
        raise RunError(f"cannot write to stdout ({error.strerror}); redirect it elsewhere") from error


def open_console(quiet: bool = False) -> Console:
    """Standard output, which prints text as it is: without rich's markup, emoji codes, colours and line breaks.

    Characters that its encoding lacks become backslash escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's is another type
        sys.stdout.reconfigure(errors="backslashreplace")
    return PlainConsole(markup=False, emoji=False, highlight=False, soft_wrap=True, quiet=quiet)


def run_command(prog: str, command: Callable[[], object], rank: int = 0, interrupted: str = "interrupted") -> int:
    """Calls ``command`` and returns the exit code.

    0; 2 for bad input; 1 for a run that could not go on; 130 for Ctrl-C, reported as ``interrupted``; 128 and the
    signal's number for a run that was stopped by a signal. ``rank`` is this process's number in its job.
    """
    if not gc.isenabled():  # what is imported lives as long as the process
        gc.freeze()
        gc.enable()
    try:
        command()
        with explain_stdout():
            sys.stdout.flush()
        return 0
    except UserError as error:
        print(f"{prog}: error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as stop:  # by a signal to all of the job
        if rank == 0:
            print(f"{prog}: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print(f"{prog}: {interrupted}", file=sys.stderr)
        return 130


def terminate_with_stdin() -> None:
    """Sends SIGTERM to this process once its standard input is closed."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
