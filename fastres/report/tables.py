"""A run's summary as a table for the terminal."""

from typing import Any

from rich.table import Table


def summary_table(summary: dict[str, Any]) -> Table:
    """``summary`` is the content of summary.json."""
    table = Table(show_header=False, title=f"{summary['model']} on {summary['dataset']}", title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    selected = f"of epoch {summary['best_epoch']}, the best on {summary['best_selected_on']}"
    for name, value, note in (
        ("best test accuracy", f"{summary['best_accuracy']:.2f} %", selected),
        ("last test accuracy", f"{summary['last_accuracy']:.2f} %", f"of epoch {summary['epochs']}"),
        ("test loss", f"{summary['test_loss']:.4f}", "of the best epoch"),
        ("seconds an epoch", f"{summary['epoch_seconds']:.2f}", "median, training alone"),
        (
            "warm-up",
            f"{summary['warm_up_seconds']:.1f} s",
            ", ".join(word for word, key in (("compiled", "compile"), ("captured", "cuda_graphs")) if summary[key]),
        ),
        ("images/s", f"{summary['images_per_second']:,.0f}", "median"),
        ("data wait", f"{100 * summary['data_wait_fraction']:.1f} %", "of the epochs' time"),
        ("peak memory", f"{summary['peak_memory_mb']:,.0f} MiB", summary["device"]),
        ("parameters", f"{summary['params_millions']:.2f} M", ""),
    ):
        table.add_row(name, value, note)
    return table
