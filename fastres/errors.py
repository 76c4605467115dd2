"""What goes wrong for a reason that a user can mend: command lines print the one line and no traceback."""

from pathlib import Path
from signal import Signals


class UserError(Exception):
    """Bad input: the message names the flag or file and says how to mend it."""

    exit_code = 2

    def __str__(self) -> str:  # one line, even if a path or a value in it has several
        return super().__str__().replace("\n", "\\n")


class RunError(UserError):
    """A run that could not go on, although its input was good: a loss that is no number, a full disk, too little
    memory."""

    exit_code = 1


class Interrupted(Exception):  # noqa: N818
    """A signal ended the run, after a step and with everything saved."""

    def __init__(self, signal_number: int, folder: Path) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(f"stopped by {Signals(signal_number).name}; --resume {folder} goes on with the next step")
