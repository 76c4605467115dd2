"""The layers of every model: BatchNorm that also adds the residual and applies ReLU, and convolutions of small maps."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from fastres import ops
from fastres.ops.batch_norm_relu import batch_norm_relu_twin, reference, refuse_create_graph
from fastres.ops.batch_norm_relu.reference import transforms_active

__all__ = ["BatchNormReLU2d", "EagerBatchNormReLU2d", "SmallMapConv2d", "SyncBatchNormReLU2d"]

SMALL_MAP = 16  # pixels of a map on which a 1x1 convolution is a product
MANY_IMAGES = 32  # in a batch for which the matrix of a 3x3 convolution is made


class BatchNormReLU2d(nn.BatchNorm2d):
    """`relu(batch_norm(x) + residual)` in one fused operator, `fastres.ops.batch_norm_relu`.

    Parameters, buffers and state-dict keys are those of `torch.nn.BatchNorm2d`, and so are the arguments.

    Args:
        relu: apply ReLU; the only argument that `torch.nn.BatchNorm2d` has not.

    Attributes:
        epsilon: what `torch.nn.BatchNorm2d` calls `eps`. To read `eps` is an error where ReLU is applied: functions
            that rebuild a norm as a plain one, or fold it into a convolution, read it, and would lose the ReLU.

    Shape: `x` and `residual` `[N, C, H, W]`; the output too, in the type of `x`, to which the residual is converted.
    With `twin`, while training without hooks on the module, the output is two tensors of one memory, for the next
    block's branch and shortcut: the backward pass adds their gradients as it reads them.

    Raises:
        ValueError: as `torch.nn.BatchNorm2d` and `fastres.ops.batch_norm_relu` do.
    """

    _function: Callable[..., Tensor] = staticmethod(ops.batch_norm_relu)
    _twin_function: Callable[..., tuple[Tensor, Tensor]] | None = staticmethod(batch_norm_relu_twin)

    def __init__(self, num_features: int, *args: Any, relu: bool = True, **kwargs: Any) -> None:
        super().__init__(num_features, *args, **kwargs)
        self.relu = relu

    @property
    def eps(self) -> float:
        if self.relu:
            raise TypeError(
                f"{type(self).__name__} applies ReLU, which is lost where eps is read to rebuild it as a plain norm or "
                "to fold it into a convolution. For SyncBatchNorm: create_model(..., sync_bn=True) or "
                "SyncBatchNormReLU2d; for folding: nn.BatchNorm2d with its state dict, and nn.ReLU; the value: epsilon"
            )
        return self.epsilon

    @eps.setter
    def eps(self, value: float) -> None:
        self.epsilon = value

    def __dir__(self) -> list[str]:  # torch.jit.trace and inspect.getmembers read every name in it
        return [name for name in super().__dir__() if name != "eps"]

    def __prepare_scriptable__(self) -> None:
        refuse_script(self)

    def forward(self, x: Tensor, residual: Tensor | None = None, twin: bool = False) -> Any:
        if isinstance(x, Proxy):
            return fx_node(self, x, residual)
        self._check_input_dim(x)
        counter = self.num_batches_tracked if self.training and self.track_running_stats else None
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.momentum is None and counter is not None:  # the cumulative average
            momentum = 1 / float(counter + 1)
        use_running = not self.training or self.track_running_stats
        function: Callable[..., Any] = self._function
        twin = twin and self.training and torch.is_grad_enabled() and not has_hooks(self) and not transforms_active()
        if twin and self._twin_function:
            function = self._twin_function
        return function(
            x,
            self.running_mean if use_running else None,
            self.running_var if use_running else None,
            self.weight,
            self.bias,
            residual=None if residual is None else residual.to(x.dtype),
            training=self.training or self.running_mean is None,
            momentum=momentum,
            eps=self.epsilon,
            relu=self.relu,
            num_batches_tracked=counter,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.epsilon}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, relu={self.relu}"
        )


class EagerBatchNormReLU2d(BatchNormReLU2d):
    """`BatchNormReLU2d` in plain PyTorch operators: what the fused one is compared with."""

    _function = staticmethod(reference.batch_norm_relu)
    _twin_function = None


class SyncBatchNormReLU2d(BatchNormReLU2d):
    """`BatchNormReLU2d` over the joined batch of all processes, whose parts may differ in size.

    That is what `torch.nn.SyncBatchNorm` is to `BatchNorm2d`, on the CPU, too. Without a process group, and in
    evaluation, it is `BatchNormReLU2d`.
    """

    _twin_function = None

    @staticmethod
    def _function(
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        **options: Any,
    ) -> Tensor:
        if not options["training"] or not dist.is_initialized():
            return ops.batch_norm_relu(x, running_mean, running_var, weight, bias, **options)
        if transforms_active():
            raise RuntimeError(
                "SyncBatchNormReLU2d does not train under torch.func or forward-mode AD: use BatchNormReLU2d there"
            )
        residual, momentum, eps, relu = (options[name] for name in ("residual", "momentum", "eps", "relu"))
        if options["num_batches_tracked"] is not None:
            options["num_batches_tracked"].add_(1)
        y, mean, var, count = _SyncBatchNormReLU.apply(x, residual, weight, bias, eps, relu)
        if running_mean is not None and running_var is not None:
            running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
            running_var.mul_(1 - momentum).add_(var * count / (count - 1), alpha=momentum)
        return y


class _SyncBatchNormReLU(torch.autograd.Function):
    """The fused operator as in evaluation, with the statistics of all processes, and their part of the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
    ) -> tuple[Tensor, ...]:
        # faster than torch.var_mean, and without a float32 copy
        _, mean, var, _ = torch.ops.fastres.batch_norm_relu(x, *[None] * 6, True, 0.0, eps, False)
        own = torch.cat([mean.new_full((1,), x.numel() // x.size(1)), mean, var])
        all_own = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(all_own, own)
        counts, means, variances = torch.stack(all_own).split([1, x.size(1), x.size(1)], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        var = (counts * (variances + (means - mean).square())).sum(0) / count
        y = ops.batch_norm_relu(x, mean, var, weight, bias, residual=residual, training=False, eps=eps, relu=relu)
        ctx.mark_non_differentiable(mean, var, count)
        ctx.set_materialize_grads(False)
        ctx.has_residual = residual is not None
        ctx.save_for_backward(x, y if ctx.has_residual and relu else None, weight, bias, mean, var, count)
        ctx.options = False, eps, relu
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        refuse_create_graph()
        x, output, weight, bias, mean, var, count = ctx.saved_tensors
        dx, dz, dweight, dbias = torch.ops.fastres.batch_norm_relu_backward(
            grad, None, x, output, weight, bias, mean, var, *ctx.options
        )
        sums = torch.cat([dbias, dweight])
        dist.all_reduce(sums)
        mean_dz, mean_dz_xhat = (sums / count).chunk(2)
        # dx is invstd * weight * dz; what is missing is -invstd * weight * (mean_dz + xhat * mean_dz_xhat)
        invstd = (var + ctx.options[1]).rsqrt()
        scale = invstd if weight is None else invstd * weight
        slope = -scale * invstd * mean_dz_xhat
        offset = -scale * mean_dz - slope * mean
        dx += torch.addcmul(offset.view(-1, 1, 1), slope.view(-1, 1, 1), x)
        return (
            dx,
            (grad if output is None else dz) if ctx.has_residual else None,
            None if weight is None else dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None,
            None,
        )


class SmallMapConv2d(nn.Conv2d):
    """A `torch.nn.Conv2d` of 1x1 or 3x3 and half as much padding, computed as a matrix product where that is faster.

    That is on a CPU, for bfloat16 channels-last maps and stride 1. 1x1 on few pixels: the convolution's gradient of the
    weight takes up to three times as long as the product's (oneDNN on AVX512-BF16). 3x3 on 2x2 pixels: every output
    sees every input, and 5 of its 9 weights fall on padding, with which oneDNN multiplies, too.

    Shape: `[N, in_channels, H, W]` to `[N, out_channels, H / stride, W / stride]`, rounded up.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = False
    ) -> None:
        if kernel_size not in (1, 3):
            raise ValueError(f"kernel_size must be 1 or 3, not {kernel_size}")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)

    def __prepare_scriptable__(self) -> None:
        refuse_script(self)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return fx_node(self, x)
        if not self._is_faster_as_product(x):
            return super().forward(x)
        pixels = x.movedim(1, -1)
        if self.kernel_size == (1, 1):
            return F.linear(pixels, self.weight.flatten(1), self.bias).movedim(-1, 1)
        autocast = torch.is_autocast_enabled("cpu")
        weight = (self.weight.to(x.dtype) if autocast else self.weight).movedim(1, -1)
        # the output at row i and column j sees row k and column l by the weight at k - i + 1 and l - j + 1
        rows = [weight[:, 1 - i : 3 - i, 1 - j : 3 - j].flatten(1) for i in (0, 1) for j in (0, 1)]
        bias = None if self.bias is None else self.bias.repeat(4)
        return F.linear(pixels.flatten(1), torch.cat(rows), bias).view(-1, 2, 2, self.out_channels).movedim(-1, 1)

    def _is_faster_as_product(self, x: Tensor) -> bool:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or self.stride != (1, 1):
            return False
        # vmap knows no layout but the contiguous one, and an exported program is for batches of any size
        if transforms_active() or torch.compiler.is_exporting():
            return False
        if not x.is_contiguous(memory_format=torch.channels_last):
            return False
        if self.kernel_size == (1, 1):
            return x.size(2) * x.size(3) <= SMALL_MAP
        return x.shape[2:] == (2, 2) and len(x) >= MANY_IMAGES


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks that are called with inputs or outputs of `module`, or their gradients, are registered on it."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return any(hooks)


def fx_node(module: nn.Module, x: Proxy, *args: object) -> Any:
    """The call of `module` as one node of the graph that `torch.fx` traces, as for the modules of `torch.nn`.

    So the traced model has the module itself, which follows `train()` and `eval()`.
    """
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x, *args), {})


def refuse_script(module: nn.Module) -> None:
    """Raises RuntimeError; `torch.jit.script` calls this before it compiles `module`."""
    raise RuntimeError(
        f"torch.jit.script cannot compile {type(module).__name__}: use torch.export.export or torch.jit.trace"
    )
