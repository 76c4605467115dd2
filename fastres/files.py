"""Files and folders: written whole or not at all, read with one-line errors, held by one process at a time."""

import errno
import fcntl
import json
import os
import tomllib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from fastres.errors import RunError, UserError, first_line

LOCK = ".lock"  # in every folder that fastres began; it stays there
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)

_held: set[TextIO] = set()
# a loader's worker may outlive a killed process by seconds, and must not hold the process's locks as long
os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])


def write_atomically(path: Path, write: Callable[[Path], Any], then: str = "") -> None:
    """Calls ``write`` with a temporary path and moves the file to ``path`` once it is on the disk.

    A crash or a full disk leaves the file that was there before. Raises RunError if the file cannot be written, whose
    advice ends with ``then``; by default, to resume the run in its folder.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(cannot_be_written(path, error, then)) from error


def cannot_be_written(path: Path, error: Exception, then: str = "") -> str:
    """The message for a file that could not be written; ``then`` as in ``write_atomically``."""
    mend = "make the folder writable" if getattr(error, "errno", None) in NOT_WRITABLE else "make room"
    return f"{path}: cannot be written ({first_line(error)}); {mend}, then {then or f'--resume {path.parent}'}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """``content`` as indented JSON; atomic, as ``write_atomically``."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """The parsed content of the file. Raises UserError if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error


def read_toml(path: Path) -> dict[str, Any]:
    """The parsed content of the file. Raises UserError if it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as TOML ({first_line(error)})") from error


def make_folder(folder: Path) -> None:
    """Makes ``folder`` and its parents. Raises UserError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be made ({error.strerror})") from error


def new_folder(path: Path) -> Path:
    """Makes the folder ``path``, or the first of ``path-2``, ``path-3``, ... that does not exist, and returns it."""
    for number in count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); add --output-dir") from error
    raise AssertionError


@contextmanager
def claimed(folder: Path, writes: Collection[str] = ()) -> Iterator[None]:
    """Makes ``folder`` if needed and holds its lock, which the kernel releases when the process ends.

    Raises UserError if another process holds the lock, or if the folder contains one of the files that this command
    ``writes`` although fastres did not begin the folder.
    """
    make_folder(folder)
    for name in writes if not (folder / LOCK).exists() else ():
        if (folder / name).exists():
            raise UserError(
                f"--output-dir {folder}: {name} in it would be overwritten and is not from fastres; choose another "
                "folder"
            )
    try:
        file = open(folder / LOCK, "a", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--output-dir {folder}: not writable ({error.strerror}); choose another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--output-dir {folder}: another process is writing to it; choose another folder, or wait for its end"
            ) from error
        except OSError as error:
            raise UserError(
                f"--output-dir {folder}: cannot be locked ({error.strerror}); choose a folder on another file system"
            ) from error
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)
