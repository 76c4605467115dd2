"""fastres compare on folders whose figures are known, and on real runs."""

import json

import pytest

from fastres import compare
from tests.conftest import CommandLine
from tests.report.test_study_report import write_run

GOOD, BAD = (93.0, 94.0, 93.6), (91.0, 91.9, 91.5)  # accuracies of three seeds


@pytest.fixture
def command_line(capfd):
    return CommandLine(capfd, compare.main)


def write(folder, accuracy, seed, **settings):
    """A finished run's config.json, history and summary."""
    write_run(folder, "vgg16", [accuracy / 2, accuracy], 2.0, seed)
    asked = {"model": "vgg16", "lr": 0.01, "seed": seed, "output_dir": None, "amp": "auto"} | settings
    chosen = {"amp": "bf16", "output_dir": str(folder)}
    (folder / "config.json").write_text(json.dumps({"asked": asked, "chosen": chosen}))


@pytest.fixture
def runs(tmp_path):
    for name, accuracies, lr in (("good", GOOD, 0.01), ("bad", BAD, 0.1)):
        for seed, accuracy in enumerate(accuracies):
            write(tmp_path / f"{name}-seed{seed}", accuracy, seed, lr=lr)
    return tmp_path


def test_two_groups_paired_by_seed(command_line, runs):
    assert command_line(*runs.glob("good-*"), *runs.glob("bad-*")) == 0
    text = " ".join(command_line.out.split())
    assert "bad is less accurate than good: 91.47 % and 93.53 % at the last epoch" in text
    assert "(paired by 3 seeds, Student's t with 2 degrees of freedom)" in text
    assert "lr 0.01 0.1" in text  # the one difference
    assert "amp" not in text


def test_the_page_has_both_pictures_inside(command_line, runs, tmp_path):
    assert command_line(*runs.glob("*-seed*"), "--output-dir", tmp_path / "out") == 0
    page = (tmp_path / "out/compare.html").read_text()
    assert page.count("data:image/png") == 2
    assert "-2.07 (-2.21 to -1.92)" in page or "+2.07 (+1.92 to +2.21)" in page
    assert (tmp_path / "out/compare.md").exists()


def test_single_runs_are_not_judged(command_line, runs):
    assert command_line(runs / "good-seed0", runs / "bad-seed0") == 0
    assert "There are too few runs to tell them apart" in command_line.out


def test_other_seeds_are_compared_unpaired(command_line, runs):
    for seed, accuracy in enumerate(BAD, start=7):
        write(runs / f"other-seed{seed}", accuracy, seed, lr=0.1)
    assert command_line(*runs.glob("good-*"), *runs.glob("other-*")) == 0
    assert "unpaired, Welch's t" in " ".join(command_line.out.split())


def test_one_group_has_its_means(command_line, runs):
    assert command_line(*runs.glob("good-*")) == 0
    assert "93.53 ± 0.50" in command_line.out
    assert "minus" not in command_line.out


def test_bad_input(command_line, runs, tmp_path):
    assert "config.json: not readable" in command_line.one_line(tmp_path / "nowhere")
    write(tmp_path / "again", 90.0, 0)
    assert "the same settings and seed" in command_line.one_line(runs / "good-seed0", tmp_path / "again")
    write(tmp_path / "x/good-seed0", 90.0, 0, lr=0.5)
    assert "two groups are called good" in command_line.one_line(runs / "good-seed0", tmp_path / "x/good-seed0")
    (runs / "bad-seed0/history.csv").write_text("epoch\n1\n")
    assert "history.csv" in command_line.one_line(runs / "bad-seed0")
    (runs / "bad-seed1/config.json").write_text("[]")
    assert "config.json: not the settings of a run" in command_line.one_line(runs / "bad-seed1")
