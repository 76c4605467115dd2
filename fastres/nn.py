"""The norm layer of every model: BatchNorm that also adds the residual and applies ReLU."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastres import ops
from fastres.ops.batch_norm_relu import reference

__all__ = ["BatchNormReLU2d", "EagerBatchNormReLU2d"]


class BatchNormReLU2d(nn.BatchNorm2d):
    """`relu(batch_norm(x) + residual)` in one fused operator, `fastres.ops.batch_norm_relu`.

    Parameters, buffers and state-dict keys are those of `torch.nn.BatchNorm2d`, and so are the arguments.

    Args:
        relu: apply ReLU; the only argument that `torch.nn.BatchNorm2d` has not.

    Shape: `x` and `residual` `[N, C, H, W]`, of one type; the output too.

    Raises:
        ValueError: as `torch.nn.BatchNorm2d` and `fastres.ops.batch_norm_relu` do.
    """

    _function: Callable[..., Tensor] = staticmethod(ops.batch_norm_relu)

    def __init__(self, num_features: int, *args: Any, relu: bool = True, **kwargs: Any) -> None:
        super().__init__(num_features, *args, **kwargs)
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(x)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the cumulative average
                momentum = 1 / float(self.num_batches_tracked)
        use_running = not self.training or self.track_running_stats
        return self._function(
            x,
            self.running_mean if use_running else None,
            self.running_var if use_running else None,
            self.weight,
            self.bias,
            residual=residual,
            training=self.training or self.running_mean is None,
            momentum=momentum,
            eps=self.eps,
            relu=self.relu,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}"


class EagerBatchNormReLU2d(BatchNormReLU2d):
    """`BatchNormReLU2d` in plain PyTorch operators: what the fused one is compared with."""

    _function = staticmethod(reference.batch_norm_relu)
