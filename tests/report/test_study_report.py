"""The report of a study, on folders whose figures are known: tables, findings, pictures, and the page in a browser."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape

import markdown
import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.text import Text

from fastres.errors import UserError
from fastres.report import figures
from fastres.report.page import as_markdown, table
from fastres.report.results import read_results
from fastres.report.study import first_to, report, time_to, write_report
from fastres.report.style import styled

ACCURACIES = {  # test accuracy of each epoch, in percent
    "vgg": {0: [70, 81, 88, 92, 93, 91], 1: [72, 83, 89, 90, 95, 94]},
    "resnet": {0: [60, 72, 79, 84, 86, 88], 1: [62, 75, 81, 85, 88, 87]},
}
SECONDS = {"vgg": 2.0, "resnet": 9.0, "eager-vgg": 5.0, "eager-resnet": 30.0}  # of an epoch
IMAGES = 1000


def write_run(folder, model, accuracies, seconds, seed=0, **more):
    """The part of a run's folder that a report reads."""
    folder.mkdir(parents=True)
    epochs = range(1, len(accuracies) + 1)
    pd.DataFrame(
        {
            "epoch": epochs,
            "lr": 0.1,
            "train_loss": [2 / epoch for epoch in epochs],
            "train_accuracy": accuracies,
            "test_loss": [2.5 / epoch for epoch in epochs],
            "test_accuracy": accuracies,
            "epoch_seconds": seconds,
            "images_per_second": IMAGES / seconds,
            "data_wait_seconds": 0.0,
        }
    ).to_csv(folder / "history.csv", index=False)
    summary = {
        "model": model,
        "dataset": "cifar",
        "num_classes": 2,
        "train_images": IMAGES,
        "test_images": 200,
        "params_millions": 14.7,
        "epochs": len(accuracies),
        "best_selected_on": "test",
        "best_accuracy": max(accuracies),
        "last_accuracy": accuracies[-1],
        "test_loss": 0.25,
        "per_class_accuracy": {"cat": 90.0, "dog": 80.0},
        "confusion_matrix": [[90, 10], [20, 80]],
        "epoch_seconds": seconds,
        "images_per_second": IMAGES / seconds,
        "train_seconds": seconds * len(accuracies),
        "peak_memory_mb": 900.0,
        "device": "some GPU",
        "loader": "dali",
        "amp": "bf16",
        "channels_last": True,
        "compile": True,
        "cuda_graphs": True,
        "fused": True,
        "seed": seed,
        "versions": {"torch": "2.11"},
        "commit": "abc",
    }
    (folder / "summary.json").write_text(json.dumps(summary | more))


@pytest.fixture
def study():
    """study.json of two models with two seeds each, at full scale."""

    def run(name, label, gflop, published):
        folders = [f"{name}-seed{seed}" for seed in (0, 1)]
        return {
            "name": name, "label": label, "folders": folders, "eager_folder": f"eager-{name}", "forward_gflop": gflop,
            "published": published,
        }  # fmt: skip

    return {
        "study": "architecture",
        "title": "VGG <against> ResNet",
        "source": "Study A",
        "date": "2026-01-01 00:00 UTC",
        "scale": 1.0,
        "data_scale": 1.0,
        "overrides": {},
        "runs": [
            run("vgg", "VGG-16", 0.6, {"best_accuracy": 94.17, "epoch_seconds": 6.28}),
            run("resnet", "ResNet-50", 2.4, {"best_accuracy": 85.80, "epoch_seconds": 51.56}),
        ],
        "figures": [],
        "conjectures": [],
    }


@pytest.fixture
def report_of(study, tmp_path):
    """Writes the report of ``study`` as it is changed, and returns its Markdown."""
    for name, seeds in ACCURACIES.items():
        for seed, accuracies in seeds.items():
            write_run(tmp_path / f"{name}-seed{seed}", name, accuracies, SECONDS[name], seed)
        write_run(tmp_path / f"eager-{name}", name, [50.0], SECONDS[f"eager-{name}"])

    def write(price_per_hour=0.0, **changes):
        (tmp_path / "study.json").write_text(json.dumps(study | changes))
        return write_report(tmp_path, price_per_hour).with_suffix(".md").read_text()

    return write


@pytest.fixture
def text_of(report_of, study, tmp_path):
    """The Markdown alone, without drawing; ``report_of`` has made the runs."""

    def text(**changes):
        pictures = {"Seconds": "seconds.png", "Confusion": "confusion.png"}
        return report(study | changes, read_results(tmp_path, study | changes), pictures, 0.0)

    return text


def test_accuracy_is_mean_and_deviation_over_seeds_beside_the_published(report_of):
    report = report_of()
    assert "| **VGG-16** | 94.00 ± 1.41 | 92.50 ± 2.12 | 85.30 ± 0.71 | 9.17 ± 0.50 | 0.2500 ± 0.0000 |" in report
    assert "| *published* | 94.17 |" in report
    assert "± standard deviation over 2 seeds" in report


def judged(text):
    return [line.split(" | ") for line in text.splitlines() if re.search("(consistent|cannot be told.*) \\|$", line)]


def test_published_figures_are_judged(text_of, study):
    figures = judged(text_of())
    assert [row[0] for row in figures] == [
        "| VGG-16: best accuracy", "| ResNet-50: best accuracy", "| ResNet-50 minus VGG-16: best accuracy"
    ]  # fmt: skip
    # 93 and 95, of 200 test images: 94 +- t 1.4142 sqrt(1.5) and +- 1.96 1.68
    low = 94 - np.hypot(12.7062 * 1.41421 * 1.5**0.5, 1.95996 * 1.67929)
    assert figures[0][1:] == ["94.17", "94.00", "2", f"{low:.2f} to 100.00", "consistent |"]
    assert figures[2][1:3] == ["-8.37", "-6.00"]


@pytest.mark.parametrize(
    ("changes", "departures"),
    [
        ({"scale": 0.5}, "scale"),
        ({"overrides": {"dataset": "cifar100"}}, "--dataset"),
        ({"overrides": {"epochs": "3", "dataset": "folder", "workers": "1"}}, "--epochs"),
        ({"data_scale": 0.5, "overrides": {"train-fraction": "0.2", "amp": "off"}}, "scale, --train-fraction"),
    ],
)
def test_what_departs_from_the_originals_is_not_judged_but_for_parameters(changes, departures, text_of, study):
    run = study["runs"][0]
    text = text_of(**changes, runs=[run | {"published": run["published"] | {"params_millions": 15.7}}])
    assert f"are not judged, because these differ from the originals': {departures}." in text
    (row,) = judged(text)
    assert row[0] == "| VGG-16: million parameters"
    assert row[1] == "15.70"
    assert row[-1] == "not consistent |"


def test_cost_beside_eager_and_published(report_of):
    report = report_of(price_per_hour=100)
    assert (
        "| **resnet** | 2.400 | 14.70 | 9.00 ± 0.00 | 111 ± 0 | 900 ± 0 | 30.00 | 33.3 | 900 | 3.33 x | 51.56 |"
        in report
    )
    assert "| **VGG-16** | 4.0 ± 0.0 | 6.0 ± 0.0 | 8.0 ± 0.0 | 12.0 ± 0.0 | 0.3333 |" in report
    assert "| **ResNet-50** | 31.5 ± 6.4 | 40.5 ± 6.4 | not reached | 54.0 ± 0.0 | 1.5000 |" in report


def test_seconds_of_a_shared_machine_are_left_out(report_of, tmp_path):
    report = report_of(report_seconds=False, jobs=2)
    assert "| **VGG-16** | 94.00 ± 1.41 |" in report
    assert "| *published* | 94.17 |" in report
    assert "Other work shared the machine" in report
    for words in ("s/epoch", "images/s", "times as long", "first by", "against seconds", "own GPU"):
        assert words not in report
    assert not (tmp_path / "figures/accuracy-against-seconds-of-training.png").exists()
    pair = ["resnet", "vgg"]
    conjecture = {"text": "it is", "expect": "lower", "metric": "epoch_seconds", "before": pair, "after": pair}
    assert "Conjecture: it is. Not decided: seconds are left out." in report_of(
        report_seconds=False, conjectures=[conjecture]
    )


def test_findings_are_computed(report_of):
    report = report_of()
    for line in (
        "ResNet-50: best accuracy 88.00 %, 6.00 points lower than VGG-16 (94.00 %) (interval -18.71 to +6.71: they "
        "cannot be told apart); the study measured 8.37 points lower.",
        "ResNet-50 takes 4.5 times as long an epoch as VGG-16; the study measured 8.2; eager PyTorch 6.0; its "
        "arithmetic is 4.0 times as much.",
        "fastres trains vgg at 500 images/s, 2.5 times the 200 of eager PyTorch on the same machine.",
        "90 % is reached first by VGG-16, after 8.0 s of training.",
    ):
        assert f"- {line}\n" in report


def test_the_early_accuracy_is_compared_where_it_was_published(report_of, study):
    runs = [run | {"published": {"mean_accuracy": early}} for run, early in zip(study["runs"], (80, 70), strict=True)]
    line = (
        "- ResNet-50: mean accuracy of epochs 1 to 5 77.20 %, 8.10 points lower than VGG-16 (85.30 %) (interval -14.45 "
        "to -1.75); the study measured 10.00 points lower.\n"
    )
    assert line in report_of(runs=runs)


def test_every_run_has_its_seconds_beside_the_published(text_of):
    rows = [line.split(" | ") for line in text_of().splitlines() if line.startswith(("| **", "| *published"))]
    seconds = [row[8].removesuffix(" |") for row in rows if len(row) == 9]
    assert seconds == ["2.00 ± 0.00", "6.28", "9.00 ± 0.00", "51.56"]


LAST = [{"best_accuracy": 94.17, "last_accuracy": 93.63}, {"best_accuracy": 85.80, "last_accuracy": 85.80}]


def test_the_last_epoch_is_compared_where_it_was_published(text_of, study):
    line = (
        "- ResNet-50: accuracy at the last epoch 87.50 %, 5.00 points lower than VGG-16 (92.50 %) (interval -30.41 to "
        "+20.41: they cannot be told apart); the study measured 7.83 points lower.\n"
    )
    assert line not in text_of()
    assert line in text_of(runs=[run | {"published": last} for run, last in zip(study["runs"], LAST, strict=True)])


def test_where_the_source_contradicts_itself_and_what_is_within_its_noise(text_of, study):
    runs = [run | {"published": last} for run, last in zip(study["runs"], LAST, strict=True)]
    repeated = {"best_accuracy": [85.80, 85.77, 90.33], "last_accuracy": [80.0, 90.0]}
    content = text_of(runs=runs, repeated=repeated, notes=["It does not say why."])
    assert "### About the published figures\n\n- It does not say why.\n" in content
    assert (
        "as published: best accuracy 85.77, 85.80, 90.33. Differences below 4.56 are within the study's own noise."
        in content
    )
    assert "the study measured 8.37 points lower.\n" in content  # more than 4.56
    assert (
        "the study measured 7.83 points lower, less than the 10.00 between its own runs of the same settings.\n"
        in content
    )


@pytest.mark.parametrize(
    ("last", "end"),
    [((3, 2, 1), "the same at the last epoch"), ((1, 2, 3), "at the last epoch: Again; ResNet-50; VGG-16")],
)
def test_the_order_at_the_best_and_at_the_last_epoch(last, end, text_of, study):
    runs = [*study["runs"], study["runs"][1] | {"name": "again", "label": "Again"}]
    for run, best, final in zip(runs, (3, 2, 1), last, strict=True):
        run["published"] = {"best_accuracy": best, "last_accuracy": final}
    content = text_of(runs=runs)
    ours = "VGG-16; ResNet-50; Again"
    assert f"- From the highest best accuracy to the lowest: {ours}; the same at the last epoch.\n" in content
    assert f"- From the highest best accuracy to the lowest in the study: {ours}; {end}.\n" in content
    assert "From the highest" not in text_of(runs=runs[:2])


def test_phases_are_windows_of_epochs(text_of):
    phases = [{"label": "early", "epochs": [1, 3]}, {"label": "jump", "epochs": [5, 6]}]
    content = text_of(phases=phases)
    assert "| **VGG-16** | early | 1-3 | 80.50 ± 1.18 | 8.85 ± 0.32 | 17.50 ± 0.71 |" in content
    assert "| **ResNet-50** | jump | 5-6 | 87.25 ± 0.35 | 1.06 ± 0.50 | 0.50 ± 2.12 |" in content


def test_phases_are_scaled_as_the_epochs_are(text_of):
    phases = [{"label": "jump", "epochs": [50, 51]}, {"label": "plateau", "epochs": [80, 100]}]
    content = text_of(phases=phases, scale=0.05)
    for row in ("| jump | 2-3 |", "| plateau | 4-5 |"):
        assert content.count(row) == 2
    assert "plateau" not in text_of(phases=phases, scale=0.1)  # of 10 epochs, and the runs have 6


@pytest.mark.parametrize(
    ("metric", "expect", "found"),
    [
        ("best_accuracy", "higher", "Not decided: ResNet-50 minus VGG-16 is -6.00 (-18.71 to +6.71) points of best "
                                    "accuracy; the study measured -8.37."),
        ("mean_accuracy", "lower", "Yes: ResNet-50 minus VGG-16 is -8.10 (-14.45 to -1.75) points of mean accuracy of "
                                   "epochs 1 to 5."),
        ("spread", "lower", "Not decided: ResNet-50 minus VGG-16 is +1.24 (-1.58 to +4.07) points of spread in epochs "
                            "1 to 5."),
        ("params_millions", "lower", "Yes: ResNet-50 minus VGG-16 is -9.80 million parameters, 3.0 times."),
        ("test_loss", "lower", "No: ResNet-50 minus VGG-16 is +0.2500 (+0.2500 to +0.2500) of test loss."),
    ],
)  # fmt: skip
def test_a_claim_about_two_runs(metric, expect, found, text_of, study, tmp_path):
    pair = ["resnet", "vgg"]
    for path in tmp_path.glob("resnet-seed*/summary.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"params_millions": 4.9, "test_loss": 0.5}))
    conjecture = {"text": "it is", "expect": expect, "metric": metric, "before": pair, "after": pair}
    content = text_of(conjectures=[conjecture])
    assert f"- Conjecture: it is. {found}\n" in content
    assert "- ResNet-50: best accuracy 88.00 %" in content  # a claim about a change takes its place, this does not


def test_a_claim_that_one_epoch_cannot_decide(text_of, tmp_path):
    for path in tmp_path.glob("*/history.csv"):
        pd.read_csv(path)[:1].to_csv(path, index=False)
    pair = ["resnet", "vgg"]
    conjecture = {"text": "it is", "expect": "lower", "metric": "spread", "before": pair, "after": pair}
    assert "Conjecture: it is. Not decided: the runs are too short." in text_of(conjectures=[conjecture])


@pytest.mark.parametrize(
    ("expect", "pairs", "verdict"),
    [
        (
            "grows",
            [("resnet", "vgg"), ("vgg", "resnet")],
            "Not decided: VGG-16 minus ResNet-50 is +6.00 (-6.71 to +18.71)",
        ),
        (
            "grows",
            [("vgg", "resnet"), ("resnet", "vgg")],
            "Not decided: ResNet-50 minus VGG-16 is -6.00 (-18.71 to +6.71)",
        ),
        (
            "grows",
            [("vgg", "resnet"), ("vgg", "resnet")],
            "Not decided: VGG-16 minus ResNet-50 is +6.00 (-6.71 to +18.71)",
        ),
        (
            "stays positive",
            [("vgg", "resnet"), ("vgg", "resnet")],
            "Not decided: VGG-16 minus ResNet-50 is +6.00 (-6.71 to +18.71)",
        ),
    ],
)
def test_two_seeds_six_points_apart_decide_nothing(expect, pairs, verdict, report_of):
    conjecture = {"text": "it does", "expect": expect, "before": pairs[0], "after": pairs[1]}
    assert f"- Conjecture: it does. {verdict}" in report_of(conjectures=[conjecture])


@pytest.mark.parametrize(
    ("before", "after", "finding"),
    [
        ((-2, 1), (5, 1), "Not decided: C minus D is +5.00 (-7.71 to +17.71) points of best accuracy, and A minus B "
                          "-2.00 (-14.71 to +10.71)."),
        ((-20, 1), (6, 1), "Yes: C minus D is +6.00 (-6.71 to +18.71) points of best accuracy, and A minus B -20.00 "
                           "(-32.71 to -7.29)."),
        ((20, 1), (-6, 1), "No: C minus D is -6.00 (-18.71 to +6.71) points of best accuracy, and A minus B +20.00 "
                           "(+7.29 to +32.71)."),
        ((-2, None), (1, None), "Yes, by one seed: C minus D is +1.00 points of best accuracy, and A minus B -2.00."),
    ],
)  # fmt: skip
def test_a_change_is_decided_by_its_differences_by_seed(before, after, finding, text_of, study, tmp_path):
    """The change differs by 4 between the two seeds: its standard error is 2, and t of 1 degree of freedom is 12.7."""
    runs = []
    for name, (mean, error) in {"a": before, "b": (0, 0), "c": after, "d": (0, 0)}.items():
        seeds = [mean] if before[1] is None else [mean - error, mean + error]
        for seed, accuracy in enumerate(reversed(seeds) if name == "c" else seeds):
            write_run(tmp_path / f"{name}{seed}", "vgg", [70 + accuracy], 1.0, seed)
        folders = [f"{name}{seed}" for seed in range(len(seeds))]
        runs.append(study["runs"][0] | {"name": name, "label": name.upper(), "folders": folders})
    conjecture = {"text": "it does", "expect": "grows", "before": ["a", "b"], "after": ["c", "d"]}
    assert f"- Conjecture: it does. {finding}\n" in text_of(runs=runs, conjectures=[conjecture])
    if before[1] is not None:
        write_run(tmp_path / "d2", "vgg", [70], 1.0, 2)  # a seed that "c" has not
        runs[3] = runs[3] | {"folders": ["d0", "d1", "d2"]}
        assert f"- Conjecture: it does. {finding}\n" in text_of(runs=runs, conjectures=[conjecture])


def test_one_seed_has_no_deviation(report_of, study):
    runs = [run | {"folders": run["folders"][:1], "eager_folder": None} for run in study["runs"]]
    report = report_of(runs=runs)
    assert "±" not in report
    assert "eager" not in report
    other = [study["runs"][0] | {"folders": ["vgg-seed0"]}, study["runs"][1] | {"folders": ["resnet-seed1"]}]
    assert "| ResNet-50 minus VGG-16: best accuracy | -8.37 | -5.00 | 1 |" in report_of(runs=other)  # 88 and 93 %
    assert "| **VGG-16** | 93.00 | 91.00 | 84.80 | 9.52 | 0.2500 | 14.70 | 6 |" in report


def test_the_seconds_of_the_whole_process_by_phase(report_of, tmp_path):
    for path in tmp_path.glob("*/summary.json"):
        seed = json.loads(path.read_text())["seed"]
        phases = {"start_up": 2.0 + seed, "training": 10.0}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"phase_seconds": phases}))
    report = report_of()
    assert "| run | start-up | training | whole |" in report
    assert "| **VGG-16** | 2.5 | 10.0 | 12.5 |" in report


def test_one_epoch_has_no_spread(report_of, tmp_path):
    for path in tmp_path.glob("*/history.csv"):
        pd.read_csv(path)[:1].to_csv(path, index=False)
    assert "nan" not in report_of()


@pytest.mark.parametrize(
    ("device", "memory"),
    [
        ("some GPU", "Peak memory is what PyTorch reserved on the GPU"),
        ("CPU, 2 threads", "Peak memory is the process's resident memory"),
    ],
)
def test_how_it_was_measured(device, memory, report_of, tmp_path):
    for path in tmp_path.glob("*/summary.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"device": device}))
    report = report_of()
    for words in (
        "1000 training images and 200 test images of 2 classes (cat, dog)",
        f"device {device}; loader dali, amp bf16, channels-last True, compile True, cuda-graphs True, fused True",
        "torch 2.11; commit abc",
        "The best epoch is the best on the test set, as the published figures are.",
        "Published figures: Study A.",
        memory,
    ):
        assert words in report


def test_a_study_has_figures_of_its_own(report_of, tmp_path):
    report = report_of(figures=[{"title": "One", "runs": ["vgg"]}, {"title": "The other", "runs": ["vgg", "resnet"]}])
    for title, name in (("One", "one"), ("The other", "the-other")):
        assert f"### {title}\n\n![{title}](figures/{name}.png)" in report
        assert (tmp_path / f"figures/{name}.png").exists()
    assert "Accuracy and loss against epoch" not in report


def test_the_scale_is_everywhere(report_of, tmp_path):
    report = report_of(scale=0.1, data_scale=0.25, overrides={"device": "cpu"})
    line = "Scaled down: 10 % of the epochs and 25 % of the training images; changed on the command line: device cpu"
    assert f"**{line}**" in report
    assert f'<div class="subtitle">{line}</div>' in (tmp_path / "report.html").read_text()


def test_a_target_counts_as_reached_with_every_seed(report_of, study, tmp_path):
    assert "- 80 % is reached first by VGG-16, after 4.0 s of training.\n" in report_of()
    results = read_results(tmp_path, study)
    assert first_to(results, 80) == (4.0, "VGG-16")
    assert time_to(results[0], 94) == "10.0 (1 of 2 seeds)"
    assert first_to(results, 92.5) == (10.0, "VGG-16")
    assert first_to(results, 94) is None  # with one of two seeds


def test_figures_show_what_was_measured(report_of, study, tmp_path):
    report_of()
    results = read_results(tmp_path, study)
    confused, *_ = figures.confusion(results, "").axes
    shown = {text.get_position(): text.get_text() for text in confused.texts}  # by predicted and true class
    assert shown == {(0, 0): "90.0", (1, 0): "10.0", (0, 1): "20.0", (1, 1): "80.0"}
    assert (confused.get_xlabel(), confused.get_ylabel()) == ("predicted", "true, % of its images")

    accuracy, loss = figures.curves(results, "").axes
    test, train = (line.get_ydata() for line in loss.lines[:2])
    np.testing.assert_allclose(test, [2.5 / epoch for epoch in range(1, 7)])
    np.testing.assert_allclose(train, [2 / epoch for epoch in range(1, 7)])
    assert accuracy.lines[2].get_xydata().tolist() == [[1.0, 94.17]]  # published
    assert accuracy.lines[2].get_marker() == "<"
    classes = {"per_class_accuracy": {"x": 1, "y": 2, "z": 3}, "confusion_matrix": np.eye(3).tolist()}
    for path in tmp_path.glob("resnet-*/summary.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | classes))
    _, other = figures.confusion(read_results(tmp_path, study), "").axes
    assert [label.get_text() for label in other.get_xticklabels()] == ["x", "y", "z"]

    shade = accuracy.collections[0].get_paths()[0].get_extents()
    assert (shade.ymin, shade.ymax) == (70, 95)

    (axes,) = figures.pareto(results, "").axes
    vgg, resnet, front = (line.get_xydata().tolist() for line in axes.lines)
    means = [sum(seeds) / 2 for seeds in zip(*ACCURACIES["vgg"].values(), strict=True)]
    assert vgg == [[2.0 * epoch, accuracy] for epoch, accuracy in enumerate(means, 1)]
    best, expected = 0.0, []
    for seconds, accuracy in sorted(vgg + resnet):
        best = max(best, accuracy)
        expected.append([seconds, best])
    assert front == expected


def shown(page, tag):
    """The texts of a page's elements ``tag``."""
    found = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page, re.DOTALL)
    return [" ".join(html.unescape(re.sub("<[^>]*>", "", text)).split()) for text in found]


@settings(max_examples=300, deadline=None)
@given(st.text("ab1 .|\\`*_[](){}#<>&~!-+=:$\"'/;é", min_size=1, max_size=12).filter(str.strip))
@example("~~a~~")
@example("__init__")
@example("1. a")
def test_a_label_is_text(label):
    """In the page and in what else shows Markdown with tables, as GitHub does."""
    text, label = as_markdown(label), " ".join(label.split())
    cells = table(["run", "value"], [[f"**{text}**", text], ["a", "b"]])
    source = f"# {text}\n\n- {text}\n- in {text} between\n\n{cells}\n\n![{text}](figures/a.png)\n"
    for page in (
        markdown.markdown(source, extensions=["tables"]),
        MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(source),
    ):
        assert shown(page, "h1") == [label]
        assert shown(page, "li") == [label, f"in {label} between"]
        assert shown(page, "td") == [label, label, "a", "b"]
        (alternative,) = re.findall(r'<img [^>]*alt="([^"]*)"', page)
        assert " ".join(html.unescape(alternative).split()) == label


LABEL = '_lr $x_$ y 0.1 | <b>warm-up</b> 5 "a" src="figures/x.png"'


def test_labels_are_text_in_the_report_and_its_pictures(report_of, study, tmp_path):
    runs = [run | {"label": f"{LABEL} {run['name']}"} for run in study["runs"]]
    report_of(runs=runs, title=LABEL, overrides={"classes": LABEL}, figures=[{"title": LABEL, "runs": ["vgg"]}])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert shown(page, "h1") == shown(page, "title") == [LABEL]
    assert LABEL in shown(page, "h3")
    rows = [shown(row, "td") for row in re.findall("<tr>.*?</tr>", page, re.DOTALL)]
    accuracy, *_, times = (row for row in rows if row and row[0] == f"{LABEL} vgg")
    assert accuracy[1] == "94.00 ± 1.41"
    assert times[1] == "4.0 ± 0.0"
    assert any(line.startswith(f"{LABEL} resnet: best accuracy 88.00 %") for line in shown(page, "li"))


def test_labels_are_text_in_pictures(report_of, study, tmp_path):
    report_of()
    results = [replace(result, label=f"{LABEL} {result.name}") for result in read_results(tmp_path, study)]
    for draw in (figures.curves, figures.pareto, figures.confusion):
        figure = styled(draw)(results, "a $x_$ b")
        texts = {text.get_text(): text for text in figure.findobj(Text)}
        for words in (f"{LABEL} vgg", f"{LABEL} resnet", "a $x_$ b"):
            assert not texts[words].get_parse_math()
        figure.savefig(tmp_path / "drawn.png")


def test_figures_have_files_of_their_own(report_of, tmp_path):
    titles = ["One: two", "One, two", "One, two", "日本", "Confusion of the best epoch", 300 * "long "]
    report = report_of(figures=[{"title": title, "runs": ["vgg"]} for title in titles])
    pictures = re.findall(r"^!\[(.*)\]\((.*)\)$", report, re.M)
    titles[-1] = titles[-1].strip()
    assert [title for title, _ in pictures] == [
        *titles, "Accuracy against seconds of training", "Confusion of the best epoch",
    ]  # fmt: skip
    paths = [path for _, path in pictures]
    assert len(set(paths)) == len(paths)
    assert all((tmp_path / path).exists() and path.isascii() for path in paths)


def test_the_fastest_of_two_runs_of_one_label(report_of, study, tmp_path):
    report_of()
    results = [replace(result, label="the same") for result in read_results(tmp_path, study)]
    assert first_to(results, 80) == (4.0, "the same")


def test_the_users_texts_are_shown_as_they_are(text_of, study):
    text = "1. *a* _b_ | `c` <i>d</i> &amp; ~~e~~ [f](g) # {{ 1 + 1 }} \\"
    runs = [run | {"label": text} for run in study["runs"]]
    pair = ["resnet", "vgg"]
    content = text_of(
        title=text,
        source=text,
        overrides={"device": text},
        runs=runs,
        notes=[text],
        phases=[{"label": text, "epochs": [1, 2]}],
        conjectures=[{"text": text, "expect": "higher", "before": pair, "after": pair}],
    )
    page = markdown.markdown(content, extensions=["tables"])
    shown = [unescape(re.sub("<[^>]*>", "", line)) for line in page.splitlines()]
    for line in (
        text,  # the title, a note, cells of tables
        f"Full scale; changed on the command line: device {text}",
        f"Conjecture: {text}. Not decided: {text} minus {text} is -6.00 (-18.71 to +6.71) points of best accuracy; "
        "the study measured -8.37.",
        f"90 % is reached first by {text}, after 8.0 s of training.",
    ):
        assert line in shown
    assert any(line.endswith(f"Published figures: {text}.") for line in shown)
    cells = 2 * 4  # two runs in the tables of accuracy and time, and twice in that of phases
    assert shown.count(text) == 1 + 1 + cells


def test_a_run_that_is_not_there(report_of, tmp_path):
    shutil.rmtree(tmp_path / "resnet-seed1")
    with pytest.raises(UserError, match=r"missing or damaged .*resnet-seed1.*add --resume"):
        report_of()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "[]", "holds no summary"),
        ("summary.json", "{}", "has no proper model; is it of another version"),
        ("summary.json", '{"model": 3}', "has no proper model"),
        ("history.csv", "", "No columns"),
        ("history.csv", "epoch,test_accuracy\n1,50", "no proper row of epoch 1"),
    ],
)
def test_a_run_that_is_damaged(name, content, message, report_of, tmp_path):
    report_of()
    (tmp_path / "vgg-seed0" / name).write_text(content)
    with pytest.raises(UserError, match=rf"vgg-seed0/{name}: .*{message}.*; delete damaged ones and add --resume"):
        report_of()


def test_the_page_needs_nothing_beside_it(report_of, tmp_path):
    report_of()
    page = (tmp_path / "report.html").read_text()
    assert "VGG &lt;against&gt; ResNet" in page
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_the_page_opens_in_a_browser_with_its_pictures(report_of, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium on PATH")
    report_of()
    page = tmp_path / "alone" / "report.html"
    page.parent.mkdir()
    sizes = "<script>onload = () => document.title = [...document.images].map(image => image.naturalWidth)</script>"
    page.write_text((tmp_path / "report.html").read_text() + sizes)
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60)
    widths = [int(width) for width in re.search(r"<title>(.*?)</title>", done.stdout)[1].split(",")]
    assert len(widths) == 3
    assert min(widths) > 500


@pytest.mark.parametrize(
    ("margin", "found"),
    [(40.0, "Yes"), (1.0, "Not decided"), (0.01, "Not decided")],
)
def test_equivalence_is_decided_by_the_interval_of_90_percent(margin, found, text_of, tmp_path):
    """The differences at the last epoch are -3 and -7 points: -5, and 6.31 times the standard error of 2."""
    pair = ["resnet", "vgg"]
    losses = {("resnet", 0): [2.0, 1.0], ("resnet", 1): [2.2, 1.2], ("vgg", 0): [2.0, 1.1], ("vgg", 1): [2.5, 1.2]}
    for (name, seed), values in losses.items():
        path = tmp_path / f"{name}-seed{seed}/summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"first_losses": values}))
    conjecture = {
        "text": "they are", "expect": "equivalent", "metric": "last_accuracy", "margin": margin, "before": pair,
        "after": pair,
    }  # fmt: skip
    content = text_of(conjectures=[conjecture])
    assert f"{found}: ResNet-50 minus VGG-16 is -5.00 (-17.63 to +7.63) points of accuracy at the last epoch" in content
    assert "| 1 | 2.25 | 2.1 | 0.3 |" in content  # of seed 1, 2.5 and 2.2
    path.write_text(json.dumps(json.loads(path.read_text()) | {"first_losses": []}))  # resumed after the first steps
    assert "| 1 | 2 | 2.1 | 0 |" in text_of(conjectures=[conjecture])
