import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres.nn import BatchNormReLU2d, EagerBatchNormReLU2d


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


class Net(nn.Module):
    """Three residual blocks, small but with everything that a ResNet does with the layer."""

    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stem_norm = norm(16)
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(6))
        self.norms = nn.ModuleList(norm(16) for _ in range(6))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.stem_norm(self.stem(x))
        for i in range(0, 6, 2):
            y = self.norms[i](self.convs[i](x))
            x = self.norms[i + 1](self.convs[i + 1](y), x)
        return self.head(x.mean([2, 3]))


def losses_of_fifty_steps(norm):
    generator = torch.Generator().manual_seed(0)
    x, label = torch.randn(32, 3, 10, 10, generator=generator), torch.randint(10, (32,), generator=generator)
    torch.manual_seed(0)
    net = Net(norm).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    losses = []
    for _ in range(50):
        loss = F.cross_entropy(net(x.to(memory_format=torch.channels_last)), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_fifty_steps_of_training_fused_and_eager():
    fused, eager = losses_of_fifty_steps(BatchNormReLU2d), losses_of_fifty_steps(EagerBatchNormReLU2d)
    torch.testing.assert_close(fused, eager, rtol=0, atol=1e-4)
    assert fused[-1] < 0.9 * fused[0]
