"""fastres.train with the tiny model in vgg11's place, for torchrun, and with a fault where FAULT asks for one.

``FAULT="1 12 SIGKILL self"``: at its 12th step, on the first start of the job, rank 1 sends SIGKILL to itself;
"torchrun" instead of "self" sends it to the process that started the job, "both" to both.
"""

import os
import signal
import sys

import torch

from fastres import train
from fastres.models import MODELS
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
    """Keeps torch's first optimizer from importing torch._dynamo, which takes a second of every process."""
    for method in vars(torch.optim.Optimizer).values():
        function = getattr(method, "__wrapped__", None)
        if function and method.__code__.co_filename == torch._compile.__file__:
            function.__dynamo_disable = function


if __name__ == "__main__":
    without_the_compiler()
    MODELS["vgg11"] = tiny_model
    if os.environ.get("FAULT"):
        arrange(*os.environ["FAULT"].split())
    sys.exit(train.main())
