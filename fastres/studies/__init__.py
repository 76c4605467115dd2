"""Studies: tables of runs over the flags of ``fastres.train``, read from TOML and checked before anything runs.

A file holds::

    title = "..."                     # of the report
    source = "..."                    # optional: where the published figures are from
    notes = ["..."]                   # optional: sentences about the source, for the report
    include = ["architecture/vgg16"]  # optional: runs of built-in studies, with their flags and published figures
    [flags]                           # optional: flags of fastres.train that all of this file's own runs share
    [runs.NAME]                       # label, flags, published (its keys: METRICS), all optional
    [variants.NAME]                   # optional: label and flags; each run is done once in every variant
    [repeated]                        # optional: METRIC = [...], published figures of runs with the same settings
    [[figures]]                       # optional: title and runs; otherwise one figure shows all runs
    [[phases]]                        # optional: label and epochs = [FIRST, LAST], see Phase
    [[conjectures]]                   # optional: text, expect, metric, and runs, or before and after, see Conjecture
"""

import difflib
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastres.config import MANY, TrainConfig, is_a, read_setting
from fastres.errors import UserError

BUILT_IN = Path(__file__).parent
METRICS = (
    "best_accuracy", "last_accuracy", "mean_accuracy", "spread", "test_loss", "params_millions", "epochs",
    "epoch_seconds",
)  # fmt: skip
EXPECTATIONS = {  # of a conjecture: the keys that name its runs
    "grows": ("before", "after"),
    "stays positive": ("before", "after"),
    "higher": ("runs",),
    "lower": ("runs",),
}
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
class Phase:
    """The first and the last epoch, from 1, whose test accuracies the report sums up; ``--scale`` scales both."""

    label: str
    epochs: tuple[int, int]


@dataclass(frozen=True)
class Conjecture:
    """A claim about the difference in ``metric`` between two runs, ``first - second``, by default in best accuracy.

    ``expect``: the first is ``higher`` or ``lower``; in TOML, ``runs`` names the two, here both ``before`` and
    ``after`` do. Or about two such pairs, before and after a change: the difference ``grows``, or ``stays positive``.
    """

    text: str
    expect: str
    before: tuple[str, str]
    after: tuple[str, str]
    metric: str = "best_accuracy"


@dataclass(frozen=True)
class Study:
    name: str
    title: str
    source: str
    runs: tuple[RunDefinition, ...]
    figures: tuple[Figure, ...]
    conjectures: tuple[Conjecture, ...]
    notes: tuple[str, ...] = ()
    repeated: dict[str, list[float]] = field(default_factory=dict)
    phases: tuple[Phase, ...] = ()


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
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as TOML ({error})") from error
    return _Reader(path).study(content)


class _Reader:
    """Turns the content of ``path`` into a Study; every error names the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def study(self, content: dict[str, Any]) -> Study:
        keys = ("title", "source", "notes", "include", "flags", "runs", "variants", "repeated", "figures", "phases",
                "conjectures")  # fmt: skip
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
            notes=self.strings("notes", content.get("notes", [])),
            repeated=self.repeated(self.table(content, "repeated")),
            phases=tuple(self.phase(item) for item in self.tables(content, "phases")),
        )

    def run(self, where: str, name: str, value: Any) -> RunDefinition:
        if "/" in name or not name:
            raise UserError(f"{self.path}: {where}: a run's name is its folder's, so it must not hold a /")
        self.check_table(where, value)
        self.check_keys(f"{where}.", value, ("label", "flags", "published"))
        published = self.table(value, "published", f"{where}.")
        self.check_keys(f"{where}.published.", published, METRICS)
        for key, number in published.items():
            if not is_a(number, float):
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
            settings[name] = read_setting(name, value, f"{self.path}: {where}.")
        return settings

    def figure(self, value: dict[str, Any], names: Collection[str]) -> Figure:
        self.check_keys("figures.", value, ("title", "runs"))
        return Figure(
            self.string("figures.title", value.get("title")), self.names("figures.runs", value.get("runs"), names)
        )

    def repeated(self, values: dict[str, Any]) -> dict[str, list[float]]:
        self.check_keys("repeated.", values, METRICS)
        for key, numbers in values.items():
            if not isinstance(numbers, list) or len(numbers) < 2 or not all(is_a(item, float) for item in numbers):
                raise UserError(f"{self.path}: repeated.{key}: must be a list of two numbers or more, not {numbers!r}")
        return values

    def phase(self, value: dict[str, Any]) -> Phase:
        self.check_keys("phases.", value, ("label", "epochs"))
        epochs: Any = value.get("epochs")
        if not is_a(epochs, tuple[int, ...]) or len(epochs) != 2 or not 1 <= epochs[0] < epochs[1] <= MANY:
            raise UserError(f"{self.path}: phases.epochs: must be the first and the last, for instance [10, 50]")
        return Phase(self.string("phases.label", value.get("label")), (epochs[0], epochs[1]))

    def conjecture(self, value: dict[str, Any], names: Collection[str]) -> Conjecture:
        expect = self.one_of("conjectures.expect", value.get("expect"), EXPECTATIONS)
        metric = self.one_of("conjectures.metric", value.get("metric", Conjecture.metric), METRICS)
        keys = EXPECTATIONS[expect]
        self.check_keys("conjectures.", value, ("text", "expect", "metric", *keys))
        pairs = [self.names(f"conjectures.{key}", value.get(key), names) for key in keys]
        if any(len(pair) != 2 for pair in pairs):
            raise UserError(f"{self.path}: conjectures: {' and '.join(keys)} must name two runs each")
        (first, second), (third, fourth) = pairs[0], pairs[-1]
        text = self.string("conjectures.text", value.get("text"))
        return Conjecture(text, expect, (first, second), (third, fourth), metric)

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

    def one_of(self, where: str, value: Any, known: Collection[str]) -> str:
        if not isinstance(value, str) or value not in known:
            raise UserError(f"{self.path}: {where}: must be one of {', '.join(known)}")
        return value

    def strings(self, where: str, value: Any) -> tuple[str, ...]:
        if not is_a(value, tuple[str, ...]):
            raise UserError(f"{self.path}: {where}: must be a list of strings, not {value!r}")
        return tuple(value)

    def names(self, where: str, value: Any, known: Collection[str]) -> tuple[str, ...]:
        """Names of runs of this study."""
        names = self.strings(where, value)
        for name in names:
            if name not in known:
                raise UserError(f"{self.path}: {where}: no run {name}; there are {', '.join(known)}")
        return names
