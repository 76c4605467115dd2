"""Figures of a study. Each shows a note, the line that says at which scale the study was done."""

import re
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fastres.report.results import Results
from fastres.report.style import number_plainly, styled

CURVES = "Accuracy and loss against epoch"
COLORS = list(colors.TABLEAU_COLORS)
FEW_EPOCHS = 30  # up to here a point is marked at each
CONFUSION_COLUMNS = 3
MOST_NUMBERS = 20  # classes of a confusion matrix whose cells have numbers
MAX_NAME = 100  # characters of a figure's file name that come from its title
NOTE: dict[str, Any] = {"fontsize": "small", "color": "0.4"}


@styled
def draw_figures(folder: Path, chosen: list[dict[str, Any]], results: list[Results], note: str) -> dict[str, str]:
    """Draws all figures of a study to ``folder``, and returns their titles by path in the report.

    ``chosen`` names the titles and runs of the curves; without any, one figure shows all runs.
    """
    by_name = {result.name: result for result in results}
    chosen = chosen or [{"title": CURVES, "runs": list(by_name)}]
    drawn = [(figure["title"], curves([by_name[name] for name in figure["runs"]], note)) for figure in chosen]
    if results[0].timed:
        drawn.append(("Accuracy against seconds of training", pareto(results, note)))
    selected = results[0].summaries[0].get("select", "best")
    drawn.append((f"Confusion of the {selected} epoch", confusion(results, note)))
    return save_figures(folder, drawn)


@styled
def draw_comparison(folder: Path, results: list[Results]) -> dict[str, str]:
    """Draws the figures of a comparison, like ``draw_figures``."""
    return save_figures(folder, [(CURVES, curves(results)), ("Accuracy against seconds of training", pareto(results))])


def save_figures(folder: Path, drawn: Iterable[tuple[str, Figure]]) -> dict[str, str]:
    """Saves figures to ``folder``, and returns their titles by path in the report."""
    folder.mkdir(exist_ok=True)
    titles: dict[str, str] = {}
    for title, picture in drawn:
        name = re.sub(r"[^a-z0-9]+", "-", title.lower())[:MAX_NAME].strip("-") or "figure"
        while (path := f"{folder.name}/{name}.png") in titles:
            name += "-2"
        picture.savefig(folder.parent / path, dpi=130, bbox_inches="tight")
        titles[path] = title
    return titles


def curves(results: list[Results], note: str = "") -> Figure:
    """Accuracy and loss against epoch: mean over seeds, from the lowest to the highest shaded."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(note, **NOTE)
    accuracy, loss = figure.subplots(1, 2)
    handles = []
    for color, result in zip(cycle(COLORS), results, strict=False):
        history, epochs = result.history, result.history.index + 1
        for axes, metric in ((accuracy, "accuracy"), (loss, "loss")):
            over_seeds(axes, epochs, history[f"test_{metric}"], color)
            over_seeds(axes, epochs, history[f"train_{metric}"], color, alpha=0.45, linestyle="--", linewidth=1)
        handles.append(Line2D([], [], color=color, label=result.label))
        if "best_accuracy" in result.published:
            published = result.published["best_accuracy"]
            accuracy.plot(1.0, published, "<", color=color, transform=accuracy.get_yaxis_transform(), clip_on=False)
    handles += [
        Line2D([], [], color="0.3", label="test"),
        Line2D([], [], color="0.3", alpha=0.6, linestyle="--", linewidth=1, label="train"),
    ]
    if any("best_accuracy" in result.published for result in results):
        handles.append(Line2D([], [], color="0.3", marker="<", linestyle="", label="published best"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))
    accuracy.set(xlabel="epoch", ylabel="accuracy, %")
    loss.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    number_plainly(loss.yaxis)
    for axes in (accuracy, loss):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def over_seeds(axes: Axes, x: Any, values: pd.DataFrame, color: str, **style: Any) -> None:
    """``values``, a column for each seed: their mean, from the lowest to the highest shaded."""
    marker = "o" if len(x) <= FEW_EPOCHS else ""
    axes.plot(x, values.mean(axis=1), color=color, marker=marker, markersize=3, **style)
    if values.shape[1] > 1:
        axes.fill_between(x, values.min(axis=1), values.max(axis=1), color=color, alpha=0.12, linewidth=0)


def pareto(results: list[Results], note: str = "") -> Figure:
    """Test accuracy against seconds of training, a point an epoch, and the best that any run has by then: means over
    seeds, from the lowest accuracy to the highest shaded."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    figure.suptitle(note, **NOTE)
    axes = figure.subplots()
    means = []
    for color, result in zip(cycle(COLORS), results, strict=False):
        seconds = result.history["epoch_seconds"].cumsum().mean(axis=1)
        accuracies = result.history["test_accuracy"]
        over_seeds(axes, seconds, accuracies, color, label=result.label, alpha=0.7, linewidth=0.8)
        means.append(accuracies.mean(axis=1).set_axis(seconds))
    front = pd.concat(means).sort_index().cummax()
    axes.step(front.index, front, where="post", color="0.2", linewidth=1.6, alpha=0.6, label="Pareto front", zorder=0)
    axes.set(xlabel="seconds of training, evaluation not counted", ylabel="test accuracy, %", xscale="log")
    number_plainly(axes.xaxis)
    axes.legend(handles=axes.lines, loc="lower right", fontsize="small")  # named, or it hides labels that begin with _
    return figure


def side_of(classes: list[str]) -> float:
    """Inches a side of a confusion matrix of ``classes``."""
    return max(3.6, 0.55 * len(classes)) if len(classes) <= MOST_NUMBERS else min(0.2 * len(classes), 20)


def draw_confusion(axes: Axes, counts: np.ndarray, classes: list[str], title: str) -> None:
    """The percentage of each true class that was taken for each class; ``counts[true][predicted]`` are images."""
    size, turn = ("medium", 0) if len(classes) <= 5 else ("x-small", 90)
    percent = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for (true, predicted), value in np.ndenumerate(percent):
        if len(classes) <= MOST_NUMBERS:
            color = "white" if value > 60 else "0.2"
            axes.text(predicted, true, f"{value:.1f}", ha="center", va="center", color=color, fontsize=size)
    axes.set_xticks(range(len(classes)), classes, rotation=turn, fontsize=size)
    axes.set_yticks(range(len(classes)), classes, fontsize=size)
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel="predicted", ylabel="true, % of its images")
    axes.grid(False)
    axes.spines[:].set_visible(True)


def confusion(results: list[Results], note: str) -> Figure:
    """Of each run, summed over seeds: the percentage of each true class that was taken for each class."""
    columns = min(len(results), CONFUSION_COLUMNS)
    rows = -(-len(results) // columns)
    classes = [list(result.summaries[0]["per_class_accuracy"]) for result in results]
    side = max(map(side_of, classes))
    figure = Figure(figsize=(side * columns, (side + 0.2) * rows), layout="constrained")
    figure.suptitle(note, **NOTE)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, result, names in zip(grid.flat, results, classes, strict=False):
        counts = np.sum([summary["confusion_matrix"] for summary in result.summaries], axis=0)
        draw_confusion(axes, counts, names, result.label)
    for axes in grid.flat[len(results) :]:
        axes.set_axis_off()
    return figure
