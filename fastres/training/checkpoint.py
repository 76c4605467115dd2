"""What a run writes so that it can go on or be used: last.pt and best.safetensors. Opening either runs no code."""

import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fastres.errors import RunError, UserError
from fastres.training import distributed
from fastres.training.trainer import Epoch, Trainer

FORMAT = "fastres checkpoint 2"


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls ``write`` with a temporary path and moves the file to ``path`` once it is on the disk.

    A crash leaves the file that was there before, and so does a full disk, which raises RunError.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors have their own
        temporary.unlink(missing_ok=True)
        raise RunError(
            f"{path}: cannot be written ({_first_line(error)}); make room, then --resume {path.parent}"
        ) from error


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """The state dict as safetensors, contiguous."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, lambda temporary: save_file(state, temporary))


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Raises UserError where ``path`` is missing, no safetensors file, or of another model."""
    try:
        model.load_state_dict(load_file(path))
    except Exception as error:  # safetensors and torch raise OSError, SafetensorError, RuntimeError, ...
        raise UserError(f"{path}: does not hold weights of this model ({_first_line(error)})") from error


def save_checkpoint(path: Path, trainer: Trainer, history: list[dict[str, Any]], epoch: Epoch | None = None) -> None:
    """Everything that the next step depends on: of ``epoch``, if the run is in the middle of one.

    All processes of a job must call it, with the ``epoch`` of them all; rank 0 writes.
    """
    cuda = trainer.device.type == "cuda"
    state = {
        "format": FORMAT,
        "config": trainer.config.to_json(),
        "history": history,
        "epoch": epoch and epoch.state_dict(),
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "rng": distributed.gather(torch.get_rng_state()),
        "cuda_rng": distributed.gather(torch.cuda.get_rng_state(trainer.device) if cuda else None),
    }
    if distributed.rank() == 0:
        write_atomically(path, lambda temporary: torch.save(state, temporary))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What ``save_checkpoint`` wrote at ``path``, or in the folder ``path``. Raises UserError for anything else."""
    if path.is_dir():
        path = path / "last.pt"
    if not path.is_file():
        raise UserError(f"--resume {path}: no such file; give a run's folder or its last.pt")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not compare the checksums
        state = torch.load(path, map_location="cpu", weights_only=True)
        if damaged is None and state["format"] == FORMAT:
            return state
    except Exception:  # torch.load raises whatever zipfile and its unpickler raise
        pass
    raise UserError(f"--resume {path}: not a checkpoint of fastres, or damaged; give a run's folder or its last.pt")


def restore(state: dict[str, Any], trainer: Trainer) -> Epoch | None:
    """Brings ``trainer`` to where ``state`` was saved, and returns the epoch that it was in the middle of, if any.

    The number of processes may be another: those that were not there before keep their own random state.
    """
    rank = distributed.rank()
    trainer.model.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    trainer.scaler.load_state_dict(state["scaler"])
    if rank < len(state["rng"]):
        torch.set_rng_state(state["rng"][rank])
        if trainer.device.type == "cuda" and state["cuda_rng"][rank] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"][rank], trainer.device)
    if state["epoch"] is None:
        return None
    epoch = Epoch.from_state_dict(state["epoch"], trainer.device)
    if rank > 0:  # rank 0 has the sums of all so far
        none = Epoch.begin(epoch.number, trainer.device)
        epoch = replace(epoch, loss_sum=none.loss_sum, correct=none.correct, images=none.images)
    return epoch


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
