"""Muon against torch's, which takes matrices."""

import numpy as np
import pytest
import torch
from torch import nn

from fastres.config import TrainConfig
from fastres.models import create_model
from fastres.training import muon
from fastres.training.optimizer import create_optimizer, set_lr
from tests.training.test_trainer import make_trainer, random_batches, train_epoch

SETTINGS = {"optimizer": "muon", "lr": 0.03, "sgd_lr": 0.1, "weight_decay": 0.01, "momentum": 0.9, "cuda_graphs": False}


@pytest.mark.parametrize("channels_last", [True, False])
def test_convolutions_go_by_muon_and_the_rest_by_sgd(channels_last, monkeypatch):
    monkeypatch.setattr(muon, "COEFFICIENTS", [(3.4445, -4.7750, 2.0315)] * 5)  # torch's
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 24, 1), nn.Conv2d(24, 6, 3), nn.Flatten(), nn.Linear(6, 4)
    ).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    optimizer = create_optimizer(model, TrainConfig(**SETTINGS), torch.device("cpu"))
    convolutions = [model[2].weight, model[3].weight]
    matrices = [nn.Parameter(p.detach().movedim(1, -1).flatten(1).clone()) for p in convolutions]
    rest = {name: p for name, p in model.named_parameters() if name not in ("2.weight", "3.weight")}
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in rest.items()}
    torch_muon = torch.optim.Muon(matrices, lr=0.03, momentum=0.9, weight_decay=0.01)
    decayed = [p for p in copies.values() if p.ndim > 1]
    plain = [p for p in copies.values() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": plain}]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    for factor in (0.5, 1.0, 0.1):
        set_lr(optimizer, 0.03 * factor)
        for group in torch_muon.param_groups:
            group["lr"] = 0.03 * factor
        for group in sgd.param_groups:
            group["lr"] = 0.1 * factor
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for matrix, p in zip(matrices, convolutions, strict=True):
            matrix.grad = p.grad.movedim(1, -1).flatten(1)
        for name, p in rest.items():
            copies[name].grad = p.grad
        for step in (optimizer, torch_muon, sgd):
            step.step()
    for matrix, p in zip(matrices, convolutions, strict=True):
        torch.testing.assert_close(p.movedim(1, -1).flatten(1), matrix, rtol=0, atol=2e-3)  # the updates are bfloat16
    for name, p in rest.items():
        torch.testing.assert_close(p, copies[name])


def near(matrices):
    return muon.orthogonalized(matrices).double()


def in_float64(matrices):
    u, s, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for a, b, c in muon.COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return (u * s[:, None]) @ v


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 64, 16), (2, 24, 48), (1, 7, 7)], ids=str)
def test_singular_values_come_near_1(shape):
    torch.manual_seed(0)
    matrices = (torch.randn(shape) * 1e-3).bfloat16()
    values = torch.linalg.svdvals(near(matrices))
    assert values.max() < 1.3
    assert values[:, : min(shape[1:]) // 2].min() > 0.6
    expected = in_float64(matrices)
    assert (near(matrices) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("shape", [(64, 576), (256, 64), (32, 32)], ids=str)
@pytest.mark.parametrize("decay", [1, 2])
def test_rounding_errors_do_not_grow_in_matrices_of_low_rank(shape, decay):
    """Most singular values, i^-decay of the largest, are below the rounding error of the Gram matrix."""
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(2, *shape), full_matrices=False)
    matrices = ((u * torch.arange(1.0, 1 + s.size(1)) ** -decay) @ v).bfloat16()
    expected = in_float64(matrices)
    assert (near(matrices) - expected).norm() < 0.2 * expected.norm()
    assert torch.linalg.svdvals(near(matrices)).max() < 1.7


def test_no_step_could_be_nearer_to_1():
    """The error of each polynomial has the same size and alternating signs at 4 points, which makes it the nearest."""
    low, high = 0.01, 1.0
    for a, b, c in muon.COEFFICIENTS:
        turns = np.sqrt(np.roots([5 * c, 3 * b, a]))  # the derivative's zeros
        points = np.array([low, *sorted(turns), high])
        errors = a * points + b * points**3 + c * points**5 - 1
        assert all(low < turn < high for turn in turns)
        np.testing.assert_allclose(errors, errors[3] * np.array([-1, 1, -1, 1]), atol=1e-3)
        low, high = 1 - errors[3], 1 + errors[3]
    assert (low, high) == pytest.approx((0.73, 1.27), abs=0.01)


def test_every_convolution_of_a_network_but_the_stem():
    model = create_model("resnet18", 10)
    optimizer = create_optimizer(model, TrainConfig(**SETTINGS), torch.device("cpu"))
    (group,) = [group for group in optimizer.param_groups if group.get("muon")]
    expected = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d) and m is not model.conv1}
    assert {id(p) for p in group["params"]} == expected
    (plain,) = [group for group in optimizer.param_groups if group["weight_decay"] == 0]
    assert {p.ndim for p in plain["params"]} == {1}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_it_learns():
    batches = random_batches([16] * 8)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip
    trainer = make_trainer(batches, model, **{k: v for k, v in SETTINGS.items() if k != "cuda_graphs"})
    losses = [train_epoch(trainer, batches, number).loss for number in range(5)]
    assert losses[-1] < 0.6 * losses[0]
