"""fastres compare on folders whose figures are known, and on real runs."""

import json
import math

import pandas as pd
import pytest

from fastres import compare
from fastres.report.compare import time_to_target
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


def test_a_run_in_the_working_folder_has_its_name(command_line, runs, monkeypatch):
    monkeypatch.chdir(runs / "bad-seed0")
    assert command_line(".", runs / "good-seed0") == 0
    assert "bad" in command_line.out.split()


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


def amend(folder, **summary):
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | summary))


def test_selection_targets_and_looks(command_line, runs):
    for name in ("good", "bad"):
        for seed in range(3):
            amend(
                runs / f"{name}-seed{seed}", best_selected_on="validation", best_accuracy=90.0 + seed,
                best_on_test_accuracy=95.0, selection_gain=0.25, test_evaluations=3, target_accuracy=92.0,
                phase_seconds={"start_up": 2.0, "training": 10.0 + seed},
                target_seconds=None if seed == 2 and name == "bad" else 10.0 + seed, joules=None, train_flop=2e12,
            )  # fmt: skip
    assert command_line(*runs.glob("good-*"), *runs.glob("bad-*"), "--output-dir", runs / "out") == 0
    text = (runs / "out/compare.md").read_text()
    assert "these 6 runs have looked at it 18 times" in " ".join(text.split())
    for words in (
        "| accuracy, best on validation, % | 91.00 ± 1.00 | 91.00 ± 1.00 | +0.00 (+0.00 to +0.00) |",
        "| gained by selecting the best, points | 0.25 ± 0.00 |",
        "| arithmetic, TFLOP | 2.0 ± 0.0 |",
        "| of the whole process: training, s | 11.0 | 11.0 |",
        "| seconds of training to 92 %, median | 11.0; 3 of 3 reached it | 11.0; 2 of 3 reached it |",
    ):
        assert words in text
    assert "energy" not in text


def test_the_median_time_to_a_target_has_an_interval_of_its_order_statistics():
    times = pd.Series([5.0, 1.0, 3.0, 2.0, 4.0, 6.0, 7.0, 8.0, math.nan])
    assert time_to_target(times) == "5.0 (2.0 to 8.0); 8 of 9 reached it"  # 0.96 of the binomial is from 2 to 8
    assert time_to_target(pd.Series([math.nan, math.nan, 1.0])) == "not reached; 1 of 3 reached it"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("joules", "many"), ("wall_seconds", "1"), ("selection_gain", [1]), ("target_accuracy", "high"),
        ("test_evaluations", "x"), ("phase_seconds", 3), ("phase_seconds", {"training": "x"}), ("first_losses", ["x"]),
    ],
)  # fmt: skip
def test_a_damaged_figure(name, value, command_line, runs):
    amend(runs / "good-seed0", **{name: value})
    assert f"good-seed0/summary.json: has no proper {name}; is it of another" in command_line.one_line(
        *runs.glob("good-*")
    )


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
