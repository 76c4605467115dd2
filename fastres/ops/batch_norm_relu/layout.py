"""The layouts and types that the kernels work in. csrc/batch_norm_relu.cpp has the same rules in C++."""

import torch
from torch import Tensor


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The type of the statistics and of every sum: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def new_statistics(x: Tensor, wanted: bool = True) -> tuple[Tensor, Tensor]:
    """Two uninitialised tensors `[C]`, or empty ones, in the type of the statistics of `x`."""
    shape = x.size(1) if wanted else 0
    dtype = statistics_dtype(x)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def dense(tensor: Tensor, channels_last: bool) -> Tensor:
    """The tensor with no gaps between its elements, the channels side by side if `channels_last`."""
    if channels_last:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return tensor.contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Whether the kernels treat `x` as channels-last, contiguous being the other choice."""
    return x.stride(1) == 1
