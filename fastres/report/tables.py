"""A run's summary as a table for the terminal."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

MOST_CLASSES = 10  # in a table


def summary_table(summary: dict[str, Any]) -> Table:
    """``summary`` is the content of summary.json."""
    table = Table(show_header=False, title=f"{summary['model']} on {summary['dataset']}", title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for row in summary_rows(summary):
        table.add_row(*row)
    return table


def class_table(summary: dict[str, Any]) -> Table:
    """The accuracy of each class, the lowest first; of many classes the lowest ones."""
    classes = sorted(summary["per_class_accuracy"].items(), key=lambda item: item[1])
    more = f", {MOST_CLASSES} lowest of {len(classes)}" if len(classes) > MOST_CLASSES else ""
    title = f"accuracy by class, {summary['select']} epoch{more}"
    table = Table(show_header=False, title=title, title_justify="left")
    for name, accuracy in classes[:MOST_CLASSES]:
        table.add_row(Text(name), f"{accuracy:.2f} %")
    return table


def summary_rows(summary: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, value and note of each figure."""
    best, by = f"of epoch {summary['best_epoch']}", summary["best_selected_on"]
    yield "accuracy, last epoch", f"{summary['last_accuracy']:.2f} %", f"of epoch {summary['epochs']}"
    if by == "validation":
        yield "accuracy, best on validation", f"{summary['best_accuracy']:.2f} %", f"{best}, {gain(summary)}"
    on_test = summary["best_on_test_accuracy"]
    note = f"{best}, {gain(summary)}, chosen by the test set" if by == "test" else "chosen by the test set"
    yield "accuracy, best on test", f"{on_test:.2f} %", note
    if summary["top5_accuracy"] is not None:
        yield "top-5 accuracy", f"{summary['top5_accuracy']:.2f} %", f"of the {summary['select']} epoch"
    if summary["mirrored_accuracy"] is not None:
        yield (
            "accuracy with mirrored images",
            f"{summary['mirrored_accuracy']:.2f} %",
            f"of the {summary['select']} epoch",
        )
    yield "test loss", f"{summary['test_loss']:.4f}", f"of the {summary['select']} epoch"
    if target := summary["target_accuracy"]:
        reached = summary["target_epoch"]
        note = f"{summary['target_seconds']:,.1f} s of training" if reached else ""
        yield f"reached {target:g} %", f"epoch {reached}" if reached else "not", note
    yield "seconds an epoch", f"{summary['epoch_seconds']:.2f}", "median, of training only"
    done = [word for word, key in (("compiled", "compile"), ("captured", "cuda_graphs")) if summary[key]]
    yield "warm-up", f"{summary['warm_up_seconds']:.1f} s", ", ".join(done)
    yield "images/s", f"{summary['images_per_second']:,.0f}", "median"
    yield "data wait", f"{100 * summary['data_wait_fraction']:.1f} %", "of the epochs' time"
    phases = (f"{name.replace('_', '-')} {seconds:,.1f}" for name, seconds in summary["phase_seconds"].items())
    yield "whole process", f"{summary['wall_seconds']:,.1f} s", ", ".join(phases)
    share = summary["share_of_limit"]
    limit = f", {100 * share:.0f} % of the limit" if share else ""
    rate = f"{summary['train_flop_per_second'] / 1e12:.3g} TFLOP/s{limit}"
    yield "arithmetic", f"{summary['train_flop'] / 1e12:,.3g} TFLOP", rate
    if summary["image_size_schedule"] != "none":
        yield "epochs' work", f"{summary['epochs_work']:.2f}", f"image sizes {summary['image_size_schedule']}"
    if summary["joules"] is None:
        yield "energy", "", "not available here"
    else:
        yield "energy", f"{summary['joules']:,.0f} J", "of the GPU, by NVML"
    if summary["price"]:
        yield "price", f"{summary['price']:.4f}", "of the whole process"
    yield "peak memory", f"{summary['peak_memory_mb']:,.0f} MiB", summary["device"]
    yield "parameters", f"{summary['params_millions']:.2f} M", ""


def gain(summary: dict[str, Any]) -> str:
    """How much selecting gained."""
    return f"{summary['selection_gain']:+.2f} points"
