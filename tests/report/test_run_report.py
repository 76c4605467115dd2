"""A run's summary on the terminal, and its curves."""

import io

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from fastres.report.plots import plot_curves
from fastres.report.tables import summary_table

SUMMARY = {
    "model": "vgg16", "dataset": "digits", "best_accuracy": 90.123, "best_epoch": 3, "best_selected_on": "test",
    "best_on_test_accuracy": 90.123, "selection_gain": 9.778, "top5_accuracy": None, "select": "last",
    "target_accuracy": None, "target_epoch": None, "target_seconds": None,
    "last_accuracy": 80.345, "epochs": 5, "test_loss": 0.25, "epoch_seconds": 12.345, "warm_up_seconds": 4.56,
    "compile": True, "cuda_graphs": False, "images_per_second": 1234.5, "data_wait_fraction": 0.0312,
    "wall_seconds": 100.0, "phase_seconds": {"start_up": 4.0, "training": 96.0}, "share_of_limit": 0.625,
    "mirrored_accuracy": None, "image_size_schedule": "none", "epochs_work": 5.0,
    "train_flop": 7.89e13, "train_flop_per_second": 8.2e11, "joules": None, "price": None,
    "peak_memory_mb": 2345.6, "device": "Some CPU", "params_millions": 14.7,
}  # fmt: skip


def printed(**changes):
    """The lines of the summary's table."""
    file = io.StringIO()
    Console(file=file, width=140).print(summary_table(SUMMARY | changes))
    return [" ".join(line.replace("│", " ").split()) for line in file.getvalue().splitlines()]


def test_the_summary_on_the_terminal():
    lines = printed()
    for line in (
        "vgg16 on digits",
        "accuracy, last epoch 80.34 % of epoch 5",
        "accuracy, best on test 90.12 % of epoch 3, +9.78 points, chosen by the test set",
        "test loss 0.2500 of the last epoch",
        "seconds an epoch 12.35 median, of training only",
        "warm-up 4.6 s compiled",
        "images/s 1,234 median",
        "data wait 3.1 % of the epochs' time",
        "whole process 100.0 s start-up 4.0, training 96.0",
        "arithmetic 78.9 TFLOP 0.82 TFLOP/s, 62 % of the limit",
        "energy not available here",
        "peak memory 2,346 MiB Some CPU",
        "parameters 14.70 M",
    ):
        assert line in lines
    assert not [line for line in lines if line.startswith(("price", "top-5", "reached", "epochs' work"))]
    assert not [line for line in lines if "mirrored" in line]


def test_what_the_summary_shows_where_there_is_more():
    lines = printed(
        best_selected_on="validation", best_on_test_accuracy=91.5, top5_accuracy=99.1, target_accuracy=90.0,
        target_epoch=3, mirrored_accuracy=81.5, image_size_schedule="24:0.65", epochs_work=3.58,
        target_seconds=37.04, joules=12345.6, price=0.125,
    )  # fmt: skip
    for line in (
        "accuracy with mirrored images 81.50 % of the last epoch",
        "epochs' work 3.58 image sizes 24:0.65",
        "accuracy, best on validation 90.12 % of epoch 3, +9.78 points",
        "accuracy, best on test 91.50 % chosen by the test set",
        "top-5 accuracy 99.10 % of the last epoch",
        "reached 90 % epoch 3 37.0 s of training",
        "energy 12,346 J of the GPU, by NVML",
        "price 0.1250 of the whole process",
    ):
        assert line in lines
    assert "reached 95 % not" in printed(target_accuracy=95.0)


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
