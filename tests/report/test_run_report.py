"""What a run shows of itself: the summary on the terminal and the curves."""

import io

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from fastres.report.plots import plot_curves
from fastres.report.tables import summary_table


def test_the_summary_on_the_terminal():
    summary = {
        "model": "vgg16", "dataset": "digits", "best_accuracy": 90.123, "best_epoch": 3, "best_selected_on": "test",
        "last_accuracy": 80.345, "epochs": 5, "test_loss": 0.25, "epoch_seconds": 12.345, "warm_up_seconds": 4.56,
        "compile": True, "cuda_graphs": False, "images_per_second": 1234.5, "data_wait_fraction": 0.0312,
        "peak_memory_mb": 2345.6, "device": "Some CPU", "params_millions": 14.7,
    }  # fmt: skip
    printed = io.StringIO()
    Console(file=printed, width=120).print(summary_table(summary))
    lines = [" ".join(line.replace("│", " ").split()) for line in printed.getvalue().splitlines()]
    for line in (
        "vgg16 on digits",
        "best test accuracy 90.12 % of epoch 3, the best on test",
        "last test accuracy 80.34 % of epoch 5",
        "test loss 0.2500 of the best epoch",
        "seconds an epoch 12.35 median, training alone",
        "warm-up 4.6 s compiled",
        "images/s 1,234 median",
        "data wait 3.1 % of the epochs' time",
        "peak memory 2,346 MiB Some CPU",
        "parameters 14.70 M",
    ):
        assert line in lines


@pytest.mark.parametrize(
    ("splits", "title"),
    [
        (("train", "test"), "best on test: epoch 3, test 90.00 %"),
        (("train", "val", "test"), "best on val: epoch 2, test 80.00 %"),
    ],
)
def test_the_curves_are_the_history(splits, title, tmp_path, monkeypatch):
    accuracy = {"train": [50.0, 99.0, 98.0], "val": [40.0, 85.0, 84.0], "test": [30.0, 80.0, 90.0]}
    history = pd.DataFrame({"epoch": [1, 2, 3]})
    for number, split in enumerate(splits):
        history[f"{split}_loss"] = [3.0 + number, 2.0, 1.0]
        history[f"{split}_accuracy"] = accuracy[split]
    history.to_csv(tmp_path / "history.csv", index=False)
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    plot_curves(tmp_path, "a run")
    losses, accuracies = saved[0].axes
    assert accuracies.get_title() == title
    for axes, metric in ((losses, "loss"), (accuracies, "accuracy")):
        for line, split in zip(axes.lines, splits, strict=False):
            assert line.get_label() == split
            assert line.get_linestyle() == ("--" if split == "train" else "-")
            np.testing.assert_array_equal(line.get_ydata(), history[f"{split}_{metric}"])
