"""fastres.train with the tiny model in vgg11's place, for torchrun, and with a fault where FAULT asks for one.

``FAULT="1 12 SIGKILL self"``: at its 12th step, on the first start of the job, rank 1 sends SIGKILL to itself;
"torchrun" instead of "self" sends it to the process that started the job, "both" to both.
"""

import os
import signal
import sys
from types import ModuleType
from typing import Any

import torch

from fastres import train
from fastres.models import MODELS
from fastres.report import plots
from fastres.training.trainer import Trainer
from tests.conftest import tiny_model


def arrange(rank: str, step: str, name: str, target: str) -> None:
    if os.environ["RANK"] != rank or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return
    take_step, taken = Trainer._step, 0

    def faulty_step(*args):
        nonlocal taken
        taken += 1
        if taken == int(step):
            for process in {"self": [os.getpid()], "torchrun": [os.getppid()]}.get(target, [os.getppid(), os.getpid()]):
                os.kill(process, signal.Signals[name])
        return take_step(*args)

    Trainer._step = faulty_step


def without_the_compiler() -> None:
    """Puts a stub in the place of torch._dynamo, whose import by torch's first optimizer takes a second or two."""
    stub: Any = ModuleType("torch._dynamo")
    stub.disable = lambda function, *_, **__: function
    stub.graph_break = lambda: None
    utils: Any = ModuleType("torch._dynamo.utils")
    utils.is_compile_supported = lambda device: False  # which torchvision asks for
    sys.modules["torch._dynamo.utils"] = utils
    torch._dynamo = sys.modules["torch._dynamo"] = stub


if __name__ == "__main__":
    if "RANK" not in os.environ:  # DDP needs it
        without_the_compiler()
        plots.plot_curves = lambda folder, title: folder / "curves.png"  # which would take as long as the run
    MODELS["vgg11"] = tiny_model
    if os.environ.get("FAULT"):
        arrange(*os.environ["FAULT"].split())
    sys.exit(train.main())
