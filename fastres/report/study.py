"""The report of a study, from study.json and the folders of its runs: report.md with its figures, and report.html with
the pictures inside, which needs no network. The sentences are in study.md.j2."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fastres.config import ENGINE
from fastres.files import read_json
from fastres.report.figures import draw_figures
from fastres.report.page import as_markdown, fill, table_of, write_page
from fastres.report.results import CONSTANT, Estimate, Results, decoded, one_of_each_model, read_results
from fastres.report.statistics import (
    CONFIDENCE,
    MOST_SEEDS,
    TOST,
    Difference,
    anytime_interval,
    decided,
    difference,
    judge,
    more_seeds,
)
from fastres.studies import FIRST_EPOCHS, METRICS
from fastres.training.start import RESUMABLE

TARGETS = (80, 85, 90)  # test accuracies in % whose time-to-reach is reported


CLAIMED = ("best_accuracy", "last_accuracy", "mean_accuracy", "test_loss", "params_millions")  # what can be judged
NEUTRAL = RESUMABLE - {"epochs", "select", "target_accuracy"} | {*ENGINE}  # they leave accuracies as they are


def write_report(folder: Path, price_per_hour: float = 0.0) -> Path:
    """Writes report.md, figures/ and report.html to the study's ``folder``, and returns the path of the last.

    ``price_per_hour`` adds the cost of each run's training time.
    """
    study = decoded(read_json(folder / "study.json"))
    results = read_results(folder, study)
    scale = scale_line(study)
    figures = draw_figures(folder / "figures", study["figures"], results, scale)
    content = report(study, results, figures, price_per_hour)
    return write_page(folder, "report", study["title"], scale, content, figures)


def report(study: dict[str, Any], results: list[Results], figures: dict[str, str], price_per_hour: float) -> str:
    """The report as Markdown. ``figures`` are titles by path: curves against epoch, then Pareto front, unless seconds
    are left out, and confusion."""
    compared = compared_with_the_first(study, results)
    summaries = [summary for result in results for summary in result.summaries]
    return fill(
        "study.md.j2",
        study=study,
        scale=scale_line(study),
        results=results,
        models=one_of_each_model(results),
        runs={result.name: result for result in results},
        compared=compared,
        ranked=len(compared) > 2
        and all({"best_accuracy", "last_accuracy"} <= result.published.keys() for result in compared),
        summaries=summaries,
        versions=dict.fromkeys(f"{name} {number}" for one in summaries for name, number in one["versions"].items()),
        figures=list(figures.items()),
        noise={metric: max(values) - min(values) for metric, values in study.get("repeated", {}).items()},
        accuracy_table=accuracy_table(results),
        claims_table=table_of(rows) if (rows := [found.row for found in claims(study, results)]) else "",
        departures=departures(study) if any(set(CLAIMED) & result.published.keys() for result in results) else "",
        phase_table=phase_table(study, results),
        tricks_table=tricks_table(study, results),
        losses_table=losses_table(study, results),
        cost_table=cost_table(results),
        time_table=time_table(results, price_per_hour),
        phases_table=phases_table(results),
        first_to={target: first_to(results, target) for target in TARGETS},
        decisions=decisions(results, study["decide"]) if study.get("decide") else (),
        growth=growth,
        verdict=verdict,
        CONFIDENCE=CONFIDENCE,
        TOST=TOST,
        CONSTANT=CONSTANT,
        METRICS=METRICS,
        FIRST_EPOCHS=FIRST_EPOCHS,
        Estimate=Estimate,
        rate=rate,
    )


def compared_with_the_first(study: dict[str, Any], results: list[Results]) -> list[Results]:
    """The runs that are compared with the first: none where a claim about a change is about two tables, not about rows
    of one."""
    return [] if any(item["before"] != item["after"] for item in study["conjectures"]) else results


def scale_line(study: dict[str, Any]) -> str:
    """The scale of the study, and what else differs from its definition."""
    parts = [
        f"{100 * study[key]:.4g} % of the {what}"
        for key, what in (("scale", "epochs"), ("data_scale", "training images"))
        if study[key] < 1
    ]
    line = f"Scaled down: {' and '.join(parts)}" if parts else "Full scale"
    changed = ", ".join(f"{name} {value}" for name, value in study["overrides"].items())
    return f"{line}; changed on the command line: {changed}" if changed else line


def growth(before: Sequence[Results], after: Sequence[Results], metric: str) -> Difference:
    """How much larger the difference of the two runs ``after`` a change is than that of the two ``before`` it."""
    changes = [(first.figures[metric] - second.figures[metric]).dropna() for first, second in (after, before)]
    return difference(*changes)


def verdict(expect: str, found: Difference, constant: bool = False, margin: float = 0.0) -> str:
    """Whether ``found`` is what a conjecture expects. ``constant``: of figures that do not depend on the seed."""
    if expect == "equivalent":
        return ("Yes" if abs(found.value) < margin else "No") if decided(found, margin) else "Not decided"
    if found.sign == 0 and not constant:
        return "Not decided"
    fits = found.value < 0 if expect == "lower" else found.value > 0
    return ("Yes" if fits else "No") + (", by one seed" if found.sign is None and not constant else "")


class Decision(NamedTuple):
    """Of a run against the first of the study: a line with the difference of their accuracies and its verdict."""

    line: str
    decided: bool


def decisions(results: list[Results], margin: float) -> list[Decision]:
    """Whether each run's accuracy at the last epoch differs from the first run's by more than ``margin`` points.

    Wrong in any of them, after any number of seeds, with a probability of at most 1 - CONFIDENCE: by Bonferroni over
    the runs, and by ``anytime_interval`` over the seeds.
    """
    first, *others = results
    found = []
    for other in others:
        changes = (other.figures["last_accuracy"] - first.figures["last_accuracy"]).dropna()
        rate = (1 - CONFIDENCE) / len(others)
        interval, seeds = anytime_interval(changes, rate), len(changes)
        done = decided(interval, margin)
        if not done:
            verdict = "not decided"
            if seeds > 1:
                more = more_seeds(changes, margin, rate)
                verdict += f"; it would take {f'about {more}' if more else f'over {MOST_SEEDS:,}'} more seeds"
        elif abs(interval.value) < margin:
            verdict = f"the same within {margin:g} points"
        else:
            verdict = f"{'higher' if interval.value > 0 else 'lower'} by more than {margin:g} points"
        after = f"{interval.text()} points after {seeds} seed{'s' * (seeds > 1)}"
        found.append(Decision(f"{other.label} minus {first.label}: {after}: {verdict}", done))
    return found


def accuracy_table(results: list[Results]) -> str:
    rows = []
    for result in results:
        measured = {metric.title: result.estimate(name).text(metric.digits) for name, metric in METRICS.items()}
        rows.append({"run": f"**{as_markdown(result.label)}**"} | measured)
        if result.published:
            figures = ((metric, result.published[name]) for name, metric in METRICS.items() if name in result.published)
            rows.append({"run": "*published*"} | {metric.title: f"{x:,.{metric.digits}f}" for metric, x in figures})
    return table_of(rows)


def departures(study: dict[str, Any]) -> str:
    """What keeps the accuracies from being judged by the published ones: scale, and flags on the command line, but for
    a folder, which is taken to hold the same images."""
    found = ["scale"] if min(study["scale"], study["data_scale"]) < 1 else []
    for name, value in study["overrides"].items():
        if name.replace("-", "_") not in NEUTRAL and (name, value) != ("dataset", "folder"):
            found.append(f"--{name}")
    return ", ".join(found)


class Claim(NamedTuple):
    """A published figure ``metric`` of a run, or its difference from another's, and the ``row`` of a table in which it
    stands beside ours."""

    runs: tuple[Results, ...]
    metric: str
    row: dict[str, str]


def claims(study: dict[str, Any], results: list[Results]) -> list[Claim]:
    """Every published figure but seconds, and every published difference in accuracy of a run from the first, beside
    ours and whether they agree; with ``departures``, only what the seed does not change."""
    found, compared = [], compared_with_the_first(study, results)
    for name in (name for name in CLAIMED if name in CONSTANT or not departures(study)):
        known = [one for one in results if name in one.published]
        for one in known:
            row = claim(one.label, name, one.published[name], one.figures[name], one.sampling_error(name))
            found.append(Claim((one,), name, row))
        for one in compared[1:] if name.endswith("accuracy") else []:
            other = compared[0]
            if one in known and other in known:
                published = one.published_minus(other, name).value
                changes = (one.figures[name] - other.figures[name]).dropna()
                if len(changes) < 2:  # the difference of the means, as in the findings
                    changes = pd.Series([one.minus(other, name).value])
                error = math.hypot(one.sampling_error(name), other.sampling_error(name))
                row = claim(f"{one.label} minus {other.label}", name, published, changes, error, sign="+")
                found.append(Claim((one, other), name, row))
    return found


def claim(label: str, name: str, published: float, ours: pd.Series, error: float, sign: str = "") -> dict[str, str]:
    """The row of a Claim, of a figure ``name`` of METRICS. ``sign``: + to show it where it is positive."""
    metric = METRICS[name]
    number = f"{{:{sign},.{metric.digits}f}}".format
    found = judge(published, ours, error, 0.5 * 10**-metric.digits, name in CONSTANT)
    low, high = found.low, found.high
    if name.endswith("accuracy") and not sign:
        low, high = max(low, 0.0), min(high, 100.0)
    return {
        "figure": as_markdown(f"{label}: {metric.name}"),
        "published": number(published),
        "ours": number(ours.mean()),
        "n": f"{len(ours)}",
        "another seed of ours": f"{number(low)} to {number(high)}" if 0 < found.high - found.low < math.inf else "",
        "verdict": found.verdict,
    }


def phase_table(study: dict[str, Any], results: list[Results]) -> str:
    """Test accuracy of each run in each phase, scaled, if the run reaches its end: mean, sample standard deviation, and
    change from the phase's first epoch to its last."""
    rows = []
    for result in results:
        for phase in study.get("phases", []):
            first, last = (max(round(epoch * study["scale"]), 1) for epoch in phase["epochs"])
            last = max(last, first + 1)
            if last <= len(result.history):
                accuracy = result.history["test_accuracy"][first - 1 : last]
                rows.append(
                    {
                        "run": f"**{as_markdown(result.label)}**",
                        "phase": as_markdown(phase["label"]),
                        "epochs": f"{first}-{last}",
                        "mean accuracy, %": Estimate.of(accuracy.mean()).text(),
                        "spread": Estimate.of(accuracy.std()).text(),
                        "change, points": Estimate.of(accuracy.iloc[-1] - accuracy.iloc[0]).text(),
                    }
                )
    return table_of(rows) if rows else ""


def tricks_table(study: dict[str, Any], results: list[Results]) -> str:
    """How accuracy at the last epoch, epochs' work and seconds change when a trick is added: to a run without tricks,
    and to a run that has all the others."""
    runs, rows = {result.name: result for result in results}, []
    metrics = {"points": "last_accuracy", "epochs' work": "epochs_work", "seconds": "train_seconds"}
    if len({work for result in results for work in result.figures.get("epochs_work", ())}) < 2:
        del metrics["epochs' work"]
    for item in study.get("ablations", []):
        row = {"run": as_markdown(runs[item["baseline"]].label), "trick": f"**{as_markdown(item['label'])}**"}
        for words, with_it, without_it in (
            ("added alone", "added", "baseline"),
            ("in the whole", "whole", "left_out"),
        ):
            more, less = runs[item[with_it]], runs[item[without_it]]
            row |= {f"{words}: {title}": more.minus(less, name).text() for title, name in metrics.items()}
        rows.append(row)
    return table_of(rows) if rows else ""


def losses_table(study: dict[str, Any], results: list[Results]) -> str:
    """The losses of the first steps, in a study that asks whether its runs are equivalent."""
    if not any(item["expect"] == "equivalent" for item in study["conjectures"]):
        return ""
    losses = [  # a column for each seed; a run that was resumed may have none
        pd.DataFrame({one["seed"]: pd.Series(one["first_losses"], dtype=float) for one in result.summaries})
        for result in results
    ]
    spread = pd.concat(losses, keys=range(len(losses))).groupby(level=1).agg(lambda step: step.max() - step.min())
    means = {as_markdown(one.label): loss.mean(axis=1) for one, loss in zip(results, losses, strict=True)}
    columns = {"step": spread.index + 1} | means | {"largest difference": spread.max(axis=1)}
    return table_of(pd.DataFrame(columns).map("{:.5g}".format).to_dict("records"))


def cost_table(results: list[Results]) -> str:
    rows = []
    for result in one_of_each_model(results):
        row = {
            "model": f"**{as_markdown(result.model)}**",
            "forward GFLOP": f"{result.forward_gflop:.3f}",
            "params, M": result.estimate("params_millions").text(),
            "s/epoch": result.estimate("epoch_seconds").text(),
            "images/s": rate(result.estimate("images_per_second")),
            "peak MiB": result.estimate("peak_memory_mb").text(0),
        }
        if result.eager:
            row |= {
                "eager s/epoch": f"{result.eager['epoch_seconds']:,.2f}",
                "eager images/s": rate(Estimate(result.eager["images_per_second"])),
                "eager peak MiB": f"{result.eager['peak_memory_mb']:,.0f}",
                "fastres against eager": f"{result.times_eager:.2f} x",
            }
        if "epoch_seconds" in result.published:
            row["published s/epoch"] = f"{result.published['epoch_seconds']:.2f}"
        rows.append(row)
    return table_of(rows)


def time_table(results: list[Results], price_per_hour: float) -> str:
    """Seconds of training to each target and to the end, and the cost of the latter."""
    rows = []
    for result in results:
        row = {"run": f"**{as_markdown(result.label)}**"}
        row |= {f"to {target} %, s": time_to(result, target) for target in TARGETS}
        row["whole training, s"] = result.estimate("train_seconds").text(1)
        if price_per_hour:
            row[f"cost at {price_per_hour:g} an hour"] = f"{result.means['train_seconds'] / 3600 * price_per_hour:.4f}"
        rows.append(row)
    return table_of(rows)


def phases_table(results: list[Results]) -> str:
    """Seconds of wall time of each run by phase, and of its whole process."""
    if not all(len(result.phases) for result in results):
        return ""
    rows = []
    for result in results:
        seconds = {phase: f"{value:,.1f}" for phase, value in result.phases.items()}
        rows.append({"run": f"**{as_markdown(result.label)}**"} | seconds | {"whole": f"{result.phases.sum():,.1f}"})
    return table_of(rows)


def time_to(result: Results, target: float) -> str:
    seconds = result.seconds_to(target)
    if seconds.isna().all():
        return "not reached"
    everyone = f" ({seconds.count()} of {len(seconds)} seeds)" if seconds.isna().any() else ""
    return Estimate.of(seconds).text(1) + everyone


def first_to(results: list[Results], target: float) -> tuple[float, str] | None:
    """The least mean training time in seconds to ``target`` %, and its run's label, if a run has it with every seed."""
    times = [(result.seconds_to(target), result.label) for result in results]
    return min(((seconds.mean(), label) for seconds, label in times if seconds.notna().all()), default=None)


def rate(estimate: Estimate) -> str:
    """Images a second, to three digits at least."""
    return estimate.text(0 if estimate.value >= 100 else 1)
