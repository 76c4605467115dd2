"""fastres: train CIFAR-scale ResNets and VGGs fast, and know honestly what it cost.

The public API, whose modules are imported on first use:

* ``fit``: trains as the command line does, and returns the summary.
* ``load_model``: a trained model from a run's folder, ready to predict.
* ``create_model``, ``list_models``: the networks.
* ``DaliLoader``, ``EagerLoader``, ``training_plan``, ``evaluation_plan``: augmented batches for any training loop.
* ``check_loader``: whether a loader of your own gives the batches of a plan.
* ``BatchNormReLU2d``, ``batch_norm_relu``: the fused operator, as a module and as a function.
* ``keep_freed_memory``: the memory setting that training uses on a CPU.
* ``UserError``: the base class of the errors that a user can fix.
"""

import gc
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastres.data.check import check_loader as check_loader
    from fastres.data.dali import DaliLoader as DaliLoader
    from fastres.data.eager import EagerLoader as EagerLoader
    from fastres.data.plan import evaluation_plan as evaluation_plan
    from fastres.data.plan import training_plan as training_plan
    from fastres.errors import UserError as UserError
    from fastres.models import create_model as create_model
    from fastres.models import list_models as list_models
    from fastres.nn import BatchNormReLU2d as BatchNormReLU2d
    from fastres.ops.batch_norm_relu import batch_norm_relu as batch_norm_relu
    from fastres.train import fit as fit
    from fastres.trained import load_model as load_model
    from fastres.training.memory import keep_freed_memory as keep_freed_memory

__version__ = "0.1.0"

_MODULES = {
    "BatchNormReLU2d": "fastres.nn",
    "DaliLoader": "fastres.data.dali",
    "EagerLoader": "fastres.data.eager",
    "UserError": "fastres.errors",
    "batch_norm_relu": "fastres.ops.batch_norm_relu",
    "check_loader": "fastres.data.check",
    "create_model": "fastres.models",
    "evaluation_plan": "fastres.data.plan",
    "fit": "fastres.train",
    "keep_freed_memory": "fastres.training.memory",
    "list_models": "fastres.models",
    "load_model": "fastres.trained",
    "training_plan": "fastres.data.plan",
}
__all__ = list(_MODULES)

# Started in this very folder, Python would find profile.py in it when a library imports the standard library's profile.
_here = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != _here]


if sys.argv[:1] == ["-m"] and any(argument.startswith("fastres.") for argument in sys.orig_argv):
    gc.disable()  # python -m fastres.train: its imports take half a second less; run_command enables it


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fastres' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
