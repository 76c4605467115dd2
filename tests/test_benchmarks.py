"""The README's tables come from measured files, and the GPU script goes on when a step fails."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastres.config import DATASET_DEFAULTS, Parser, TrainConfig, add_flags, over_recipe
from fastres.data.datasets import synthetic
from fastres.report.study import write_report

ROOT = Path(__file__).parents[1]


def script(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


sys.path.append(str(ROOT / "benchmarks"))  # as pytest does for what is there
render, keep_run, interleave = script("render"), script("keep_run"), script("interleave")

VERSIONS = {"torch": "2.11.0"}


def profile(date, median):
    row = {
        "name": "eager",
        "epoch_seconds": {"median": median, "p20": 3.0, "p80": 5.0},
        "images_per_second": 12500.4,
        "times_eager": 1.0,
        "data_wait_fraction": 0.312,
        "peak_memory_mb": 1234.5,
        "limit_share": 0.25,
    }
    return {
        "model": "vgg16",
        "dataset": "synthetic",
        "images_per_epoch": 50_000,
        "batch_size": 128,
        "augmentation": "crop-flip",
        "config": {"model": "vgg16", "seconds": 150.0, "data_dir": "data", "compile_variant": True, "trace": True},
        "rounds": 5,
        "steps_per_round": 40,
        "steps_per_epoch": 390,
        "device": "Some GPU",
        "limit_epoch_seconds": 1.0,
        "variants": [row],
        "versions": VERSIONS,
        "commit": "0123456789abcdef-dirty",
        "date": date,
    }


def benchmarks(*measured, gpu=None):
    return {
        "machine_info": {"fastres": {"cpu": "Some CPU", "gpu": gpu, "versions": VERSIONS, "commit": "0123456789"}},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [{"name": name, "extra_info": extra} for name, extra in measured],
    }


def readme(name):
    return f"above\n<!-- results:{name} -->\nold\n<!-- /results:{name} -->\nbelow"


def test_the_newest_profile_is_shown():
    text = render.render(readme("profile"), [profile("2026-02-01 10:00", 4.0), profile("2026-01-01 10:00", 9.0)])
    assert "| eager | 4.00 | 3.00 to 5.00 | 12,500 | 1.00 | 31.2 % | 1,234 | 25 % |" in text
    assert "5 rounds of 40 of 390 steps; torch 2.11.0, commit 0123456-dirty, 2026-02-01 10:00" in text
    assert "`python -m fastres.profile --model vgg16 --seconds 150 --compile-variant`" in text
    assert "9.00" not in text
    assert "old" not in text
    assert text.startswith("above\n<!-- results:profile -->\n")
    assert text.endswith("\n<!-- /results:profile -->\nbelow")
    assert render.render(text, [profile("2026-02-01 10:00", 4.0)]) == text


def test_benchmarks_are_shown_by_what_they_measured():
    contents = [
        benchmarks(
            (
                "test_loader[arrays-cpu]",
                {
                    "what": "loader",
                    "images": "arrays",
                    "device": "cpu",
                    "images_per_second": {"eager": {"p50": 6800.0}, "dali": {"p50": 52000.0}},
                    "times_as_long": {"eager": {"p50": 7.6}},
                },
            ),
            (
                "test_step[vgg16]",
                {
                    "what": "step",
                    "model": "vgg16",
                    "batch_size": 32,
                    "seconds": {"eager": {"p50": 0.4}, "fastres": {"p50": 0.1}},
                    "times_as_long": {"eager": {"p50": 4.0}},
                },
            ),
            *(
                (
                    f"test_batch_norm_relu[{shape}-forward+backward-residual]",
                    {"times_as_long": {"eager": {"p50": eager}, "compile": {"p50": 1.5}, "copy": {"p50": 0.9}}},
                )
                for shape, eager in (("64x32x32", 2.0), ("128x16x16", 3.0), ("256x8x8", 4.0))
            ),
        )
    ]
    measured = "2026-01-02, torch 2.11.0, 0123456 |"
    assert f"| Some CPU | arrays | 6,800 | 52,000 | 7.6 | {measured}" in render.render(readme("loaders"), contents)
    assert f"| Some CPU | `vgg16` | 32 | 400.0 | 100.0 | 4.00 | {measured}" in render.render(readme("steps"), contents)
    assert f"| Some CPU | forward+backward | residual | 3.00 | 1.50 | 0.90 | {measured}" in render.render(
        readme("operator"), contents
    )


def step(seconds):
    return {
        "what": "step", "model": "vgg16", "batch_size": 32, "times_as_long": {"eager": {"p50": 1.0}},
        "seconds": {"eager": {"p50": seconds}, "fastres": {"p50": seconds}},
    }  # fmt: skip


def test_each_device_is_shown():
    contents = [benchmarks(("test_step[vgg16]", step(0.1)), gpu=gpu) for gpu in (None, "H100", "H200")]
    text = render.render(readme("steps"), contents)
    assert re.findall(r"^\| (.+?) \| `vgg16`", text, re.M) == ["Some CPU", "H100", "H200"]


def test_a_loader_is_shown_with_the_device_that_it_feeds():
    contents = [
        benchmarks(
            *(
                (
                    f"test_loader[arrays-{device}]",
                    {
                        "what": "loader",
                        "images": "arrays",
                        "device": device,
                        "images_per_second": {"eager": {"p50": 1.0}, "dali": {"p50": 2.0}},
                        "times_as_long": {"eager": {"p50": 2.0}},
                    },
                )
                for device in ("cpu", "cuda")
            ),
            gpu="H100",
        )
    ]
    text = render.render(readme("loaders"), contents)
    assert re.findall(r"^\| (.+?) \| arrays", text, re.M) == ["Some CPU", "H100"]


def test_the_newest_benchmark_is_shown():
    contents = [
        benchmarks(("test_step[vgg16]", step(seconds))) | {"datetime": f"2026-0{month}-01T00:00:00"}
        for month, seconds in ((2, 0.1), (1, 0.9))
    ]
    text = render.render(readme("steps"), contents)
    assert "100.0" in text
    assert "900.0" not in text


def test_each_batch_size_is_shown():
    profiles = [profile("2026-02-01 10:00", 4.0) | {"batch_size": size} for size in (32, 128)]
    text = render.render(readme("profile"), profiles)
    assert re.findall(r"an epoch, batch (\d+)", text) == ["32", "128"]


def test_candidates_take_turns_in_random_order():
    calls = []
    seconds = interleave.interleave({name: partial(calls.append, name) for name in "abcd"}, 6)
    assert calls[:4] == list("abcd")  # to warm up
    rounds = [calls[start : start + 4] for start in range(4, 28, 4)]
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abcd", 6)


def test_ratios_are_times_as_long_as_the_reference():
    seconds = {"fused": np.ones(3), "eager": np.array([2.0, 3.0, 4.0])}
    assert interleave.ratios(seconds, "fused") == {"eager": {"p20": 2.4, "p50": 3.0, "p80": 3.6, "fastest": 2.0}}


def test_the_operator_moves_what_the_roofline_counts():
    moved = script("test_batch_norm_relu").tensors_moved
    assert [moved("forward", residual) for residual in (False, True)] == [3, 4]
    assert [moved("forward+backward", residual) for residual in (False, True)] == [8, 10]  # as in test_roofline.py


def test_loaders_are_measured_in_images_a_second(monkeypatch):
    module, results = script("test_loaders"), {}
    monkeypatch.setattr(module, "IMAGES", 256)
    monkeypatch.setattr(module, "ROUNDS", 1)
    module.test_loader(SimpleNamespace(extra_info=results, pedantic=lambda *_, **__: None), synthetic(256), "cpu")
    assert all(rate["p50"] > 1 for rate in results["images_per_second"].values())
    faster = results["images_per_second"]["dali"]["p50"] / results["images_per_second"]["eager"]["p50"]
    assert results["times_as_long"]["eager"]["p50"] == pytest.approx(faster)


@pytest.mark.parametrize(
    ("text", "message"), [("no place", "has no <!-- results:NAME --> to fill"), (None, "No such file")]
)
def test_a_readme_without_a_place_is_an_error(text, message, tmp_path, capsys):
    if text:
        (tmp_path / "README.md").write_text(text)
    assert render.main([str(tmp_path / "README.md"), str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.fixture
def run_gpu(tmp_path):
    """Runs the script with a Python that fails where a model is named; gives its folder and what steps.txt says."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *vgg11*) exit 3;; esac\n')
    python.chmod(0o755)

    def run(**environment):
        out = tmp_path / "out"
        subprocess.run(
            ["bash", ROOT / "benchmarks/run_gpu.sh", out],
            env=os.environ | {"PYTHON": str(python), "QUICK": "1"} | environment,
            check=True,
        )
        return out, [line.split(" after")[0] for line in (out / "steps.txt").read_text().splitlines()]

    return run


def test_the_gpu_script_keeps_results_and_goes_on(run_gpu):
    out, steps = run_gpu()
    assert steps == [
        "gpu-tests: exit code 0",
        "profile-vgg11-8: exit code 3",
        "operator: exit code 0",
        "profile-vgg13-8: exit code 0",
        "train-vgg13: exit code 0",
        "loaders: exit code 0",
        "steps: exit code 0",
        "profile-vgg11-8-compiled: exit code 3",
        "tilings: exit code 0",
        "train-vgg11: exit code 3",
    ]
    assert "-m fastres.train --model vgg11" in (out / "train-vgg11.log").read_text()


def test_the_gpu_script_ends_in_time_and_can_be_called_again(run_gpu):
    _, steps = run_gpu(BUDGET="1")
    assert len(steps) == 10
    assert all(line.endswith(": left out, no time") for line in steps)
    _, steps = run_gpu()
    assert steps[10:13] == ["gpu-tests: exit code 0", "profile-vgg11-8: exit code 3", "operator: exit code 0"]
    _, again = run_gpu(DATA="cifar10")
    assert again[20:] == ["study-architecture: exit code 0"]  # what failed would fail again


def test_the_gpu_script_repeats_what_ran_into_its_limit_and_what_was_deleted(run_gpu):
    out, _ = run_gpu()
    lines = (out / "steps.txt").read_text().splitlines()
    lines[0] = "gpu-tests: exit code 124 after 150 s"
    (out / "steps.txt").write_text("\n".join(line for line in lines if not line.startswith("operator")) + "\n")
    _, steps = run_gpu()
    assert steps[9:] == ["gpu-tests: exit code 0", "operator: exit code 0"]


@pytest.mark.parametrize("between", [" ", "="])
def test_runs_are_kept_and_shown_with_their_command(between, tmp_path):
    summary = {
        "best_accuracy": 90.333, "last_accuracy": 89.5, "epoch_seconds": 48.37, "images_per_second": 309.6,
        "data_wait_fraction": 0.0027, "device": "Some CPU", "versions": VERSIONS, "commit": "0123456789",
        "command": f"python -m fastres.train --data-dir{between}/home/me/x --output-dir{between}/home/me/y --lr 1",
        "date": "2026-01-02 03:04",
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.json").write_text(json.dumps({"data_dir": "/home/me/x", "lr": 1.0}))
    (tmp_path / "history.csv").write_text("epoch,lr\n1,0.5\n")
    run = keep_run.kept(tmp_path, "digits")
    assert run["config"] == {"data_dir": None, "output_dir": None, "lr": 1.0}
    assert run["history"] == [{"epoch": 1, "lr": 0.5}]
    command = "python -m fastres.train --data-dir DIR --lr 1"
    row = f"| `{command}` | digits | 90.33 / 89.50 % | 48.4 | 310 | 0.3 % | Some CPU, 2026-01-02, "
    assert row in render.render(readme("training"), [run])


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("train-*.json")), ids=lambda path: path.stem)
def test_the_shown_command_gives_the_settings_of_its_run(path):
    run = json.loads(path.read_text())
    _, command = run["command"].split("python -m fastres.train ")
    parser = Parser("fastres.train")
    add_flags(parser, TrainConfig)
    given = parser.parse_flags(command.split())
    defaults = DATASET_DEFAULTS.get(run["config"]["dataset"], {})
    config = TrainConfig(**{**defaults, **over_recipe(given)}).to_json()
    of_the_machine = {
        "data_dir", "output_dir", "device", "amp", "loader", "fused", "compile", "compile_mode", "cuda_graphs",
    }  # fmt: skip
    for name, value in run["config"].items():
        if name not in of_the_machine | {"warmup_epochs"}:
            assert config[name] == value, name


@pytest.mark.parametrize("folder", sorted((ROOT / "benchmarks/results").glob("study-*")), ids=lambda path: path.name)
def test_a_kept_report_is_what_its_results_say(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "study")
    write_report(copy)
    assert (copy / "report.md").read_text() == (folder / "report.md").read_text()


def test_the_readme_shows_what_is_in_the_results(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    assert render.main([str(copy), str(ROOT / "benchmarks/results")]) == 0
    assert copy.read_text() == (ROOT / "README.md").read_text()
