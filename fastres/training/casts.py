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

    Those are the ones that autocast casts; outputs and gradients are the same. The parameters stay as they are.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    weights = {f"{name}.{key}": weight for name, layer in layers for key, weight in layer.named_parameters()}
    names = {id(weight): name for name, weight in weights.items()}  # of tied weights, one
    weights = {name: weight for name, weight in weights.items() if names[id(weight)] == name}

    def forward(images: torch.Tensor) -> torch.Tensor:
        copies = _Cast.apply(dtype, *weights.values())
        return functional_call(model, dict(zip(weights, copies, strict=True)), (images,))

    return forward
