"""A profile as a table, a picture and a line of advice. ``result`` is the content of profile.json throughout."""

from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from fastres.fields import as_flag
from fastres.files import read_json
from fastres.report.style import styled

MUCH_WAIT = 0.02  # of an epoch
CLEARLY_FASTER = 1.05  # times as fast, the median over the rounds; and faster in four of five of them


def profile_table(result: dict[str, Any]) -> str:
    """A row for each candidate, then the model without a loader and the ceilings."""
    rounds = f"{result['rounds']} interleaved rounds of"
    scale = f"{rounds} {result['steps_per_round']} of {result['steps_per_epoch']} steps, scaled to an epoch"
    if result["steps_per_round"] == result["steps_per_epoch"]:
        scale = f"{rounds} an epoch"
    rows = pd.json_normalize([*result["candidates"], result["model_alone"]]).set_index("name").rename_axis(None)
    table = pd.DataFrame(
        {
            "s/epoch": rows["epoch_seconds.median"].map(_seconds),
            "p20": rows["epoch_seconds.p20"].map(_seconds),
            "p80": rows["epoch_seconds.p80"].map(_seconds),
            "images/s": rows.images_per_second.map("{:,.0f}".format),
            "x eager": rows.times_eager.map("{:.2f}".format),
            "wait": rows.data_wait_fraction.map("{:.1%}".format),
            "MiB": rows.peak_memory_mb.map("{:,.0f}".format),
            "limit": rows.limit_share.map("{:.1%}".format),
        }
    )
    table.loc["model alone", ["wait", "MiB"]] = ""
    for name, rate in ceilings(result).items():
        table.loc[name, ["s/epoch", "images/s"]] = _seconds(result["images_per_epoch"] / rate), f"{rate:,.0f}"
    return f"{subject(result)}, {result['augmentation']}, {result['device']}\n{scale}\n{table.fillna('').to_string()}"


def subject(result: dict[str, Any]) -> str:
    images = f"{result['images_per_epoch']:,} {result['dataset']} images an epoch"
    return f"{result['model']}, {images}, batch {result['batch_size']}"


def ceilings(result: dict[str, Any]) -> dict[str, float]:
    """Images a second of each loader with no model consuming them, and of the roofline."""
    loaders = {f"{name} loader alone": rate for name, rate in result["loader_alone_images_per_second"].items()}
    return loaders | {"limit (roofline)": result["limit_images_per_second"]}


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def advice(result: dict[str, Any]) -> str:
    """One line: the change that would help most."""
    fastres = result["candidates"][-1]
    loader = fastres["engine"]["loader"]
    wait = fastres["data_wait_fraction"]
    if wait > MUCH_WAIT:
        rate = result["loader_alone_images_per_second"][loader]
        alone = f"the {loader} loader gives {rate:,.0f} images/s by itself, the model takes "
        alone += f"{result['model_alone']['images_per_second']:,.0f}"
        change = "raise --workers" if loader == "dali" else "install DALI and take --loader dali"
        return f"data wait is {100 * wait:.0f}%: {alone}; {change}"
    gains = []
    for row in result["candidates"]:
        ratios = np.divide(fastres["epoch_seconds"]["rounds"], row["epoch_seconds"]["rounds"])
        low, gain = np.percentile(ratios, (20, 50))
        if row["engine"] != fastres["engine"] and gain > CLEARLY_FASTER and low > 1:
            gains.append((gain, row))
    if gains:
        gain, best = max(gains, key=itemgetter(0))
        changes = [as_flag(name, value) for name, value in best["engine"].items() if value != fastres["engine"][name]]
        return f"{best['name']} is {gain:.2f}x as fast as the defaults here: train with {' '.join(changes)}"
    return (
        f"keep the defaults: data wait is {100 * wait:.1f}%, no other setting measured is clearly faster, and the "
        f"model reaches {100 * fastres['limit_share']:.0f}% of the limit"
    )


@styled
def plot_profile(folder: Path) -> Path:
    """Draws ``folder/profile.json`` to ``folder/profile.png``, and returns that."""
    result = read_json(folder / "profile.json")
    rows = pd.json_normalize(result["candidates"])
    median, p20, p80 = (rows[f"epoch_seconds.{name}"] for name in ("median", "p20", "p80"))
    wait = rows.data_wait_fraction * median
    figure = Figure(figsize=(11, 0.45 * len(rows) + 1.6), layout="constrained")
    epochs, rates = figure.subplots(1, 2, width_ratios=(3, 2))
    epochs.barh(rows.name, median - wait, color="tab:blue", label="step")
    spread = {"xerr": [median - p20, p80 - median], "error_kw": {"elinewidth": 1.5}}
    waits = epochs.barh(rows.name, wait, left=median - wait, color="tab:red", label="data wait", **spread)
    epochs.bar_label(waits, rows.times_eager.map("{:.2f}x".format), padding=4)
    epochs.axvline(result["limit_epoch_seconds"], color="0.4", linestyle="--", linewidth=1, label="limit (roofline)")
    epochs.set(xlabel="seconds an epoch (line: p20 to p80 of the rounds)")
    epochs.margins(x=0.12)
    epochs.grid(False)
    epochs.legend(loc="lower right", fontsize="small")

    images = rows.images_per_second
    shown = {"eager": images.iloc[0], "fastres": images.iloc[-1]}
    shown |= {"fastres' model alone": result["model_alone"]["images_per_second"], **ceilings(result)}
    for name, rate in shown.items():
        rates.plot(rate, name, "o", color="tab:blue" if name in ("eager", "fastres") else "0.5")
        rates.annotate(f"{rate:,.0f}", (rate, name), (7, 0), textcoords="offset points", va="center")
    rates.set(xlabel="images/s", xscale="log", xlim=(0.5 * min(shown.values()), 12 * max(shown.values())))
    rates.xaxis.set_major_formatter(EngFormatter(sep=""))
    rates.margins(y=0.1)
    rates.grid(False, axis="y")
    for axes in (epochs, rates):
        axes.invert_yaxis()
    figure.suptitle(f"{subject(result)}, {result['device']}, {result['date']}", fontsize="medium")
    path = folder / "profile.png"
    figure.savefig(path, dpi=150)
    return path
