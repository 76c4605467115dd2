"""The processes that torchrun starts for one job. In a single process each function is a no-op or the identity."""

import os
import re
import signal
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastres.errors import RunError, UserError

T = TypeVar("T")


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def refuse(parser: ArgumentParser) -> None:
    """Exits with one line if torchrun started a command that runs in a single process."""
    if launched():
        line = f"{parser.prog}: error: runs in one process; start it without torchrun\n"
        parser.exit(2, line if os.environ["RANK"] == "0" else None)


def restarts() -> tuple[int, int]:
    """How often torchrun has restarted this job, and its --max-restarts."""
    if not launched():
        return 0, 0
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["TORCHELASTIC_MAX_RESTARTS"])


@contextmanager
def job() -> Iterator[None]:
    """Joins the process group if torchrun started several processes: Gloo for CPU tensors, NCCL for CUDA ones."""
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    store, rank, world_size = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        # torchrun keeps its store over a restart, with the addresses of processes that are gone
        store=dist.PrefixStore(f"restart-{restarts()[0]}", store),
        rank=rank,
        world_size=world_size,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number in the job, from 0. Only rank 0 writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes of the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(kind: str) -> torch.device:
    """``cpu``, or this process's GPU: each of a machine's processes needs its own."""
    if kind == "cpu":
        return torch.device(kind)
    if dist.is_initialized():
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(
                f"--nproc-per-node {processes}: each takes a GPU, and there are {gpus}; start no more than that"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(kind, torch.cuda.current_device())


def largest_shard(number: int) -> int:
    """Size of the largest shard of ``number`` items."""
    return -(-number // world_size())


def on_rank_0(function: Callable[..., T], *arguments: Any) -> T:
    """Calls ``function`` on rank 0 only, and returns its result in every process.

    Rank 0 reports a UserError or SystemExit of ``function``; the other processes exit silently with the same code.
    """
    if not dist.is_initialized():
        return function(*arguments)
    outcome: list[Any] = [None, None]  # the result, or the exit code
    if rank() == 0:
        try:
            outcome[0] = function(*arguments)
        except (UserError, SystemExit) as error:
            dist.broadcast_object_list([None, error.exit_code if isinstance(error, UserError) else error.code])
            raise
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        sys.exit(outcome[1])
    return outcome[0]


def gather(value: T) -> list[T]:
    """The ``value`` of every process, by rank, in every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def max_over_processes(*numbers: int) -> list[int]:
    """Element-wise maximum over processes; does not synchronise the GPU."""
    if not dist.is_initialized():
        return list(numbers)
    joined = torch.tensor(numbers)
    dist.all_reduce(joined, dist.ReduceOp.MAX)
    return joined.tolist()


def copy_from_rank_0(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrites ``tensors``, of equal shapes in all processes, with those of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


@contextmanager
def explain_lost_process(advice: str = "") -> Iterator[None]:
    """Raises RunError, which ends with ``advice``, if a peer process has died during a collective operation."""
    try:
        yield
    except RuntimeError as error:  # the type that Gloo and NCCL raise
        if not (dist.is_initialized() and re.search("gloo|nccl", str(error), re.IGNORECASE)):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it next; the message comes first
        raise RunError(f"another process of this job died; its own message says why{advice}") from error
