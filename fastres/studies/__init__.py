"""Studies: tables of runs over the flags of ``fastres.train``, read from TOML and checked before anything runs.

A file holds::

    title = "..."                     # of the report
    source = "..."                    # optional: where the published figures are from
    include = ["architecture/vgg16"]  # optional: runs of built-in studies, with their flags and published figures
    [flags]                           # optional: flags of fastres.train that all of this file's own runs share
    [runs.NAME]                       # label, flags, published (its keys: METRICS), all optional
    [variants.NAME]                   # optional: label and flags; each run is done once in every variant
    [[figures]]                       # optional: title and runs; otherwise one figure shows all runs
    [[conjectures]]                   # optional: see Conjecture
"""

import difflib
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from fastres.config import TrainConfig
from fastres.errors import UserError, named
from fastres.fields import has_type, read_value

BUILT_IN = Path(__file__).parent
METRICS = (
    "best_accuracy", "last_accuracy", "mean_accuracy", "spread", "test_loss", "params_millions", "epochs",
    "epoch_seconds",
)  # fmt: skip
EXPECTATIONS = ("grows", "stays positive")
RESERVED = {"seed": "--seeds gives the seeds", "output_dir": "the study names the folders of its runs"}


@dataclass(frozen=True)
class RunDefinition:
    """A row of a study: ``flags`` are settings of TrainConfig, ``published`` holds the original's figures by metric."""

    name: str
    label: str
    flags: dict[str, Any] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """Accuracy and loss against epoch of the named runs."""

    title: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Conjecture:
    """A claim about the difference in best accuracy between two runs, ``first - second``, before and after a change.

    ``expect``: the difference ``grows`` from before to after, or it ``stays positive``.
    """

    text: str
    expect: str
    before: tuple[str, str]
    after: tuple[str, str]


@dataclass(frozen=True)
class Study:
    name: str
    title: str
    source: str
    runs: tuple[RunDefinition, ...]
    figures: tuple[Figure, ...]
    conjectures: tuple[Conjecture, ...]


def list_studies() -> list[str]:
    """The names of the built-in studies."""
    return sorted(path.stem for path in BUILT_IN.glob("*.toml"))


def load_study(name: str) -> Study:
    """The built-in study called ``name``, or that of the TOML file at that path.

    Raises UserError for whatever is wrong with the name or the file.
    """
    path = Path(name) if name.endswith(".toml") else BUILT_IN / f"{name}.toml"
    if not path.is_file():
        raise UserError(f"{name}: no such study; there are {', '.join(list_studies())}, or give a .toml file")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as TOML ({error})") from error
    return _Reader(path).study(content)


class _Reader:
    """Turns the content of ``path`` into a Study; every error names the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def study(self, content: dict[str, Any]) -> Study:
        keys = ("title", "source", "include", "flags", "runs", "variants", "figures", "conjectures")
        self.check_keys("", content, keys)
        shared = self.flags("flags", self.table(content, "flags"))
        runs = [self.included(name) for name in self.strings("include", content.get("include", []))]
        for name, value in self.table(content, "runs").items():
            run = self.run(f"runs.{name}", name, value)
            runs.append(replace(run, flags=shared | run.flags))
        if not runs:
            raise UserError(f"{self.path}: no runs; add a table [runs.NAME] with flags = {{ ... }}")
        variants = [self.run(f"variants.{key}", key, value) for key, value in self.table(content, "variants").items()]
        if variants:
            runs = [self.varied(run, variant) for run in runs for variant in variants]
        names = [run.name for run in runs]
        if len(set(names)) < len(names):
            raise UserError(f"{self.path}: two runs are called {max(names, key=names.count)}; rename one")
        return Study(
            name=self.path.stem,
            title=self.string("title", content.get("title", self.path.stem)),
            source=self.string("source", content.get("source", "")),
            runs=tuple(runs),
            figures=tuple(self.figure(item, names) for item in self.tables(content, "figures")),
            conjectures=tuple(self.conjecture(item, names) for item in self.tables(content, "conjectures")),
        )

    def run(self, where: str, name: str, value: Any) -> RunDefinition:
        if "/" in name or not name:
            raise UserError(f"{self.path}: {where}: a run's name is its folder's, so it must not hold a /")
        self.check_table(where, value)
        self.check_keys(f"{where}.", value, ("label", "flags", "published"))
        published = self.table(value, "published", f"{where}.")
        self.check_keys(f"{where}.published.", published, METRICS)
        for key, number in published.items():
            if not has_type(number, float):
                raise UserError(f"{self.path}: {where}.published.{key}: must be a number, not {number!r}")
        flags = self.flags(f"{where}.flags", self.table(value, "flags", f"{where}."))
        return RunDefinition(name, self.string(f"{where}.label", value.get("label", name)), flags, published)

    def included(self, name: str) -> RunDefinition:
        study, _, run = name.partition("/")
        if study not in list_studies() or study == self.path.stem:
            raise UserError(f"{self.path}: include {name}: must be STUDY/RUN of {', '.join(list_studies())}")
        known = {definition.name: definition for definition in load_study(study).runs}
        if run not in known:
            raise UserError(f"{self.path}: include {name}: {study} has the runs {', '.join(known)}")
        return known[run]

    def varied(self, run: RunDefinition, variant: RunDefinition) -> RunDefinition:
        """``run`` in ``variant``; its published figures hold only where the variant changes nothing."""
        return RunDefinition(
            name=f"{run.name}-{variant.name}",
            label=f"{run.label}, {variant.label}",
            flags=run.flags | variant.flags,
            published=run.published if not variant.flags else variant.published,
        )

    def flags(self, where: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of TrainConfig in ``values``, whose keys are flags without the two dashes in front."""
        settings = {key.replace("-", "_"): value for key, value in values.items()}
        self.check_keys(f"{where}.", settings, vars(TrainConfig()))
        for name, value in settings.items():
            if name in RESERVED:
                raise UserError(f"{self.path}: {where}.{name}: leave it out; {RESERVED[name]}")
            with named(self.path):
                settings[name] = read_value(value, get_type_hints(TrainConfig)[name], f"{where}.{name}")
        return settings

    def figure(self, value: dict[str, Any], names: Collection[str]) -> Figure:
        self.check_keys("figures.", value, ("title", "runs"))
        return Figure(
            self.string("figures.title", value.get("title")), self.names("figures.runs", value.get("runs"), names)
        )

    def conjecture(self, value: dict[str, Any], names: Collection[str]) -> Conjecture:
        self.check_keys("conjectures.", value, ("text", "expect", "before", "after"))
        if value.get("expect") not in EXPECTATIONS:
            raise UserError(f"{self.path}: conjectures.expect: must be one of {', '.join(EXPECTATIONS)}")
        pairs = [self.names(f"conjectures.{key}", value.get(key), names) for key in ("before", "after")]
        if any(len(pair) != 2 for pair in pairs):
            raise UserError(f"{self.path}: conjectures: before and after must name two runs each")
        (first, second), (third, fourth) = pairs
        text = self.string("conjectures.text", value.get("text"))
        return Conjecture(text, value["expect"], (first, second), (third, fourth))

    def check_keys(self, prefix: str, values: Mapping[str, Any], known: Collection[str]) -> None:
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=3)
                hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
                raise UserError(f"{self.path}: unknown key {prefix}{key}; {hint}")

    def check_table(self, where: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise UserError(f"{self.path}: {where}: must be a table, not {value!r}")

    def table(self, values: Mapping[str, Any], key: str, prefix: str = "") -> dict[str, Any]:
        self.check_table(prefix + key, values.get(key, {}))
        return values.get(key, {})

    def tables(self, values: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
        found = values.get(key, [])
        if not isinstance(found, list):
            raise UserError(f"{self.path}: {key}: must be a list of tables, [[{key}]]")
        for item in found:
            self.check_table(key, item)
        return found

    def string(self, where: str, value: Any) -> str:
        if not isinstance(value, str):
            raise UserError(f"{self.path}: {where}: must be a string, not {value!r}")
        return value

    def strings(self, where: str, value: Any) -> tuple[str, ...]:
        if not has_type(value, tuple[str, ...]):
            raise UserError(f"{self.path}: {where}: must be a list of strings, not {value!r}")
        return tuple(value)

    def names(self, where: str, value: Any, known: Collection[str]) -> tuple[str, ...]:
        """Names of runs of this study."""
        names = self.strings(where, value)
        for name in names:
            if name not in known:
                raise UserError(f"{self.path}: {where}: no run {name}; there are {', '.join(known)}")
        return names
