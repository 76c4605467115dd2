"""Studies: tables of runs over the flags of ``fastres.train``, read from TOML and checked before anything runs.

A file holds::

    title = "..."                     # of the report
    source = "..."                    # optional: where the published figures are from
    notes = ["..."]                   # optional: sentences about the source, for the report
    include = ["architecture/vgg16"]  # optional: runs of built-in studies, with their flags and published figures
    [flags]                           # optional: flags of fastres.train that all of this file's own runs share
    [runs.NAME]                       # label, flags, published (its keys: METRICS), all optional
    [variants.NAME]                   # optional: label and flags; each run is done once in every variant
    [tricks.NAME]                     # optional: label and flags; each run is done without them and with them all
    [repeated]                        # optional: METRIC = [...], published figures of runs with the same settings
    [[figures]]                       # optional: title and runs; otherwise one figure shows all runs
    [[phases]]                        # optional: label and epochs = [FIRST, LAST], see Phase
    [[conjectures]]                   # optional: text, expect, metric, and runs, or before and after: see Conjecture
"""

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from fastres.config import INT32_MAX, TrainConfig, over_recipe
from fastres.data.plan import with_steps
from fastres.errors import UserError, named
from fastres.fields import check_names, read_fields, read_table
from fastres.fields import path as path_of
from fastres.files import read_toml

BUILT_IN = Path(__file__).parent
FIRST_EPOCHS = 5  # the early part of a run that Study A compares


class Metric(NamedTuple):
    """A column of the report's accuracy table, and the words for a difference in it: 1.23 ``unit`` ``name``."""

    title: str
    digits: int
    name: str
    unit: str = "points of "


METRICS = {
    "best_accuracy": Metric("best, %", 2, "best accuracy"),
    "last_accuracy": Metric("last, %", 2, "accuracy at the last epoch"),
    "mean_accuracy": Metric(f"mean of epochs 1-{FIRST_EPOCHS}, %", 2, f"mean accuracy of epochs 1 to {FIRST_EPOCHS}"),
    "spread": Metric("their spread", 2, f"spread in epochs 1 to {FIRST_EPOCHS}"),
    "test_loss": Metric("test loss", 4, "test loss", "of "),
    "params_millions": Metric("params, M", 2, "million parameters", ""),
    "epochs": Metric("epochs", 0, "epochs", ""),
    "epoch_seconds": Metric("s/epoch", 2, "seconds an epoch", ""),
}
EXPECTATIONS = {  # of a conjecture: the keys that name its runs
    "grows": ("before", "after"),
    "stays positive": ("before", "after"),
    "higher": ("runs",),
    "lower": ("runs",),
    "equivalent": ("runs",),
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
    epochs: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.epochs) != 2 or not 1 <= self.epochs[0] < self.epochs[1] <= INT32_MAX:
            raise UserError("epochs must be the first and the last, for instance [10, 50]")


@dataclass(frozen=True)
class Conjecture:
    """A claim about the difference in ``metric`` between two runs, ``first - second``.

    ``expect``: of the two ``runs``, the first is ``higher`` or ``lower``, or they are ``equivalent`` within ``margin``;
    or of two such pairs, ``before`` and ``after`` a change, the difference ``grows``, or ``stays positive``.
    """

    text: str
    expect: str
    metric: str = "best_accuracy"
    runs: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    margin: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("expect", EXPECTATIONS), ("metric", METRICS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}")
        keys = EXPECTATIONS[self.expect]
        if any(len(getattr(self, key)) != 2 * (key in keys) for key in ("runs", "before", "after")):
            raise UserError(
                f"to expect {self.expect!r}, {' and '.join(keys)} must name two runs each, and nothing else"
            )
        if (self.margin > 0) != (self.expect == "equivalent"):
            raise UserError("margin must be above 0 to expect 'equivalent', and is for that only")


@dataclass(frozen=True)
class Ablation:
    """The names of four runs that measure a trick: ``baseline`` has no trick and ``added`` only this one; ``whole`` has
    all tricks and ``left_out`` all except this one."""

    label: str
    baseline: str
    added: str
    whole: str
    left_out: str


@dataclass(frozen=True)
class Study:
    name: str
    title: str
    source: str
    runs: tuple[RunDefinition, ...]
    figures: tuple[Figure, ...] = ()
    conjectures: tuple[Conjecture, ...] = ()
    notes: tuple[str, ...] = ()
    repeated: dict[str, tuple[float, ...]] = field(default_factory=dict)
    phases: tuple[Phase, ...] = ()
    ablations: tuple[Ablation, ...] = ()


@dataclass(frozen=True)
class RunTable:
    """[runs.NAME], [variants.NAME] or [tricks.NAME] of a file."""

    label: str = ""
    flags: dict[str, Any] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyFile:
    """The keys of a file, described at the head of this module."""

    title: str = ""
    source: str = ""
    notes: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    flags: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, RunTable] = field(default_factory=dict)
    variants: dict[str, RunTable] = field(default_factory=dict)
    tricks: dict[str, RunTable] = field(default_factory=dict)
    repeated: dict[str, tuple[float, ...]] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    phases: tuple[Phase, ...] = ()
    conjectures: tuple[Conjecture, ...] = ()


def list_studies() -> list[str]:
    """The names of the built-in studies."""
    return sorted(path.stem for path in BUILT_IN.glob("*.toml"))


def load_study(name: str, ablate: bool = False) -> Study:
    """The built-in study called ``name``, or that of the TOML file at that path.

    ``ablate``: for each of its tricks, add a run that has only this trick, and a run that has all the others.
    """
    path = path_of(name) if name.endswith(".toml") else BUILT_IN / f"{name}.toml"
    if not path.is_file():
        raise UserError(f"{name}: no such study; choose from {', '.join(list_studies())}, or give a .toml file")
    content = read_toml(path)
    with named(path):
        return build(path.stem, read_table(StudyFile, content), ablate)


def build(name: str, file: StudyFile, ablate: bool = False) -> Study:
    """The study called ``name`` from the content of its file."""
    shared = read_flags("flags", file.flags)
    own = definitions("runs", file.runs)
    runs = [included(item) for item in file.include] + [replace(run, flags=shared | run.flags) for run in own]
    if not runs:
        raise UserError("no runs; add a table [runs.NAME] with flags = { ... }")
    if file.variants:
        runs = [varied(run, variant) for run in runs for variant in definitions("variants", file.variants)]
    ablations: list[Ablation] = []
    if ablate and not file.tricks:
        raise UserError("no tricks for --ablate; add a table [tricks.NAME] with flags = { ... }")
    if file.tricks:
        tricks = definitions("tricks", file.tricks)
        tried = [with_tricks(run, tricks, ablate) for run in runs]
        runs = [run for found, _ in tried for run in found]
        ablations = [ablation for _, found in tried for ablation in found]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"two runs are called {max(names, key=names.count)}; rename one")
    for figure in file.figures:
        check_runs("figures.runs", figure.runs, names)
    for item in file.conjectures:
        check_runs("conjectures", (*item.runs, *item.before, *item.after), names)
    check_names(file.repeated, METRICS, "repeated.")
    for metric, numbers in file.repeated.items():
        if len(numbers) < 2:
            raise UserError(f"repeated.{metric}: must be a list of two numbers or more, not {list(numbers)}")
    return Study(
        name,
        file.title or name,
        file.source,
        tuple(runs),
        file.figures,
        file.conjectures,
        file.notes,
        file.repeated,
        file.phases,
        tuple(ablations),
    )


def definitions(where: str, tables: dict[str, RunTable]) -> list[RunDefinition]:
    found = []
    for name, item in tables.items():
        if "/" in name or not name:
            raise UserError(f"{where}.{name}: a run's name is its folder's, so it must not contain a /")
        try:
            os.fsencode(name)
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}.{name}: a run's name is its folder's, and the locale has no such file name; set PYTHONUTF8=1"
            ) from error
        check_names(item.published, METRICS, f"{where}.{name}.published.")
        flags = read_flags(f"{where}.{name}.flags", item.flags)
        found.append(RunDefinition(name, item.label or name, flags, item.published))
    return found


def read_flags(where: str, values: dict[str, Any]) -> dict[str, Any]:
    """The settings in ``values``, whose keys are flags without the two dashes in front."""
    settings = read_fields(TrainConfig, values, where)
    for name in settings:
        if name in RESERVED:
            raise UserError(f"{where}.{name}: leave it out; {RESERVED[name]}")
    return settings


def included(item: str) -> RunDefinition:
    """The run STUDY/RUN of a built-in study."""
    study, _, run = item.partition("/")
    if study not in list_studies():
        raise UserError(f"include {item}: must be STUDY/RUN of {', '.join(list_studies())}")
    known = {definition.name: definition for definition in load_study(study).runs}
    if run not in known:
        raise UserError(f"include {item}: {study} has the runs {', '.join(known)}")
    return known[run]


def varied(run: RunDefinition, variant: RunDefinition) -> RunDefinition:
    """``run`` in ``variant``; its published figures hold only if the variant changes nothing."""
    return RunDefinition(
        name=f"{run.name}-{variant.name}",
        label=f"{run.label}, {variant.label}",
        flags=run.flags | variant.flags,
        published=run.published if not variant.flags else variant.published,
    )


def with_tricks(
    run: RunDefinition, tricks: list[RunDefinition], ablate: bool
) -> tuple[list[RunDefinition], list[Ablation]]:
    """``run`` without any of ``tricks`` and with all of them.

    If ``ablate``, also with one trick, and with all except one, for each trick; the second list says which runs these
    are.
    """

    def tried(suffix: str, words: str, parts: list[RunDefinition]) -> RunDefinition:
        flags = dict(run.flags)
        for trick in parts:
            augmentation = over_recipe(flags).get("augmentation", TrainConfig.augmentation)
            flags |= trick.flags
            if steps := trick.flags.get("augmentation"):
                flags["augmentation"] = with_steps(augmentation, steps)
        return RunDefinition(run.name + suffix, run.label + words, flags, run.published if not parts else {})

    whole = tried("-all", " with all", tricks)
    if not ablate:
        return [tried("", "", []), whole], []
    added = [tried(f"-with-{trick.name}", f" with {trick.label}", [trick]) for trick in tricks]
    left_out = [
        tried(f"-without-{trick.name}", f" with all but {trick.label}", [other for other in tricks if other != trick])
        for trick in tricks
    ]
    ablations = [
        Ablation(trick.label, run.name, one.name, whole.name, rest.name)
        for trick, one, rest in zip(tricks, added, left_out, strict=True)
    ]
    return [tried("", "", []), whole, *added, *left_out], ablations


def check_runs(where: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{where}: no run {name}; choose from {', '.join(known)}")
