"""A whole run: dataset and settings in, a folder of results out."""

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fastres.config import TrainConfig
from fastres.data import Loader, create_loader
from fastres.data.plan import EpochPlan, evaluation_plan, resized, training_plan
from fastres.data.sizes import size_of_steps, steps_of_sizes
from fastres.data.splits import Dataset, Split
from fastres.errors import Interrupted, RunError, UserError
from fastres.fields import as_json
from fastres.files import claimed, new_folder, write_atomically, write_json
from fastres.models import create_model, function_name, is_function
from fastres.models.own import explained
from fastres.profiling.roofline import Machine
from fastres.training import distributed
from fastres.training.checkpoint import load_weights, restore, save_checkpoint, save_weights
from fastres.training.clock import Clock
from fastres.training.cost import energy, flop_an_image, measure_rates
from fastres.training.epoch import Epoch, Evaluation
from fastres.training.event_log import EventLog
from fastres.training.hardware import steps_per_epoch
from fastres.training.history import Row, best_row, target_row
from fastres.training.summary import summarize
from fastres.training.trainer import Trainer

OnStep = Callable[[int, torch.Tensor], object]
WRITES = (
    "config.json", "history.csv", "history.pkl", "summary.json", "curves.png", "best.safetensors", "last.safetensors",
    "last.pt",
)  # fmt: skip


class Run:
    """A run of the resolved ``config`` on ``dataset``. Nothing is written before ``fit``.

    asked: the settings before ``resolve``, for config.json.
    checkpoint: of ``read_checkpoint``, for a run that goes on.
    clock: started with the run's process; otherwise it starts now.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        checkpoint: dict[str, Any] | None = None,
        asked: TrainConfig | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.config, self.asked, self.clock = config, asked or config, clock or Clock()
        validation: Split | None = None
        if config.val_fraction:
            dataset, validation = dataset.hold_out(config.val_fraction, config.seed)
        self.dataset, self.device = dataset, distributed.local_device(config.device)
        with self.clock.phase("data"):
            self.test_loader = self._evaluation_loader(dataset.test)
            self.validation_loader = self._evaluation_loader(validation) if validation else None

        torch.manual_seed(config.seed)
        model = create_model(
            config.model,
            len(dataset.classes),
            config.zero_gamma,
            bool(config.fused),
            config.sync_bn,
            config.init,
            config.image_size,
        )
        images = len(dataset.train)
        steps = steps_per_epoch(config, images)
        self.images_per_epoch = steps * config.batch_size if config.drop_last else images
        self.rates: list[Machine] = []  # of the machine, before and after training
        self.joules: float | None = None  # of the GPU; of a run in one piece
        self.trainer = Trainer(model, config, self.device, len(dataset.classes), steps)
        if distributed.rank() > 0:
            torch.manual_seed(config.seed + distributed.rank())  # every process has dropout of its own
        self.history: list[Row] = []
        self.epoch: Epoch | None = None  # the unfinished one of the checkpoint
        self.resumed = checkpoint is not None
        self.warm_up_seconds = 0.0
        self.last_save_time = time.monotonic()
        if checkpoint is not None:
            self.epoch = restore(checkpoint, self.trainer)
            self.history = checkpoint["history"]
            self.clock.add(checkpoint["seconds"])
            distributed.on_rank_0(self._check_resumable)

    def _check_resumable(self) -> None:
        if len(self.history) + bool(self.epoch) > self.config.epochs:
            raise UserError(
                f"--epochs {self.config.epochs}: the run is past that already; --eval {self.folder} tests it"
            )
        best = self.folder / "best.safetensors"
        if self.history and not best.exists():
            raise UserError(
                f"--resume {self.folder}: best.safetensors, the weights of epoch {best_row(self.history)['epoch']}, is "
                "missing beside last.pt; copy it there, too"
            )

    @property
    def folder(self) -> Path:
        """The run's folder; chosen by ``fit`` unless it was given."""
        assert self.config.output_dir is not None
        return self.config.output_dir

    @property
    def record(self) -> dict[str, Any]:
        """The content of config.json: the settings as asked for, those chosen instead, and the data's properties."""
        asked, config = as_json(self.asked), as_json(self.config)
        return {
            "asked": asked,
            "chosen": {name: value for name, value in config.items() if value != asked[name]},
            "class_names": list(self.dataset.classes),
            "mean": list(self.dataset.mean),
            "std": list(self.dataset.std),
        }

    def steps_of_sizes(self, epochs: int) -> dict[int, int]:
        """The steps of the first ``epochs`` epochs by the size of their images."""
        steps = self.trainer.steps_per_epoch
        config = self.config
        return steps_of_sizes(config.image_size_schedule, config.epochs * steps, epochs * steps, config.image_size)

    def flop(self, epochs: int) -> float:
        """Floating-point operations of training in the first ``epochs`` epochs."""
        steps = self.steps_of_sizes(epochs)
        flop = sum(count * self.flop_an_image[size] for size, count in steps.items())
        return flop * epochs * self.images_per_epoch / sum(steps.values())

    @cached_property
    def flop_an_image(self) -> dict[int, float]:
        return flop_an_image(self.config, len(self.dataset.classes))

    @cached_property
    def train_loader(self) -> Loader:
        """Created on first use, because it decodes every image of a folder."""
        config, images = self.config, len(self.dataset.train)
        steps = self.trainer.steps_per_epoch

        def plan(epoch: int) -> EpochPlan:
            whole = training_plan(config.seed, epoch, images, config.augmentation, config.image_size)
            if config.image_size_schedule == "none":
                return whole
            step = epoch * steps + np.arange(images) // config.batch_size
            total, full = config.epochs * steps, config.image_size
            return resized(whole, size_of_steps(config.image_size_schedule, step, total, full), full)

        with self.clock.phase("data"):
            return self._loader(self.dataset.train, plan, config.batch_size, config.drop_last)

    def fit(
        self,
        on_step: OnStep = lambda step, loss: None,
        on_epoch: Callable[[Row], None] = lambda row: None,
        signalled: Callable[[], int] = lambda: 0,
    ) -> dict[str, Any]:
        """Trains to the last epoch, writing to the run's folder after each, and returns the summary.

        ``on_step`` is called after every step with its number in the run, from 1, and its loss, a scalar on the device
        that the next step may overwrite; ``on_epoch`` with the new row of history.csv.
        ``signalled`` is called after every step: a signal's number other than 0 saves the run and raises Interrupted.
        Raises RunError for a NaN or infinite loss, too little memory, a full disk, or a process of the job that died.
        """
        with ExitStack() as stack:
            folder = distributed.on_rank_0(self._claim_folder, stack)
            self.config = self.trainer.config = replace(self.config, output_dir=folder)
            stack.enter_context(distributed.explain_lost_process(f"; --resume {folder} goes on"))
            distributed.on_rank_0(write_json, folder / "config.json", self.record)
            loader = self.train_loader
            self._measure()
            theirs = (
                explained(self.config.model, "fails in a step") if is_function(self.config.model) else nullcontext()
            )
            with self.clock.phase("warm_up"), theirs:
                self.warm_up_seconds = self.trainer.warm_up()
            if not self.resumed:
                self._save()
            writes = distributed.rank() == 0
            log = EventLog(folder, len(self.history) + 1) if writes else None
            before = energy(self.device)
            with self.clock.phase("training"):
                while len(self.history) < self.config.epochs and not self._reached_target:
                    epoch = self.epoch or Epoch.begin(len(self.history), self.trainer.device)
                    self.epoch = None
                    row = self._finish(self._train(epoch, loader, on_step, signalled))
                    if log:
                        log.add(row)
                    on_epoch(row)
            after = energy(self.device)
            if before is not None and after is not None and not self.resumed:
                self.joules = after - before
            self._measure()
            if writes:
                with self.clock.phase("writing"):
                    save_weights(self.trainer.model, folder / "last.safetensors")
            summary = summarize(self)
            if writes:
                write_json(folder / "summary.json", summary)
            return summary

    @property
    def _reached_target(self) -> bool:
        return target_row(self.history, self.config.target_accuracy) is not None

    def _measure(self) -> None:
        with self.clock.phase("measuring"):
            if rates := measure_rates(self.config, self.device, self.flop(self.config.epochs)):
                self.rates.append(rates)

    def _claim_folder(self, stack: ExitStack) -> Path:
        """The run's folder, locked until ``stack`` is closed."""
        folder = self.config.output_dir
        if folder is None:
            name = f"{function_name(self.config.model)}-{self.dataset.name}-{datetime.now():%Y%m%d-%H%M%S}"
            folder = new_folder(Path("runs") / name)
        stack.enter_context(claimed(folder, () if self.resumed else WRITES))
        if not self.resumed and (folder / "last.pt").exists():
            raise UserError(f"--output-dir {folder}: already holds a run; choose another folder, or --resume {folder}")
        return folder

    def _train(self, epoch: Epoch, loader: Loader, on_step: OnStep, signalled: Callable[[], int]) -> Epoch:
        """Trains on the rest of ``epoch``, saves within it as asked, and returns the joint epoch of all processes."""
        every = self.config.checkpoint_steps

        def after_step() -> None:
            step = epoch.number * len(loader) + epoch.steps
            on_step(step, self.trainer.loss)
            asked = time.perf_counter()
            minutes = (time.monotonic() - self.last_save_time) / 60
            due = 0 < self.config.checkpoint_minutes <= minutes or (every > 0 and step % every == 0)
            # processes see a signal at different steps and have different clocks, but must save at the same step
            signal_number, save = distributed.max_over_processes(signalled(), due)
            epoch.seconds += time.perf_counter() - asked
            if signal_number or save:
                self.trainer.settle(epoch)
                self._save(self._checked(epoch))
            if signal_number:
                raise Interrupted(signal_number, self.folder)

        self.trainer.train_epoch(loader, epoch, after_step)
        return self._checked(epoch)

    def _checked(self, epoch: Epoch) -> Epoch:
        """The joint ``epoch`` of all processes, after a check that its loss is finite."""
        whole = epoch.of_all_processes()
        distributed.on_rank_0(self._check_finite, whole)
        return whole

    def _check_finite(self, epoch: Epoch) -> None:
        finite = int(epoch.finite_steps)
        if finite < epoch.steps:
            raise RunError(
                f"the loss was {epoch.loss} from step {finite + 1} of epoch {epoch.number + 1} on (learning rate "
                f"{epoch.lr:.3g} by now): start again with a lower --lr or a longer --warmup-epochs; "
                f"{self.folder / 'last.pt'} is from before"
            )

    def _finish(self, epoch: Epoch) -> Row:
        """Evaluates after ``epoch`` and writes its row and the checkpoints."""
        with self.clock.phase("evaluation"):
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
            with self.clock.phase("evaluation"):
                validation = self.trainer.evaluate(self.validation_loader, epoch.number)
            row |= {"val_loss": validation.loss, "val_accuracy": validation.accuracy}
        self.history.append(row)
        with self.clock.phase("writing"):
            if distributed.rank() == 0:
                if best_row(self.history) is row:
                    save_weights(self.trainer.model, self.folder / "best.safetensors")
                frame = pd.DataFrame(self.history)
                write_atomically(self.folder / "history.csv", partial(frame.to_csv, index=False))
                write_atomically(self.folder / "history.pkl", frame.to_pickle)
        last = row["epoch"] == self.config.epochs or self._reached_target
        if row["epoch"] % self.config.checkpoint_every == 0 or last:
            self._save()
        return row

    def _save(self, epoch: Epoch | None = None) -> None:
        with self.clock.phase("writing"):
            save_checkpoint(self.folder / "last.pt", self.trainer, self.record, self.history, self.clock.read(), epoch)
        self.last_save_time = time.monotonic()

    def evaluate_weights(self, name: str, mirrored: bool = False) -> Evaluation:
        """Evaluates the weights of the ``best`` or the ``last`` epoch, reloaded from their file, on the test split."""
        model = self.trainer.model
        with self.clock.phase("evaluation"):
            distributed.on_rank_0(load_weights, model, self.folder / f"{name}.safetensors")
            distributed.copy_from_rank_0(model.state_dict().values())
            return self.trainer.evaluate(self.test_loader, self.config.epochs, mirrored)

    def _loader(
        self,
        split: Split,
        plan_of_epoch: Callable[[int], EpochPlan],
        batch_size: int,
        drop_last: bool,
    ) -> Loader:
        """A loader of this process's shard of every batch of ``batch_size`` images."""
        size = distributed.largest_shard(min(batch_size, len(split)))
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
            decode=self.config.decode,
            num_classes=len(self.dataset.classes),
        )

    def _evaluation_loader(self, split: Split) -> Loader:
        plan = evaluation_plan(len(split))
        return self._loader(split, lambda epoch: plan, self.config.eval_batch_size, drop_last=False)
