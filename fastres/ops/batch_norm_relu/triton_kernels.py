# mypy: disable-error-code="no-untyped-def"
"""batch_norm_relu for CUDA, in Triton.

A tensor whose channels fit into one program's registers is read once. Larger ones take two passes: statistics
by splits of the rows, which the last program to finish merges as in Chan, Golub and LeVeque, "Updating formulae and a
pairwise algorithm for computing sample variances" (1979), then the result. All sums are float32 (float64 for float64
inputs), and so are momentum and eps, which arrive as float64.
Reductions run from the last row to the first, element-wise passes from the first to the last: each starts on the rows
that the kernel before it, which may be the convolution that made x, has left in the cache.

A row is the channels of one pixel. Row r of a channels-last tensor starts at r * C and has stride 1; of a
contiguous one with planes of P pixels it starts at (r // P) * C * P + r % P and has stride P.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastres.ops.batch_norm_relu.launch import WORD, launcher, mask_words
from fastres.ops.batch_norm_relu.layout import dense, is_channels_last, new_statistics, statistics_dtype

# Software pipelining of a loop over tiles: two are being loaded while a third is computed. Without it a thread waits
# for each 16 bytes, and all threads together keep half as many bytes in flight as an H100's memory needs.
STAGES = tl.constexpr(3)


@triton.jit
def _offsets(row, channel, plane, channels, channels_last: tl.constexpr):
    row = row[:, None]
    if channels_last:
        return row.to(tl.int64) * channels + channel[None, :]
    return ((row // plane).to(tl.int64) * channels + channel[None, :]) * plane + row % plane  # divided as int32


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
def _gradient(grad, twin_grad, offsets, valid, has_twin: tl.constexpr, dtype: tl.constexpr):
    dy = tl.load(grad + offsets, valid, other=0.0).to(dtype)
    if has_twin:
        dy += tl.load(twin_grad + offsets, valid, other=0.0).to(dtype)
    return dy


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
def _is_last(arrived, splits):
    """Whether all other programs of the same channels have been here; what they have stored can then be loaded."""
    tl.debug_barrier()  # all threads of this program have stored
    last = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        tl.store(arrived + tl.program_id(0), 0)  # for the next launch
    return last


@triton.jit
def _load_parts(parts, split, splits, channel, channels):
    """`[splits, channels]`, past the L1 cache, which does not see what other programs store."""
    valid = (split < splits)[:, None] & (channel < channels)[None, :]
    return tl.load(parts + split[:, None] * channels + channel[None, :], valid, other=0.0, cache_modifier=".cg")


@triton.jit
def _store_statistics(
    channel, valid, mean_c, var_c, mean, var, running_mean, running_var, num_batches, rows, momentum,
    has_running: tl.constexpr, has_counter: tl.constexpr,
):  # fmt: skip
    tl.store(mean + channel, mean_c, valid)
    tl.store(var + channel, var_c, valid)
    if has_counter and tl.program_id(0) == 0:
        tl.store(num_batches, tl.load(num_batches) + 1)
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
    x, residual, weight, bias, y, mean, var, running_mean, running_var, num_batches,
    rows, channels, plane, eps: tl.float64, momentum: tl.float64,
    has_residual: tl.constexpr, relu: tl.constexpr, has_running: tl.constexpr, has_counter: tl.constexpr,
    channels_last: tl.constexpr, dtype: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """y and all statistics of all rows of a block of channels; x is read once."""
    channel, valid_channel, valid, offsets = _tile(rows, channels, plane, channels_last, block_rows, block_channels)
    values = tl.load(x + offsets, valid, other=0.0).to(dtype)
    mean_c, deviation_c = _merged(valid.to(dtype), values, tl.zeros_like(values), rows)
    var_c = deviation_c / rows
    _store_statistics(
        channel, valid_channel, mean_c, var_c, mean, var, running_mean, running_var, num_batches, rows, momentum,
        has_running, has_counter,
    )  # fmt: skip
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
def _rows_of(split, splits, rows, block_rows: tl.constexpr):
    tiles = tl.cdiv(rows, block_rows)
    missing = tl.where((tiles - 1) % splits == split, tiles * block_rows - rows, 0)  # of the last tile from the end
    return tl.cdiv(tiles - split, splits) * block_rows - missing


@triton.jit
def _merged_moments(means, deviations, splits, channel, rows, channels, dtype: tl.constexpr, block_rows: tl.constexpr):
    """Mean, as a distance from the splits' origin, and biased variance of all rows."""
    first = tl.load(means + channel, channel < channels, other=0.0, cache_modifier=".cg")
    shift = tl.where(tl.abs(first) < float("inf"), first, 0.0)  # as in split_moments
    sums = tl.zeros([block_rows, channel.shape[0]], dtype)
    squares = tl.zeros([block_rows, channel.shape[0]], dtype)
    for start in tl.range(0, splits, block_rows, num_stages=STAGES):
        split = start + tl.arange(0, block_rows)
        count = _rows_of(split, splits, rows, block_rows).to(dtype)[:, None]
        shifted = _load_parts(means, split, splits, channel, channels) - shift[None, :]
        deviation = _load_parts(deviations, split, splits, channel, channels)
        valid = (split < splits)[:, None]
        sums += tl.where(valid, shifted * count, 0.0)
        squares += tl.where(deviation < 0, 0.0, deviation)  # NaN stays NaN
        squares += tl.where(valid, shifted * shifted * count, 0.0)
    rest = tl.sum(sums, 0) / rows
    finite = tl.where(tl.abs(rest) < float("inf"), rest, 0.0)
    var = tl.sum(squares, 0) / rows - finite * finite
    return shift + rest, tl.where(var < 0, 0.0, var)


@triton.jit(do_not_specialize=["splits", "split_tiles"])
def split_moments(
    x, means, deviations, arrived, mean, var, running_mean, running_var, num_batches,
    rows, channels, plane, splits, split_tiles, momentum: tl.float64,
    has_running: tl.constexpr, has_counter: tl.constexpr,
    channels_last: tl.constexpr, dtype: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of the rows of one split; from all splits, the statistics of the channels."""
    split = tl.program_id(1)
    channel = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    valid_channel = channel < channels
    # The splits' means are kept as distances from the channel's last value, which is at most sqrt(rows) standard
    # deviations from the mean: large means, as they are, would lose digits.
    last = _offsets(rows - 1 + tl.arange(0, 1), channel, plane, channels, channels_last)
    origin = tl.load(x + last, valid_channel[None, :], other=0.0).to(dtype)
    origin = tl.where(tl.abs(origin) < float("inf"), origin, 0.0)
    shift = tl.zeros([block_rows, block_channels], dtype)
    sums = tl.zeros([block_rows, block_channels], dtype)
    squares = tl.zeros([block_rows, block_channels], dtype)
    for i in tl.range(0, split_tiles, num_stages=STAGES):
        row = _tile_from_the_end(i * splits + split, rows, block_rows)
        valid = (row >= 0)[:, None] & valid_channel[None, :]
        values = tl.load(x + _offsets(row, channel, plane, channels, channels_last), valid, other=0.0).to(dtype)
        # Each element of the tile subtracts its first value, or the sum of squares would cancel; but not an infinite
        # one, which would turn infinities into NaN.
        shift = tl.where((i == 0) & (tl.abs(values) < float("inf")), values, shift)
        shifted = tl.where(valid, values - shift, 0.0)
        sums += shifted
        squares += shifted * shifted
    row = _tile_from_the_end(split, rows, block_rows)
    count = tl.where(row >= 0, row // (splits * block_rows) + 1, 0)
    total = tl.sum(count, 0).to(dtype)
    count = count.to(dtype)[:, None]
    mean_p = sums / tl.maximum(count, 1)
    mean_c, deviation_c = _merged(count, shift - origin + mean_p, squares - sums * mean_p, total)
    at = split * channels + channel
    tl.store(means + at, mean_c, valid_channel)
    tl.store(deviations + at, deviation_c, valid_channel)
    if _is_last(arrived, splits):
        mean_c, var_c = _merged_moments(means, deviations, splits, channel, rows, channels, dtype, block_rows)
        mean_c += tl.sum(origin, 0)
        _store_statistics(
            channel, valid_channel, mean_c, var_c, mean, var, running_mean, running_var, num_batches, rows, momentum,
            has_running, has_counter,
        )  # fmt: skip


@triton.jit
def _words(row, first_channel, rows, channels, block_channels: tl.constexpr):
    """Offsets and validity of the words of the mask for a tile."""
    word = first_channel // WORD + tl.arange(0, block_channels // WORD)
    valid = ((row >= 0) & (row < rows))[:, None] & (word < channels // WORD)[None, :]
    return row.to(tl.int64)[:, None] * (channels // WORD) + word[None, :], valid


@triton.jit
def normalize(
    x, residual, weight, bias, mean, var, y, mask, rows, channels, plane, eps: tl.float64,
    has_residual: tl.constexpr, relu: tl.constexpr, has_mask: tl.constexpr,
    channels_last: tl.constexpr, dtype: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual) for a tile, and which of them are not 0."""
    channel, valid_channel, valid, offsets = _tile(rows, channels, plane, channels_last, block_rows, block_channels)
    values = tl.load(x + offsets, valid, other=0.0).to(dtype)
    mean_c, invstd, weight_c, bias_c = _affine(channel, valid_channel, weight, bias, mean, var, eps, dtype)
    z = _normalized(values, residual, offsets, valid, mean_c, weight_c * invstd, bias_c, has_residual, relu)
    z = z.to(y.dtype.element_ty)
    tl.store(y + offsets, z, valid)
    if has_mask:
        bits = tl.reshape(tl.where(z <= 0, 0, 1), [block_rows, block_channels // WORD, WORD])  # 1 for NaN
        across = tl.cdiv(channels, block_channels)
        row = tl.program_id(0) // across * block_rows + tl.arange(0, block_rows)
        at, valid_word = _words(row, tl.program_id(0) % across * block_channels, rows, channels, block_channels)
        tl.store(mask + at, tl.sum(bits << tl.arange(0, WORD)[None, None, :], 2), valid_word)


@triton.jit
def backward_once(
    grad, twin_grad, x, y, weight, bias, mean, var, dx, dz, dweight, dbias, rows, channels, plane, eps: tl.float64,
    has_twin: tl.constexpr, has_residual: tl.constexpr, relu: tl.constexpr, training: tl.constexpr,
    channels_last: tl.constexpr, dtype: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """All gradients of all rows of a block of channels; the gradients, x and y are read once."""
    channel, valid_channel, valid, offsets = _tile(rows, channels, plane, channels_last, block_rows, block_channels)
    mean_c, invstd, weight_c, bias_c = _affine(channel, valid_channel, weight, bias, mean, var, eps, dtype)
    scale = weight_c * invstd
    dy = _gradient(grad, twin_grad, offsets, valid, has_twin, dtype)
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


@triton.jit(do_not_specialize=["splits", "split_tiles"])
def split_sums(
    grad, twin_grad, x, y, weight, bias, mean, var, dz, dweights, dbiases, arrived, dweight, dbias,
    rows, channels, plane, splits, split_tiles, eps: tl.float64,
    has_twin: tl.constexpr, has_residual: tl.constexpr, relu: tl.constexpr, has_mask: tl.constexpr,
    channels_last: tl.constexpr, dtype: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """dz, and the gradients of weight and bias from the rows of one split; from all splits, those of all rows."""
    split = tl.program_id(1)
    channel = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    valid_channel = channel < channels
    mean_c, invstd, weight_c, bias_c = _affine(channel, valid_channel, weight, bias, mean, var, eps, dtype)
    sums = tl.zeros([block_rows, block_channels], dtype)
    products = tl.zeros([block_rows, block_channels], dtype)
    for i in tl.range(0, split_tiles, num_stages=STAGES):
        row = _tile_from_the_end(i * splits + split, rows, block_rows)
        valid = (row >= 0)[:, None] & valid_channel[None, :]
        offsets = _offsets(row, channel, plane, channels, channels_last)
        dy = _gradient(grad, twin_grad, offsets, valid, has_twin, dtype)
        centered = tl.load(x + offsets, valid, other=0.0).to(dtype) - mean_c[None, :]
        if has_mask:
            at, valid_word = _words(row, tl.program_id(0) * block_channels, rows, channels, block_channels)
            words = tl.load(y + at, valid_word, other=0)
            bits = words[:, :, None] >> tl.arange(0, WORD)[None, None, :] & 1
            dy = tl.where(tl.reshape(bits, [block_rows, block_channels]) == 0, 0.0, dy)
        else:
            dy = _before_relu(dy, centered, y, offsets, valid, weight_c * invstd, bias_c, has_residual, relu)
        if relu and has_residual:
            tl.store(dz + offsets, dy.to(dz.dtype.element_ty), valid)
        sums += tl.where(valid, dy, 0.0)
        products += tl.where(valid, dy * centered, 0.0)
    at = split * channels + channel
    tl.store(dbiases + at, tl.sum(sums, 0), valid_channel)
    tl.store(dweights + at, tl.sum(products, 0) * invstd, valid_channel)
    if _is_last(arrived, splits):
        sums = tl.zeros([block_rows, block_channels], dtype)
        products = tl.zeros([block_rows, block_channels], dtype)
        for start in tl.range(0, splits, block_rows, num_stages=STAGES):
            part = start + tl.arange(0, block_rows)
            sums += _load_parts(dbiases, part, splits, channel, channels)
            products += _load_parts(dweights, part, splits, channel, channels)
        tl.store(dbias + channel, tl.sum(sums, 0), valid_channel)
        tl.store(dweight + channel, tl.sum(products, 0), valid_channel)


@triton.jit
def input_gradient(
    grad, x, weight, bias, mean, var, dweight, dbias, dx, rows, channels, plane, eps: tl.float64,
    relu: tl.constexpr, training: tl.constexpr,
    channels_last: tl.constexpr, dtype: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr,
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
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fastres::batch_norm_relu`: y; if training, the mean and biased variance of x and the mask."""
    channels_last = is_channels_last(x)
    x = dense(x, channels_last)
    y = torch.empty_like(x)
    mean, var = new_statistics(x, training)
    kept = training and relu and residual is not None
    mask = x.new_empty(mask_words(x.shape, channels_last) if kept else 0, dtype=torch.int32)
    has_mask = mask.numel() > 0
    if x.numel() == 0:
        if training and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        return y, mean.zero_(), var.zero_(), mask
    launch = launcher(x.shape, x.dtype, channels_last, x.device.index)
    affine = _affine_parameters(x, weight, bias)
    inputs = x, x if residual is None else dense(residual, channels_last), *affine
    flags = residual is not None, relu
    running = [t.contiguous() for t in (running_mean, running_var) if t is not None]
    if not training:
        launch(normalize, launch.tile_grid, (*inputs, *running, y, y), (*launch.shape, eps), (*flags, False))
        return y, mean, var, mask
    counter = mean if num_batches_tracked is None else num_batches_tracked
    updated = mean, var, *(running or (mean, var)), counter
    given = bool(running), num_batches_tracked is not None
    if launch.tiling.single_pass:
        tensors, numbers = (*inputs, y, *updated), (*launch.shape, eps, momentum)
        launch(forward_once, launch.channel_grid, tensors, numbers, (*flags, *given))
    else:
        parts = launch.parts(mean)
        launch(split_moments, launch.split_grid, (x, *parts, *updated), (*launch.split_shape, momentum), given)
        tensors = *inputs, mean, var, y, mask if has_mask else y
        launch(normalize, launch.tile_grid, tensors, (*launch.shape, eps), (*flags, has_mask))
    for old, new in zip((running_mean, running_var), running, strict=False):
        if old is not None and old is not new:  # not contiguous
            old.copy_(new)
    torch.autograd.graph.increment_version(running)  # autograd must know
    return y, mean, var, mask


def backward(
    grad: Tensor,
    twin_grad: Tensor | None,
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
    launch = launcher(x.shape, x.dtype, channels_last, x.device.index)
    constants = *_affine_parameters(x, weight, bias), mean.contiguous(), var.contiguous()
    twin = grad if twin_grad is None else dense(twin_grad, channels_last)
    has_mask = output is not None and output.dtype == torch.int32
    y = x if output is None else output if has_mask else dense(output, channels_last)
    inputs = grad, twin, x, y, *constants
    flags = twin_grad is not None, output is not None, relu
    tensors: tuple[Tensor, ...]
    if launch.tiling.single_pass:
        tensors = *inputs, dx, dz, dweight, dbias
        launch(backward_once, launch.channel_grid, tensors, (*launch.shape, eps), (*flags, training))
        return dx, dz, dweight, dbias
    tensors = *inputs, dz, *launch.parts(dweight), dweight, dbias
    launch(split_sums, launch.split_grid, tensors, (*launch.split_shape, eps), (*flags, has_mask))
    dy, relu = (grad, relu) if output is None else (dz, False)
    tensors = dy, x, *constants, dweight, dbias, dx
    launch(input_gradient, launch.tile_grid, tensors, (*launch.shape, eps), (relu, training))
    return dx, dz, dweight, dbias
