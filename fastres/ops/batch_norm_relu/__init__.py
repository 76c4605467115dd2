"""BatchNorm, an optional residual and ReLU in one operator.

    y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual)

Formula: Ioffe and Szegedy, "Batch Normalization" (2015); semantics: `torch.nn.functional.batch_norm`.
The schemas, shape functions and autograd are here; csrc/batch_norm_relu.cpp holds the CPU kernels and
triton_kernels.py those for CUDA.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastres.ops.batch_norm_relu import reference
from fastres.ops.batch_norm_relu.layout import dense, is_channels_last, new_statistics

__all__ = ["batch_norm_relu", "batch_norm_relu_twin"]

library = torch.library.Library("fastres", "FRAGMENT")
# When training, mean and var are those of x, the variance biased, and the running ones move towards them, the
# variance unbiased; num_batches_tracked goes up by one. In evaluation mean and var are empty, and x is normalised with
# the running ones. The mask has a bit for each element of y, whether ReLU let it pass, in words of 32 channels. It is
# kept where a kernel reads it in place of y: on CUDA, in training, for large channels-last tensors with a residual.
ARGUMENTS = (
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " Tensor(c!)? num_batches_tracked, bool training, float momentum, float eps, bool relu)"
)
library.define(f"batch_norm_relu{ARGUMENTS} -> (Tensor y, Tensor mean, Tensor var, Tensor mask)")
# torch.library allows no kernel whose outputs share memory. So this operator has none: its autograd implementation
# calls the operator above and returns y a second time.
library.define(f"batch_norm_relu_twin{ARGUMENTS} -> (Tensor y, Tensor mean, Tensor var, Tensor mask, Tensor twin)")
# Mean and var are those that x was normalised with. The output is passed if there was a residual and ReLU was applied,
# or its mask, if that was kept;
# the gradient before ReLU, dz, is then the residual's, too, and otherwise it is empty. Only then may there be a second
# gradient of the output, which is added to the first.
library.define(
    "batch_norm_relu_backward(Tensor grad, Tensor? twin_grad, Tensor x, Tensor? output, Tensor? weight, Tensor? bias,"
    " Tensor mean, Tensor var, bool training, float eps, bool relu)"
    " -> (Tensor dx, Tensor dz, Tensor dweight, Tensor dbias)"
)


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
    """`torch.nn.functional.batch_norm`, then `+ residual`, then ReLU, in two passes over `x`.

    Under the transforms of `torch.func` and in forward-mode AD it is computed by PyTorch's own operators.

    Args:
        x: `[N, C, ...]`, float16, bfloat16, float32 or float64, contiguous or channels-last, or copied.
        running_mean, running_var: `[C]`, or None when training. Updated in place when training (the variance
            unbiased), used to normalise otherwise.
        weight, bias: `[C]`, or None for 1 and 0; float32 also where `x` is a half type, as under autocast.
        residual: added before ReLU; the shape and type of `x`.
        training: normalise with the (biased) statistics of `x`.
        momentum: the weight of the new statistics in the running ones.
        eps: added to the variance.
        relu: apply ReLU.
        num_batches_tracked: int64 scalar, or None. Incremented in place when training.

    Returns:
        The shape, type and layout of `x`.

    Raises:
        ValueError: training with a single value per channel; only one of `running_mean` and `running_var`;
            neither of them in evaluation; `residual` unlike `x`; a parameter or statistic that is not `[C]`.
        RuntimeError: on the CPU if the C++ extension has not been built; in a backward pass with
            `create_graph=True`: there is no second derivative.
    """
    arguments = _arguments(
        x, running_mean, running_var, weight, bias, residual, training, momentum, eps, relu, num_batches_tracked
    )
    if reference.transforms_active():
        return reference.batch_norm_relu(
            x, running_mean, running_var, weight, bias,
            residual=residual, training=training, momentum=momentum, eps=eps, relu=relu,
            num_batches_tracked=num_batches_tracked,
        )  # fmt: skip
    y, *_ = torch.ops.fastres.batch_norm_relu(*arguments)
    return y


def batch_norm_relu_twin(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`batch_norm_relu(...)` as two tensors of one memory, for the two places where a residual block's output is used.

    The backward pass adds the gradients of both as it reads them; autograd would add them in a separate pass. The
    arguments are those of `batch_norm_relu`, without defaults. The transforms of `torch.func` are not supported.
    """
    y, _, _, _, twin = torch.ops.fastres.batch_norm_relu_twin(*_arguments(*args, **options))
    return y, twin


def _arguments(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
    num_batches_tracked: Tensor | None,
) -> tuple[Any, ...]:
    """The operator's arguments, checked. Raises ValueError."""
    if x.dim() < 2:
        raise ValueError(f"expected an input of shape [N, C, ...], got {tuple(x.shape)}")
    if training and x.numel() == x.size(1):
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if running_mean is None and not training:
        raise ValueError("running_mean and running_var are needed when training is False")
    for name, tensor in (
        ("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias),
    ):  # fmt: skip
        if tensor is not None and tensor.shape != x.shape[1:2]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(x.shape[1:2])}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}, the input {x.dtype} {tuple(x.shape)}")
    return x, residual, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, relu


@torch.library.register_fake("fastres::batch_norm_relu", lib=library)
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    words = 0
    if x.device.type == "cuda" and training and relu and residual is not None:
        from fastres.ops.batch_norm_relu.launch import mask_words  # needs Triton

        words = mask_words(x.shape, is_channels_last(x))
    y = torch.empty_like(dense(x, is_channels_last(x)))
    return y, *new_statistics(x, training), x.new_empty(words, dtype=torch.int32)


@torch.library.register_fake("fastres::batch_norm_relu_backward", lib=library)
def _(
    grad: Tensor, twin_grad: Tensor | None, x: Tensor, output: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(dense(x, is_channels_last(x)))
    dz = x.new_empty(0) if output is None else torch.empty_like(dx)
    return dx, dz, *new_statistics(x)


def refuse_create_graph() -> None:
    """To be called in a backward pass. Raises RuntimeError if that is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise RuntimeError("batch_norm_relu has no second derivative; EagerBatchNormReLU2d has")


class _BatchNormReLU(torch.autograd.Function):
    """The gradient of the registered operator, by the registered backward operator, which has none itself.

    `once_differentiable` would say so, too, but it doubles the time of a call (81 us instead of 35).
    """

    @staticmethod
    def forward(
        ctx: Any,
        twin: bool,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            y, mean, var, mask = torch.ops.fastres.batch_norm_relu.default(x, residual, weight, bias, *options)
        running_mean, running_var, _num_batches_tracked, training, _momentum, eps, relu = options
        ctx.mark_non_differentiable(mean, var, mask)
        ctx.set_materialize_grads(False)
        ctx.has_residual = residual is not None
        statistics = (mean, var) if training else (running_mean, running_var)
        output = (mask if mask.numel() else y) if ctx.has_residual and relu else None
        ctx.save_for_backward(x, output, weight, bias, *statistics)
        ctx.options = training, eps, relu
        return y, mean, var, mask, *([y.detach()] if twin else [])

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, _mean: None, _var: None, _mask: None, twin_grad: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        refuse_create_graph()
        if grad is None:
            grad, twin_grad = twin_grad, None
        if grad is None:
            return (None,) * 12
        x, output, weight, bias, mean, var = ctx.saved_tensors
        if output is None and twin_grad is not None:
            grad, twin_grad = grad + twin_grad, None
        dx, dz, dweight, dbias = torch.ops.fastres.batch_norm_relu_backward.default(
            grad, twin_grad, x, output, weight, bias, mean, var, *ctx.options
        )
        return (
            None,
            dx,
            (grad if output is None else dz) if ctx.has_residual else None,
            None if weight is None else dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            *(None,) * 7,
        )


# Not torch.library.register_autograd: with it, a call and its backward took 16 us longer (51 instead of 35).
library.impl("batch_norm_relu", partial(_BatchNormReLU.apply, False), "Autograd")
library.impl("batch_norm_relu_twin", partial(_BatchNormReLU.apply, True), "Autograd")


def _cuda_forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from fastres.ops.batch_norm_relu import triton_kernels  # needs Triton, which only comes with CUDA builds

    with torch.cuda.device_of(x):  # Triton launches on the current device
        return triton_kernels.forward(x, *args)


def _cuda_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from fastres.ops.batch_norm_relu import triton_kernels

    with torch.cuda.device_of(grad):
        return triton_kernels.backward(grad, *args)


library.impl("batch_norm_relu", _cuda_forward, "CUDA")
library.impl("batch_norm_relu_backward", _cuda_backward, "CUDA")

extension_error = ""  # why there are no CPU kernels, and what to do, in one line; empty where there are
try:
    import fastres._C  # noqa: F401
except ImportError as error:
    if isinstance(error, ModuleNotFoundError):
        reason = "is not built"
    elif "undefined symbol" in str(error):
        reason = f"was built for another torch than {torch.__version__} ({error})"
    else:
        reason = f"does not load ({error})"
    extension_error = (
        f"the C++ extension of fastres {reason}; with a C++ compiler, `make setup` or "
        "`pip install --no-build-isolation .` builds it"
    )

    def _not_built(*_args: object) -> None:
        raise RuntimeError(f"batch_norm_relu on a CPU: {extension_error}")

    library.impl("batch_norm_relu", _not_built, "CPU")
    library.impl("batch_norm_relu_backward", _not_built, "CPU")
