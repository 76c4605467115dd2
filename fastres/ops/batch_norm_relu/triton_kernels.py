# mypy: disable-error-code="no-untyped-def"
"""batch_norm_relu for CUDA, in Triton.

A tensor whose channels fit into one program's registers is read once. Larger ones take two passes: statistics
by splits of the rows, merged as in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
computing sample variances" (1979), then the result. All sums are float32 (float64 for float64 inputs).

A row is the channels of one pixel. Row r of a channels-last tensor starts at r * C and has stride 1; of a
contiguous one with planes of P pixels it starts at (r // P) * C * P + r % P and has stride P.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.ops.batch_norm_relu.layout import dense, is_channels_last, statistics_dtype


@dataclass(frozen=True)
class Tiling:
    """How the work is cut into programs: every choice that tuning on a GPU changes."""

    once: bool  # one program holds all rows of its channels
    block_rows: int
    block_channels: int
    splits: int  # programs that share the rows of a channel, when reducing
    num_warps: int


def tiling(rows: int, channels: int, channels_last: bool) -> Tiling:
    """The tiling for a matrix `[rows, channels]`, chosen by arithmetic and not yet tuned on a GPU."""
    once_channels = min(16, triton.next_power_of_2(channels))
    if triton.next_power_of_2(rows) * once_channels <= 16384:
        return Tiling(True, triton.next_power_of_2(rows), once_channels, 1, 8)
    block_channels = min(64, triton.next_power_of_2(channels)) if channels_last else 1
    block_rows = 4096 // block_channels
    programs = 512 // triton.cdiv(channels, block_channels)  # about four for each multiprocessor of a large GPU
    splits = max(1, min(programs, triton.cdiv(rows, 4 * block_rows)))
    return Tiling(False, block_rows, block_channels, splits, 8)


@triton.jit
def _offsets(row, channel, plane, channels, channels_last: tl.constexpr):
    row = row.to(tl.int64)[:, None]
    if channels_last:
        return row * channels + channel[None, :]
    return (row // plane * channels + channel[None, :]) * plane + row % plane


@triton.jit
def _affine(channel, valid, weight, bias, mean, var, eps, dtype: tl.constexpr):
    mean_c = tl.load(mean + channel, valid, other=0.0)
    var_c = tl.load(var + channel, valid, other=1.0)
    weight_c = tl.load(weight + channel, valid, other=0.0).to(dtype)
    bias_c = tl.load(bias + channel, valid, other=0.0).to(dtype)
    invstd = 1 / tl.sqrt(var_c + eps)
    return mean_c, invstd, weight_c, bias_c


@triton.jit
def _normalized(x, residual, offsets, valid, mean, scale, bias, has_residual: tl.constexpr, relu: tl.constexpr):
    z = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    if has_residual:
        z += tl.load(residual + offsets, valid, other=0.0).to(z.dtype)
    if relu:
        z = tl.where(z <= 0, 0.0, z)  # NaN stays NaN
    return z


@triton.jit
def _before_relu(dy, centered, y, offsets, valid, scale, bias, has_residual: tl.constexpr, relu: tl.constexpr):
    """The gradient of what ReLU was applied to; without a residual, the sign of y is recomputed from x."""
    if relu:
        if has_residual:
            sign = tl.load(y + offsets, valid, other=0.0).to(dy.dtype)
        else:
            sign = centered * scale[None, :] + bias[None, :]
        dy = tl.where(sign <= 0, 0.0, dy)
    return dy


@triton.jit
def forward_once(
    x, residual, weight, bias, y, mean, var, rows, channels, plane, eps,
    channels_last: tl.constexpr, has_residual: tl.constexpr, relu: tl.constexpr, dtype: tl.constexpr,
    block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """y, mean and var of all rows of a block of channels; x is read once."""
    row = tl.arange(0, block_rows)
    channel = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    valid_channel = channel < channels
    valid = (row < rows)[:, None] & valid_channel[None, :]
    offsets = _offsets(row, channel, plane, channels, channels_last)
    values = tl.load(x + offsets, valid, other=0.0).to(dtype)
    mean_c = tl.sum(values, 0) / rows
    centered = tl.where(valid, values - mean_c[None, :], 0.0)
    var_c = tl.sum(centered * centered, 0) / rows
    tl.store(mean + channel, mean_c, valid_channel)
    tl.store(var + channel, var_c, valid_channel)
    scale = tl.load(weight + channel, valid_channel, other=0.0).to(dtype) / tl.sqrt(var_c + eps)
    bias_c = tl.load(bias + channel, valid_channel, other=0.0).to(dtype)
    z = _normalized(values, residual, offsets, valid, mean_c, scale, bias_c, has_residual, relu)
    tl.store(y + offsets, z.to(y.dtype.element_ty), valid)


@triton.jit
def split_moments(
    x, counts, means, deviations, rows, channels, plane, split_rows: tl.constexpr,
    channels_last: tl.constexpr, dtype: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared deviations of the rows of one split, by channel."""
    split = tl.program_id(1)
    channel = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    valid_channel = channel < channels
    begin = split * split_rows
    end = tl.minimum(begin + split_rows, rows)
    # Near the mean, lest the sum of squares cancel; an infinite one would turn infinities into NaN.
    row = begin + tl.arange(0, block_rows)
    valid = (row < end)[:, None] & valid_channel[None, :]
    first = tl.load(x + _offsets(row, channel, plane, channels, channels_last), valid, other=0.0).to(dtype)
    shift = tl.sum(first, 0) / tl.minimum(end - begin, block_rows)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    sums = tl.zeros([block_rows, block_channels], dtype)
    squares = tl.zeros([block_rows, block_channels], dtype)
    for start in range(0, split_rows, block_rows):
        row = begin + start + tl.arange(0, block_rows)
        valid = (row < end)[:, None] & valid_channel[None, :]
        values = tl.load(x + _offsets(row, channel, plane, channels, channels_last), valid, other=0.0).to(dtype)
        shifted = tl.where(valid, values - shift[None, :], 0.0)
        sums += shifted
        squares += shifted * shifted
    count = (end - begin).to(dtype)
    total = tl.sum(sums, 0)
    at = split * channels + channel
    tl.store(counts + split, count)
    tl.store(means + at, shift + total / count, valid_channel)
    tl.store(deviations + at, tl.sum(squares, 0) - total * total / count, valid_channel)


@triton.jit
def merge_moments(
    counts, means, deviations, mean, var, rows, channels, splits,
    block_splits: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance from those of the splits."""
    split = tl.arange(0, block_splits)
    channel = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    valid = (split < splits)[:, None] & (channel < channels)[None, :]
    at = split[:, None] * channels + channel[None, :]
    count = tl.load(counts + split, split < splits, other=0.0)[:, None]
    mean_s = tl.load(means + at, valid, other=0.0)
    deviation = tl.load(deviations + at, valid, other=0.0)
    mean_c = tl.sum(mean_s * count, 0) / rows
    delta = mean_s - mean_c[None, :]
    deviation = tl.where(deviation < 0, 0.0, deviation) + tl.where(valid, delta * delta * count, 0.0)
    tl.store(mean + channel, mean_c, channel < channels)
    tl.store(var + channel, tl.sum(deviation, 0) / rows, channel < channels)


@triton.jit
def normalize(
    x, residual, weight, bias, mean, var, y, rows, channels, plane, eps,
    channels_last: tl.constexpr, has_residual: tl.constexpr, relu: tl.constexpr, dtype: tl.constexpr,
    block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual) for a tile."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    channel = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    valid = (row < rows)[:, None] & (channel < channels)[None, :]
    offsets = _offsets(row, channel, plane, channels, channels_last)
    mean_c, invstd, weight_c, bias_c = _affine(channel, channel < channels, weight, bias, mean, var, eps, dtype)
    values = tl.load(x + offsets, valid, other=0.0).to(dtype)
    z = _normalized(values, residual, offsets, valid, mean_c, weight_c * invstd, bias_c, has_residual, relu)
    tl.store(y + offsets, z.to(y.dtype.element_ty), valid)


@triton.jit
def backward_once(
    grad, x, y, weight, bias, mean, var, dx, dz, dweight, dbias, rows, channels, plane, eps,
    channels_last: tl.constexpr, has_residual: tl.constexpr, relu: tl.constexpr, training: tl.constexpr,
    dtype: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """All gradients of all rows of a block of channels; grad, x and y are read once."""
    row = tl.arange(0, block_rows)
    channel = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    valid_channel = channel < channels
    valid = (row < rows)[:, None] & valid_channel[None, :]
    offsets = _offsets(row, channel, plane, channels, channels_last)
    mean_c, invstd, weight_c, bias_c = _affine(channel, valid_channel, weight, bias, mean, var, eps, dtype)
    scale = weight_c * invstd
    dy = tl.load(grad + offsets, valid, other=0.0).to(dtype)
    centered = tl.load(x + offsets, valid, other=0.0).to(dtype) - mean_c[None, :]
    dy = _before_relu(dy, centered, y, offsets, valid, scale, bias_c, has_residual, relu)
    dbias_c = tl.sum(tl.where(valid, dy, 0.0), 0)
    dweight_c = tl.sum(tl.where(valid, dy * centered, 0.0), 0) * invstd
    tl.store(dbias + channel, dbias_c, valid_channel)
    tl.store(dweight + channel, dweight_c, valid_channel)
    if relu and has_residual:
        tl.store(dz + offsets, dy.to(dz.dtype.element_ty), valid)
    if training:
        dy -= (dbias_c[None, :] + centered * (dweight_c * invstd)[None, :]) / rows
    tl.store(dx + offsets, (dy * scale[None, :]).to(dx.dtype.element_ty), valid)


@triton.jit
def split_sums(
    grad, x, y, weight, bias, mean, var, dz, dweights, dbiases, rows, channels, plane, split_rows: tl.constexpr, eps,
    channels_last: tl.constexpr, has_residual: tl.constexpr, relu: tl.constexpr, dtype: tl.constexpr,
    block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """dz, and the gradients of weight and bias from the rows of one split."""
    split = tl.program_id(1)
    channel = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    valid_channel = channel < channels
    mean_c, invstd, weight_c, bias_c = _affine(channel, valid_channel, weight, bias, mean, var, eps, dtype)
    begin = split * split_rows
    end = tl.minimum(begin + split_rows, rows)
    sums = tl.zeros([block_rows, block_channels], dtype)
    products = tl.zeros([block_rows, block_channels], dtype)
    for start in range(0, split_rows, block_rows):
        row = begin + start + tl.arange(0, block_rows)
        valid = (row < end)[:, None] & valid_channel[None, :]
        offsets = _offsets(row, channel, plane, channels, channels_last)
        dy = tl.load(grad + offsets, valid, other=0.0).to(dtype)
        centered = tl.load(x + offsets, valid, other=0.0).to(dtype) - mean_c[None, :]
        dy = _before_relu(dy, centered, y, offsets, valid, weight_c * invstd, bias_c, has_residual, relu)
        if relu and has_residual:
            tl.store(dz + offsets, dy.to(dz.dtype.element_ty), valid)
        sums += tl.where(valid, dy, 0.0)
        products += tl.where(valid, dy * centered, 0.0)
    at = split * channels + channel
    tl.store(dbiases + at, tl.sum(sums, 0), valid_channel)
    tl.store(dweights + at, tl.sum(products, 0) * invstd, valid_channel)


@triton.jit
def input_gradient(
    grad, x, weight, bias, mean, var, dweight, dbias, dx, rows, channels, plane, eps,
    channels_last: tl.constexpr, relu: tl.constexpr, training: tl.constexpr, dtype: tl.constexpr,
    block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """dx = scale * (dz - (dbias + (x - mean) * invstd * dweight) / rows); in evaluation dx = scale * dz."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    channel = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    valid_channel = channel < channels
    valid = (row < rows)[:, None] & valid_channel[None, :]
    offsets = _offsets(row, channel, plane, channels, channels_last)
    mean_c, invstd, weight_c, bias_c = _affine(channel, valid_channel, weight, bias, mean, var, eps, dtype)
    scale = weight_c * invstd
    dy = tl.load(grad + offsets, valid, other=0.0).to(dtype)
    centered = tl.load(x + offsets, valid, other=0.0).to(dtype) - mean_c[None, :]
    dy = _before_relu(dy, centered, x, offsets, valid, scale, bias_c, False, relu)
    if training:
        dbias_c = tl.load(dbias + channel, valid_channel, other=0.0)
        dweight_c = tl.load(dweight + channel, valid_channel, other=0.0)
        dy -= (dbias_c[None, :] + centered * (dweight_c * invstd)[None, :]) / rows
    tl.store(dx + offsets, (dy * scale[None, :]).to(dx.dtype.element_ty), valid)


class _Launch:
    """What every kernel needs to know about a tensor."""

    def __init__(self, x: Tensor) -> None:
        self.channels_last = is_channels_last(x)
        self.channels = x.size(1)
        self.rows = x.numel() // self.channels
        self.plane = self.rows // x.size(0)
        self.tiling = tiling(self.rows, self.channels, self.channels_last)
        self.split_rows = triton.cdiv(self.rows, self.tiling.splits)
        self.splits = triton.cdiv(self.rows, self.split_rows)
        self.options = {
            "channels_last": self.channels_last,
            "dtype": tl.float64 if x.dtype == torch.float64 else tl.float32,
            "block_rows": self.tiling.block_rows,
            "block_channels": self.tiling.block_channels,
            "num_warps": self.tiling.num_warps,
        }

    @property
    def channel_grid(self) -> tuple[int]:
        return (triton.cdiv(self.channels, self.tiling.block_channels),)

    @property
    def split_grid(self) -> tuple[int, int]:
        return (*self.channel_grid, self.splits)

    @property
    def tile_grid(self) -> tuple[int, int]:
        return (triton.cdiv(self.rows, self.tiling.block_rows), *self.channel_grid)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastres::batch_norm_relu`: y, and the mean and biased variance that it was normalised with."""
    channels_last = is_channels_last(x)
    x = dense(x, channels_last)
    y = torch.empty_like(x)
    mean = x.new_empty(x.size(1), dtype=statistics_dtype(x))
    var = torch.empty_like(mean)
    if x.numel() == 0:
        return y, mean.zero_(), var.zero_()
    launch = _Launch(x)
    flags = {"has_residual": residual is not None, "relu": relu, **launch.options}
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    other = x if residual is None else dense(residual, channels_last)
    shape = launch.rows, launch.channels, launch.plane
    if training and launch.tiling.once:
        forward_once[launch.channel_grid](x, other, weight, bias, y, mean, var, *shape, eps, **flags)
        return y, mean, var
    if training:
        counts = mean.new_empty(launch.splits)
        means, deviations = mean.new_empty(2, launch.splits, launch.channels).unbind()
        split_moments[launch.split_grid](x, counts, means, deviations, *shape, launch.split_rows, **launch.options)
        block_channels = min(16, launch.tiling.block_channels)
        merge_moments[(triton.cdiv(launch.channels, block_channels),)](
            counts, means, deviations, mean, var, launch.rows, launch.channels, launch.splits,
            block_splits=triton.next_power_of_2(launch.splits), block_channels=block_channels,
        )  # fmt: skip
    elif running_mean is not None and running_var is not None:
        mean.copy_(running_mean)
        var.copy_(running_var)
    normalize[launch.tile_grid](x, other, weight, bias, mean, var, y, *shape, eps, **flags)
    return y, mean, var


def backward(
    grad: Tensor,
    x: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fastres::batch_norm_relu_backward`: dx, dz (empty unless `output` is given), dweight and dbias."""
    channels_last = is_channels_last(x)
    x, grad = dense(x, channels_last), dense(grad, channels_last)
    dx = torch.empty_like(x)
    dz = x.new_empty(0) if output is None else torch.empty_like(x)
    if x.numel() == 0:
        return dx, dz, torch.zeros_like(mean), torch.zeros_like(mean)
    launch = _Launch(x)
    flags = {"has_residual": output is not None, "relu": relu, **launch.options}
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    y = x if output is None else dense(output, channels_last)
    shape = launch.rows, launch.channels, launch.plane
    if launch.tiling.once:
        dweight, dbias = torch.empty_like(mean), torch.empty_like(mean)
        backward_once[launch.channel_grid](
            grad,
            x,
            y,
            weight,
            bias,
            mean,
            var,
            dx,
            dz,
            dweight,
            dbias,
            *shape,
            eps,
            training=training,
            **flags,
        )
        return dx, dz, dweight, dbias
    dweights, dbiases = mean.new_empty(2, launch.splits, launch.channels).unbind()
    split_sums[launch.split_grid](
        grad, x, y, weight, bias, mean, var, dz, dweights, dbiases, *shape, launch.split_rows, eps, **flags
    )
    dweight, dbias = dweights.sum(0), dbiases.sum(0)
    input_gradient[launch.tile_grid](
        grad if output is None else dz, x, weight, bias, mean, var, dweight, dbias, dx, *shape, eps,
        relu=relu and output is None, training=training, **launch.options,
    )  # fmt: skip
    return dx, dz, dweight, dbias
