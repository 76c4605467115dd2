"""A whole run: dataset and settings in, a folder of results out."""

import json
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch

import fastres
from fastres.config import ENGINE, TrainConfig
from fastres.data import Loader, choose_loader, create_loader
from fastres.data.datasets import Dataset, Split
from fastres.data.plan import EpochPlan, evaluation_plan, training_plan
from fastres.errors import Interrupted, RunError, UserError
from fastres.models import create_model
from fastres.training import distributed
from fastres.training.checkpoint import load_weights, restore, save_checkpoint, save_weights, write_atomically
from fastres.training.event_log import EventLog
from fastres.training.hardware import (
    check_extension,
    choose_amp,
    choose_compile,
    choose_cuda_graphs,
    choose_device,
)
from fastres.training.schedule import ONECYCLE_RISE
from fastres.training.trainer import Epoch, Evaluation, Trainer

Row = dict[str, Any]


def resolve(config: TrainConfig, dataset: Dataset) -> tuple[TrainConfig, str]:
    """``config`` with every ``auto`` replaced by what this machine and dataset call for, and a line that says why.

    Raises UserError for what the machine or the dataset cannot do.
    """
    images = len(dataset.train) - round(len(dataset.train) * config.val_fraction)
    if config.batch_size > images:
        raise UserError(f"--batch-size {config.batch_size}: larger than the training set of {images} images")
    processes, last_batch = distributed.world_size(), images % config.batch_size
    if config.batch_size % processes:
        raise UserError(f"--batch-size {config.batch_size}: must be a multiple of the {processes} processes")
    if 0 < last_batch < processes and not config.drop_last:
        raise UserError(
            f"--batch-size {config.batch_size}: leaves {last_batch} of {images} images for the last batch of "
            f"{processes} processes; add --drop-last, or choose another"
        )
    steps = config.epochs * steps_per_epoch(config, images)
    device, device_why = choose_device(config.device)
    if config.fused and device.type == "cpu":
        check_extension()
    amp, amp_why = choose_amp(config.amp, device)
    compiled, compile_why = choose_compile(config.compile, device, steps)
    cuda_graphs, graphs_why = choose_cuda_graphs(config.cuda_graphs, device, config.compile_mode if compiled else None)
    loader, loader_why = choose_loader(config.loader)
    output_dir = config.output_dir or Path("runs") / f"{config.model}-{dataset.name}-{datetime.now():%Y%m%d-%H%M%S}"
    warmup_epochs = config.warmup_epochs
    if warmup_epochs is None:
        by_schedule = {"constant": 0.0, "onecycle": ONECYCLE_RISE * config.epochs}
        warmup_epochs = by_schedule.get(config.schedule, min(1.0, config.epochs / 2))
    chosen = replace(
        config,
        warmup_epochs=warmup_epochs,
        device=device.type,
        amp=amp,
        compile=compiled,
        cuda_graphs=cuda_graphs,
        loader=loader,
        output_dir=output_dir,
    )
    line = (
        f"device {device.type} ({device_why}), amp {amp} ({amp_why}), compile {'on' if compiled else 'off'} "
        f"({compile_why}), CUDA graphs {'on' if cuda_graphs else 'off'} ({graphs_why}), loader {loader} ({loader_why})"
    )
    return chosen, line


def steps_per_epoch(config: TrainConfig, images: int) -> int:
    return images // config.batch_size if config.drop_last else -(-images // config.batch_size)


class Run:
    """A run of ``config``, as ``resolve`` gave it, on ``dataset``; nothing is written before ``fit``.

    ``checkpoint`` is what ``read_checkpoint`` gave, for a run that goes on.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, checkpoint: dict[str, Any] | None = None) -> None:
        assert config.output_dir is not None
        self.config, self.folder = config, config.output_dir
        validation: Split | None = None
        if config.val_fraction:
            dataset, validation = dataset.hold_out(config.val_fraction, config.seed)
        self.dataset, self.device = dataset, distributed.local_device(config.device)
        self.test_loader = self._evaluation_loader(dataset.test)
        self.validation_loader = self._evaluation_loader(validation) if validation else None

        torch.manual_seed(config.seed)
        model = create_model(config.model, len(dataset.classes), config.zero_gamma, config.fused, config.sync_bn)
        steps = steps_per_epoch(config, len(dataset.train))
        self.trainer = Trainer(model, config, self.device, len(dataset.classes), steps)
        if distributed.rank() > 0:
            torch.manual_seed(config.seed + distributed.rank())  # every process has dropout of its own
        self.history: list[Row] = []
        self.epoch: Epoch | None = None  # that a checkpoint was in the middle of
        self.resumed = checkpoint is not None
        self.warm_up_seconds = 0.0
        self.saved = time.monotonic()  # when a checkpoint was written
        if checkpoint is not None:
            self.epoch = restore(checkpoint, self.trainer)
            self.history = checkpoint["history"]
        if len(self.history) + bool(self.epoch) > config.epochs:
            raise UserError(f"--epochs {config.epochs}: the run is past that already; --eval {self.folder} tests it")

    @cached_property
    def train_loader(self) -> Loader:
        """Made when it is needed, since it decodes every image of a folder."""
        config, images = self.config, len(self.dataset.train)
        plan = partial(training_plan, config.seed, num_images=images, augmentation=config.augmentation)
        return self._loader(self.dataset.train, plan, config.batch_size, config.drop_last)

    def fit(
        self,
        on_step: Callable[[], None] = lambda: None,
        on_epoch: Callable[[Row], None] = lambda row: None,
        signalled: Callable[[], int] = lambda: 0,
    ) -> dict[str, Any]:
        """Trains to the last epoch, writing to the run's folder after each, and returns the summary.

        ``signalled`` is asked after every step: a signal's number ends the run there, saved, with Interrupted.
        Raises UserError where the folder already holds another run, and RunError for a loss that is no number or a
        process of the job that died.
        """
        with distributed.loss_of_processes_named(f"; --resume {self.folder} goes on"):
            distributed.from_rank_0(self._prepare_folder)
            self.warm_up_seconds = self.trainer.warm_up()
            if not self.resumed:
                self._save()
            log = EventLog(self.folder, len(self.history) + 1) if distributed.rank() == 0 else None
            while len(self.history) < self.config.epochs:
                epoch = self.epoch or Epoch.begin(len(self.history), self.trainer.device)
                self.epoch = None
                row = self._finish(self._train(epoch, on_step, signalled))
                if log:
                    log.add(row)
                on_epoch(row)
            summary = self._summary()
            if log:
                write_json(self.folder / "summary.json", summary)
            return summary

    def _prepare_folder(self) -> None:
        if not self.resumed and (self.folder / "last.pt").exists():
            raise UserError(
                f"--output-dir {self.folder}: already holds a run; choose another folder, or --resume {self.folder}"
            )
        make_folder(self.folder)
        write_json(self.folder / "config.json", self.config.to_json())

    def _train(self, epoch: Epoch, on_step: Callable[[], None], signalled: Callable[[], int]) -> Epoch:
        """Trains on the rest of ``epoch``, saving within it as asked, and returns that of all processes."""
        every = self.config.checkpoint_steps

        def after_step() -> None:
            on_step()
            asked = time.perf_counter()
            minutes = (time.monotonic() - self.saved) / 60
            step = epoch.number * len(self.train_loader) + epoch.steps
            due = 0 < self.config.checkpoint_minutes <= minutes or (every > 0 and step % every == 0)
            # processes notice a signal at different steps, and have clocks of their own, but must save at the same step
            signal_number, save = distributed.highest(signalled(), due)
            epoch.seconds += time.perf_counter() - asked
            if signal_number or save:
                self.trainer.settle(epoch)
                self._save(self._checked(epoch))
            if signal_number:
                raise Interrupted(signal_number, self.folder)

        self.trainer.train_epoch(self.train_loader, epoch, after_step)
        return self._checked(epoch)

    def _checked(self, epoch: Epoch) -> Epoch:
        """``epoch`` of all processes. Raises RunError for a loss that is no number."""
        whole = epoch.of_all_processes()
        distributed.from_rank_0(partial(self._check, whole))
        return whole

    def _check(self, epoch: Epoch) -> None:
        finite = int(epoch.finite_steps)
        if finite < epoch.steps:
            raise RunError(
                f"the loss was {epoch.loss} from step {finite + 1} of epoch {epoch.number + 1} on (learning rate "
                f"{epoch.lr:.3g} by now): start again with a lower --lr or a longer --warmup-epochs; "
                f"{self.folder / 'last.pt'} is from before"
            )

    def _finish(self, epoch: Epoch) -> Row:
        """Evaluates after ``epoch`` and writes its row and the checkpoints."""
        test = self.trainer.evaluate(self.test_loader, epoch.number)
        row: Row = {
            "epoch": epoch.number + 1,
            "lr": epoch.lr,
            "train_loss": epoch.loss,
            "train_accuracy": epoch.accuracy,
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
            "epoch_seconds": epoch.seconds,
            "images_per_second": epoch.images / epoch.seconds,
            "data_wait_seconds": epoch.data_wait_seconds,
        }
        if self.validation_loader:
            validation = self.trainer.evaluate(self.validation_loader, epoch.number)
            row |= {"val_loss": validation.loss, "val_accuracy": validation.accuracy}
        self.history.append(row)
        if distributed.rank() == 0:
            if best_row(self.history) is row:
                save_weights(self.trainer.model, self.folder / "best.safetensors")
            frame = pd.DataFrame(self.history)
            write_atomically(self.folder / "history.csv", partial(frame.to_csv, index=False))
            write_atomically(self.folder / "history.pkl", frame.to_pickle)
        if row["epoch"] % self.config.checkpoint_every == 0 or row["epoch"] == self.config.epochs:
            self._save()
        return row

    def _save(self, epoch: Epoch | None = None) -> None:
        save_checkpoint(self.folder / "last.pt", self.trainer, self.history, epoch)
        self.saved = time.monotonic()

    def evaluate_best(self) -> Evaluation:
        """The test split through the best epoch's weights, reloaded from their file."""
        model = self.trainer.model
        distributed.from_rank_0(lambda: load_weights(model, self.folder / "best.safetensors"))
        distributed.copy_from_rank_0(model.state_dict().values())
        return self.trainer.evaluate(self.test_loader, self.config.epochs)

    def _summary(self) -> dict[str, Any]:
        config, best, last = self.config, best_row(self.history), self.history[-1]
        waited = sum(row["data_wait_seconds"] for row in self.history)
        peak_memory = peak_memory_mb(self.trainer.device)
        evaluation = self.evaluate_best()
        return {
            "model": config.model,
            "dataset": self.dataset.name,
            "num_classes": len(self.dataset.classes),
            "train_images": len(self.dataset.train),
            "test_images": len(self.dataset.test),
            "skipped_images": self.dataset.skipped_images,
            "mean": list(self.dataset.mean),
            "std": list(self.dataset.std),
            "params_millions": sum(parameter.numel() for parameter in self.trainer.model.parameters()) / 1e6,
            "epochs": len(self.history),
            "best_selected_on": "validation" if self.validation_loader else "test",
            "best_accuracy": evaluation.accuracy,
            "best_epoch": best["epoch"],
            "test_loss": evaluation.loss,
            "last_accuracy": last["test_accuracy"],
            "last_test_loss": last["test_loss"],
            "per_class_accuracy": dict(zip(self.dataset.classes, evaluation.per_class_accuracy, strict=True)),
            "confusion_matrix": evaluation.confusion,
            "epoch_seconds": median(row["epoch_seconds"] for row in self.history),
            "images_per_second": median(row["images_per_second"] for row in self.history),
            "data_wait_fraction": waited / sum(row["epoch_seconds"] for row in self.history),
            "train_seconds": sum(row["epoch_seconds"] for row in self.history),
            "warm_up_seconds": self.warm_up_seconds,
            "peak_memory_mb": peak_memory,
            "device": device_name(self.trainer.device),
            "world_size": distributed.world_size(),
            **{name: getattr(config, name) for name in ENGINE},
            "seed": config.seed,
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "date": f"{datetime.now():%Y-%m-%d %H:%M}",
            "versions": versions(),
            "commit": commit(),
        }

    def _loader(
        self,
        split: Split,
        plan_of_epoch: Callable[[int], EpochPlan],
        batch_size: int,
        drop_last: bool,
    ) -> Loader:
        """A loader of this process's shard of every batch of ``batch_size`` images."""
        size = distributed.largest_shard(batch_size)
        rank, processes = distributed.rank(), distributed.world_size()
        return create_loader(
            self.config.loader,
            split,
            lambda epoch: plan_of_epoch(epoch).shard(rank, processes, size * processes, drop_last),
            batch_size=size,
            mean=self.dataset.mean,
            std=self.dataset.std,
            device=self.device,
            workers=self.config.workers,
        )

    def _evaluation_loader(self, split: Split) -> Loader:
        plan = evaluation_plan(len(split))
        return self._loader(split, lambda epoch: plan, self.config.eval_batch_size, drop_last=False)


def best_row(history: list[Row]) -> Row:
    """The first epoch of the highest validation accuracy, or test accuracy where nothing was held out."""
    return max(history, key=lambda row: row["val_accuracy" if "val_accuracy" in row else "test_accuracy"])


def make_folder(folder: Path) -> None:
    """Raises UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot be made ({error.strerror})") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def peak_memory_mb(device: torch.device) -> float:
    """What torch had reserved on CUDA, CUDA graphs included; of the process's resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    threads = torch.get_num_threads()
    return f"{next(names, platform.machine())}, {threads} thread{'s' * (threads > 1)}"


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "fastres": fastres.__version__}
    for package in ("torch", "torchvision", "triton", "nvidia-dali-cuda130", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit that this package's code is at, ``-dirty`` if it was changed since; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
