"""What each recipe reaches with each network on all of its data, from the kept runs, for render.py to show."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fastres.config import ENGINE, TrainConfig, over_recipe
from fastres.data.datasets import MINI_CIFAR10_CLASSES
from fastres.data.sizes import image_sizes
from fastres.errors import UserError
from fastres.fields import as_json
from fastres.files import read_json
from fastres.report.style import number_plainly, styled
from fastres.training.start import RESUMABLE

Content = dict[str, Any]
Steps = dict[str, Content]  # the measured steps of a network: with "sgd", and with "muon, 24x24" images and so on
COLORS = {"resnet18": "tab:green", "resnet50": "tab:orange", "vgg16": "tab:blue"}  # of the networks that are shown
DATA = {(): "CIFAR-10", MINI_CIFAR10_CLASSES: "mini-CIFAR-10"}  # of folders with these classes
MARKERS = {"study-a": "s", "study-b": "s", "default": "o", "fast": "*"}
TRAINING_IMAGES = 5000  # of a class


class Reached(NamedTuple):
    """Runs of a recipe that differ in the seed: ``images`` is the format of the files of ``data``; ``accuracy`` in
    percent at the last epoch, of each; ``seconds`` of the steps; ``work``: FLOPs over those of a full-size epoch."""

    model: str
    data: str
    images: str
    recipe: str
    epochs: int
    work: float
    accuracy: pd.Series
    seconds: float


def reached(contents: Iterable[Content], steps: dict[str, Steps]) -> list[Reached]:
    """In the order of networks, data and recipes. ``contents`` are the kept files, the newest last; ``steps`` are by
    network. Of two runs that differ in nothing the newer counts."""
    groups: dict[tuple[str, str, str, str, int], dict[int, tuple[Content, Content]]] = {}
    for config, run in whole_runs(contents):
        data = DATA.get(tuple(config["classes"])) if config["dataset"] == "folder" else None
        if config["model"] in COLORS and data and is_of_recipe(config):
            key = config["model"], data, run["images"], config.get("recipe", "default"), config["epochs"]
            groups.setdefault(key, {})[config["seed"]] = config, run
    found = []
    for key, runs in sorted(groups.items()):
        config, run = next(iter(runs.values()))
        images = TRAINING_IMAGES * (len(config["classes"]) or 10) * config["epochs"]
        seconds = images * seconds_an_image(config, steps.get(config["model"], {}))
        accuracy = pd.Series([run["last_accuracy"] for _, run in runs.values()])
        found.append(Reached(*key, run.get("epochs_work", config["epochs"]), accuracy, seconds))
    return found


def whole_runs(contents: Iterable[Content]) -> Iterator[tuple[Content, Content]]:
    """Settings and figures of every kept run: the single ones and those of the studies, with the format of the
    ``images`` in its folder, which a study of others names."""
    for content in contents:
        images = {"images": content.get("images", "JPEG q75")}
        if "data" in content:
            yield content["config"], content | images
        for run in content["runs"] if "study" in content else ():
            for name in run["folders"]:
                config = read_json(content["folder"] / name / "config.json")
                yield config.get("asked", config), read_json(content["folder"] / name / "summary.json") | images


def is_of_recipe(config: Content) -> bool:
    """Whether its settings are a recipe's, whatever the data, the seed and the machine."""
    given = {name: config[name] for name in ("recipe", "model", "epochs") if name in config}
    expected = as_json(TrainConfig(**over_recipe(given)))
    free = RESUMABLE | {*ENGINE, "seed", "dataset", "classes", "output_dir", "warmup_epochs"}
    return all(config[name] == value for name, value in expected.items() if name in config and name not in free)


def seconds_an_image(config: Content, steps: Steps) -> float:
    """On average over the sizes of the run's images."""
    total = 0.0
    for (_, start), (size, until) in pairwise([(0, 0.0), *image_sizes(config.get("image_size_schedule", "none"))]):
        name = f"muon, {size}x{size}" if config.get("optimizer") == "muon" else "sgd"
        if not (step := steps.get(name)):
            raise UserError(f"no benchmark of a step of {config['model']}, {name}: make bench measures it")
        total += (until - start) * step["seconds"] / step["images"]
    return total


@styled
def draw(rows: list[Reached], device: str, file: Path) -> None:
    """Accuracy against seconds: means over seeds, with a line from the lowest to the highest."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        mean = row.accuracy.mean()
        spread = [[mean - row.accuracy.min()], [row.accuracy.max() - mean]]
        style = {"color": COLORS[row.model], "marker": MARKERS[row.recipe], "markersize": 9, "capsize": 3}
        style["fillstyle"] = "none" if row.images == "PNG" else "full"
        axes.errorbar([row.seconds], [mean], yerr=spread, **style)
        axes.annotate(
            f"{row.epochs}", (row.seconds, mean), xytext=(7, -11), textcoords="offset points", fontsize="small"
        )
    shown = {row.model: row.data for row in rows}
    handles = [Line2D([], [], color=COLORS[model], label=f"{model}, {data}") for model, data in shown.items()]
    handles += [
        Line2D([], [], color="0.3", linestyle="", marker=MARKERS[recipe], label=f"{recipe} recipe")
        for recipe in dict.fromkeys(row.recipe for row in rows)
    ]
    axes.set(
        xlabel=f"seconds of the training steps, {device}", ylabel="test accuracy, last epoch, %", xscale="log",
        title="numbers: epochs; lines: from the lowest seed to the highest; filled: JPEG files, hollow: PNG files",
    )  # fmt: skip
    axes.margins(y=0.1)
    number_plainly(axes.xaxis)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(file, dpi=150)
