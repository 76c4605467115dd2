"""How long a study would take."""

from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastres.config import ENGINE
from fastres.data.sizes import mean_area
from fastres.profiling.measure import ContinuingLoader, train
from fastres.report.results import read_summary
from fastres.studies.plan import PlannedRun
from fastres.training.hardware import tune_libraries
from fastres.training.run import Run

# what decides the images a second
SPEED_SETTINGS = (
    "model", "batch_size", "augmentation", "image_size", "image_size_schedule", "optimizer", "device", "decode",
    "workers", *ENGINE,
)  # fmt: skip
MEASURED_STEPS = 2  # of each model


def print_estimate(planned: list[PlannedRun], console: Console) -> None:
    """A table of the runs and about how long each would take, one after another."""
    rates: dict[tuple[Any, ...], tuple[float, str]] = {}
    rate_of = attrgetter(*SPEED_SETTINGS)
    for run in planned:
        if run.finished:
            rates[rate_of(run.config)] = read_summary(run.folder)["images_per_second"], "finished run"
    table = Table(title=f"{len(planned)} runs", title_justify="left")
    for header in ("run", "epochs", "images", "about", "from"):
        table.add_column(header, justify="left" if header in ("run", "from") else "right", overflow="fold")
    total = 0.0
    for run in planned:
        if run.finished:
            seconds, source = 0.0, "is finished"
        else:
            if rate_of(run.config) not in rates:
                rates[rate_of(run.config)] = measure(run), f"{MEASURED_STEPS} measured steps"
            rate, source = rates[rate_of(run.config)]
            # a forward pass is a third of a training step's arithmetic
            seconds = run.config.epochs * (len(run.dataset.train) + len(run.dataset.test) / 3) / rate
        total += seconds
        table.add_row(Text(run.name), str(run.config.epochs), f"{len(run.dataset.train):,}", duration(seconds), source)
    console.print(table)
    console.print(f"about {duration(total)} in all, without start-up and compilation")


def measure(run: PlannedRun) -> float:
    """Training images a second over a few steps, uncompiled, once the loader has started; writes nothing."""
    few = np.arange((MEASURED_STEPS + 1) * run.config.batch_size) % len(run.dataset.train)
    schedule = run.config.image_size_schedule
    config = replace(run.config, compile=False, val_fraction=0.0, image_size_schedule="none")
    tune_libraries(config.device)
    trial = Run(config, replace(run.dataset, train=run.dataset.train.take(few)))
    trial.trainer.warm_up()
    epoch = train(trial.trainer, ContinuingLoader(trial.train_loader, MEASURED_STEPS))
    return epoch.images / epoch.seconds / mean_area(schedule, config.image_size)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
