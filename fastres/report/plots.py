"""The curves of a run."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastres.report.style import number_plainly, styled

MUCH = 20  # from this ratio of the largest to the smallest loss on, the axis is logarithmic
SPLITS = {"train": "tab:blue", "val": "tab:green", "test": "tab:orange"}


@styled
def plot_curves(folder: Path, title: str) -> Path:
    """Draws loss and accuracy against epoch from ``folder/history.csv`` to ``folder/curves.png``, and returns that."""
    history = pd.read_csv(folder / "history.csv")
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for split, color in SPLITS.items():
        if f"{split}_loss" in history:
            marker = "o" if len(history) < 30 else ""
            line = "--" if split == "train" else "-"
            style = {"label": split, "color": color, "linestyle": line, "marker": marker, "markersize": 3}
            loss.plot(history["epoch"], history[f"{split}_loss"], **style)
            accuracy.plot(history["epoch"], history[f"{split}_accuracy"], **style)
    selection = "val" if "val_accuracy" in history else "test"
    best = history.loc[history[f"{selection}_accuracy"].idxmax()]
    accuracy.axvline(best["epoch"], color="0.6", linestyle=":", linewidth=1)
    accuracy.set_title(
        f"best on {selection}: epoch {best['epoch']:.0f}, test {best['test_accuracy']:.2f} %", fontsize="medium"
    )
    losses = history.filter(regex="_loss$")
    wide = losses.max(axis=None) > MUCH * losses.min(axis=None)
    loss.set(xlabel="epoch", ylabel="cross-entropy")
    if wide:
        loss.set_yscale("log")
        number_plainly(loss.yaxis)
    accuracy.set(xlabel="epoch", ylabel="accuracy, %")
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    accuracy.legend()
    figure.suptitle(title)
    path = folder / "curves.png"
    figure.savefig(path, dpi=150)
    return path
