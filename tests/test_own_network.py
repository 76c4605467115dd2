"""``--model file.py:function`` on the command line: trained, continued and evaluated, and never imported unasked."""

import json

import pytest

from fastres import models
from fastres.config import TrainConfig, over_recipe
from fastres.profiling import roofline
from fastres.training import cost

NET = """
from torch import nn

def net(num_classes):
    open("imported", "a").write("x")
    body = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.GroupNorm(2, 8), nn.GELU()
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""


@pytest.fixture
def net(own_models, tmp_path, monkeypatch):
    """The name of a network of one's own, and the file that it leaves wherever it is called."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NET)
    return "nets.py:net", tmp_path / "imported"


def test_a_network_of_ones_own(command_line, flags, net, tmp_path):
    name, imported = net
    run = tmp_path / "run"
    assert command_line(*flags, "--model", name, "--image-size-schedule", "16:0.5", "--init", "dirac") == 0
    line = "model nets.py:net: 0.00 M parameters, 0.000 GMAC forward; the limit leaves out GELU, GroupNorm"
    assert line in command_line.out
    assert json.loads((run / "config.json").read_text())["asked"]["model"] == name
    models.MODELS.pop(name)
    imported.unlink()
    for action in ("--resume", "--eval"):
        message = (
            "--model nets.py:net: a function is imported only where it is given as a flag or argument; add --model"
        )
        assert message in command_line.one_line(action, run)
        assert not imported.exists()
    assert command_line("--resume", run, "--epochs", 3, "--model", f"{tmp_path}/{name}") == 0
    assert command_line("--eval", run, "--model", name) == 0
    assert f"is a run with {tmp_path}/nets.py:net; leave" in command_line.one_line("--eval", run, "--model", "resnet18")
    assert "--zero-gamma: nets.py:net has no residual blocks" in command_line.one_line(
        *flags[:-1], tmp_path / "other", "--model", name, "--zero-gamma"
    )


ODD = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.layers = nn.Parameter(torch.ones(2, 1, 1))
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.again = self.conv
        self.deep = nn.Conv2d(3, 4, 3, 2)
        self.last = nn.Conv2d(4, num_classes, 3, 2)
        self.norm = nn.BatchNorm1d(num_classes)

    def forward(self, x):
        x = self.again(self.conv(x * self.scale + self.shift).relu()) * self.layers.mean()
        return self.norm(self.last(self.deep(x)).mean((2, 3)))

class Two(Tied):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits) if self.training else logits

class Early(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.parts = nn.Sequential(nn.Conv2d(3, num_classes, 3, 2), nn.BatchNorm2d(num_classes), nn.ReLU())

    def forward(self, x):
        return self.parts[1](self.parts[0](x)).mean((2, 3))
"""


def test_a_function_called_like_a_model(command_line, flags, net, tmp_path):
    (tmp_path / "nets.py").write_text(NET + "\nresnet18 = net\n")
    assert command_line(*flags, "--model", "nets.py:resnet18") == 0
    assert "is a run with nets.py:resnet18; leave" in command_line.one_line(
        "--eval", tmp_path / "run", "--model", "resnet18"
    )


def test_odd_networks_of_ones_own(command_line, flags, net, tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text(ODD)
    monkeypatch.setitem(cost.MEASURED_FLOP, "cpu", 1.0)
    monkeypatch.setattr(roofline, "MEASURE_SECONDS", 0.01)
    monkeypatch.setitem(roofline.MATRIX_SIZE, "cpu", 64)
    run = tmp_path / "run"
    assert command_line(*flags, "--model", "odd.py:Tied", "--recipe", "fast") == 0
    assert command_line("--eval", run, "--model", "odd.py:Tied") == 0
    assert "is a run with odd.py:Tied; leave" in command_line.one_line("--eval", run, "--model", "odd.py:Two")
    assert command_line(*flags, "--model", "odd.py:Early", "--no-fused", "--output-dir", tmp_path / "early") == 0
    assert json.loads((tmp_path / "early/summary.json").read_text())["share_of_limit"] > 0
    assert command_line(*flags, "--model", "odd.py:Two", "--output-dir", tmp_path / "two") == 2
    assert "--model odd.py:Two: fails in a step (TypeError: cross_entropy_loss()" in command_line.err
    assert command_line(*flags, "--model", "odd.py:Tied", "--sync-bn", "--output-dir", tmp_path / "sync") == 0
    assert "; --sync-bn leaves BatchNorm1d as it is" in command_line.out


def test_a_network_of_ones_own_is_no_vgg():
    for name in ("vgg_like.py:net", "vggs:vgg11"):
        assert over_recipe({"model": name, "recipe": "fast"})["image_size_schedule"] == "16:0.5,24:0.85"
        large = {"model": name, "recipe": "fast", "image_size": 1000}
        assert TrainConfig(**over_recipe(large)).image_size_schedule == "500:0.5,750:0.85"
        assert TrainConfig(model=name, image_size_schedule="16:0.5").model == name


def test_the_folder_of_a_network_of_ones_own(command_line, flags, net, tmp_path):
    assert command_line(*flags[:-2], "--model", f"{tmp_path}/nets.py:net", "--no-fused") == 0
    assert [path.name[:12] for path in (tmp_path / "runs").iterdir()] == ["net-folder-2"]
