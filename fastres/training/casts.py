"""The weights of all layers cast at once, where autocast would cast them one by one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


class _Cast(torch.autograd.Function):
    """Copies of tensors in another type, and their gradients in the tensors' own, each by one foreach operation."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        return cast(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        copies = iter(cast([grad for grad in grads if grad is not None], ctx.dtype))
        return None, *(None if grad is None else next(copies) for grad in grads)


def cast(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Copies of ``tensors`` in another type, by one foreach operation."""
    copies = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    torch._foreach_copy_(copies, tuple(tensors))
    return copies


def with_cast_weights(model: nn.Module, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """``model``, computed with the parameters of its convolutions and linear layers in ``dtype``.

    Those are the ones that autocast casts; outputs and gradients are the same. The parameters stay as they are, and so
    do those from which a layer computes its weight (torch.nn.utils.parametrizations).
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    weights = {
        f"{name}.{key}": weight for name in layers for key, weight in layers[name].named_parameters(recurse=False)
    }
    distinct = list(dict.fromkeys(weights.values()))  # layers may share theirs
    if not weights:
        return model

    def forward(images: torch.Tensor) -> torch.Tensor:
        copies = dict(zip(distinct, _Cast.apply(dtype, *distinct), strict=True))
        replaced = {name: copies[weight] for name, weight in weights.items()}
        return functional_call(model, replaced, (images,), tie_weights=False)  # a module by two names is replaced once

    return forward
