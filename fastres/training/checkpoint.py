"""Checkpoints and weights: last.pt, which a run goes on from, and safetensors files. Opening either runs no code."""

import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from fastres.errors import UserError, first_line
from fastres.files import write_atomically
from fastres.training import distributed
from fastres.training.clock import PHASES
from fastres.training.epoch import Epoch
from fastres.training.history import Row, check_history
from fastres.training.trainer import Trainer

FORMAT = "fastres checkpoint 4"
PARTS = {
    "format", "run", "history", "seconds", "steps_per_epoch", "epoch", "model", "optimizer", "scaler", "rng",
    "cuda_rng",
}  # fmt: skip
RANDOM_STATES = ("rng", "cuda_rng")


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Writes the state dict as safetensors, contiguous, with a checksum in the metadata."""
    # copies, because safetensors takes no tensor that is there by two names
    state = {
        name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items()
    }
    content = save(state, {"crc32": checksum(state)})  # not save_file, which ignores the umask
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def load_weights(model: torch.nn.Module, path: Path, but: Sequence[str] = ()) -> None:
    """Loads the safetensors file at ``path`` into ``model``; refuses a damaged file and another model's.

    but: names of tensors that ``model`` keeps.
    """
    try:
        content = path.read_bytes()  # safe_open takes only paths that are UTF-8
        state = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        recorded = header.get("__metadata__", {}).get("crc32")  # files from elsewhere have none
        damaged = recorded not in (None, checksum(state))
        if not damaged:
            own = model.state_dict()
            model.load_state_dict({**state, **{name: own[name] for name in but}})
    except Exception as error:  # safetensors and torch raise OSError, SafetensorError, RuntimeError, ...
        raise UserError(f"{path}: does not hold weights of this model ({first_line(error)})") from error
    if damaged:
        raise UserError(f"{path}: damaged, its checksum is not the recorded one; take a copy of it, or train again")


def checksum(state: dict[str, torch.Tensor]) -> str:
    """CRC-32 of the bytes of all tensors, contiguous and on the CPU, in the order of their names."""
    crc = 0
    for name in sorted(state):
        crc = zlib.crc32(state[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def save_checkpoint(
    path: Path,
    trainer: Trainer,
    run: dict[str, Any],
    history: list[Row],
    seconds: dict[str, float],
    epoch: Epoch | None = None,
) -> None:
    """Writes everything that the next step depends on; ``epoch`` is the unfinished one, ``run`` the content of
    config.json, ``seconds`` those of the run's Clock.

    A collective call: all processes of a job pass the joint ``epoch``; rank 0 writes, with the random states of all.
    """
    state = snapshot(trainer, run, history, seconds, epoch)
    state |= {part: distributed.gather(state[part]) for part in RANDOM_STATES}
    if distributed.rank() == 0:
        write_atomically(path, lambda temporary: torch.save(state, temporary))


def snapshot(
    trainer: Trainer, run: dict[str, Any], history: list[Row], seconds: dict[str, float], epoch: Epoch | None
) -> dict[str, Any]:
    """The content of a checkpoint, but with the random states of this process instead of lists of all."""
    return {
        "format": FORMAT,
        "run": run,
        "history": history,
        "seconds": seconds,
        "steps_per_epoch": trainer.steps_per_epoch,
        "epoch": epoch and asdict(epoch),
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict()["state"],  # the run's settings have the rest
        "scaler": trainer.scaler.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(trainer.device) if trainer.device.type == "cuda" else None,
    }


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint at ``path``, or last.pt in the folder ``path``; ``restore`` checks its content."""
    if path.is_dir():
        path = path / "last.pt"
    if not path.is_file():
        raise UserError(f"--resume {path}: no such file; give a run's folder or its last.pt")
    found: Any = None
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise ValueError("torch.save does not compress")
            damaged = archive.testzip()  # torch.load does not compare the checksums
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["format"]
        if damaged is None and found == FORMAT and state.keys() >= PARTS:
            return state
    except Exception:  # torch.load raises whatever zipfile and its unpickler raise
        pass
    if isinstance(found, str) and found.startswith("fastres checkpoint ") and found != FORMAT:
        raise UserError(f"--resume {path}: written by another version of fastres; go on with that one, or train again")
    raise UserError(f"--resume {path}: not a checkpoint of fastres, or damaged; give a run's folder or its last.pt")


def restore(state: dict[str, Any], trainer: Trainer) -> Epoch | None:
    """Restores ``trainer`` from ``state`` and returns the unfinished epoch, if any.

    The number of processes may differ; additional processes keep their own random state.
    """
    distributed.on_rank_0(_fit_expected(trainer)(check), state, trainer)  # every process would find the same
    with _fit_expected(trainer):
        trainer.model.load_state_dict(state["model"])
        trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), "state": state["optimizer"]})
        trainer.scaler.load_state_dict(state["scaler"])
        rank = distributed.rank()
        if rank < len(state["rng"]):
            torch.set_rng_state(state["rng"][rank])
            if trainer.device.type == "cuda" and state["cuda_rng"][rank] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"][rank], trainer.device)
        epoch = state["epoch"] and Epoch.from_state_dict(state["epoch"], trainer.device)
    if epoch and rank > 0:  # rank 0 has the sums of all processes so far
        empty = Epoch.begin(epoch.number, trainer.device)
        epoch = replace(epoch, loss_sum=empty.loss_sum, correct=empty.correct, images=empty.images)
    return epoch


@contextmanager
def _fit_expected(trainer: Trainer) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--resume {trainer.config.output_dir}: last.pt does not fit this run ({first_line(error)})"
        ) from error


def check(state: dict[str, Any], trainer: Trainer) -> None:
    """Raises ValueError if ``state``, which has all PARTS, differs in structure from a snapshot of ``trainer``."""
    check_history(state["history"], validated=trainer.config.val_fraction > 0)
    epoch = Epoch.begin(len(state["history"]), trainer.device) if state["epoch"] is not None else None
    expected = snapshot(trainer, state["run"], state["history"], dict.fromkeys(PHASES, 0.0), epoch)
    for part in ("seconds", "steps_per_epoch", "epoch", "model", "optimizer", "scaler"):
        check_like(state[part], expected[part], part)
    if state["steps_per_epoch"] != trainer.steps_per_epoch:
        raise ValueError(
            f"its epochs have {state['steps_per_epoch']:,} steps instead of {trainer.steps_per_epoch:,}: was the "
            "training set another?"
        )
    if epoch:
        number, done, images = (state["epoch"][name] for name in ("number", "steps", "images"))
        if number != epoch.number or not 0 < done <= min(trainer.steps_per_epoch, images):
            raise ValueError(f"it is at step {done} of epoch {number + 1}, after {len(state['history'])} finished ones")
    for part in RANDOM_STATES:
        if not isinstance(state[part], list) or len(state[part]) != len(state["rng"]):
            raise ValueError(f"{part} has not a state for each process")
    for process in state["rng"]:
        check_like(process, expected["rng"], "rng")
    if expected["cuda_rng"] is not None:
        for process in state["cuda_rng"]:
            if process is not None:  # it was on a CPU
                check_like(process, expected["cuda_rng"], "cuda_rng")


def check_like(found: Any, expected: Any, where: str) -> None:
    """Raises ValueError if ``found`` differs from ``expected`` in structure, type or shape."""
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
