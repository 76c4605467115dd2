"""What the README tells a user to write works as it stands."""

import re
from pathlib import Path

import torch

from fastres.models import create_model
from fastres.studies import load_study
from fastres.training.checkpoint import save_weights

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(language, word):
    """The code block of the README that has ``word`` in it."""
    (found,) = (code for code in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if word in code)
    return found


def test_the_weights_of_a_run_can_be_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/RUN"
    folder.mkdir(parents=True)
    save_weights(create_model("resnet18", 10), folder / "best.safetensors")
    names = {}
    exec(block("python", "load_weights"), names)
    assert names["logits"].shape == (1, 10)


def test_the_operator_can_be_used_in_a_block_of_ones_own():
    names = {}
    exec(block("python", "BatchNormReLU2d"), names)
    x = torch.randn(2, 8, 6, 6)
    module = names["Block"](8)
    assert module(x).shape == x.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_a_study_of_ones_own_can_be_read(tmp_path):
    (tmp_path / "mine.toml").write_text(block("toml", "[runs"))
    assert [run.name for run in load_study(str(tmp_path / "mine.toml")).runs] == ["low", "high"]
