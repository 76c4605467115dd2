"""The comparison of groups of runs, from their folders: what differs, accuracies and costs with intervals, pictures."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import scipy

from fastres.errors import UserError
from fastres.files import read_json
from fastres.report.figures import draw_comparison
from fastres.report.page import as_markdown, fill, table_of, write_page
from fastres.report.results import Estimate, Results, decoded
from fastres.report.statistics import CONFIDENCE, Difference, difference

# settings that neither change what is computed nor how fast
PLACES = {
    "seed", "output_dir", "data_dir", "checkpoint_every", "checkpoint_minutes", "checkpoint_steps", "price_per_hour",
}  # fmt: skip
CIRCUMSTANCES = ("device", "commit", "versions")  # of summary.json


class Figure(NamedTuple):
    """A figure of summary.json: its name in tables, its digits, and the factor to the table's unit."""

    title: str
    digits: int = 2
    factor: float = 1.0


FIGURES = {
    "last_accuracy": Figure("accuracy at the last epoch, %"),
    "validated_accuracy": Figure("accuracy, best on validation, %"),
    "best_on_test_accuracy": Figure("accuracy, best on test, %"),
    "mirrored_accuracy": Figure("accuracy with mirrored images, too, %"),
    "selection_gain": Figure("gained by selecting the best, points"),
    "last_test_loss": Figure("test loss at the last epoch", 4),
    "epoch_seconds": Figure("seconds an epoch"),
    "images_per_second": Figure("images/s", 0),
    "train_seconds": Figure("seconds of training", 1),
    "wall_seconds": Figure("seconds of the whole process", 1),
    "train_flop": Figure("arithmetic, TFLOP", 1, 1e-12),
    "epochs_work": Figure("epochs' work (arithmetic of epochs at full size)"),
    "share_of_limit": Figure("share of the limit, %", 0, 100),
    "joules": Figure("energy, J", 0),
    "price": Figure("price", 4),
    "peak_memory_mb": Figure("peak memory, MiB", 0),
}


class Group(NamedTuple):
    """Runs that differ only in their seed, and their settings by name."""

    results: Results
    settings: dict[str, Any]


def read_groups(folders: Sequence[Path]) -> list[Group]:
    """The groups of the runs in ``folders``, in the order of their first runs."""
    found: dict[str, tuple[dict[str, Any], list[Path]]] = {}
    for folder in folders:
        settings = read_settings(folder)
        key = str({name: value for name, value in settings.items() if name not in PLACES})
        found.setdefault(key, (settings, []))[1].append(folder)
    groups = []
    for settings, members in found.values():
        label = re.sub(r"-seed\d+$", "", members[0].resolve().name)
        try:
            results = Results.read(label, label, members)
        except (OSError, ValueError) as error:
            raise UserError(f"{error}; leave the run out") from error
        if results.figures.index.has_duplicates:
            raise UserError(
                f"{', '.join(map(str, members))}: two runs with the same settings and seed; name one of them"
            )
        groups.append(Group(results, settings))
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


def comparison(groups: Sequence[Group], pictures: Mapping[str, str]) -> str:
    """The comparison as Markdown. ``pictures`` are titles by path."""
    results = [group.results for group in groups]
    first, *others = results
    return fill(
        "compare.md.j2",
        title=title_of(groups),
        first=first,
        others=others,
        differing=table_of(differing(groups)),
        figures=table_of(figures(results)),
        runs=sum(len(one.summaries) for one in results),
        looks=sum(summary.get("test_evaluations", 0) for one in results for summary in one.summaries),
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


def figures(results: Sequence[Results]) -> list[dict[str, str]]:
    """A row for each figure that all runs have, and for the time to their target."""
    tables = [result.figures for result in results]
    for table in tables:
        table["validated_accuracy"] = table["best_accuracy"].where(table["best_selected_on"] == "validation")
    known = [name for name in FIGURES if all(table.get(name, missing).notna().all() for table in tables)]
    rows = [row(name, results) for name in known]
    if all(len(result.phases) for result in results):
        for phase in results[0].phases.index:
            seconds = {as_markdown(one.label): f"{one.phases[phase]:,.1f}" for one in results}
            rows.append({"": f"of the whole process: {phase}, s"} | seconds)
    targets = pd.concat([table.get("target_accuracy", missing) for table in tables])
    if targets.notna().all() and targets.nunique() == 1:
        times = {as_markdown(one.label): time_to_target(one.figures["target_seconds"]) for one in results}
        rows.append({"": f"seconds of training to {targets.iloc[0]:g} %, median"} | times)
    return rows


missing = pd.Series([math.nan])


def row(name: str, results: Sequence[Results]) -> dict[str, str]:
    """A figure of every group, and the differences of the others to the first."""
    figure, labels = FIGURES[name], [as_markdown(one.label) for one in results]
    values = [figure.factor * one.figures[name] for one in results]
    cells = {"": figure.title}
    cells |= {label: Estimate.of(value).text(figure.digits) for label, value in zip(labels, values, strict=True)}
    for label, value in zip(labels[1:], values[1:], strict=True):
        cells[f"{label} minus {labels[0]}"] = difference(value, values[0]).text(figure.digits)
    return cells


def time_to_target(seconds: pd.Series) -> str:
    """The median of ``seconds``, NaN where the target was not reached, and its interval by order statistics."""
    times = seconds.fillna(math.inf).sort_values()
    interval = scipy.stats.quantile_test(times, p=0.5).confidence_interval(CONFIDENCE)
    shown = [f"{value:,.1f}" if value < math.inf else "not reached" for value in (times.median(), *interval)]
    known = "" if any(map(math.isnan, interval)) else f" ({shown[1]} to {shown[2]})"
    return f"{shown[0]}{known}; {seconds.count()} of {len(seconds)} reached it"


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
