"""Networks that are not fastres' own: functions that the user names, and the fused operator in what they return.

A function is imported only by ``import_model``, which is called with what the user gave as a flag or an argument. A
name that was found in a config, a checkpoint or a run's folder runs nothing.
"""

import copy
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastres.errors import UserError, examples, first_line
from fastres.fields import path
from fastres.models.resnet import NormLayer
from fastres.nn import EagerBatchNormReLU2d, has_hooks

NOT_THEIRS = rf"site-packages|importlib|^<|{re.escape(os.path.dirname(os.path.dirname(__file__)))}"  # in a file's path


def import_model(name: str) -> Callable[..., nn.Module]:
    """The function that ``name``, ``package.module:function`` or ``file.py:function``, stands for, to be called like
    those of MODELS: it checks and fuses what the function returns.

    Modules are looked for in the working folder, too, and those that a file imports in the file's folder.
    """
    source, _, function_name = name.rpartition(":")
    with explained(name, "cannot be imported"):
        module = _import_file(path(source)) if source.endswith(".py") else _import_module(source)
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        has = f"; it has {examples(functions)}" if functions else ""
        raise UserError(f"--model {name}: {source} has no function {function_name}{has}")
    try:
        inspect.signature(function).bind(10)
    except (TypeError, ValueError) as error:  # ValueError: it is not written in Python
        raise UserError(
            f"--model {name}: must be callable with the number of classes as its only argument ({error})"
        ) from error

    def create(num_classes: int, norm_layer: NormLayer | None, image_size: int) -> nn.Module:
        with explained(name, f"{function_name}({num_classes}) failed"):
            model = function(num_classes)
        if not isinstance(model, nn.Module):
            raise UserError(f"--model {name}: returned {type(model).__name__} instead of a torch.nn.Module")
        generator = torch.Generator().manual_seed(0)
        with explained(name, "cannot be copied and changed"), torch.no_grad():
            trial = copy.deepcopy(model)
            for parameter in trial.parameters():  # of which some may be 0, and hide what follows them
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        before = _logits(trial, name, num_classes, image_size)
        if norm_layer:
            fuse_norms(trial, EagerBatchNormReLU2d)
            after = _logits(trial, name, num_classes, image_size)
            if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
                raise UserError(f"--model {name}: has other outputs with the fused operator; take --no-fused")
            fuse_norms(model, norm_layer)
        return model

    return create


def _import_file(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    sys.path.insert(0, str(file.parent.resolve()))
    spec = importlib.util.spec_from_file_location(f"fastres_model_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None  # of any .py
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> Any:
    sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


@contextmanager
def explained(name: str, what: str) -> Iterator[None]:
    """Turns any error of the user's code into a line with its place in that code."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if not re.search(NOT_THEIRS, frame.filename)]
        place = f", {theirs[-1].filename}, line {theirs[-1].lineno}" if theirs else ""
        raise UserError(f"--model {name}: {what} ({type(error).__name__}: {first_line(error)}{place})") from error


def _logits(model: nn.Module, name: str, num_classes: int, image_size: int) -> torch.Tensor:
    """What ``model`` gives for two images; refuses another shape than ``[2, num_classes]``."""
    shape = [2, 3, image_size, image_size]
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with explained(name, f"does not take images {shape}"), torch.no_grad():
        logits = model.eval()(images)
    model.train()
    found = list(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
    if found != [2, num_classes]:
        raise UserError(f"--model {name}: gives {found} for images {shape} instead of logits [2, {num_classes}]")
    return logits


def fuse_norms(model: nn.Module, norm_layer: NormLayer) -> None:
    """Replaces each BatchNorm2d in ``model`` by ``norm_layer`` with the same parameters and buffers.

    Where a ReLU follows in a Sequential, the new norm applies it, and an Identity takes its place. Norms and ReLUs with
    hooks stay as they are.
    """
    uses = Counter(child for parent in model.modules() for child in parent._modules.values())
    fused: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        in_turn = isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward
        for (place, norm), (next_place, following) in pairwise([*parent._modules.items(), ("", None)]):
            if type(norm) is not nn.BatchNorm2d or has_hooks(norm):
                continue
            relu = in_turn and type(following) is nn.ReLU and uses[norm] == 1 and not has_hooks(following)
            if norm not in fused:
                fused[norm] = _with_operator(norm, norm_layer, relu)
            parent._modules[place] = fused[norm]
            if relu:
                parent._modules[next_place] = nn.Identity()


def _with_operator(norm: nn.BatchNorm2d, norm_layer: NormLayer, relu: bool) -> nn.BatchNorm2d:
    new = norm_layer(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta", relu=relu
    )
    new._parameters, new._buffers, new.training = norm._parameters, norm._buffers, norm.training
    return new
