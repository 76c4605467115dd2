"""The processes that torchrun starts for one job. In a process on its own, each function is what one process does."""

import os
import re
import signal
import sys
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
    return dist.is_available() and dist.is_torchelastic_launched()


def refuse(parser: ArgumentParser) -> None:
    """Exits with one line, of rank 0, if torchrun started a command line that is for one process."""
    if launched():
        line = f"{parser.prog}: error: trains in one process; start it without torchrun\n"
        parser.exit(2, line if os.environ["RANK"] == "0" else None)


def restarts() -> tuple[int, int]:
    """How often torchrun has started this job again, and how often it would."""
    if not launched():
        return 0, 0
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["TORCHELASTIC_MAX_RESTARTS"])


@contextmanager
def job() -> Iterator[None]:
    """Joins the other processes of the job, if torchrun started more than one.

    What lies on the CPU then travels through Gloo and what lies on a GPU through NCCL.
    """
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
    """This process's number in the job, from 0. Rank 0 alone writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes of the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(kind: str) -> torch.device:
    """``cpu``, or the GPU of this process: one for each of the processes of a machine.

    Raises UserError where the machine has fewer GPUs than processes.
    """
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
    """What ``number`` things, shared out evenly, are for the process that gets most of them."""
    return -(-number // world_size())


def from_rank_0(make: Callable[[], T]) -> T:
    """What ``make`` returns on rank 0, where alone it is called, in every process.

    A UserError or SystemExit of ``make`` is rank 0's to report: the others exit with its code and say nothing.
    """
    if not dist.is_initialized():
        return make()
    outcome: list[Any] = [None, None]  # the result, or the exit code
    if rank() == 0:
        try:
            outcome[0] = make()
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


def highest(*numbers: int) -> list[int]:
    """The highest that any process has for each of ``numbers``. Quick, and no GPU is waited for."""
    if not dist.is_initialized():
        return list(numbers)
    joined = torch.tensor(numbers)
    dist.all_reduce(joined, dist.ReduceOp.MAX)
    return joined.tolist()


def copy_from_rank_0(tensors: Iterable[torch.Tensor]) -> None:
    """Makes ``tensors``, alike in shape in all processes, what they are on rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


@contextmanager
def loss_of_processes_named(advice: str = "") -> Iterator[None]:
    """Raises RunError, ending with ``advice``, where another process is gone that this one exchanges tensors with."""
    try:
        yield
    except RuntimeError as error:  # all that Gloo raises
        if not (dist.is_initialized() and re.search("gloo|nccl", str(error), re.IGNORECASE)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends next; the message comes first
        raise RunError(f"another process of this job died; its own message says why{advice}") from error
