"""A profile as a table, a picture and a line of advice. ``result`` is the content of profile.json throughout."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich import box
from rich.table import Table

from fastres.fields import as_flag
from fastres.files import read_json
from fastres.report.style import styled

MUCH_WAIT = 0.02  # of an epoch
CLEARLY_FASTER = 1.05


def profile_table(result: dict[str, Any]) -> Table:
    """One row a variant, then the ceilings: each part alone, and the roofline."""
    scale = (
        f"{result['rounds']} interleaved rounds of {result['steps_per_round']} of {result['steps_per_epoch']} steps, "
        "scaled to an epoch"
    )
    if result["steps_per_round"] == result["steps_per_epoch"]:
        scale = f"{result['rounds']} interleaved rounds of an epoch"
    table = Table(
        title=f"{result['model']}, {result['images_per_epoch']:,} {result['dataset']} images an epoch, batch "
        f"{result['batch_size']}, {result['augmentation']}, {result['device']}\n{scale}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for name in ("s/epoch", "p20", "p80", "images/s", "x eager", "wait", "MiB", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["variants"]:
        table.add_row(
            *_measured(row), f"{100 * row['data_wait_fraction']:.1f}%", f"{row['peak_memory_mb']:,.0f}", _share(row)
        )
    table.add_section()
    table.add_row(*_measured(result["model_alone"]), "", "", _share(result["model_alone"]))
    for name, rate in result["loader_alone_images_per_second"].items():
        table.add_row(f"{name} loader alone", _seconds(result["images_per_epoch"] / rate), "", "", f"{rate:,.0f}")
    table.add_row(
        "limit (roofline)",
        _seconds(result["limit_epoch_seconds"]),
        "",
        "",
        f"{result['limit_images_per_second']:,.0f}",
    )
    return table


def _measured(row: dict[str, Any]) -> tuple[str, ...]:
    seconds = row["epoch_seconds"]
    times = (_seconds(seconds[name]) for name in ("median", "p20", "p80"))
    return row["name"], *times, f"{row['images_per_second']:,.0f}", f"{row['times_eager']:.2f}"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _share(row: dict[str, Any]) -> str:
    return f"{100 * row['limit_share']:.1f}%"


def advice(result: dict[str, Any]) -> str:
    """In one line, what the user should change, most pressing first."""
    fastres = result["variants"][-1]
    loader = fastres["engine"]["loader"]
    wait = fastres["data_wait_fraction"]
    if wait > MUCH_WAIT:
        rate = result["loader_alone_images_per_second"][loader]
        alone = f"the {loader} loader gives {rate:,.0f} images/s alone, the model takes "
        alone += f"{result['model_alone']['images_per_second']:,.0f}"
        change = "raise --workers" if loader == "dali" else "install DALI and take --loader dali"
        return f"data wait is {100 * wait:.0f}%: {alone}; {change}"
    best = min((row for row in result["variants"] if row["engine"] != fastres["engine"]), key=_median, default=fastres)
    gain = _median(fastres) / _median(best)
    changes = [as_flag(name, value) for name, value in best["engine"].items() if value != fastres["engine"][name]]
    if gain > CLEARLY_FASTER:
        return f"{best['name']} is {gain:.2f}x as fast as the defaults here: train with {' '.join(changes)}"
    return (
        f"keep the defaults: data wait is {100 * wait:.1f}%, no other setting is clearly faster, and the model reaches "
        f"{100 * fastres['limit_share']:.0f}% of the limit"
    )


def _median(row: dict[str, Any]) -> float:
    return row["epoch_seconds"]["median"]


@styled
def plot_profile(folder: Path) -> Path:
    """Draws ``folder/profile.json`` to ``folder/profile.png``, and returns that."""
    result = read_json(folder / "profile.json")
    rows = result["variants"]
    figure = Figure(figsize=(11, 0.45 * len(rows) + 1.6), layout="constrained")
    epochs, ceilings = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, row in enumerate(rows):
        seconds = row["epoch_seconds"]
        median, wait = seconds["median"], row["data_wait_fraction"] * seconds["median"]
        epochs.barh(i, median - wait, color="tab:blue", label="step" if i == 0 else None)
        epochs.barh(i, wait, left=median - wait, color="tab:red", label="data wait" if i == 0 else None)
        epochs.plot([seconds["p20"], seconds["p80"]], [i, i], color="black", linewidth=1.5)
        end = max(median, seconds["p80"])
        epochs.annotate(f"{row['times_eager']:.2f}x", (end, i), (4, 0), textcoords="offset points", va="center")
    epochs.axvline(result["limit_epoch_seconds"], color="0.4", linestyle="--", linewidth=1, label="limit (roofline)")
    epochs.set_yticks(range(len(rows)), [row["name"] for row in rows])
    epochs.set(xlabel="seconds an epoch (line: p20 to p80 of the rounds)")
    epochs.margins(x=0.12)
    epochs.grid(False)
    epochs.legend(loc="lower right", fontsize="small")

    rates: list[tuple[str, float]] = [
        ("eager", rows[0]["images_per_second"]),
        ("fastres", rows[-1]["images_per_second"]),
        ("fastres' model alone", result["model_alone"]["images_per_second"]),
        ("limit (roofline)", result["limit_images_per_second"]),
        *((f"{name} loader alone", rate) for name, rate in result["loader_alone_images_per_second"].items()),
    ]
    for i, (name, rate) in enumerate(rates):
        ceilings.plot(rate, i, "o", color="tab:blue" if name in ("eager", "fastres") else "0.5")
        ceilings.annotate(f"{rate:,.0f}", (rate, i), (7, 0), textcoords="offset points", va="center")
    ceilings.set_yticks(range(len(rates)), [name for name, _ in rates])
    ceilings.set(
        xlabel="images/s",
        xscale="log",
        xlim=(0.5 * min(rate for _, rate in rates), 12 * max(rate for _, rate in rates)),
    )
    ceilings.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1k, 10k, ...; the default is in mathtext
    ceilings.margins(y=0.1)
    ceilings.grid(False, axis="y")
    for axes in (epochs, ceilings):
        axes.invert_yaxis()
    figure.suptitle(
        f"{result['model']}, {result['images_per_epoch']:,} {result['dataset']} images an epoch, batch "
        f"{result['batch_size']}, {result['device']}, {result['date']}",
        fontsize="medium",
    )
    path = folder / "profile.png"
    figure.savefig(path, dpi=150)
    return path
