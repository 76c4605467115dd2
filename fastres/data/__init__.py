"""Datasets, the epoch plan, and the two loaders that apply it."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from fastres.data.datasets import Split
from fastres.data.plan import EpochPlan
from fastres.errors import UserError, first_line

Batch = tuple[torch.Tensor, torch.Tensor]


class Loader(Protocol):
    """Gives the batches of an epoch: float32 images ``[B, 3, 32, 32]`` and int64 labels ``[B]``.

    ``starts_anew``: with every epoch, whose first batch is therefore waited for.
    """

    starts_anew: bool

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]: ...


def choose_loader(name: str) -> tuple[str, str]:
    """``dali`` or ``eager``, and the reason; a loader named explicitly is kept."""
    if name == "eager":
        return name, "asked for"
    try:
        import nvidia.dali  # noqa: F401
    except Exception as error:  # python -OO makes it a TypeError
        if name == "auto":
            return "eager", f"DALI does not import: {first_line(error)}"
        mend = "pip install nvidia-dali-cuda130" if isinstance(error, ImportError) else "take --loader eager"
        raise UserError(f"--loader dali: DALI does not import ({first_line(error)}); {mend}") from error
    return "dali", "asked for" if name == "dali" else "DALI imports"


def create_loader(name: str, split: Split, plan_of_epoch: Callable[[int], EpochPlan], **options: Any) -> Loader:
    """The loader called ``name``, ``dali`` or ``eager``. Either applies the same plan, so the batches are the same.

    ``options`` are the keyword arguments of DaliLoader and EagerLoader, which are the same.
    """
    loader: Callable[..., Loader]
    if name == "dali":
        from fastres.data.dali import DaliLoader as loader
    else:
        from fastres.data.eager import EagerLoader as loader
    return loader(split, plan_of_epoch, **options)
