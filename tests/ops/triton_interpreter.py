"""The Triton kernels in Triton's interpreter, on the CPU. test_batch_norm_relu.py runs this with
TRITON_INTERPRET=1, which Triton reads when a kernel is decorated."""

import itertools

import pytest
import torch

from fastres.ops.batch_norm_relu import triton_kernels

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}
SHAPES = [(2, 3, 5, 7), (4, 20, 3, 3), (2, 5, 1, 1), (3, 6, 40, 40), (9, 18, 12, 12)]
MASKED = (2, 32, 24, 24)  # if channels-last, of which the kernels keep a bit of each element's sign


def reference(x, residual, weight, bias, mean, var, training, eps, relu):
    """y, mean and var in float64."""
    axes = [0, *range(2, x.dim())]
    shape = [-1, *[1] * (x.dim() - 2)]
    if training:
        mean, var = x.mean(axes), x.var(axes, correction=0)
    y = (x - mean.view(shape)) / (var.view(shape) + eps).sqrt() * weight.view(shape) + bias.view(shape)
    y = y if residual is None else y + residual
    return torch.relu(y) if relu else y, mean, var


@pytest.mark.parametrize(
    ("shape", "channels_last"), [*itertools.product(SHAPES, (True, False)), (MASKED, True)], ids=str
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_agrees_with_float64(shape, dtype, channels_last, has_residual, relu, training):
    torch.manual_seed(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    other_format = torch.contiguous_format if channels_last else torch.channels_last

    def activation(memory_format=memory_format):
        return torch.randn(shape).to(dtype).to(memory_format=memory_format)

    x, grad = activation() * 2 + 1, activation(other_format)
    residual = activation(other_format if training else memory_format) if has_residual else None
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, running_mean = torch.randn(3, shape[1], dtype=statistics).unbind()
    running_var = torch.rand(shape[1], dtype=statistics) + 0.5
    running = running_mean.clone(), running_var.clone()
    batches = torch.tensor(4)
    y, mean, var, mask = triton_kernels.forward(x, residual, weight, bias, *running, batches, training, 0.3, 1e-5, relu)
    if not training:
        mean, var = running
    output = (mask if mask.numel() else y) if has_residual and relu else None
    assert (mask.numel() > 0) == (training and has_residual and relu and shape == MASKED)
    twin_grad = None if output is None else activation(memory_format)
    dx, dz, dweight, dbias = triton_kernels.backward(
        grad, twin_grad, x, output, weight, bias, mean, var, training, 1e-5, relu
    )
    if twin_grad is not None:
        grad = grad.double() + twin_grad.double()

    leaves = [t if t is None else t.double().requires_grad_() for t in (x, residual, weight, bias)]
    expected, expected_mean, expected_var = reference(
        *leaves, running_mean.double(), running_var.double(), training, 1e-5, relu
    )
    if output is not None:  # the same mask, whatever the rounding
        expected = expected * (y > 0) + expected.detach() * (y <= 0)
    expected_grads = torch.autograd.grad(expected, [t for t in leaves if t is not None], grad.double())

    def close(actual, expected, tolerance=TOLERANCE[statistics]):
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)

    tolerance = TOLERANCE[dtype]
    close(y, expected, tolerance)
    close(mean, expected_mean)
    close(var, expected_var)
    assert batches == (5 if training else 4)
    if training:
        assert running[0]._version == running[1]._version == 1
        rows = x.numel() / shape[1]
        close(running[0], 0.7 * running_mean.double() + 0.3 * expected_mean)
        close(running[1], 0.7 * running_var.double() + 0.3 * expected_var * rows / (rows - 1))
    actual_grads = [dx, dz if output is not None else grad, dweight, dbias]
    if not has_residual:
        del actual_grads[1]
    for actual, wanted in zip(actual_grads, expected_grads, strict=True):
        scale = max(1.0, wanted.abs().max().item())
        close(actual / scale, wanted / scale, tolerance)
    assert y.stride() == x.stride() == dx.stride()


@pytest.mark.parametrize("std", [0.1, 0])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (3, 6, 40, 40)], ids=str)
def test_large_mean_and_small_variance(shape, std):
    torch.manual_seed(0)
    x = (torch.randn(shape) * std + 1e4).to(memory_format=torch.channels_last)
    _, mean, var, _ = triton_kernels.forward(x, *[None] * 6, True, 0.1, 1e-5, True)
    half_of_their_spacing = 0.5 * 2**-10 + 1e-5
    torch.testing.assert_close(mean.double(), x.double().mean([0, 2, 3]), rtol=0, atol=half_of_their_spacing)
    torch.testing.assert_close(var.double(), x.double().var([0, 2, 3], correction=0), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (3, 6, 40, 40)], ids=str)
@pytest.mark.parametrize("at", [0, -1], ids=["first", "last"])
def test_what_is_not_finite_stays_in_its_channel(at, shape, value):
    x = torch.randn(shape)
    x[at, 1, at, at] = value
    y, mean, *_ = triton_kernels.forward(x, *[None] * 6, True, 0.1, 1e-5, True)
    assert y[:, 1].isnan().all()
    torch.testing.assert_close(mean, x.mean([0, 2, 3]), equal_nan=True)
    assert y[:, [0, 2]].isfinite().all()
