"""The settings of a run: one dataclass behind the command line, its help, config.json and the Python API."""

import argparse
import difflib
import json
import math
import reprlib
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from fastres.data.datasets import DATASETS
from fastres.data.plan import STEPS, canonical_augmentation
from fastres.errors import UserError
from fastres.models import INITS, MODELS

# the settings that change how fast a run is, and no more than rounding of what it computes
ENGINE = ("channels_last", "amp", "loader", "fused", "compile", "compile_mode", "cuda_graphs")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def flag(group: str, help: str, default: Any, choices: Sequence[str] | None = None) -> Any:
    """A field that is also a command-line flag of that group."""
    return field(default=default, metadata={"group": group, "help": help, "choices": choices})


MANY = 2**31 - 1  # of anything; beyond, libraries overflow


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on. ``auto`` and None are chosen by the hardware when the run starts.

    Raises UserError where a value is out of its range.
    """

    recipe: str = flag(
        "Recipe",
        "where the other defaults come from: study-a (VGG-16 and ResNet-50 on mini-CIFAR-10) and study-b (ResNet-18 "
        "and VGG-19-BN on CIFAR-10) are the published studies' settings; flags override them",
        "default",
        ("default", "study-a", "study-b"),
    )
    seed: int = flag("Recipe", "seed of weights, order, augmentation and dropout", 0)

    model: str = flag("Model", "architecture", "resnet50", tuple(MODELS))
    zero_gamma: bool = flag("Model", "start the last norm of each residual block at 0", False)
    init: str = flag("Model", "initial weights; study-b: as that study's code draws them", "default", INITS)
    fused: bool = flag("Model", "fused BatchNorm-(add-)ReLU operator instead of torch's modules", True)
    sync_bn: bool = flag(
        "Model",
        "under torchrun: BatchNorm over the whole batch, not over each process's part of it; the statistics of every "
        "norm then travel between the processes, forward and backward",
        False,
    )

    dataset: str = flag(
        "Data", "auto: mini-cifar10 if it is there or downloads within seconds, otherwise digits", "auto", DATASETS
    )
    data_dir: Path = flag(
        "Data", "where CIFAR is or will be downloaded; for folder: holds train/<class>/ and test/<class>/", Path("data")
    )
    classes: tuple[str, ...] = flag("Data", "comma-separated subset of the classes; none: all of them", ())
    skip_bad_images: bool = flag("Data", "folder: leave out files that are not readable as images", False)
    augmentation: str = flag(
        "Data",
        f"steps for training images, joined by dashes: any of {', '.join(STEPS)}; or none; digits: none",
        "crop-flip",
    )
    train_fraction: float = flag("Data", "part of the training set to train on, drawn from the seed", 1.0)
    val_fraction: float = flag(
        "Data", "part of the training set to hold out and select the best epoch on; 0: none", 0.0
    )
    loader: str = flag("Data", "auto: dali where it imports", "auto", ("auto", "dali", "eager"))
    workers: int = flag("Data", "threads (dali) or processes (eager) that prepare batches", 2)

    epochs: int = flag("Optimization", "training epochs; digits: 7", 30)
    batch_size: int = flag("Optimization", "training images a step, over all processes; digits: 32", 128)
    eval_batch_size: int = flag("Optimization", "images a step in evaluation, over all processes", 250)
    drop_last: bool = flag("Optimization", "leave out the last, smaller batch of a training epoch", True)
    lr: float = flag("Optimization", "peak learning rate; VGGs: 0.01; digits: 0.02", 0.1)
    momentum: float = flag("Optimization", "of SGD", 0.9)
    nesterov: bool = flag("Optimization", "Nesterov momentum", True)
    weight_decay: float = flag("Optimization", "of all parameters", 5e-4)
    label_smoothing: float = flag("Optimization", "of the training loss, at least 0 and below 1", 0.0)
    schedule: str = flag(
        "Optimization", "learning rate, set at every step", "cosine", ("constant", "multistep", "cosine", "onecycle")
    )
    warmup_epochs: float | None = flag(
        "Optimization", "epochs of linear warm-up; auto: 1, or half of a single epoch; onecycle: 30%% of the run", None
    )
    milestones: tuple[int, ...] = flag(
        "Optimization", "multistep: comma-separated epochs at which it is divided by 10", ()
    )

    device: str = flag("Engine", "auto: cuda where there is one", "auto", ("auto", "cpu", "cuda"))
    amp: str = flag(
        "Engine", "mixed precision; auto: bf16 where the hardware has it", "auto", ("auto", "bf16", "fp16", "off")
    )
    channels_last: bool = flag("Engine", "channels-last memory format", True)
    compile: bool | None = flag(
        "Engine",
        "torch.compile the model; auto: for several processes on CUDA, if the run is long enough",
        None,
    )
    compile_mode: str = flag(
        "Engine",
        "of torch.compile; reduce-overhead and max-autotune capture CUDA graphs of their own, of the model alone",
        "default",
        COMPILE_MODES,
    )
    cuda_graphs: bool | None = flag(
        "Engine",
        "capture the whole training step, compiled or not, as a CUDA graph, so that the GPU need not wait for Python; "
        "auto: on CUDA, in a single process",
        None,
    )

    output_dir: Path | None = flag("Output", "folder of the run; auto: runs/MODEL-DATASET-TIME", None)
    checkpoint_every: int = flag("Output", "epochs between checkpoints", 1)
    checkpoint_minutes: float = flag("Output", "minutes between checkpoints within an epoch; 0: none", 0.0)
    checkpoint_steps: int = flag("Output", "steps between checkpoints, within epochs, too; 0: none", 0)

    def __post_init__(self) -> None:
        for condition, message in (
            (1 <= self.epochs <= MANY, f"--epochs {self.epochs}: must be at least 1, and no more than {MANY:,}"),
            (self.batch_size >= 1, f"--batch-size {self.batch_size}: must be at least 1"),
            (
                1 <= self.eval_batch_size <= MANY,
                f"--eval-batch-size {self.eval_batch_size}: must be at least 1, and no more than {MANY:,}",
            ),
            (1 <= self.workers <= 1024, f"--workers {self.workers}: must be at least 1, and no more than 1,024"),
            (self.checkpoint_every >= 1, f"--checkpoint-every {self.checkpoint_every}: must be at least 1"),
            (self.checkpoint_minutes >= 0, f"--checkpoint-minutes {self.checkpoint_minutes}: must not be negative"),
            (self.checkpoint_steps >= 0, f"--checkpoint-steps {self.checkpoint_steps}: must not be negative"),
            (self.fused or not self.sync_bn, "--sync-bn: is made of the fused operator; leave --no-fused off"),
            (0 <= self.seed < 2**63, f"--seed {self.seed}: must not be negative, and less than 2^63"),
            (0 < self.lr < math.inf, f"--lr {self.lr}: must be positive, and finite"),
            (0 <= self.momentum < 1, f"--momentum {self.momentum}: must be in [0, 1)"),
            (self.momentum > 0 or not self.nesterov, "--nesterov: needs a --momentum above 0; add --no-nesterov"),
            (self.weight_decay >= 0, f"--weight-decay {self.weight_decay}: must not be negative"),
            (0 <= self.label_smoothing < 1, f"--label-smoothing {self.label_smoothing}: must be in [0, 1)"),
            (0 < self.train_fraction <= 1, f"--train-fraction {self.train_fraction}: must be in (0, 1]"),
            (0 <= self.val_fraction < 1, f"--val-fraction {self.val_fraction}: must be in [0, 1)"),
            ((self.warmup_epochs or 0) >= 0, f"--warmup-epochs {self.warmup_epochs}: must not be negative"),
            (
                self.schedule == "constant" or (self.warmup_epochs or 0) < self.epochs,
                f"--warmup-epochs {self.warmup_epochs}: must be less than --epochs {self.epochs}",
            ),
            (
                bool(self.milestones) or self.schedule != "multistep",
                "--schedule multistep: needs --milestones, for instance --milestones 50,75",
            ),
            (
                list(self.milestones) == sorted({epoch for epoch in self.milestones if 0 < epoch <= MANY}),
                "--milestones: must be increasing epochs, for instance --milestones 50,75",
            ),
        ):
            if not condition:
                raise UserError(message)
        # one spelling of equal settings, for config.json and for comparisons
        object.__setattr__(self, "augmentation", canonical_augmentation(self.augmentation))

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON has them: paths are strings, tuples lists. ``from_json`` reads them back."""
        return as_json(self)

    @classmethod
    def from_json(cls, values: Any, source: object) -> "TrainConfig":
        """The settings that ``to_json`` gave. Raises UserError, naming ``source``, for whatever else ``values`` are."""
        if not isinstance(values, dict):
            raise UserError(f"{source}: holds no settings")
        unknown = values.keys() - vars(cls())
        if unknown:
            raise UserError(
                f"{source}: unknown setting {min(map(repr, unknown))}; is it of another version of fastres?"
            )
        settings = {name: read_setting(name, value, f"{source}: ") for name, value in values.items()}
        try:
            return cls(**settings)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error


SETTING_TYPES: dict[Any, tuple[str, Any]] = {  # what TOML or JSON must hold for a setting, and how to convert that
    str: ("a string", str),
    int: ("an integer", int),
    float: ("a number", float),
    float | None: ("a number", float),
    bool: ("true or false", bool),
    bool | None: ("true or false", bool),
    Path: ("a string", Path),
    Path | None: ("a string", Path),
    tuple[str, ...]: ("a list of strings", tuple),
    tuple[int, ...]: ("a list of integers", tuple),
}


def read_setting(name: str, value: Any, where: str) -> Any:
    """The setting ``name`` of TrainConfig from its ``value`` in TOML or JSON.

    Raises UserError, which begins with ``where``, for a value of another type and for what is none of its choices.
    """
    kind = get_type_hints(TrainConfig)[name]
    wanted, convert = SETTING_TYPES[kind]
    if not is_a(value, kind):
        raise UserError(f"{where}{name}: must be {wanted}, not {reprlib.repr(value)}")
    choices = TrainConfig.__dataclass_fields__[name].metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"{where}{name}: no choice {reprlib.repr(value)}; there are {', '.join(choices)}")
    return None if value is None else convert(value)


def is_a(value: Any, kind: Any) -> bool:
    """Whether ``value``, as TOML or JSON has it, is of the type ``kind`` of a setting. An integer is a number, too."""
    if kind in (tuple[str, ...], tuple[int, ...]):
        return isinstance(value, list) and all(is_a(item, kind.__args__[0]) for item in value)
    if isinstance(value, bool):
        return kind in (bool, bool | None)
    if kind in (float, float | None) and isinstance(value, int | float):
        return abs(value) <= sys.float_info.max
    return isinstance(value, {Path: str, Path | None: str | None}.get(kind, kind))


def read_json(path: Path) -> Any:
    """What the file holds. Raises UserError where it is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error


DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    # 1,437 images, and a mirrored 3 is no 3
    "digits": {"epochs": 7, "batch_size": 32, "lr": 0.02, "augmentation": "none"},
}


def recipe_defaults(recipe: str, model: str) -> dict[str, Any]:
    """What ``recipe`` sets in place of TrainConfig's defaults for ``model``; the studies' values as published."""
    published = {
        "zero_gamma": False,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 5e-4,
        "batch_size": 128,
        "warmup_epochs": 0.0,
    }
    if recipe == "study-a":
        return published | {
            "dataset": "mini-cifar10",
            "augmentation": "none",
            "epochs": 20 if model.startswith("vgg") else 15,
            "eval_batch_size": 100,
            "drop_last": False,
            "lr": 0.01,
            "schedule": "constant",
        }
    if recipe == "study-b":
        return published | {
            "dataset": "cifar10",
            "init": "study-b",
            "augmentation": "crop-flip",
            "epochs": 100,
            "eval_batch_size": 128,
            "drop_last": False,
            "lr": 0.01 if model == "vgg19_4096" else 0.1,
            "schedule": "multistep",
            "milestones": (50, 75),
        }
    return {"lr": 0.01} if model.startswith("vgg") else {}


def over_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings ``given`` over the defaults of the recipe and the model that they name."""
    recipe, model = given.get("recipe", TrainConfig.recipe), given.get("model", TrainConfig.model)
    return {**recipe_defaults(recipe, model), **given}


def check_effect(given: Mapping[str, Any]) -> None:
    """Raises UserError for a flag among those ``given`` for a new run that needs another one to change anything."""
    settings = over_recipe(given)
    schedule = settings.get("schedule", TrainConfig.schedule)
    for name, acts, needed in (
        ("milestones", schedule == "multistep", "--schedule multistep"),
        ("warmup_epochs", schedule != "constant", "another --schedule than constant"),
        ("compile_mode", settings.get("compile"), "--compile"),
    ):
        if given.get(name) and not acts:
            raise UserError(f"{as_flag(name, given[name])}: needs {needed}")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage, and exits with code 2. Flags are written out."""

    def __init__(self, prog: str, description: str | None = None) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_flags(self, arguments: Sequence[str] | None) -> dict[str, Any]:
        """The flags that were given, by the names of their fields."""
        given, unknown = self.parse_known_args(arguments)
        if unknown:
            flags = [name for action in self._actions for name in action.option_strings]
            close = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "--help lists the flags"
            self.error(f"unknown argument {unknown[0]}; {hint}")
        return vars(given)


def comma_separated_names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def comma_separated_integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


comma_separated_integers.__name__ = "list of integers"  # in argparse's message


PARSERS: dict[Any, Any] = {
    str: str,
    int: int,
    int | None: int,
    float: float,
    float | None: float,
    Path: Path,
    Path | None: Path,
    tuple[str, ...]: comma_separated_names,
    tuple[int, ...]: comma_separated_integers,
}


def add_flags(
    parser: argparse.ArgumentParser, config: type, leave_out: Collection[str] = (), default: str | None = None
) -> None:
    """Adds a flag for every field of the dataclass ``config`` but those to ``leave_out``, in the fields' groups. Help
    names each field's own default, or ``default``.

    A flag that is not given is left out of the namespace, so that what the user said stands apart from defaults, which
    a recipe or a dataset may replace.
    """
    groups: dict[str, Any] = {}
    hints = get_type_hints(config)
    for item in fields(config):
        if item.name in leave_out:
            continue
        title = item.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind = hints[item.name]
        options: dict[str, Any] = {"default": argparse.SUPPRESS}
        if kind in (bool, bool | None):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": PARSERS[kind], "metavar": "X"}
        if item.metadata["choices"]:
            options |= {"choices": item.metadata["choices"], "metavar": None}
        groups[title].add_argument(
            "--" + item.name.replace("_", "-"),
            help=f"{item.metadata['help']} (default: {default or in_words(item.default)})",
            **options,
        )


def as_json(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as JSON has them: paths are strings, tuples lists."""
    return json.loads(json.dumps(asdict(settings), default=str))


def as_flag(name: str, value: Any) -> str:
    """The field ``name`` set to ``value``, as on a command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{flag}"
    if isinstance(value, list | tuple):
        return f"--{flag} {','.join(map(str, value))}"
    return f"--{flag} {format(value, 'g') if isinstance(value, float) else value}"


def in_words(default: Any) -> str:
    """A field's default as help shows it."""
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "none"
    return {"None": "auto", "True": "on", "False": "off"}.get(str(default), str(default))
