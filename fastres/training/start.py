"""From flags to a Run: a new one, one that goes on, or a finished one that is evaluated again."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastres.config import DATASET_DEFAULTS, ENGINE, TrainConfig, check_effect, over_recipe
from fastres.data.datasets import load_dataset
from fastres.data.plan import mixes
from fastres.data.splits import Dataset
from fastres.errors import UserError, named
from fastres.fields import as_flag, read_fields, read_table
from fastres.files import read_json, read_toml
from fastres.models import function_name, is_function, register_model
from fastres.training import distributed
from fastres.training.checkpoint import load_weights, read_checkpoint
from fastres.training.clock import Clock
from fastres.training.cost import describe_model
from fastres.training.hardware import resolve, tune_libraries
from fastres.training.run import Run

# what may differ between a checkpoint and the run that goes on from it, and between a run and its evaluation
RESUMABLE = {
    "data_dir", "device", "loader", "decode", "workers", "fused", "compile", "compile_mode", "cuda_graphs", "epochs",
    "eval_batch_size", "checkpoint_every", "checkpoint_minutes", "checkpoint_steps", "target_accuracy", "select",
    "price_per_hour", "tta",
}  # fmt: skip
EVALUABLE = {"data_dir", "device", "workers", "eval_batch_size", "tta", *ENGINE}
# what a resumed run chooses anew if it was ``auto``, because it may go on with another machine
MACHINE = ("device", "loader", "fused", "compile", "cuda_graphs")

Say = Callable[[str], object]  # prints a line


@dataclass(frozen=True)
class Record:
    """The content of config.json, as ``Run.record`` makes it."""

    asked: dict[str, Any]
    chosen: dict[str, Any]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Saved:
    """The settings of an earlier run, from its config.json or checkpoint.

    asked: as given on the command line and by recipe and dataset, with ``auto``.
    config: with every ``auto`` replaced.
    class_names, mean, std: of its dataset.
    """

    asked: TrainConfig
    config: TrainConfig
    class_names: tuple[str, ...]
    mean: Any
    std: Any

    @property
    def settings(self) -> TrainConfig:
        """``config`` with the machine's settings as asked for."""
        return replace(self.config, **{name: getattr(self.asked, name) for name in MACHINE})


def read_saved(record: Any, source: object) -> Saved:
    """Parses ``record``, which ``Run.record`` wrote."""
    with named(source):
        content = read_table(Record, record)
        if not len(content.mean) == len(content.std) == 3 or min(content.std) <= 0:
            raise UserError("mean and std: must be three numbers each, and std above 0")
        return Saved(
            read_table(TrainConfig, content.asked),
            read_table(TrainConfig, content.asked | content.chosen),
            content.class_names,
            content.mean,
            content.std,
        )


def read_config(file: Path) -> dict[str, Any]:
    """The settings that a run's config.json was asked for, or those of a TOML file of flags, without ``output_dir``."""
    if file.suffix == ".json":
        settings = vars(read_saved(read_json(file), file).asked)
    else:
        content = read_toml(file)
        with named(file):
            settings = read_fields(TrainConfig, content)
    return {name: value for name, value in settings.items() if name != "output_dir"}


def open_run(
    flags: dict[str, Any],
    resume: Path | None = None,
    finished: Path | None = None,
    file: Path | None = None,
    say: Say = lambda line: None,
    clock: Clock | None = None,
) -> Run:
    """The run that ``flags`` (settings by name) ask for; nothing is written yet.

    resume: a run's folder or checkpoint to go on from. A job that torchrun restarts goes on from its own folder.
    finished: the folder of a finished run, to evaluate it again.
    file: of settings for a new run, which ``flags`` override; ``read_config`` reads it.
    say: is called on rank 0 with the lines that tell what was chosen and why.
    clock: of the run; starts now unless it is given.
    """
    clock = clock or Clock()
    if "model" in flags:
        distributed.on_rank_0(register_model, flags["model"])  # one message if it fails
        if distributed.rank() > 0:
            register_model(flags["model"])
    with clock.phase("data"):  # which takes nearly all of the time
        chosen = distributed.on_rank_0(_choose, flags, resume, finished, file, say)
    config, _, checkpoint, _ = chosen
    tune_libraries(config.device)
    run = Run(*chosen, clock)
    if config.initial_checkpoint and not checkpoint and not finished:
        with clock.phase("data"):
            distributed.on_rank_0(_begin_from, config.initial_checkpoint, run, say)
            distributed.copy_from_rank_0(run.trainer.model.state_dict().values())
    return run


def _begin_from(folder: Path, run: Run, say: Say) -> None:
    """Loads the weights of the finished run in ``folder``, but for the last layer if its classes are others."""
    with named(f"--initial-checkpoint {folder}"):
        saved = read_saved(read_json(folder / "config.json"), "config.json")
        if saved.config.model != run.config.model and ":" not in saved.config.model + run.config.model:
            raise UserError(f"is a run of {saved.config.model}, not of {run.config.model}; take that --model")
        model, classes, new = run.trainer.model, run.dataset.classes, []
        line = f"begins with the weights of {folder}"
        if saved.class_names != classes:
            linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
            layers = [name for name, module in linear.items() if module.out_features == len(classes)]
            if not layers:
                raise UserError("its classes are others, and this model has no linear layer to begin anew for them")
            new = [name for name in model.state_dict() if name.startswith(f"{layers[-1]}.")]
            line += f", but for a new {layers[-1]} for {len(classes)} other classes"
        load_weights(model, folder / f"{saved.config.select}.safetensors", but=new)
    say(line)


def _choose(
    flags: dict[str, Any], resume: Path | None, finished: Path | None, file: Path | None, say: Say
) -> tuple[TrainConfig, Dataset, dict[str, Any] | None, TrainConfig]:
    """The arguments of Run."""
    restart, most_restarts = distributed.restarts()
    if most_restarts and not resume and not finished:
        if "output_dir" not in flags:
            raise UserError("--output-dir: needed with torchrun's --max-restarts, so that a restart finds its run")
        if restart and (flags["output_dir"] / "last.pt").exists():
            resume = flags["output_dir"]
            say(f"restart {restart} of {most_restarts}: goes on from {resume / 'last.pt'}")
    checkpoint, saved = None, None
    if resume:
        checkpoint = read_checkpoint(resume)
        folder = resume if resume.is_dir() else resume.parent
        saved = read_saved(checkpoint["run"], f"--resume {resume}")
        settings = settings_of_run(folder, saved, flags, RESUMABLE)
    elif finished:
        with named(f"--eval {finished}: not the folder of a finished run"):
            saved = read_saved(read_json(finished / "config.json"), "config.json")
        settings = settings_of_run(finished, saved, flags, EVALUABLE)
    else:
        if file and file.suffix == ".json" and "recipe" in flags:
            raise UserError(f"--recipe {flags['recipe']}: changes nothing, as {file} has every setting; leave one off")
        settings = over_recipe((read_config(file) if file else {}) | flags)
        check_effect(flags, settings)
    asked, dataset = choose_dataset(settings, say, load_dataset)
    if asked.normalize == "dataset":
        from fastres.data.eager import mean_and_std  # torchvision takes a second to import

        mean, std = (saved.mean, saved.std) if saved else mean_and_std(dataset.train)
        dataset = replace(dataset, mean=mean, std=std)
        say(f"mean {' '.join(f'{x:.4f}' for x in mean)} and std {' '.join(f'{x:.4f}' for x in std)} of its channels")
    config, line = resolve(asked, dataset)
    say(line)
    if mixes(config.augmentation):
        say("images are mixed: training accuracy is that of each one's larger part")
    if is_function(config.model):
        say(describe_model(config, len(dataset.classes)))
    if saved:
        if dataset.classes != saved.class_names:
            raise UserError(
                f"--data-dir {config.data_dir}: holds the classes {', '.join(dataset.classes)}, but the run in "
                f"{config.output_dir} was trained on {', '.join(saved.class_names)}"
            )
        given = {name: value for name, value in flags.items() if name != "output_dir"}
        asked = TrainConfig(**{**vars(saved.asked), **given})
    return config, dataset, checkpoint, asked


def choose_dataset(
    settings: dict[str, Any], say: Say, load: Callable[..., tuple[Dataset, str]]
) -> tuple[TrainConfig, Dataset]:
    """The dataset that ``settings`` name, and the config of ``settings`` over the dataset's defaults."""
    config = TrainConfig(**settings)  # checks the values before a dataset is read
    dataset, line = load(config.dataset, config.data_dir, config.classes, config.skip_bad_images, config.image_size)
    say(f"dataset: {line}")
    if config.train_fraction < 1:
        dataset = dataset.sample(config.train_fraction, config.seed)
        say(f"training on {len(dataset.train):,} of its images (train fraction {config.train_fraction:g})")
    return TrainConfig(**{**DATASET_DEFAULTS.get(dataset.name, {}), **settings}), dataset


def settings_of_run(folder: Path, saved: Saved, flags: dict[str, Any], may_differ: set[str]) -> dict[str, Any]:
    """The settings of the run ``saved`` in ``folder``, with ``flags``, of which only ``may_differ`` may change it.

    A flag that says again what was asked for, such as an ``auto``, leaves the run as it is.
    """
    flags = {name: value for name, value in flags.items() if name in may_differ or value != getattr(saved.asked, name)}
    before = replace(saved.settings, output_dir=folder)
    after = replace(before, **flags)
    for name in flags:
        asked, has = getattr(after, name), getattr(before, name)
        # a function's file may have moved
        functions = name == "model" and is_function(asked) and is_function(has)
        moved = functions and function_name(asked) == function_name(has)
        if name not in may_differ and asked != has and not moved:
            raise UserError(f"{as_flag(name, asked)}: {folder} is a run with {has}; leave the flag off")
    return vars(after)
