"""The report of a study, from study.json and the folders of its runs: report.md, its figures, and report.html, which
holds the same with the pictures inside and needs no network."""

import base64
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean
from string import Template
from typing import Any

import markdown
import numpy as np
import pandas as pd

from fastres.errors import UserError
from fastres.files import read_json
from fastres.report import study_plots
from fastres.training.history import check_history

TARGETS = (80, 85, 90)  # % of test accuracy, that the time to is reported
MAX_NAME = 100  # characters of a figure's file name that come from its title
FIRST_EPOCHS = 5  # the early part of a run that Study A compares
METRICS = {  # of the accuracy table: the column's title, digits, and the words for a difference
    "best_accuracy": ("best, %", 2, "points of best accuracy"),
    "last_accuracy": ("last, %", 2, "points of accuracy at the last epoch"),
    "mean_accuracy": (
        f"mean of epochs 1-{FIRST_EPOCHS}, %", 2, f"points of mean accuracy of epochs 1 to {FIRST_EPOCHS}"
    ),
    "spread": ("their spread", 2, f"points of spread in epochs 1 to {FIRST_EPOCHS}"),
    "test_loss": ("test loss", 4, "of test loss"),
    "params_millions": ("params, M", 2, "million parameters"),
    "epochs": ("epochs", 0, "epochs"),
    "epoch_seconds": ("s/epoch", 2, "seconds an epoch"),
}  # fmt: skip
CONSTANT = ("params_millions", "epochs")  # the same for every seed
SUMMARY: dict[Any, tuple[str, ...]] = {  # what a report tells of a run, by type
    str: ("model", "dataset", "best_selected_on", "device", "loader", "amp"),
    str | None: ("commit",),
    bool: ("channels_last", "compile", "cuda_graphs", "fused"),
    int: ("num_classes", "train_images", "test_images", "epochs", "seed"),
    int | float: (
        "best_accuracy", "last_accuracy", "test_loss", "epoch_seconds", "images_per_second", "train_seconds",
        "params_millions", "peak_memory_mb",
    ),
    dict: ("per_class_accuracy", "versions"),
    list: ("confusion_matrix",),
}  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds, and their sample standard deviation; None for a single seed."""

    mean: float
    std: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), std, len(values))

    def text(self, digits: int = 2) -> str:
        spread = f" ± {self.std:,.{digits}f}" if self.std is not None else ""
        return f"{self.mean:,.{digits}f}{spread}"

    def minus(self, other: "Estimate") -> tuple[float, float | None]:
        """The difference of the means, and its standard error where both have several seeds."""
        if self.std is None or other.std is None:
            return self.mean - other.mean, None
        return self.mean - other.mean, math.hypot(self.std / math.sqrt(self.seeds), other.std / math.sqrt(other.seeds))


@dataclass(frozen=True)
class Results:
    """What one row of a study wrote: a history and a summary for each seed, and those of its model in eager PyTorch."""

    name: str
    label: str
    published: dict[str, float]
    forward_gflop: float
    histories: list[pd.DataFrame]
    summaries: list[dict[str, Any]]
    eager: dict[str, Any] | None

    def estimate(self, metric: str) -> Estimate:
        """``metric`` over the seeds: ``mean_accuracy`` and ``spread`` (mean and sample standard deviation of the test
        accuracy in the first epochs, NaN of a single epoch), or a number of summary.json."""
        if metric in ("mean_accuracy", "spread"):
            first = [history["test_accuracy"][:FIRST_EPOCHS] for history in self.histories]
            return Estimate.of([part.mean() if metric == "mean_accuracy" else part.std() for part in first])
        return Estimate.of([summary[metric] for summary in self.summaries])

    @property
    def model(self) -> str:
        return self.summaries[0]["model"]

    @property
    def times_eager(self) -> float:
        """How many times as many images a second as eager PyTorch, which trained the model, too."""
        assert self.eager is not None
        return self.estimate("images_per_second").mean / self.eager["images_per_second"]

    def seconds_to(self, accuracy: float) -> list[float]:
        """Seconds of training to the end of the first epoch with that test accuracy (%), of the seeds that reach it."""
        seconds = []
        for history in self.histories:
            reached = history["test_accuracy"] >= accuracy
            if reached.any():
                seconds.append(float(history["epoch_seconds"].cumsum()[reached].iloc[0]))
        return seconds


def write_report(folder: Path, price_per_hour: float = 0.0) -> Path:
    """Writes report.md, figures/ and report.html to the study's ``folder``, and returns the last.

    ``price_per_hour`` adds the cost of each run's training time. Raises UserError where a run's files are missing.
    """
    study = decoded(read_json(folder / "study.json"))
    results = read_results(folder, study)
    content = report(study, results, draw(folder / "figures", study, results), price_per_hour)
    (folder / "report.md").write_text(content, encoding="utf-8")
    page = Template((Path(__file__).parent / "study.html").read_text(encoding="utf-8")).substitute(
        title=escape(study["title"]),
        scale=escape(scale_line(study)),
        scale_string=json.dumps(scale_line(study), ensure_ascii=False).replace("<", r"\3c "),
        body=inline_pictures(markdown.markdown(content, extensions=["tables"]), folder),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


def decoded(content: Any) -> Any:
    """``content`` of a JSON file, with the names of files as UTF-8 text.

    Python keeps bytes of a name that the locale cannot decode as surrogates, which no text file or picture can hold.
    """
    text = json.dumps(content, ensure_ascii=False).encode(errors="surrogateescape")
    return json.loads(text.decode(errors="replace"))


def read_results(folder: Path, study: dict[str, Any]) -> list[Results]:
    try:
        return [
            Results(
                name=run["name"],
                label=run["label"],
                published=run["published"],
                forward_gflop=run["forward_gflop"],
                histories=[read_history(folder / name) for name in run["folders"]],
                summaries=[read_summary(folder / name) for name in run["folders"]],
                eager=read_summary(folder / run["eager_folder"]) if run["eager_folder"] else None,
            )
            for run in study["runs"]
        ]
    except (OSError, ValueError, UserError) as error:
        raise UserError(
            f"{folder}: the study's runs are not all there and whole ({error}); delete damaged ones and add --resume"
        ) from error


def read_history(folder: Path) -> pd.DataFrame:
    """A run's history.csv. Raises OSError, or ValueError for what is none."""
    path = folder / "history.csv"
    try:
        history = pd.read_csv(path)
        check_history(history.to_dict("records"), validated=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return history


def read_summary(folder: Path) -> dict[str, Any]:
    """A run's summary.json. Raises UserError where it lacks what a study tells of it."""
    path = folder / "summary.json"
    summary = decoded(read_json(path))
    if not isinstance(summary, dict):
        raise UserError(f"{path}: holds no summary")
    for kind, names in SUMMARY.items():
        for name in names:
            if name not in summary or not isinstance(summary[name], kind):
                raise UserError(f"{path}: has no proper {name}; is it of another version of fastres?")
    return summary


def draw(folder: Path, study: dict[str, Any], results: list[Results]) -> dict[str, str]:
    """Draws all figures to ``folder``; their titles, by path in the report."""
    folder.mkdir(exist_ok=True)
    by_name = {result.name: result for result in results}
    note = scale_line(study)
    figures = study["figures"] or [{"title": "Accuracy and loss against epoch", "runs": list(by_name)}]
    drawn = [
        (figure["title"], study_plots.curves([by_name[name] for name in figure["runs"]], note)) for figure in figures
    ]
    drawn.append(("Accuracy against seconds of training", study_plots.pareto(results, note)))
    drawn.append(("Confusion of the best epoch", study_plots.confusion(results, note)))
    titles: dict[str, str] = {}
    for title, picture in drawn:
        name = re.sub(r"[^a-z0-9]+", "-", title.lower())[:MAX_NAME].strip("-") or "figure"
        while (path := f"{folder.name}/{name}.png") in titles:
            name += "-2"
        study_plots.save(picture, folder.parent / path)
        titles[path] = title
    return titles


def report(study: dict[str, Any], results: list[Results], figures: dict[str, str], price_per_hour: float) -> str:
    """The report as Markdown."""
    *curves, pareto, confusion = (
        f"{as_markdown(title)}\n\n![{as_markdown(title)}]({path})" for path, title in figures.items()
    )
    sections = [
        f"# {as_markdown(study['title'])}",
        f"**{as_markdown(scale_line(study))}**",
        "## Findings",
        "\n".join(f"- {as_markdown(finding)}" for finding in findings(study, results)),
        "## Accuracy",
        accuracy_table(results),
        as_markdown(accuracy_notes(study, results)),
        source_notes(study),
        phase_table(study, results),
        *(f"### {picture}" for picture in curves),
        "## Cost",
        cost_table(results),
        as_markdown(cost_notes(results)),
        f"### {pareto}",
        time_table(results, price_per_hour),
        f"## {confusion}",
        "## How it was measured",
        provenance(study, results),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def scale_line(study: dict[str, Any]) -> str:
    """At which scale the study was done, and what else differs from its definition."""
    parts = [
        f"{100 * study[key]:.4g} % of the {what}"
        for key, what in (("scale", "epochs"), ("data_scale", "training images"))
        if study[key] < 1
    ]
    line = f"Scaled down: {' and '.join(parts)}" if parts else "Full scale"
    changed = ", ".join(f"{name} {value}" for name, value in study["overrides"].items())
    return f"{line}; changed on the command line: {changed}" if changed else line


def accuracy_table(results: list[Results]) -> str:
    rows = []
    for result in results:
        estimates = {name: result.estimate(name) for name in METRICS}
        rows.append(
            [f"**{as_markdown(result.label)}**"]
            + [
                f"{estimates[name].mean:,.{digits}f}" if name in CONSTANT else number(estimates[name], digits)
                for name, (_, digits, _) in METRICS.items()
            ]
        )
        if result.published:
            figures = [
                f"{result.published[name]:,.{digits}f}" if name in result.published else ""
                for name, (_, digits, _) in METRICS.items()
            ]
            rows.append(["*published*", *figures])
    return table(["run", *(title for title, _, _ in METRICS.values())], rows)


def number(estimate: Estimate, digits: int) -> str:
    return "" if math.isnan(estimate.mean) else estimate.text(digits)


def rate(estimate: Estimate) -> str:
    """Images a second, to three digits at least."""
    return estimate.text(0 if estimate.mean >= 100 else 1)


def accuracy_notes(study: dict[str, Any], results: list[Results]) -> str:
    seeds = len(results[0].summaries)
    notes = [f"Mean ± standard deviation over {seeds} seeds." if seeds > 1 else "One seed."]
    if results[0].summaries[0]["best_selected_on"] == "test":
        notes.append("The best epoch is the best on the test set, as the published figures are.")
    notes.append(f"Spread is the standard deviation of the accuracies of epochs 1 to {FIRST_EPOCHS}, in points.")
    notes.append("Test loss is of the best epoch.")
    if study["source"]:
        notes.append(f"Published figures: {study['source']}.")
    return " ".join(notes)


def source_notes(study: dict[str, Any]) -> str:
    """The study's notes, and the published figures that differ although the settings are the same."""
    notes = [
        f"Runs of the same settings, as published: {METRICS[metric][2].removeprefix('points of ')} "
        f"{', '.join(f'{value:.2f}' for value in sorted(values))}. Differences below {noise(study, metric):.2f} are "
        "within the study's own noise."
        for metric, values in study.get("repeated", {}).items()
    ]
    lines = "\n".join(f"- {as_markdown(note)}" for note in [*study.get("notes", []), *notes])
    return f"### About the published figures\n\n{lines}" if lines else ""


def noise(study: dict[str, Any], metric: str) -> float:
    """How far apart the published figures of equal settings are."""
    values = study.get("repeated", {}).get(metric, [0.0])
    return max(values) - min(values)


def phase_table(study: dict[str, Any], results: list[Results]) -> str:
    """Of each run in each of the study's phases, scaled, that it comes to the end of: mean and sample standard
    deviation of the test accuracy, and its change from the phase's first epoch to its last."""
    rows = []
    for result in results:
        for phase in study.get("phases", []):
            first, last = (max(round(epoch * study["scale"]), 1) for epoch in phase["epochs"])
            last = max(last, first + 1)
            if last <= len(result.histories[0]):
                parts = [history["test_accuracy"][first - 1 : last] for history in result.histories]
                figures = (pd.Series.mean, pd.Series.std, lambda part: part.iloc[-1] - part.iloc[0])
                values = [Estimate.of([figure(part) for part in parts]).text() for figure in figures]
                rows.append(
                    [f"**{as_markdown(result.label)}**", as_markdown(phase["label"]), f"{first}-{last}", *values]
                )
    header = ["run", "phase", "epochs", "mean accuracy, %", "spread", "change, points"]
    return f"### Accuracy by phase\n\n{table(header, rows)}" if rows else ""


def cost_table(results: list[Results]) -> str:
    header = ["model", "forward GFLOP", "params, M", "s/epoch", "images/s", "peak MiB"]
    eager = any(result.eager for result in results)
    published = any("epoch_seconds" in result.published for result in results)
    if eager:
        header += ["eager s/epoch", "eager images/s", "eager peak MiB", "fastres against eager"]
    if published:
        header += ["published s/epoch"]
    rows = []
    for result in one_of_each_model(results):
        row = [
            f"**{as_markdown(result.model)}**",
            f"{result.forward_gflop:.3f}",
            f"{result.estimate('params_millions').mean:.2f}",
            result.estimate("epoch_seconds").text(),
            rate(result.estimate("images_per_second")),
            result.estimate("peak_memory_mb").text(0),
        ]
        if eager:
            assert result.eager is not None
            row += [
                f"{result.eager['epoch_seconds']:,.2f}",
                rate(Estimate.of([result.eager["images_per_second"]])),
                f"{result.eager['peak_memory_mb']:,.0f}",
                f"{result.times_eager:.2f} x",
            ]
        if published:
            row += [f"{result.published['epoch_seconds']:.2f}" if "epoch_seconds" in result.published else ""]
        rows.append(row)
    return table(header, rows)


def cost_notes(results: list[Results]) -> str:
    images, device = results[0].summaries[0]["train_images"], results[0].summaries[0]["device"]
    notes = [
        f"An epoch is {images:,} training images on {device}; seconds are the median epoch's, training alone.",
        "A multiply-add is two operations; GFLOP are of one image's convolutions and linear layers.",
    ]
    on_cpu = "Peak memory is the process's resident memory, Python and its libraries included, a loader's workers not."
    on_gpu = "Peak memory is what PyTorch reserved on the GPU; DALI's own is not in it."
    notes.append(on_cpu if "thread" in device else on_gpu)
    if any("epoch_seconds" in result.published for result in results):
        notes.append("Published seconds are of the original's own epoch and machine.")
    if results[0].eager:
        notes.append(
            f"Eager is the same training over {results[0].eager['epochs']} epochs, in fastres' own loop, with "
            "PyTorch's modules in float32, not compiled, and a DataLoader of torchvision transforms."
        )
    return " ".join(notes)


def time_table(results: list[Results], price_per_hour: float) -> str:
    """Seconds of training to each target and to the end, and the cost of the latter."""
    header = ["run", *(f"to {target} %, s" for target in TARGETS), "whole training, s"]
    rows = []
    for result in results:
        total = result.estimate("train_seconds")
        row = [f"**{as_markdown(result.label)}**", *(time_to(result, target) for target in TARGETS), total.text(1)]
        if price_per_hour:
            row.append(f"{total.mean / 3600 * price_per_hour:.4f}")
        rows.append(row)
    return table([*header, f"cost at {price_per_hour:g} an hour"] if price_per_hour else header, rows)


def time_to(result: Results, target: float) -> str:
    seconds = result.seconds_to(target)
    if not seconds:
        return "not reached"
    everyone = "" if len(seconds) == len(result.histories) else f" ({len(seconds)} of {len(result.histories)} seeds)"
    return Estimate.of(seconds).text(1) + everyone


def findings(study: dict[str, Any], results: list[Results]) -> list[str]:
    """What the figures say, in sentences."""
    by_name = {result.name: result for result in results}
    accuracy = [conjecture_finding(item, by_name) for item in study["conjectures"]]
    if all(item["before"] == item["after"] for item in study["conjectures"]):  # each is about two runs of one table
        compared = [line for result in results[1:] for line in accuracy_findings(study, result, results[0])]
        accuracy = compared + order_findings(results) + accuracy
    models = one_of_each_model(results)
    cost = [cost_finding(result, models[0]) for result in models[1:]]
    speed = [eager_finding(result) for result in models if result.eager]
    times = [line for target in TARGETS if (line := first_to(results, target))]
    return accuracy + cost + speed + times


def accuracy_findings(study: dict[str, Any], result: Results, baseline: Results) -> list[str]:
    """``result`` against ``baseline``: in best accuracy, and in that of the last and of the first epochs where it was
    published."""
    lines = []
    for metric in ("best_accuracy", "last_accuracy", "mean_accuracy"):
        what = METRICS[metric][2].removeprefix("points of ")
        published = [run.published[metric] for run in (result, baseline) if metric in run.published]
        if metric == "best_accuracy" or len(published) == 2:
            ours, theirs = result.estimate(metric), baseline.estimate(metric)
            line = (
                f"{result.label}: {what} {ours.mean:.2f} %, {difference(*ours.minus(theirs))} than {baseline.label} "
                f"({theirs.mean:.2f} %)"
            )
            if len(published) == 2:
                points = published[0] - published[1]
                line += f"; the study measured {difference(points)}"
                if abs(points) < noise(study, metric):
                    line += f", less than the {noise(study, metric):.2f} between its own runs of the same settings"
            lines.append(line + ".")
    return lines


def difference(points: float, error: float | None = None) -> str:
    uncertain = f" (± {error:.2f})" if error is not None else ""
    return f"{abs(points):.2f} points{uncertain} {'lower' if points < 0 else 'higher'}"


def order_findings(results: list[Results]) -> list[str]:
    """The order of three or more published runs by their best and by their last accuracy, here and in the study."""
    metrics = ("best_accuracy", "last_accuracy")
    if len(results) < 3 or any(metric not in result.published for result in results for metric in metrics):
        return []
    lines = []
    for where, figure in (
        ("", lambda result, metric: result.estimate(metric).mean),
        (" in the study", lambda result, metric: result.published[metric]),
    ):
        best, last = (
            "; ".join(result.label for result in sorted(results, key=lambda result: -figure(result, metric)))
            for metric in metrics
        )
        end = "the same at the last epoch" if best == last else f"at the last epoch: {last}"
        lines.append(f"From the highest best accuracy to the lowest{where}: {best}; {end}.")
    return lines


def conjecture_finding(conjecture: dict[str, Any], by_name: dict[str, Results]) -> str:
    """Whether the difference does what was conjectured, beside its standard error."""
    metric = conjecture.get("metric", "best_accuracy")
    _, digits, difference_in = METRICS[metric]
    (first, second), (third, fourth) = ([by_name[name] for name in conjecture[key]] for key in ("before", "after"))
    before, before_error = first.estimate(metric).minus(second.estimate(metric))
    after, after_error = third.estimate(metric).minus(fourth.estimate(metric))
    if math.isnan(before + after):
        return f"Conjecture: {conjecture['text']}. Not decided: the runs are too short."
    value, error = after, after_error
    if conjecture["expect"] == "grows":
        value = after - before
        error = None if before_error is None or after_error is None else math.hypot(before_error, after_error)
    if conjecture["expect"] == "lower":
        value = -after
    verdict = "yes" if value > 0 else "no"
    if error is None and metric not in CONSTANT:
        verdict += ", by one seed"
    elif error is not None and abs(value) < 2 * error:
        verdict = "not decided"
    line = (
        f"Conjecture: {conjecture['text']}. {verdict.capitalize()}: {third.label} minus {fourth.label} is "
        f"{signed(after, after_error, digits)} {difference_in}"
    )
    if conjecture["expect"] not in ("higher", "lower"):
        return f"{line}, and {first.label} minus {second.label} {signed(before, before_error, digits)}."
    if metric in CONSTANT:
        values = [run.estimate(metric).mean for run in (third, fourth)]
        line += f", {max(values) / min(values):.1f} times"
    if metric in third.published and metric in fourth.published:
        line += f"; the study measured {third.published[metric] - fourth.published[metric]:+.{digits}f}"
    return f"{line}."


def signed(value: float, error: float | None, digits: int) -> str:
    return f"{value:+.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def cost_finding(result: Results, baseline: Results) -> str:
    """The ratio of the models' time for an image, since the runs may differ in their number of images."""
    ratio = baseline.estimate("images_per_second").mean / result.estimate("images_per_second").mean
    line = f"{result.label} takes {ratio:.1f} times as long an epoch as {baseline.label}"
    if "epoch_seconds" in result.published and "epoch_seconds" in baseline.published:
        line += f"; the study measured {result.published['epoch_seconds'] / baseline.published['epoch_seconds']:.1f}"
    if result.eager and baseline.eager:
        line += f"; eager PyTorch {baseline.eager['images_per_second'] / result.eager['images_per_second']:.1f}"
    return f"{line}; its arithmetic is {result.forward_gflop / baseline.forward_gflop:.1f} times as much."


def eager_finding(result: Results) -> str:
    assert result.eager is not None
    ours = Estimate.of([result.estimate("images_per_second").mean])
    eager = Estimate.of([result.eager["images_per_second"]])
    return (
        f"fastres trains {result.model} at {rate(ours)} images/s, {result.times_eager:.1f} times the {rate(eager)} "
        "of eager PyTorch on the same machine."
    )


def first_to(results: list[Results], target: float) -> str | None:
    """Which run reached ``target`` % with every seed in the least training time."""
    times = [
        (mean(seconds), result.label)
        for result in results
        if len(seconds := result.seconds_to(target)) == len(result.histories)
    ]
    if not times:
        return None
    least, fastest = min(times)
    return f"{target} % is reached first by {fastest}, after {least:.1f} s of training."


def provenance(study: dict[str, Any], results: list[Results]) -> str:
    """Data, engine, versions and commit, with all values that the runs have."""
    summaries = [summary for result in results for summary in result.summaries]
    first = summaries[0]

    def of_all(key: str) -> str:
        return ", ".join(sorted({str(summary[key]) for summary in summaries}))

    engine = ", ".join(
        f"{key.replace('_', '-')} {of_all(key)}" for key in ("amp", "channels_last", "compile", "cuda_graphs", "fused")
    )
    versions = ", ".join(
        dict.fromkeys(f"{name} {number}" for summary in summaries for name, number in summary["versions"].items())
    )
    return "\n".join(
        f"- {as_markdown(line)}"
        for line in (
            f"study {study['study']}, begun {study['date']}; seeds {of_all('seed')}",
            f"dataset {of_all('dataset')}: {of_all('train_images')} training images and {of_all('test_images')} test "
            f"images of {first['num_classes']} classes ({', '.join(first['per_class_accuracy'])})",
            f"device {of_all('device')}; loader {of_all('loader')}, {engine}",
            f"{versions}; commit {of_all('commit')}",
        )
    )


def one_of_each_model(results: list[Results]) -> list[Results]:
    first: dict[str, Results] = {}
    for result in results:
        first.setdefault(result.model, result)
    return list(first.values())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right. The cells are Markdown but for a |."""
    header, *rows = ([cell.replace("|", r"\|") for cell in cells] for cells in (header, *rows))
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def as_markdown(text: str) -> str:
    """``text`` in one line of Markdown that shows it as it is. In a table, ``table`` does the rest."""
    text = re.sub(r"[\\`*\[\]#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", " ".join(text.split()))
    text = re.sub(r"^(\d*)([-+.)])", r"\1\\\2", text)  # would begin a list
    return escape(text, quote=False).replace("~", "&#126;")


def inline_pictures(html: str, folder: Path) -> str:
    """``html`` with its pictures, which lie under ``folder``, as data URIs."""

    def inline(match: re.Match[str]) -> str:
        return f'{match[1]}src="data:image/png;base64,{base64.b64encode((folder / match[2]).read_bytes()).decode()}"'

    return re.sub(r'(<img alt="[^"]*" )src="([^"]+)"', inline, html)
