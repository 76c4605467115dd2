"""batch_norm_relu in plain PyTorch: the reference."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


def batch_norm_relu(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """The same arguments and result as `fastres.ops.batch_norm_relu`, one PyTorch operator after another, the last two
    in place, as in torchvision's models."""
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:  # vmap over the residual only cannot add in place to the one y
        y = y + residual if transforms_active() else y.add_(residual)
    return F.relu(y, inplace=True) if relu else y


def transforms_active() -> bool:
    """Whether a transform of `torch.func` is being applied or a level of `torch.autograd.forward_ad` is open.

    PyTorch has rules for its own operators there, and none for those of fastres.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
