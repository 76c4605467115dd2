"""Dataclass fields that are flags, TOML keys and JSON values at once: their types, ranges and choices, and how they are
read and written."""

import difflib
import json
import os
import reprlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, asdict, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from fastres.errors import UserError, named

T = TypeVar("T")


def flag(group: str, help: str, default: Any, choices: Sequence[str] | None = None, interval: str = "") -> Any:
    """A dataclass field that is also a command-line flag of ``group``.

    ``interval`` is the range of a number in mathematical notation, ``[0, 1)``.
    """
    return field(default=default, metadata={"group": group, "help": help, "choices": choices, "interval": interval})


def path(text: str) -> Path:
    """A path with ``~`` expanded, which a shell does not expand in ``--flag=~/x``."""
    return Path(os.path.expanduser(text))


def comma_separated_names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def comma_separated_integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


comma_separated_integers.__name__ = "list of integers"  # in argparse's message


class Kind(NamedTuple):
    """A type of settings: its name in messages, and its value from a command line's text."""

    words: str
    parse: Callable[[str], Any]


KINDS: dict[Any, Kind] = {
    str: Kind("a string", str),
    int: Kind("an integer", int),
    float: Kind("a number", float),
    bool: Kind("true or false", bool),
    Path: Kind("a string", path),
    tuple[str, ...]: Kind("a list of strings", comma_separated_names),
    tuple[int, ...]: Kind("a list of integers", comma_separated_integers),
}
PLURALS = {str: "strings", int: "integers", float: "numbers"}


def required(kind: Any) -> Any:
    """The type ``T`` of ``T | None``, and of ``T``."""
    return next(part for part in get_args(kind) if part is not NoneType) if NoneType in get_args(kind) else kind


def read_value(value: Any, kind: Any, where: str) -> Any:
    """A ``value`` of TOML or JSON as ``kind``: a key of KINDS, a dataclass, Any, or a tuple or dict of these.

    An integer is a number, too; infinity and NaN are not. ``where`` names the value in the error.
    """
    if kind is Any or (value is None and NoneType in get_args(kind)):
        return value
    kind = required(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return read_table(kind, value, where)
    if get_origin(kind) is dict:
        return {
            key: read_value(part, get_args(kind)[1], f"{where}.{key}")
            for key, part in check_table(value, where).items()
        }
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if not isinstance(value, list | tuple) or (item in KINDS and not all(has_type(part, item) for part in value)):
            raise UserError(f"{where}: must be a list of {PLURALS.get(item, 'tables')}, not {reprlib.repr(value)}")
        return tuple(read_value(part, item, where) for part in value)
    if not has_type(value, kind):
        raise UserError(f"{where}: must be {KINDS[kind].words}, not {reprlib.repr(value)}")
    return path(value) if isinstance(value, str) and kind is Path else kind(value)


def has_type(value: Any, kind: Any) -> bool:
    """Whether ``value``, of TOML, JSON or Python, is of the scalar ``kind``."""
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is kind or (kind is Path and isinstance(value, str | Path))


def check_table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where or 'the file'}: must be a table, not {reprlib.repr(value)}")
    return value


def read_table(cls: type[T], values: Any, where: str = "") -> T:
    """The dataclass ``cls`` from a table of TOML or JSON, whose keys are its fields, with - or _ between words."""
    read = read_fields(cls, values, where)
    for item in fields(cls):  # type: ignore[arg-type]
        if item.default is item.default_factory is MISSING and item.name not in read:
            raise UserError(f"{where}.{item.name}: is missing" if where else f"{item.name}: is missing")
    with named(where) if where else nullcontext():
        return cls(**read)


def read_fields(cls: type, values: Any, where: str = "") -> dict[str, Any]:
    """Those fields of the dataclass ``cls`` that the table ``values`` has, by name."""
    hints, prefix = get_type_hints(cls), f"{where}." if where else ""
    given = {str(key).replace("-", "_"): value for key, value in check_table(values, where).items()}
    check_names(given, hints, prefix)
    return {name: read_value(value, hints[name], prefix + name) for name, value in given.items()}


def check_names(given: Collection[str], known: Collection[str], prefix: str = "") -> None:
    """Refuses a name that is not ``known``, and says which known ones are close."""
    for name in given:
        if name not in known:
            raise UserError(f"unknown key {prefix}{name}; {hint(name, known)}")


def hint(name: str, known: Collection[str]) -> str:
    """Which of the ``known`` names ``name`` may stand for."""
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(known)}"


def check_fields(settings: Any) -> None:
    """Refuses a setting that is outside its choices or its interval. None, an ``auto``, is inside."""
    for item in fields(settings):
        value, choices = getattr(settings, item.name), item.metadata["choices"]
        if choices and value not in choices:
            flag = f"--{item.name.replace('_', '-')}"
            raise UserError(f"{flag}: invalid choice {reprlib.repr(value)}; choose from {', '.join(choices)}")
        if item.metadata["interval"] and value is not None:
            check_interval(as_flag(item.name, value), value, item.metadata["interval"])


def check_interval(what: str, value: float, interval: str) -> None:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    if not (value > low or (value == low and interval[0] == "[")):
        raise UserError(f"{what}: must be {'at least' if interval[0] == '[' else 'above'} {low:,.16g}")
    if not (value < high or (value == high and interval[-1] == "]")):
        raise UserError(f"{what}: must be {'at most' if interval[-1] == ']' else 'below'} {high:,.16g}")


def as_json(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as JSON has them: paths are strings, tuples lists. ``read_table`` reads them back."""
    return json.loads(json.dumps(asdict(settings), default=str))


def as_flag(name: str, value: Any) -> str:
    """The field ``name`` set to ``value``, as on a command line, for people to read."""
    return " ".join(as_arguments({name: value}))


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """A command line's arguments for ``settings``; None and empty lists, which no flag can say, are left out."""
    arguments = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{'' if value else 'no-'}{flag}")
        elif isinstance(value, list | tuple) and value:
            arguments += [f"--{flag}", ",".join(map(str, value))]
        elif isinstance(value, float):
            arguments += [f"--{flag}", short if float(short := f"{value:g}") == value else repr(value)]
        elif value not in (None, [], ()):
            arguments += [f"--{flag}", str(value)]
    return arguments
