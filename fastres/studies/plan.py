"""The runs of a study as commands of fastres.train, planned and checked before any of them starts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fastres.config import TrainConfig, check_effect, over_recipe
from fastres.data.datasets import MINI_CIFAR10_CLASSES, load_dataset
from fastres.data.sizes import mean_area
from fastres.data.splits import IMAGE_SIZE, Dataset
from fastres.errors import UserError, named
from fastres.fields import check_fields, flag
from fastres.models import create_to_count, function_name
from fastres.profiling.measure import EAGER
from fastres.profiling.roofline import forward_macs
from fastres.studies import RunDefinition, Study
from fastres.training.hardware import resolve
from fastres.training.start import choose_dataset

# the cost of a step is compared; the schedule costs nothing
EAGER_RUN = EAGER | {"schedule": "constant", "warmup_epochs": 0.0}
EAGER_EPOCHS = 3


@dataclass(frozen=True)
class StudyConfig:
    """How a study is carried out."""

    seeds: tuple[int, ...] = flag("Study", "comma-separated; every run is done once with each of them", (0,))
    scale: float = flag(
        "Study", "fraction of the epochs, with milestones and warm-up; for a first look", 1.0, interval="(0, 1]"
    )
    data_scale: float = flag(
        "Study", "fraction of the training images; the test set stays whole", 1.0, interval="(0, 1]"
    )
    ablate: bool = flag(
        "Study",
        "for each trick of the study, also train with it alone, and with all the others, to measure what it is worth",
        False,
    )
    eager_cost: bool = flag(
        "Study", f"also train {EAGER_EPOCHS} epochs of each model in eager PyTorch, to compare", True
    )
    report_seconds: bool = flag(
        "Study", "of training, in the report; --no-report-seconds where other work shares the machine", True
    )
    price_per_hour: float = flag(
        "Study", "of the machine, in any currency, for the cost of each run; 0: not shown", 0.0, interval="[0, inf)"
    )
    output_dir: Path | None = flag("Study", "folder of the study; auto: runs/study-NAME", None)
    decide: float | None = flag(
        "Deciding",
        "add seeds until the accuracy of every run at the last epoch differs from the first run's by more, or by less, "
        "than this many percentage points; wrong with a probability of at most 5%%; auto: the seeds are --seeds",
        None,
        interval="(0, 100]",
    )
    max_seeds: int = flag("Deciding", "stop with so many seeds, undecided", 20, interval="[2, 1000]")
    max_hours: float = flag(
        "Deciding", "add no seed that would end after so many hours; 0: no limit", 0.0, interval="[0, inf)"
    )
    jobs: int = flag(
        "Machine",
        "train so many runs side by side, each on its own GPU, or with its share of the CPU's cores; on fewer GPUs the "
        "report has no seconds",
        1,
        interval="[1, 1024]",
    )
    reuse: Path | None = flag(
        "Machine", "take finished runs with the same settings and commit from this folder, or from below it", None
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.seeds or min(self.seeds) < 0:
            raise UserError("--seeds: must not be negative, for instance --seeds 0,1,2")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError("--seeds: a seed is named twice")


@dataclass(frozen=True)
class PlannedRun:
    """A run of the study: the ``flags`` of its command, and the settings and data that they stand for.

    forward_gflop: floating-point operations of one image in a forward pass, in units of 1e9.
    """

    name: str
    flags: dict[str, Any]
    config: TrainConfig
    dataset: Dataset
    forward_gflop: float

    @property
    def folder(self) -> Path:
        return self.flags["output_dir"]

    @property
    def work(self) -> float:
        """About the GFLOP of its training, the unit of a study's progress."""
        area = mean_area(self.config.image_size_schedule, self.config.image_size)
        return 3 * self.forward_gflop * self.config.epochs * len(self.dataset.train) * area

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()


def eager_name(config: TrainConfig) -> str:
    """The folder of the eager run that one of ``config`` is compared with."""
    size = f"-{config.image_size}" if config.image_size != IMAGE_SIZE else ""
    return f"eager-{function_name(config.model)}{size}"


@dataclass(frozen=True)
class Planner:
    """Plans the runs of ``study``, with ``overrides`` of its flags, each in a folder of its own in ``folder``."""

    study: Study
    config: StudyConfig
    overrides: dict[str, Any]
    folder: Path
    load: Callable[..., tuple[Dataset, str]] = field(default_factory=lambda: cache(load_dataset))

    def plan(self, seeds: Iterable[int]) -> list[PlannedRun]:
        """Every run for every seed, and the eager one of each model.

        Refuses whatever ``fastres.train`` would refuse.
        """
        planned: list[PlannedRun] = []
        eager: dict[str, PlannedRun] = {}
        for definition in self.study.runs:
            for seed in seeds:
                with named(f"{self.study.name}, run {definition.name}"):
                    run = self.run(definition, seed)
                    planned.append(run)
                    if self.config.eager_cost and eager_name(run.config) not in eager:
                        eager[eager_name(run.config)] = self.eager(run)
        return planned + list(eager.values())

    def run(self, definition: RunDefinition, seed: int) -> PlannedRun:
        """The run of ``definition`` with ``seed``, scaled."""
        flags, config = definition.flags | self.overrides, self.config
        dataset = over_recipe(definition.flags).get("dataset", TrainConfig.dataset)
        if self.overrides.get("dataset") == "folder" and dataset == "mini-cifar10":
            flags.setdefault("classes", MINI_CIFAR10_CLASSES)
        flags |= {"seed": seed, "output_dir": self.folder / f"{definition.name}-seed{seed}"}
        flags["train_fraction"] = flags.get("train_fraction", 1.0) * config.data_scale
        if config.scale < 1:
            full, _ = self._resolve(flags)
            epochs = max(round(full.epochs * config.scale), 1)
            ratio = epochs / full.epochs
            flags |= {"epochs": epochs, "warmup_epochs": (full.warmup_epochs or 0.0) * ratio}
            if full.milestones:
                flags["milestones"] = tuple(sorted({max(round(milestone * ratio), 1) for milestone in full.milestones}))
        return self._planned(f"{definition.label}, seed {seed}", flags)

    def eager(self, run: PlannedRun) -> PlannedRun:
        """A few epochs of ``run`` in eager PyTorch."""
        model, epochs = run.config.model, min(EAGER_EPOCHS, run.config.epochs)
        flags = run.flags | EAGER_RUN | {"epochs": epochs, "output_dir": self.folder / eager_name(run.config)}
        for name in ("compile_mode", "milestones"):  # mean nothing there, and fastres.train would refuse them
            flags.pop(name, None)
        return self._planned(f"{model}, eager", flags)

    def _planned(self, name: str, flags: dict[str, Any]) -> PlannedRun:
        config, dataset = self._resolve(flags)
        model = create_to_count(config.model, len(dataset.classes), False, config.image_size, config.zero_gamma)
        return PlannedRun(name, flags, config, dataset, 2 * forward_macs(model, config.image_size) / 1e9)

    def _resolve(self, flags: dict[str, Any]) -> tuple[TrainConfig, Dataset]:
        settings = over_recipe(flags)
        check_effect(flags, settings)
        config, dataset = choose_dataset(settings, lambda line: None, self.load)
        return resolve(config, dataset)[0], dataset
