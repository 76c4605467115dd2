# mypy: disable-error-code="no-untyped-def"
"""batch_norm_relu for CUDA, in Triton.

A tensor whose channels fit into one program's registers is read once. Larger ones take two passes: statistics
by splits of the rows, merged as in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for
computing sample variances" (1979), then the result. All sums are float32 (float64 for float64 inputs), and so are
momentum and eps, which arrive as float64.
Reductions run from the last row to the first, element-wise passes from the first to the last: each starts on the rows
that the kernel before it, which may be the convolution that made x, has left in the cache.

A row is the channels of one pixel. Row r of a channels-last tensor starts at r * C and has stride 1; of a
contiguous one with planes of P pixels it starts at (r // P) * C * P + r % P and has stride P.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.ops.batch_norm_relu.layout import dense, is_channels_last, new_statistics, statistics_dtype

# Programs that reduce a tensor: two for each of an H100's multiprocessors, whose registers hold two at a time.
PROGRAMS = 264
MERGED_CHANNELS = 8  # of one program that merges: a sector of 32 bytes from each split
# Software pipelining of a loop over tiles: two are being loaded while a third is computed. Without it a thread waits
# for each 16 bytes, and all threads together keep half as many bytes in flight as an H100's memory needs.
STAGES = tl.constexpr(3)


@dataclass(frozen=True)
class Tiling:
    """The division of the work into programs: every choice that tuning on a GPU changes."""

    single_pass: bool  # one program holds all rows of its channels
    block_rows: int
    block_channels: int
    splits: int  # programs that share the tiles of a channel in a reduction
    num_warps: int


def tiling(rows: int, channels: int, channels_last: bool) -> Tiling:
    """The tiling for a matrix `[rows, channels]`, chosen by arithmetic and not yet tuned on a GPU."""
    few_channels = min(16, triton.next_power_of_2(channels))
    if triton.next_power_of_2(rows) * few_channels <= 16384:
        return Tiling(True, triton.next_power_of_2(rows), few_channels, 1, 8)
    block_channels = min(64, triton.next_power_of_2(channels)) if channels_last else 1
    block_rows = 4096 // block_channels
    splits = PROGRAMS // triton.cdiv(channels, block_channels)
    splits = max(1, min(splits, triton.cdiv(rows, 2 * block_rows)))
    return Tiling(False, block_rows, block_channels, splits, 8)


@triton.jit
def _offsets(row, channel, plane, channels, channels_last: tl.constexpr):
    row = row.to(tl.int64)[:, None]
    if channels_last:
        return row * channels + channel[None, :]
    return (row // plane * channels + channel[None, :]) * plane + row % plane


@triton.jit
def _tile(rows, channels, plane, channels_last: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr):
    """The tile's channels, channel mask, element mask and offsets. Tiles follow the memory order of channels-last
    tensors."""
    across = tl.cdiv(channels, block_channels)
    first_row, first_channel = tl.program_id(0) // across * block_rows, tl.program_id(0) % across * block_channels
    row, channel = first_row + tl.arange(0, block_rows), first_channel + tl.arange(0, block_channels)
    valid_channel = channel < channels
    valid = (row < rows)[:, None] & valid_channel[None, :]
    return channel, valid_channel, valid, _offsets(row, channel, plane, channels, channels_last)


@triton.jit
def _affine(channel, valid, weight, bias, mean, var, eps, dtype: tl.constexpr):
    mean_c = tl.load(mean + channel, valid, other=0.0).to(dtype)
    var_c = tl.load(var + channel, valid, other=1.0).to(dtype)
    weight_c = tl.load(weight + channel, valid, other=0.0).to(dtype)
    bias_c = tl.load(bias + channel, valid, other=0.0).to(dtype)
    invstd = 1 / tl.sqrt(var_c + tl.full([1], eps, dtype))
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
    """The gradient with respect to ReLU's input; without a residual, the sign of y is recomputed from x."""
    if relu:
        if has_residual:
            sign = tl.load(y + offsets, valid, other=0.0).to(dy.dtype)
        else:
            sign = centered * scale[None, :] + bias[None, :]
        dy = tl.where(sign <= 0, 0.0, dy)
    return dy


@triton.jit
def _merged(counts, means, deviations, total):
    """Mean and sum of squared deviations of all values from those of the parts."""
    near = tl.sum(means * counts, 0) / total
    delta = means - near[None, :]
    rest = tl.sum(delta * counts, 0) / total  # the rounding error of the mean, if the mean is large
    rest = tl.where(tl.abs(rest) < float("inf"), rest, 0.0)
    deviations = tl.where(deviations < 0, 0.0, deviations)  # NaN stays NaN
    return near + rest, tl.sum(deviations + delta * delta * counts, 0) - rest * rest * total


@triton.jit
def _store_statistics(
    channel, valid, mean_c, var_c, mean, var, running_mean, running_var, momentum, rows, has_running: tl.constexpr
):
    tl.store(mean + channel, mean_c, valid)
    tl.store(var + channel, var_c, valid)
    if has_running:
        momentum, rows = tl.full([1], momentum, mean_c.dtype), tl.full([1], rows, mean_c.dtype)
        old_mean = tl.load(running_mean + channel, valid, other=0.0)
        old_var = tl.load(running_var + channel, valid, other=0.0)
        new_mean = old_mean.to(mean_c.dtype) * (1 - momentum) + mean_c * momentum
        unbiased = var_c * (rows / (rows - 1))
        new_var = old_var.to(var_c.dtype) * (1 - momentum) + unbiased * momentum
        tl.store(running_mean + channel, new_mean.to(old_mean.dtype), valid)
        tl.store(running_var + channel, new_var.to(old_var.dtype), valid)


@triton.jit
def forward_once(
    x, residual, weight, bias, y, mean, var, running_mean, running_var, momentum: tl.float64,
    rows, channels, plane, eps: tl.float64,
    channels_last: tl.constexpr, has_residual: tl.constexpr, relu: tl.constexpr, has_running: tl.constexpr,
    dtype: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """y and all statistics of all rows of a block of channels; x is read once."""
    channel, valid_channel, valid, offsets = _tile(rows, channels, plane, channels_last, block_rows, block_channels)
    values = tl.load(x + offsets, valid, other=0.0).to(dtype)
    mean_c, deviation_c = _merged(valid.to(dtype), values, tl.zeros_like(values), rows)
    var_c = deviation_c / rows
    _store_statistics(
        channel, valid_channel, mean_c, var_c, mean, var, running_mean, running_var, momentum, rows, has_running
    )
    invstd = 1 / tl.sqrt(var_c + tl.full([1], eps, dtype))
    scale = tl.load(weight + channel, valid_channel, other=0.0).to(dtype) * invstd
    bias_c = tl.load(bias + channel, valid_channel, other=0.0).to(dtype)
    z = _normalized(values, residual, offsets, valid, mean_c, scale, bias_c, has_residual, relu)
    tl.store(y + offsets, z.to(y.dtype.element_ty), valid)


@triton.jit
def _tile_from_the_end(i, rows, block_rows: tl.constexpr):
    """The rows of the i-th tile from the end; negative ones are to be masked."""
    return rows - (i + 1) * block_rows + tl.arange(0, block_rows)


@triton.jit
def split_moments(
    x, counts, means, deviations, rows, channels, plane, splits: tl.constexpr, split_tiles: tl.constexpr,
    channels_last: tl.constexpr, dtype: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared deviations of the rows of one split, by channel."""
    split = tl.program_id(1)
    channel = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    valid_channel = channel < channels
    row = _tile_from_the_end(split, rows, block_rows)
    valid = (row >= 0)[:, None] & valid_channel[None, :]
    first = tl.load(x + _offsets(row, channel, plane, channels, channels_last), valid, other=0.0).to(dtype)
    # Each element of the tile subtracts its first value, or the sum of squares would cancel; but not an infinite one,
    # which would turn infinities into NaN.
    shift = tl.where(tl.abs(first) < float("inf"), first, 0.0)
    sums = first - shift
    squares = sums * sums
    for i in tl.range(1, split_tiles, num_stages=STAGES):
        row = _tile_from_the_end(i * splits + split, rows, block_rows)
        valid = (row >= 0)[:, None] & valid_channel[None, :]
        values = tl.load(x + _offsets(row, channel, plane, channels, channels_last), valid, other=0.0).to(dtype)
        shifted = tl.where(valid, values - shift, 0.0)
        sums += shifted
        squares += shifted * shifted
    row = _tile_from_the_end(split, rows, block_rows)
    count = tl.where(row >= 0, row // (splits * block_rows) + 1, 0)
    total = tl.sum(count, 0).to(dtype)
    count = count.to(dtype)[:, None]
    mean_p = sums / tl.maximum(count, 1)
    mean_c, deviation_c = _merged(count, shift + mean_p, squares - sums * mean_p, total)
    at = split * channels + channel
    tl.store(counts + split, total)
    tl.store(means + at, mean_c, valid_channel)
    tl.store(deviations + at, deviation_c, valid_channel)


@triton.jit
def merge_moments(
    counts, means, deviations, mean, var, running_mean, running_var, momentum: tl.float64, rows, channels,
    splits: tl.constexpr, has_running: tl.constexpr, block_splits: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance from the moments of the splits, and the running statistics."""
    split = tl.arange(0, block_splits)
    channel = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    valid_channel = channel < channels
    valid = (split < splits)[:, None] & valid_channel[None, :]
    at = split[:, None] * channels + channel[None, :]
    count = tl.load(counts + split, split < splits, other=0.0)[:, None]
    mean_s = tl.load(means + at, valid, other=0.0)
    deviation_s = tl.load(deviations + at, valid, other=0.0)
    mean_c, deviation_c = _merged(count, mean_s, deviation_s, rows)
    _store_statistics(
        channel, valid_channel, mean_c, deviation_c / rows,
        mean, var, running_mean, running_var, momentum, rows, has_running,
    )  # fmt: skip


@triton.jit
def normalize(
    x, residual, weight, bias, mean, var, y, rows, channels, plane, eps: tl.float64,
    channels_last: tl.constexpr, has_residual: tl.constexpr, relu: tl.constexpr, dtype: tl.constexpr,
    block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual) for a tile."""
    channel, valid_channel, valid, offsets = _tile(rows, channels, plane, channels_last, block_rows, block_channels)
    values = tl.load(x + offsets, valid, other=0.0).to(dtype)
    mean_c, invstd, weight_c, bias_c = _affine(channel, valid_channel, weight, bias, mean, var, eps, dtype)
    z = _normalized(values, residual, offsets, valid, mean_c, weight_c * invstd, bias_c, has_residual, relu)
    tl.store(y + offsets, z.to(y.dtype.element_ty), valid)


@triton.jit
def backward_once(
    grad, x, y, weight, bias, mean, var, dx, dz, dweight, dbias, rows, channels, plane, eps: tl.float64,
    channels_last: tl.constexpr, has_residual: tl.constexpr, relu: tl.constexpr, training: tl.constexpr,
    dtype: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """All gradients of all rows of a block of channels; grad, x and y are read once."""
    channel, valid_channel, valid, offsets = _tile(rows, channels, plane, channels_last, block_rows, block_channels)
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
    grad, x, y, weight, bias, mean, var, dz, dweights, dbiases, rows, channels, plane, eps: tl.float64,
    splits: tl.constexpr, split_tiles: tl.constexpr,
    channels_last: tl.constexpr, has_residual: tl.constexpr, relu: tl.constexpr, dtype: tl.constexpr,
    block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """dz, and the gradients of weight and bias from the rows of one split."""
    split = tl.program_id(1)
    channel = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    valid_channel = channel < channels
    mean_c, invstd, weight_c, bias_c = _affine(channel, valid_channel, weight, bias, mean, var, eps, dtype)
    sums = tl.zeros([block_rows, block_channels], dtype)
    products = tl.zeros([block_rows, block_channels], dtype)
    for i in tl.range(split_tiles, num_stages=STAGES):
        row = _tile_from_the_end(i * splits + split, rows, block_rows)
        valid = (row >= 0)[:, None] & valid_channel[None, :]
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
def merge_sums(
    dweights, dbiases, dweight, dbias, channels,
    splits: tl.constexpr, block_splits: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """The gradients of weight and bias from those of the splits."""
    split = tl.arange(0, block_splits)
    channel = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    valid = (split < splits)[:, None] & (channel < channels)[None, :]
    at = split[:, None] * channels + channel[None, :]
    tl.store(dweight + channel, tl.sum(tl.load(dweights + at, valid, other=0.0), 0), channel < channels)
    tl.store(dbias + channel, tl.sum(tl.load(dbiases + at, valid, other=0.0), 0), channel < channels)


@triton.jit
def input_gradient(
    grad, x, weight, bias, mean, var, dweight, dbias, dx, rows, channels, plane, eps: tl.float64,
    channels_last: tl.constexpr, relu: tl.constexpr, training: tl.constexpr, dtype: tl.constexpr,
    block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """dx = scale * (dz - (dbias + (x - mean) * invstd * dweight) / rows); in evaluation dx = scale * dz."""
    channel, valid_channel, valid, offsets = _tile(rows, channels, plane, channels_last, block_rows, block_channels)
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
    """The sizes, options and grids of the kernels for a tensor."""

    def __init__(self, x: Tensor) -> None:
        self.channels = x.size(1)
        self.rows = x.numel() // self.channels
        self.plane = self.rows // x.size(0)
        channels_last = is_channels_last(x)
        self.tiling = tiling(self.rows, self.channels, channels_last)
        self.options = {
            "channels_last": channels_last,
            "dtype": tl.float64 if x.dtype == torch.float64 else tl.float32,
            "block_rows": self.tiling.block_rows,
            "block_channels": self.tiling.block_channels,
            "num_warps": self.tiling.num_warps,
        }
        tiles = triton.cdiv(self.rows, self.tiling.block_rows)
        across = triton.cdiv(self.channels, self.tiling.block_channels)
        self.channel_grid = (across,)
        self.tile_grid = (across * tiles,)
        self.split_grid = (across, self.tiling.splits)
        self.split_options = {"splits": self.tiling.splits, "split_tiles": triton.cdiv(tiles, self.tiling.splits)}
        block_channels = min(MERGED_CHANNELS, self.tiling.block_channels)
        self.merge_grid = (triton.cdiv(self.channels, block_channels),)
        self.merge_options = {
            "splits": self.tiling.splits,
            "block_splits": triton.next_power_of_2(self.tiling.splits),
            "block_channels": block_channels,
        }

    def parts(self, count: int, like: Tensor) -> tuple[Tensor, ...]:
        """``count`` uninitialised tensors ``[splits, channels]``."""
        return like.new_empty(count, self.tiling.splits, self.channels).unbind()


def _affine_parameters(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    channels, dtype = x.size(1), statistics_dtype(x)
    weight = x.new_ones(channels, dtype=dtype) if weight is None else weight.contiguous()
    bias = x.new_zeros(channels, dtype=dtype) if bias is None else bias.contiguous()
    return weight, bias


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastres::batch_norm_relu`: y, and the mean and biased variance of x if training."""
    channels_last = is_channels_last(x)
    x = dense(x, channels_last)
    y = torch.empty_like(x)
    mean, var = new_statistics(x, training)
    if x.numel() == 0:
        return y, mean.zero_(), var.zero_()
    launch = _Launch(x)
    flags = {"has_residual": residual is not None, "relu": relu, **launch.options}
    affine = _affine_parameters(x, weight, bias)
    other = x if residual is None else dense(residual, channels_last)
    shape = launch.rows, launch.channels, launch.plane
    running = [t.contiguous() for t in (running_mean, running_var) if t is not None]
    if not training:
        normalize[launch.tile_grid](x, other, *affine, *running, y, *shape, eps, **flags)
        return y, mean, var
    statistics = mean, var, *(running or (mean, var)), momentum
    if launch.tiling.single_pass:
        forward_once[launch.channel_grid](
            x, other, *affine, y, *statistics, *shape, eps, has_running=bool(running), **flags
        )
    else:
        parts = launch.parts(3, mean)
        split_moments[launch.split_grid](x, *parts, *shape, **launch.split_options, **launch.options)
        merge_moments[launch.merge_grid](
            *parts, *statistics, *shape[:2], has_running=bool(running), **launch.merge_options
        )
        normalize[launch.tile_grid](x, other, *affine, mean, var, y, *shape, eps, **flags)
    for given, updated in zip((running_mean, running_var), running, strict=False):
        if given is not None and given is not updated:  # not contiguous
            given.copy_(updated)
    torch.autograd.graph.increment_version(running)  # autograd must know
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
    dweight, dbias = new_statistics(x)
    if x.numel() == 0:
        return dx, dz, dweight.zero_(), dbias.zero_()
    launch = _Launch(x)
    flags = {"has_residual": output is not None, "relu": relu, **launch.options}
    constants = *_affine_parameters(x, weight, bias), mean.contiguous(), var.contiguous()
    y = x if output is None else dense(output, channels_last)
    shape = launch.rows, launch.channels, launch.plane
    if launch.tiling.single_pass:
        backward_once[launch.channel_grid](
            grad, x, y, *constants, dx, dz, dweight, dbias, *shape, eps, training=training, **flags
        )
        return dx, dz, dweight, dbias
    dweights, dbiases = launch.parts(2, dweight)
    split_sums[launch.split_grid](
        grad, x, y, *constants, dz, dweights, dbiases, *shape, eps, **launch.split_options, **flags
    )
    merge_sums[launch.merge_grid](dweights, dbiases, dweight, dbias, launch.channels, **launch.merge_options)
    input_gradient[launch.tile_grid](
        grad if output is None else dz, x, *constants, dweight, dbias, dx, *shape, eps,
        relu=relu and output is None, training=training, **launch.options,
    )  # fmt: skip
    return dx, dz, dweight, dbias
