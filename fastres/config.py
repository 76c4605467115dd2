"""The settings of a run: one dataclass behind the command line, its help, config.json and the Python API."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastres.data import DECODE
from fastres.data.datasets import DATASETS
from fastres.data.plan import STEPS, canonical_augmentation
from fastres.data.sizes import canonical_schedule, image_sizes
from fastres.data.splits import IMAGE_SIZE
from fastres.errors import UserError
from fastres.fields import as_flag, check_fields, flag
from fastres.models import INITS, MODELS, check_name, is_vgg
from fastres.training.optimizer import OPTIMIZERS
from fastres.training.schedule import SCHEDULES

# settings that change speed, and results only by rounding
ENGINE = ("channels_last", "amp", "loader", "fused", "compile", "compile_mode", "cuda_graphs")
WEIGHTS = ("last", "best")  # epochs whose weights a run keeps
COMPILE_MODES = (
    "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "max-autotune-no-coordinate-descent",
)  # fmt: skip
INT32_MAX = 2**31 - 1


DATASET_DEFAULTS: dict[str, dict[str, Any]] = {
    # 1,437 images, and a mirrored 3 is not a 3
    "digits": {"epochs": 7, "batch_size": 32, "lr": 0.02, "augmentation": "none"},
}

# what both published studies have in common
PUBLISHED = {
    "zero_gamma": False,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 5e-4,
    "batch_size": 128,
    "warmup_epochs": 0.0,
    "drop_last": False,
    "select": "best",
}


def default_recipe(model: str, size: int) -> dict[str, Any]:
    if not is_vgg(model):
        return {}
    return {"lr": 0.01} if model.endswith("_4096") else {"lr": 0.01, "init": "dirac"}


def fast(model: str, size: int) -> dict[str, Any]:
    """Found on CIFAR-10's images; docs/measurements.md says how."""
    recipe = {
        "optimizer": "muon",
        "lr": 0.03,
        "sgd_lr": 0.01,
        "weight_decay": 0.01,
        "label_smoothing": 0.1,
        "schedule": "onecycle",
        "augmentation": "reflectcrop-altflip",
        "epochs": 10,
    }
    if is_vgg(model):
        return recipe | {"batch_size": 256, "init": "dirac"}
    return recipe | {"image_size_schedule": f"{size // 2}:0.5,{3 * size // 4}:0.85"}


def study_a(model: str, size: int) -> dict[str, Any]:
    return PUBLISHED | {
        "dataset": "mini-cifar10",
        "augmentation": "none",
        "epochs": 20 if is_vgg(model) else 15,
        "eval_batch_size": 100,
        "lr": 0.01,
        "schedule": "constant",
    }


def study_b(model: str, size: int) -> dict[str, Any]:
    return PUBLISHED | {
        "dataset": "cifar10",
        "init": "study-b",
        "augmentation": "crop-flip",
        "epochs": 100,
        "eval_batch_size": 128,
        "lr": 0.01 if model == "vgg19_4096" else 0.1,
        "schedule": "multistep",
        "milestones": (50, 75),
    }


RECIPES: dict[str, Callable[[str, int], dict[str, Any]]] = {  # of a model and the size of its images
    "default": default_recipe,
    "fast": fast,
    "study-a": study_a,
    "study-b": study_b,
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on. What is ``auto`` or None is chosen when the run starts."""

    recipe: str = flag(
        "Recipe",
        "where the other defaults come from; fast: more accuracy in fewer epochs, by Muon and other tricks; study-a "
        "(VGG-16 and ResNet-50 on mini-CIFAR-10) and study-b (ResNet-18 and VGG-19-BN on CIFAR-10): the published "
        "studies' settings; flags override them",
        "default",
        tuple(RECIPES),
    )
    seed: int = flag("Recipe", "seed of weights, order, augmentation and dropout", 0, interval=f"[0, {2**63})")

    model: str = flag(
        "Model",
        f"architecture: {', '.join(MODELS)}; or a function of your own, as package.module:function or "
        "file.py:function, that takes the number of classes",
        "resnet50",
    )
    zero_gamma: bool = flag("Model", "start the last norm of each residual block at 0", False)
    init: str = flag(
        "Model",
        "initial weights; dirac: 3x3 convolutions begin as the identity, as those of vgg11 to vgg19 do by default; "
        "study-b: as that study's code draws them",
        "default",
        tuple(INITS),
    )
    initial_checkpoint: Path | None = flag(
        "Model",
        "folder of a finished run, from whose weights to begin; with a new last layer if its classes are others; "
        "auto: none",
        None,
    )
    fused: bool | None = flag(
        "Model",
        "fused BatchNorm-(add-)ReLU operator, and convolutions of small maps as products on a CPU, instead of torch's "
        "modules; auto: where its kernels can run and, on CUDA, steps are captured as a CUDA graph",
        None,
    )
    sync_bn: bool = flag(
        "Model",
        "under torchrun: BatchNorm over the whole batch, not over each process's part of it; the statistics of every "
        "norm then travel between the processes, forward and backward",
        False,
    )

    dataset: str = flag(
        "Data",
        "auto: mini-cifar10 if it is there or downloads within seconds, otherwise digits",
        "auto",
        tuple(DATASETS),
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
    image_size: int = flag(
        "Data", "folder: pixels a side to which images are resized; a multiple of 8", IMAGE_SIZE, interval="[32, 1024]"
    )
    image_size_schedule: str = flag(
        "Data",
        "smaller images first: 24:0.65 is 24x24 pixels in the first 65%% of the steps and then --image-size; several "
        "are joined by commas; none: --image-size throughout; VGGs need that",
        "none",
    )
    normalize: str = flag(
        "Data",
        "mean and std of the channels: default: CIFAR's, and the digits' own; dataset: of the training images",
        "default",
        ("default", "dataset"),
    )
    train_fraction: float = flag(
        "Data", "part of the training set to train on, drawn from the seed", 1.0, interval="(0, 1]"
    )
    val_fraction: float = flag(
        "Data", "part of the training set to hold out and select the best epoch on; 0: none", 0.0, interval="[0, 1)"
    )
    loader: str = flag("Data", "auto: dali where it imports", "auto", ("auto", "dali", "eager"))
    decode: str = flag(
        "Data",
        "image files: once, when the loader starts, or in every epoch; auto: once with dali, every-epoch with eager",
        "auto",
        DECODE,
    )
    workers: int = flag("Data", "threads (dali) or processes (eager) that prepare batches", 2, interval="[1, 1024]")

    epochs: int = flag("Optimization", "training epochs; digits: 7", 30, interval=f"[1, {INT32_MAX}]")
    target_accuracy: float | None = flag(
        "Optimization",
        "stop after the first epoch with this accuracy, in percent, on the images held out by --val-fraction, or else "
        "on the test set; auto: train all epochs",
        None,
        interval="(0, 100]",
    )
    batch_size: int = flag(
        "Optimization", "training images a step, over all processes; digits: 32", 128, interval=f"[1, {INT32_MAX}]"
    )
    eval_batch_size: int = flag(
        "Optimization", "images a step in evaluation, over all processes", 250, interval=f"[1, {INT32_MAX}]"
    )
    drop_last: bool = flag("Optimization", "leave out the last, smaller batch of a training epoch", True)
    optimizer: str = flag(
        "Optimization",
        "update rule; adamw: try --lr 0.001; muon: try --lr 0.03 --weight-decay 0.01",
        "sgd",
        tuple(OPTIMIZERS),
    )
    lr: float = flag("Optimization", "peak learning rate; VGGs: 0.01; digits: 0.02", 0.1, interval="(0, inf)")
    sgd_lr: float = flag(
        "Optimization", "muon: peak learning rate of what is no convolution, and of the stem", 0.1, interval="(0, inf)"
    )
    momentum: float = flag("Optimization", "sgd, muon: momentum; adamw: beta1", 0.9, interval="[0, 1)")
    nesterov: bool = flag("Optimization", "sgd: Nesterov momentum", True)
    weight_decay: float = flag(
        "Optimization", "of all parameters; muon: of those that it updates", 5e-4, interval="[0, inf)"
    )
    label_smoothing: float = flag("Optimization", "of the training loss", 0.0, interval="[0, 1)")
    schedule: str = flag("Optimization", "learning rate, set at every step", "cosine", tuple(SCHEDULES))
    warmup_epochs: float | None = flag(
        "Optimization",
        "epochs of linear warm-up; auto: 1, or half of a single epoch; onecycle: 30%% of the run",
        None,
        interval="[0, inf)",
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
        "of torch.compile; max-autotune-no-coordinate-descent is max-autotune without its last refinement, which "
        "compiles one kernel after the other; both, and reduce-overhead, capture CUDA graphs of the model",
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
    select: str = flag(
        "Output",
        "epoch whose accuracy and weights are the run's result: last; or best, on the images held out by "
        "--val-fraction, or else on the test set, which flatters it; study-a and study-b: best, as published",
        "last",
        WEIGHTS,
    )
    tta: bool = flag(
        "Output",
        "also test with the mean of an image's and its mirror image's probabilities (test-time augmentation): "
        "mirrored_accuracy in summary.json",
        False,
    )
    price_per_hour: float = flag(
        "Output", "of the machine, in any currency, for the price of the run; 0: not shown", 0.0, interval="[0, inf)"
    )
    checkpoint_every: int = flag("Output", "epochs between checkpoints", 1, interval=f"[1, {INT32_MAX}]")
    checkpoint_minutes: float = flag(
        "Output", "minutes between checkpoints within an epoch; 0: none", 0.0, interval="[0, inf)"
    )
    checkpoint_steps: int = flag(
        "Output", "steps between checkpoints, within epochs, too; 0: none", 0, interval=f"[0, {INT32_MAX}]"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        check_name(self.model)
        for fits, message in (
            (self.image_size % 8 == 0, f"--image-size {self.image_size}: must be a multiple of 8"),
            (
                len(image_sizes(self.image_size_schedule, self.image_size)) == 1 or not is_vgg(self.model),
                f"--image-size-schedule: {self.model} halves its images five times, so they need 32 pixels; remove it, "
                "or choose a resnet",
            ),
            (self.fused is not False or not self.sync_bn, "--sync-bn: needs the fused operator; remove --no-fused"),
            (
                self.momentum > 0 or not self.nesterov or self.optimizer != "sgd",
                "--nesterov: needs a --momentum above 0; add --no-nesterov",
            ),
            (
                self.schedule == "constant" or (self.warmup_epochs or 0) < self.epochs,
                f"--warmup-epochs {self.warmup_epochs}: must be less than --epochs {self.epochs}",
            ),
            (
                self.milestones or self.schedule != "multistep",
                "--schedule multistep: needs --milestones, for instance --milestones 50,75",
            ),
            (
                list(self.milestones) == sorted({epoch for epoch in self.milestones if 0 < epoch <= INT32_MAX}),
                "--milestones: must be increasing epochs, for instance --milestones 50,75",
            ),
        ):
            if not fits:
                raise UserError(message)
        # one spelling of equal settings, for config.json and for comparisons
        object.__setattr__(self, "augmentation", canonical_augmentation(self.augmentation))
        object.__setattr__(self, "image_size_schedule", canonical_schedule(self.image_size_schedule, self.image_size))


def over_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings ``given`` over the defaults of the recipe and the model that they name."""
    recipe, *subject = (given.get(name, getattr(TrainConfig, name)) for name in ("recipe", "model", "image_size"))
    return {**RECIPES.get(recipe, default_recipe)(*subject), **given}  # TrainConfig refuses an unknown recipe


def check_effect(given: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuses a flag among those ``given`` for a new run of ``settings`` that changes nothing without another flag."""
    schedule = settings.get("schedule", TrainConfig.schedule)
    for name, acts, needed in (
        ("milestones", schedule == "multistep", "--schedule multistep"),
        ("warmup_epochs", schedule != "constant", "another --schedule than constant"),
        ("compile_mode", settings.get("compile"), "--compile"),
        ("sgd_lr", settings.get("optimizer") == "muon", "--optimizer muon"),
        ("init", not settings.get("initial_checkpoint"), "a run without --initial-checkpoint"),
        ("zero_gamma", not settings.get("initial_checkpoint"), "a run without --initial-checkpoint"),
        ("nesterov", settings.get("optimizer", TrainConfig.optimizer) == "sgd", "--optimizer sgd"),
    ):
        if given.get(name) and not acts:
            raise UserError(f"{as_flag(name, given[name])}: needs {needed}")
