"""The comparison of groups of runs, from their folders: what differs, accuracies and costs with intervals, pictures."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fastres.errors import UserError
from fastres.files import read_json
from fastres.report.figures import draw_comparison
from fastres.report.page import as_markdown, fill, table_of, write_page
from fastres.report.results import Estimate, Results, decoded
from fastres.report.statistics import CONFIDENCE, Difference

# settings that neither change what is computed nor how fast
PLACES = {"seed", "output_dir", "data_dir", "checkpoint_every", "checkpoint_minutes", "checkpoint_steps"}
CIRCUMSTANCES = ("device", "commit", "versions")  # of summary.json


class Figure(NamedTuple):
    """A figure of summary.json: its name in tables and its digits."""

    title: str
    digits: int = 2


FIGURES = {
    "last_accuracy": Figure("accuracy at the last epoch, %"),
    "best_accuracy": Figure("best on test, %"),
    "last_test_loss": Figure("test loss at the last epoch", 4),
    "epoch_seconds": Figure("seconds an epoch"),
    "images_per_second": Figure("images/s", 0),
    "train_seconds": Figure("seconds of training", 1),
    "peak_memory_mb": Figure("peak memory, MiB", 0),
}


class Group(NamedTuple):
    """Runs that differ only in their seed, and their settings by name."""

    results: Results
    settings: dict[str, Any]


def read_groups(folders: Sequence[Path]) -> list[Group]:
    """The groups of the runs in ``folders``, in the order of their first runs."""
    found: dict[str, list[Path]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for folder in folders:
        own = read_settings(folder)
        key = str({name: value for name, value in own.items() if name not in PLACES})
        found.setdefault(key, []).append(folder)
        settings.setdefault(key, own)
    groups = []
    for key, members in found.items():
        label = re.sub(r"-seed\d+$", "", members[0].name)
        try:
            results = Results.read(label, label, members)
        except (OSError, ValueError) as error:
            raise UserError(f"{error}; leave the run out") from error
        if results.figures.index.has_duplicates:
            raise UserError(
                f"{', '.join(map(str, members))}: two runs with the same settings and seed; name one of them"
            )
        groups.append(Group(results, settings[key]))
    labels = [group.results.label for group in groups]
    if len(set(labels)) < len(labels):
        raise UserError(f"two groups are called {max(labels, key=labels.count)}; rename the folders of one")
    return groups


def read_settings(folder: Path) -> dict[str, Any]:
    """Every setting of the run in ``folder`` after ``auto`` was replaced, from its config.json."""
    content = decoded(read_json(folder / "config.json"))
    try:
        return {**content["asked"], **content["chosen"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'}: not the settings of a run of this version of fastres") from error


def write_comparison(groups: Sequence[Group], folder: Path) -> Path:
    """Writes the comparison to ``folder``: compare.md, its pictures, and compare.html, whose path is returned."""
    results = [group.results for group in groups]
    pictures = draw_comparison(folder / "figures", results)
    runs = sum(len(result.summaries) for result in results)
    return write_page(folder, "compare", title_of(groups), f"{runs} runs", comparison(groups, pictures), pictures)


def comparison(groups: Sequence[Group], pictures: Mapping[str, str] = MappingProxyType({})) -> str:
    """The comparison as Markdown. ``pictures`` are titles by path."""
    results = [group.results for group in groups]
    first, *others = results
    return fill(
        "compare.md.j2",
        title=title_of(groups),
        first=first,
        others=others,
        differing=table_of(differing(groups)),
        figures=table_of([row(name, results) for name in FIGURES if all(name in r.figures for r in results)]),
        pictures=pictures,
        CONFIDENCE=CONFIDENCE,
        in_words=in_words,
        method=method,
    )


def title_of(groups: Sequence[Group]) -> str:
    return " against ".join(group.results.label for group in groups)


def differing(groups: Sequence[Group]) -> list[dict[str, str]]:
    """A row for each setting or circumstance that is not the same in all runs, and the seeds."""
    rows = []
    for name in groups[0].settings.keys() - PLACES:
        rows.append([name.replace("_", "-"), *(str(group.settings.get(name)) for group in groups)])
    for name in CIRCUMSTANCES:
        rows.append([name, *(distinct(group.results.figures[name]) for group in groups)])
    rows = sorted(cells for cells in rows if len(set(cells[1:])) > 1)
    rows.append(["seeds", *(distinct(group.results.figures["seed"]) for group in groups)])
    header = ["", *(as_markdown(group.results.label) for group in groups)]
    return [dict(zip(header, map(as_markdown, cells), strict=True)) for cells in rows]


def distinct(values: Iterable[Any]) -> str:
    """The different ones of ``values``, in their order."""
    return ", ".join(dict.fromkeys(map(str, values)))


def row(name: str, results: Sequence[Results]) -> dict[str, str]:
    """A figure of every group, and the differences of the others to the first."""
    figure, (first, *others) = FIGURES[name], results
    cells = {"": figure.title}
    cells |= {as_markdown(one.label): Estimate.of(one.figures[name]).text(figure.digits) for one in results}
    for other in others:
        column = f"{as_markdown(other.label)} minus {as_markdown(first.label)}"
        cells[column] = other.minus(first, name).text(figure.digits)
    return cells


def in_words(ours: Results, theirs: Results) -> str:
    """Which of the two is more accurate at the last epoch, if that can be told."""
    found = ours.minus(theirs, "last_accuracy")
    if not found.sign:
        return "They cannot be told apart" if found.sign == 0 else "There are too few runs to tell them apart"
    return f"{ours.label} is {'more' if found.value > 0 else 'less'} accurate than {theirs.label}"


def method(found: Difference) -> str:
    """How the interval of ``found`` was computed."""
    if found.sign is None:
        return "an interval takes two runs of each, or two seeds that both have"
    how = f"paired by {found.pairs} seeds, Student's t" if found.pairs else "unpaired, Welch's t"
    return f"{how} with {found.df:.3g} degrees of freedom"
