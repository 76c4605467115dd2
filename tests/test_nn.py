import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres.models import create_model
from fastres.nn import BatchNormReLU2d, EagerBatchNormReLU2d, PointwiseConv2d


def both(*args, **kwargs):
    """A fused and an eager layer with the same state."""
    fused, eager = BatchNormReLU2d(*args, **kwargs), EagerBatchNormReLU2d(*args, **kwargs)
    eager.load_state_dict(fused.state_dict())
    return fused, eager


@pytest.mark.parametrize("layer", [BatchNormReLU2d, EagerBatchNormReLU2d])
def test_state_dict_of_batch_norm(layer):
    assert layer(4).state_dict().keys() == nn.BatchNorm2d(4).state_dict().keys()
    layer(4).load_state_dict(nn.BatchNorm2d(4).state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"relu": False},
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": 0.0},
        {"eps": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("has_residual", [True, False])
def test_agrees_with_torch(options, has_residual):
    torch.manual_seed(0)
    fused, eager = both(6, **options)
    plain = nn.BatchNorm2d(6, **{k: v for k, v in options.items() if k != "relu"})
    for training in (True, True, False):
        x = torch.randn(4, 6, 5, 5)
        residual = torch.randn(4, 6, 5, 5) if has_residual else None
        for module in (fused, eager, plain):
            module.train(training)
        expected = plain(x) if residual is None else plain(x) + residual
        expected = F.relu(expected) if options.get("relu", True) else expected
        for module in (fused, eager):
            torch.testing.assert_close(module(x, residual), expected, rtol=1e-4, atol=1e-5)
            for actual, wanted in zip(module.buffers(), plain.buffers(), strict=True):
                torch.testing.assert_close(actual, wanted)


def test_refuses_other_than_four_dimensions():
    with pytest.raises(ValueError, match="4D"):
        BatchNormReLU2d(3)(torch.randn(2, 3, 4))


def test_bfloat16_under_autocast():
    torch.manual_seed(0)
    for module in both(8):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(nn.Conv2d(3, 8, 3)(torch.randn(4, 3, 8, 8)))
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert module.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("layer", [BatchNormReLU2d, EagerBatchNormReLU2d])
def test_a_float32_residual_under_autocast(layer):
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    conv, norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), layer(3)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(conv(x), residual=x)
    assert y.dtype == torch.bfloat16
    expected = layer(3)(conv(x), residual=x)
    torch.testing.assert_close(y.float(), expected, rtol=3e-2, atol=3e-2)
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def losses_of_fifty_steps(fused):
    """ResNet-18 on one batch of noise. The rate is small: rounding differences grow with every ReLU that they flip, and
    at larger rates eager training in float32 strays as far from float64."""
    generator = torch.Generator().manual_seed(0)
    x, label = torch.randn(8, 3, 32, 32, generator=generator), torch.randint(10, (8,), generator=generator)
    x = x.to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    model = create_model("resnet18", 10, fused=fused).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(50):
        loss = F.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_fifty_steps_of_training_fused_and_eager():
    fused, eager = losses_of_fifty_steps(True), losses_of_fifty_steps(False)
    torch.testing.assert_close(fused, eager, rtol=0, atol=1e-4)
    assert fused[-1] < 0.75 * fused[0]


@pytest.mark.parametrize("size", [(4, 4), (2, 7), (1, 1), (5, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_pointwise_convolution_is_a_convolution(size, dtype, channels_last, bias):
    torch.manual_seed(0)
    conv = PointwiseConv2d(6, 10, bias=bias)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(3, 6, *size).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    grad = torch.randn(3, 10, *size).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = conv(x)
    exact = x.detach().double().requires_grad_()
    parameters = [parameter.detach().double().requires_grad_() for parameter in conv.parameters()]
    expected = F.conv2d(exact, *parameters)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    actual = torch.autograd.grad(y, [x, *conv.parameters()], grad)
    wanted = torch.autograd.grad(expected, [exact, *parameters], grad.double())
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a.double(), w, rtol=tolerance, atol=4 * tolerance)
