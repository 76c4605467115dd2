"""The runs of a study, read from their folders, and their figures over the seeds."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fastres.errors import UserError
from fastres.fields import read_value
from fastres.files import read_json
from fastres.report.statistics import CONFIDENCE, Difference, difference
from fastres.studies import FIRST_EPOCHS
from fastres.training.history import check_history

CONSTANT = ("params_millions", "epochs", "epochs_work")  # figures that are the same for every seed
SUMMARY: dict[Any, tuple[str, ...]] = {  # the part of summary.json that a report reads, by type
    str: ("model", "dataset", "best_selected_on", "device", "loader", "amp"),
    str | None: ("commit",),
    bool: ("channels_last", "compile", "cuda_graphs", "fused"),
    int: ("num_classes", "train_images", "test_images", "epochs", "seed"),
    float: (
        "best_accuracy", "last_accuracy", "test_loss", "epoch_seconds", "images_per_second", "train_seconds",
        "params_millions", "peak_memory_mb",
    ),
    dict[str, Any]: ("per_class_accuracy", "versions"),
    tuple[Any, ...]: ("confusion_matrix",),
}  # fmt: skip
OPTIONAL: dict[Any, tuple[str, ...]] = {  # what not every run has
    float | None: (
        "best_on_test_accuracy", "epochs_work", "joules", "last_test_loss", "mirrored_accuracy", "price",
        "selection_gain", "share_of_limit", "target_accuracy", "target_seconds", "test_evaluations", "train_flop",
        "wall_seconds",
    ),
    dict[str, float]: ("phase_seconds",),
    tuple[float, ...]: ("first_losses",),
}  # fmt: skip


class Estimate(NamedTuple):
    """A mean over seeds and their sample standard deviation, which is NaN for a single seed."""

    value: float
    error: float = math.nan

    @classmethod
    def of(cls, values: pd.Series) -> "Estimate":
        return cls(values.mean(), values.std())

    def text(self, digits: int = 2) -> str:
        """``1,234.50 ± 0.25``, or nothing for NaN."""
        error = "" if math.isnan(self.error) else f" ± {self.error:,.{digits}f}"
        return "" if math.isnan(self.value) else f"{self.value:,.{digits}f}{error}"


@dataclass(frozen=True)
class Results:
    """A group of runs that differ in the seed: a row of a study.

    history: a row for each epoch, columns by name and seed; ``history["test_accuracy"]`` has a column for each seed.
    published, forward_gflop, eager: of a study's row; ``eager`` is the summary of its model in eager PyTorch.
    """

    name: str
    label: str
    history: pd.DataFrame
    summaries: list[dict[str, Any]]
    published: dict[str, float] = field(default_factory=dict)
    forward_gflop: float = math.nan
    eager: dict[str, Any] | None = None

    @classmethod
    def read(cls, name: str, label: str, folders: Sequence[Path], **row: Any) -> "Results":
        """Reads the runs in ``folders``. Raises OSError or ValueError, too, if one is missing or damaged."""
        summaries = [read_summary(folder) for folder in folders]
        histories = [read_history(folder) for folder in folders]
        seeds = [summary["seed"] for summary in summaries]
        return cls(name, label, pd.concat(histories, axis=1, keys=seeds).swaplevel(axis=1), summaries, **row)

    @cached_property
    def figures(self) -> pd.DataFrame:
        """A row for each seed: summary.json, and ``mean_accuracy`` and ``spread``, which are mean and sample standard
        deviation of the test accuracy in the first epochs; the spread of a single epoch is NaN."""
        first = self.history["test_accuracy"][:FIRST_EPOCHS]
        figures = pd.DataFrame(self.summaries).set_index("seed", drop=False)
        return figures.assign(mean_accuracy=first.mean(), spread=first.std())

    @cached_property
    def means(self) -> pd.Series:
        return self.figures.mean(numeric_only=True)

    def estimate(self, metric: str) -> Estimate:
        return Estimate(self.means[metric]) if metric in CONSTANT else Estimate.of(self.figures[metric])

    @property
    def phases(self) -> pd.Series:
        """Mean seconds of wall time by phase; empty for runs of versions that had no clock."""
        known = [summary.get("phase_seconds", {}) for summary in self.summaries]
        return pd.DataFrame(known).mean().rename(lambda name: name.replace("_", "-"))

    def minus(self, other: "Results", metric: str, confidence: float = CONFIDENCE) -> Difference:
        """The difference of the means; of constant figures without an interval."""
        if metric in CONSTANT:
            return Difference(self.means[metric] - other.means[metric])
        return difference(self.figures[metric], other.figures[metric], confidence)

    def sampling_error(self, metric: str) -> float:
        """The binomial standard error, in points, of a test accuracy, from the number of test images; 0 of others."""
        if not metric.endswith("accuracy"):
            return 0.0
        share = self.means[metric] / 100
        return 100 * math.sqrt(share * (1 - share) / self.summaries[0]["test_images"])

    def published_minus(self, other: "Results", metric: str) -> Difference:
        """The difference of the published figures; NaN unless both are known."""
        return Difference(self.published.get(metric, math.nan) - other.published.get(metric, math.nan))

    @property
    def model(self) -> str:
        return self.summaries[0]["model"]

    @property
    def timed(self) -> bool:
        """Whether its seconds are known."""
        return bool(self.figures["epoch_seconds"].notna().all())

    @property
    def times_eager(self) -> float:
        """Images a second relative to eager PyTorch, in which the model was trained, too."""
        assert self.eager is not None
        return self.means["images_per_second"] / self.eager["images_per_second"]

    def seconds_to(self, accuracy: float) -> pd.Series:
        """Of each seed: seconds of training to the end of the first epoch with that test accuracy (%), or NaN."""
        return self.history["epoch_seconds"].cumsum().where(self.history["test_accuracy"] >= accuracy).min()


def read_results(folder: Path, study: dict[str, Any]) -> list[Results]:
    """The results in ``folder`` of the runs that ``study``, the content of study.json, names."""
    try:
        results = [
            Results.read(
                run["name"],
                run["label"],
                [folder / name for name in run["folders"]],
                published=run["published"],
                forward_gflop=run["forward_gflop"],
                eager=read_summary(folder / run["eager_folder"]) if run["eager_folder"] else None,
            )
            for run in study["runs"]
        ]
    except (OSError, ValueError, UserError) as error:
        raise UserError(
            f"{folder}: runs of the study are missing or damaged ({error}); delete damaged ones and add --resume"
        ) from error
    return results if study.get("report_seconds", True) else list(map(without_seconds, results))


def without_seconds(result: Results) -> Results:
    """``result`` as read where other work shared the machine: its seconds, NaN, are not its own."""
    history = result.history.copy()
    history["epoch_seconds"] = math.nan
    unknown: dict[str, Any] = dict.fromkeys(("epoch_seconds", "images_per_second", "train_seconds"), math.nan) | {
        "phase_seconds": {}
    }
    published = {name: value for name, value in result.published.items() if name != "epoch_seconds"}
    summaries = [summary | unknown for summary in result.summaries]
    return replace(result, history=history, summaries=summaries, published=published, eager=None)


def read_history(folder: Path) -> pd.DataFrame:
    """A run's history.csv. Raises OSError or ValueError if it is missing or damaged."""
    path = folder / "history.csv"
    try:
        history = pd.read_csv(path)
        check_history(history.to_dict("records"), validated=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return history


def read_summary(folder: Path) -> dict[str, Any]:
    """A run's summary.json, with everything that a report reads."""
    path = folder / "summary.json"
    summary = decoded(read_json(path))
    if not isinstance(summary, dict):
        raise UserError(f"{path}: holds no summary")
    kinds = {name: kind for kind, names in SUMMARY.items() for name in names}
    kinds |= {name: kind for kind, names in OPTIONAL.items() for name in names if name in summary}
    for name, kind in kinds.items():
        try:
            read_value(summary.get(name, ...), kind, name)
        except UserError as error:
            raise UserError(f"{path}: has no proper {name}; is it of another version of fastres?") from error
    return summary


def decoded(content: Any) -> Any:
    """``content`` of a JSON file, with the names of files as UTF-8 text.

    Python keeps bytes of a name that the locale cannot decode as surrogates, which no text file or picture can hold.
    """
    text = json.dumps(content, ensure_ascii=False).encode(errors="surrogateescape")
    return json.loads(text.decode(errors="replace"))


def one_of_each_model(results: list[Results]) -> list[Results]:
    """The first result of each model and size of its images, by which its arithmetic differs."""
    first: dict[tuple[str, float], Results] = {}
    for result in results:
        first.setdefault((result.model, result.forward_gflop), result)
    return list(first.values())
