"""Errors that a user can fix; command lines print them as one line, without a traceback."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import Signals

EXAMPLES = 3  # of many things that a line names


class UserError(Exception):
    """Bad input: the message names the flag or file and says how to mend it.

    Functions of this package raise it for every input that they check; their docstrings do not repeat it.
    """

    exit_code = 2

    def __str__(self) -> str:  # one line, even if a path or a value in it has several
        return super().__str__().replace("\n", "\\n")


class RunError(UserError):
    """A run that could not go on although its input was good, as after a NaN loss or on a full disk."""

    exit_code = 1


class Interrupted(Exception):  # noqa: N818
    """A signal ended the run after a step, with everything saved."""

    def __init__(self, signal_number: int, folder: Path) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(f"stopped by {Signals(signal_number).name}; --resume {folder} goes on with the next step")


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or the name of its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def examples(items: Sequence[object]) -> str:
    """The first ``EXAMPLES`` of ``items``, and how many more there are."""
    more = f" and {len(items) - EXAMPLES:,} more" if len(items) > EXAMPLES else ""
    return ", ".join(map(str, items[:EXAMPLES])) + more


@contextmanager
def named(source: object) -> Iterator[None]:
    """Begins the message of a UserError from within with ``source``, a file or a run."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{source}: {error}") from error
