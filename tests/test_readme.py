"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

from fastres.studies import load_study

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.usefixtures("tiny_vgg11")
def test_the_python_works_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks("python"):
        exec(code, names)
    shown = capsys.readouterr().out
    assert shown.splitlines()[-2:] == ["torch.Size([50, 3, 32, 32]) torch.Size([50])"] * 2
    x = torch.randn(2, 8, 6, 6)
    module = names["Block"](8)
    assert module(x).shape == x.shape
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_a_study_of_ones_own_can_be_read(tmp_path):
    (block,) = blocks("toml")
    (tmp_path / "mine.toml").write_text(block)
    assert [run.name for run in load_study(str(tmp_path / "mine.toml")).runs] == ["low", "high"]
