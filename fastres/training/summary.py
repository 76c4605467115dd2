"""summary.json: what a finished run reached, what it cost, and where."""

from dataclasses import asdict
from itertools import accumulate
from statistics import median
from typing import TYPE_CHECKING, Any

from fastres.config import ENGINE
from fastres.machine import device_name, peak_memory_mb, provenance
from fastres.training import distributed
from fastres.training.cost import share_of_limit
from fastres.training.history import best_row, target_row

if TYPE_CHECKING:
    from fastres.training.run import Run


def summarize(run: "Run") -> dict[str, Any]:
    """The summary of a finished ``run``. A collective call, which evaluates the selected weights again."""
    config, trainer, history = run.config, run.trainer, run.history
    best, last, reached = best_row(history), history[-1], target_row(history, config.target_accuracy)
    seconds = list(accumulate(row["epoch_seconds"] for row in history))  # up to the end of each epoch
    speed = median(row["images_per_second"] for row in history)
    flop, classes = run.flop(len(history)), run.dataset.classes
    epoch_flop = run.images_per_epoch * run.flop_an_image[config.image_size]
    limit = share_of_limit(config, len(classes), run.steps_of_sizes(len(history)), seconds[-1], run.rates)
    peak_memory = peak_memory_mb(trainer.device)
    evaluation = run.evaluate_weights(config.select)
    mirrored = run.evaluate_weights(config.select, mirrored=True) if config.tta else None
    phases = run.clock.read()
    return {
        "model": config.model,
        "dataset": run.dataset.name,
        "num_classes": len(classes),
        "train_images": len(run.dataset.train),
        "test_images": len(run.dataset.test),
        "skipped_images": run.dataset.skipped_images,
        "mean": list(run.dataset.mean),
        "std": list(run.dataset.std),
        "params_millions": sum(parameter.numel() for parameter in trainer.model.parameters()) / 1e6,
        "epochs": len(history),
        "select": config.select,
        "accuracy": evaluation.accuracy,
        "mirrored_accuracy": mirrored and mirrored.accuracy,
        "test_loss": evaluation.loss,
        "top5_accuracy": evaluation.top5_accuracy,
        "per_class_accuracy": dict(zip(classes, evaluation.per_class_accuracy, strict=True)),
        "confusion_matrix": evaluation.confusion,
        "last_accuracy": last["test_accuracy"],
        "last_test_loss": last["test_loss"],
        "best_selected_on": "validation" if run.validation_loader else "test",
        "best_epoch": best["epoch"],
        "best_accuracy": best["test_accuracy"],
        "best_test_loss": best["test_loss"],
        "best_on_test_accuracy": max(row["test_accuracy"] for row in history),
        "selection_gain": best["test_accuracy"] - last["test_accuracy"],
        "test_evaluations": len(history) + 1 + config.tta,
        "target_accuracy": config.target_accuracy,
        "target_epoch": reached and reached["epoch"],
        "target_seconds": reached and seconds[reached["epoch"] - 1],
        "epoch_seconds": median(row["epoch_seconds"] for row in history),
        "images_per_second": speed,
        "data_wait_fraction": sum(row["data_wait_seconds"] for row in history) / seconds[-1],
        "train_seconds": seconds[-1],
        "warm_up_seconds": run.warm_up_seconds,
        "wall_seconds": sum(phases.values()),
        "phase_seconds": phases,
        "price": sum(phases.values()) / 3600 * config.price_per_hour or None,
        "train_flop": flop,
        "epochs_work": flop / epoch_flop,
        "image_size_schedule": config.image_size_schedule,
        "train_flop_per_second": flop / seconds[-1],
        "machine_rates": [asdict(rates) for rates in run.rates],
        "share_of_limit": limit,
        "joules": run.joules,
        "first_losses": [loss.item() for loss in trainer.losses],
        "peak_memory_mb": peak_memory,
        "device": device_name(trainer.device),
        "world_size": distributed.world_size(),
        **{name: getattr(config, name) for name in ENGINE},
        "seed": config.seed,
        **provenance(),
    }
