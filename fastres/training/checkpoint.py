"""What a run writes so that it can go on or be used: last.pt and best.safetensors. Opening either runs no code."""

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from fastres.errors import RunError, UserError
from fastres.training import distributed
from fastres.training.trainer import Epoch, Trainer

FORMAT = "fastres checkpoint 2"
PARTS = {"format", "config", "history", "epoch", "step", "model", "momentum", "scaler", "rng", "cuda_rng"}
COLUMNS = (
    "epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
    "epoch_seconds", "images_per_second", "data_wait_seconds",
)  # fmt: skip
VALIDATION_COLUMNS = ("val_loss", "val_accuracy")
RANDOM_STATES = ("rng", "cuda_rng")


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
    """The state dict as safetensors, contiguous, with a checksum in the metadata."""
    state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"crc32": checksum(state)}
    write_atomically(path, lambda temporary: save_file(state, temporary, metadata))


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Raises UserError where ``path`` is missing, no safetensors file, damaged, or of another model."""
    try:
        content = path.read_bytes()  # safe_open takes only paths that are UTF-8
        state = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        recorded = header.get("__metadata__", {}).get("crc32")  # files from elsewhere have none
        damaged = recorded not in (None, checksum(state))
        if not damaged:
            model.load_state_dict(state)
    except Exception as error:  # safetensors and torch raise OSError, SafetensorError, RuntimeError, ...
        raise UserError(f"{path}: does not hold weights of this model ({_first_line(error)})") from error
    if damaged:
        raise UserError(f"{path}: damaged, its checksum is not the recorded one; take a copy of it, or train again")


def checksum(state: dict[str, torch.Tensor]) -> str:
    """CRC-32 of the bytes of all tensors, contiguous and on the CPU, in the order of their names."""
    crc = 0
    for name in sorted(state):
        crc = zlib.crc32(state[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def save_checkpoint(path: Path, trainer: Trainer, history: list[dict[str, Any]], epoch: Epoch | None = None) -> None:
    """Everything that the next step depends on: of ``epoch``, if the run is in the middle of one.

    All processes of a job must call it, with the ``epoch`` of them all; rank 0 writes, also the others' random states.
    """
    state = snapshot(trainer, history, epoch)
    state |= {part: distributed.gather(state[part]) for part in RANDOM_STATES}
    if distributed.rank() == 0:
        write_atomically(path, lambda temporary: torch.save(state, temporary))


def snapshot(trainer: Trainer, history: list[dict[str, Any]], epoch: Epoch | None) -> dict[str, Any]:
    """What ``save_checkpoint`` writes for a single process, whose random states it puts into lists."""
    return {
        "format": FORMAT,
        "config": trainer.config.to_json(),
        "history": history,
        "epoch": epoch and epoch.state_dict(),
        "step": len(history) * trainer.steps_per_epoch + (epoch.steps if epoch else 0),
        "model": trainer.model.state_dict(),
        "momentum": trainer.momentum_buffers(),
        "scaler": trainer.scaler.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(trainer.device) if trainer.device.type == "cuda" else None,
    }


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What ``save_checkpoint`` wrote at ``path``, or in the folder ``path``; ``restore`` looks into it.

    Raises UserError for anything else.
    """
    if path.is_dir():
        path = path / "last.pt"
    if not path.is_file():
        raise UserError(f"--resume {path}: no such file; give a run's folder or its last.pt")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise ValueError("torch.save does not compress")
            damaged = archive.testzip()  # torch.load does not compare the checksums
        state = torch.load(path, map_location="cpu", weights_only=True)
        if damaged is None and state["format"] == FORMAT and state.keys() >= PARTS:
            return state
    except Exception:  # torch.load raises whatever zipfile and its unpickler raise
        pass
    raise UserError(f"--resume {path}: not a checkpoint of fastres, or damaged; give a run's folder or its last.pt")


def restore(state: dict[str, Any], trainer: Trainer) -> Epoch | None:
    """Brings ``trainer`` to where ``state`` was saved, and returns the epoch that it was in the middle of, if any.

    The number of processes may be another: those that were not there before keep their own random state. Raises
    UserError where ``state`` is not what ``save_checkpoint`` writes in a run of this model and training set.
    """
    # every process would find the same
    distributed.from_rank_0(_fit_expected(trainer)(lambda: check(state, trainer)))
    with _fit_expected(trainer):
        trainer.model.load_state_dict(state["model"])
        for name, buffer in trainer.momentum_buffers().items():
            buffer.copy_(state["momentum"][name])
        trainer.scaler.load_state_dict(state["scaler"])
        rank = distributed.rank()
        if rank < len(state["rng"]):
            torch.set_rng_state(state["rng"][rank])
            if trainer.device.type == "cuda" and state["cuda_rng"][rank] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"][rank], trainer.device)
        epoch = state["epoch"] and Epoch.from_state_dict(state["epoch"], trainer.device)
    if epoch and rank > 0:  # rank 0 has the sums of all so far
        none = Epoch.begin(epoch.number, trainer.device)
        epoch = replace(epoch, loss_sum=none.loss_sum, correct=none.correct, images=none.images)
    return epoch


@contextmanager
def _fit_expected(trainer: Trainer) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--resume {trainer.config.output_dir}: last.pt does not fit this run ({_first_line(error)})"
        ) from error


def check(state: dict[str, Any], trainer: Trainer) -> None:
    """Raises ValueError where ``state``, which has all ``PARTS``, is not built as a snapshot of ``trainer``."""
    check_history(state["history"], validated=trainer.config.val_fraction > 0)
    epoch = Epoch.begin(len(state["history"]), trainer.device) if state["epoch"] is not None else None
    expected = snapshot(trainer, state["history"], epoch)
    check_like(state["epoch"], expected["epoch"], "epoch")
    check_like(state["step"], expected["step"], "step")
    steps = len(state["history"]) * trainer.steps_per_epoch
    if epoch:
        number, done, images = (state["epoch"][name] for name in ("number", "steps", "images"))
        if number != epoch.number or not 0 < done <= min(trainer.steps_per_epoch, images):
            raise ValueError(f"it is at step {done} of epoch {number + 1}, after {len(state['history'])} finished ones")
        steps += done
    if state["step"] != steps:
        raise ValueError(f"it is at step {state['step']:,} instead of {steps:,}: was the training set another?")
    for part in ("model", "momentum", "scaler"):
        check_like(state[part], expected[part], part)
    for part in RANDOM_STATES:
        if not isinstance(state[part], list) or len(state[part]) != len(state["rng"]):
            raise ValueError(f"{part} has not a state for each process")
    for process in state["rng"]:
        check_like(process, expected["rng"], "rng")
    if expected["cuda_rng"] is not None:
        for process in state["cuda_rng"]:
            if process is not None:  # it was on a CPU
                check_like(process, expected["cuda_rng"], "cuda_rng")


def check_history(history: Any, validated: bool) -> None:
    """Raises ValueError for what is not the list of the rows of epochs 1, 2, ..."""
    columns = COLUMNS + (VALIDATION_COLUMNS if validated else ())
    if not isinstance(history, list):
        raise ValueError("its history is no list")
    for i, row in enumerate(history):
        if (
            not isinstance(row, dict)
            or not row.keys() >= set(columns)
            or not all(type(value) in (int, float) for value in row.values())
            or row["epoch"] != i + 1
            or not row["epoch_seconds"] > 0
        ):
            raise ValueError(f"its history has no proper row of epoch {i + 1}")


def check_like(found: Any, expected: Any, where: str) -> None:
    """Raises ValueError where ``found`` is of another structure, type or shape than ``expected``."""
    if _kind(found) != _kind(expected):
        raise ValueError(f"{where} is {_kind(found)} instead of {_kind(expected)}")
    if isinstance(expected, dict):
        for name in sorted(expected.keys() ^ found.keys(), key=str):
            raise ValueError(f"{where} has {'no' if name in expected else 'an unknown'} {str(name)!r}")
        for name, value in expected.items():
            check_like(found[name], value, f"{where} {name}")


def _kind(value: Any) -> str:
    if not torch.is_tensor(value):
        return type(value).__name__
    words = "meta " * value.is_meta + "differentiable " * value.requires_grad
    return f"a {words}{value.layout} {value.dtype} {list(value.shape)}".replace("torch.", "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
