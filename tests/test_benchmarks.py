"""The benchmarks run apart from the tests, the README's tables come from measured files, and the GPU script goes on
when a step fails."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from triton.runtime import KernelInterface

from fastres.config import DATASET_DEFAULTS, TrainConfig, over_recipe
from fastres.data.datasets import MINI_CIFAR10_CLASSES, synthetic
from fastres.data.splits import Dataset, Split
from fastres.errors import UserError
from fastres.fields import as_json
from fastres.flags import Parser, add_flags
from fastres.models import create_model
from fastres.ops.batch_norm_relu import launch, triton_kernels
from fastres.profiling.measure import EAGER, RepeatedBatch, create_trainer, first_batch, interleave, train
from fastres.report.study import write_report
from fastres.training.hardware import resolve
from tests.conftest import write_folder
from tests.report.test_study_report import write_run

ROOT = Path(__file__).parents[1]


def script(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


sys.path.append(str(ROOT / "benchmarks"))  # as pytest does for what is there
render, keep_run, timing, recipes = script("render"), script("keep_run"), script("timing"), script("recipes")
kernel_table, precompile, plain_pytorch = script("kernel_table"), script("precompile"), script("plain_pytorch")
RESULTS = ROOT / "benchmarks/results"

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
        "command": "python -m fastres.profile --model vgg16 --seconds 150",
        "model": "vgg16",
        "dataset": "synthetic",
        "images_per_epoch": 50_000,
        "batch_size": 128,
        "augmentation": "crop-flip",
        "rounds": 5,
        "steps_per_round": 40,
        "steps_per_epoch": 390,
        "device": "Some GPU",
        "limit_epoch_seconds": 1.0,
        "candidates": [row],
        "versions": VERSIONS,
        "commit": "0123456789abcdef-dirty",
        "date": date,
    }


def row(benchmark, case, candidate, seconds, times_as_long=1.0, images=32, device="Some CPU"):
    return {
        "benchmark": benchmark, "case": case, "images": images, "device": device, "candidate": candidate,
        "seconds": seconds, "p20": seconds, "p80": seconds, "times_as_long": times_as_long,
        "times_p20": 0.9 * times_as_long, "times_p80": 1.1 * times_as_long,
    }  # fmt: skip


def benchmarks(*rows, date="2026-01-02 03:04"):
    return {"machine": "Some CPU", "versions": VERSIONS, "commit": "0123456789", "date": date, "rows": list(rows)}


def readme(name):
    return f"above\n<!-- results:{name} -->\nold\n<!-- /results:{name} -->\nbelow"


def test_the_newest_profile_is_shown():
    text = render.render(readme("profile"), [profile("2026-02-01 10:00", 4.0), profile("2026-01-01 10:00", 9.0)])
    assert "| eager | 4.00 | 3.00 to 5.00 | 12,500 | 1.00 | 31.2 % | 1,234 | 25 % |" in text
    assert "5 rounds of 40 of 390 steps; torch 2.11.0, commit 0123456-dirty, 2026-02-01 10:00" in text
    assert "`python -m fastres.profile --model vgg16 --seconds 150`" in text
    assert "9.00" not in text
    assert "old" not in text
    assert text.startswith("above\n<!-- results:profile -->\n")
    assert text.endswith("\n<!-- /results:profile -->\nbelow")
    assert render.render(text, [profile("2026-02-01 10:00", 4.0)]) == text


def test_benchmarks_are_shown_by_what_they_measured():
    contents = [
        benchmarks(
            row("loader", "arrays", "dali", 0.5, images=26_000),
            row("loader", "arrays", "eager", 3.8, 7.6, images=26_000),
            row("forward", "vgg16", "fastres", 0.02),
            row("forward", "vgg16", "eager", 0.064, 3.2),
            row("forward", "vgg16", "compiled", 0.016, 0.8),
            row("step", "vgg16", "fastres", 0.1),
            row("step", "vgg16", "eager", 0.4, 4.0),
            *(
                row("operator", f"{shape} forward+backward residual", candidate, 0.001, times_as_long)
                for shape, eager in (("64x32x32", 2.0), ("128x16x16", 3.0), ("256x8x8", 4.0))
                for candidate, times_as_long in (("fused", 1.0), ("eager", eager), ("compile", 1.5), ("copy", 0.9))
            ),
            *(
                row("convolution", f"vgg16 {direction}: {layer}", candidate, 0.1, times_as_long)
                for direction, layer, times_as_long in (
                    ("forward", "1 x 3x3 3 to 64 at 32x32", 2.0),
                    ("weight", "1 x 3x3 3 to 64 at 32x32", 3.0),
                    ("forward", "all", 1.0),
                    ("input", "all", 1.25),
                    ("weight", "all", 1.6),
                )
                for candidate, times_as_long in (("limit", 1.0), ("convolution", times_as_long))
            ),
        )
    ]
    measured = "2026-01-02, torch 2.11.0, 0123456 |"
    assert f"| Some CPU | arrays | 6,842 | 52,000 | 7.6 (6.8 to 8.4) | {measured}" in render.render(
        readme("loaders"), contents
    )
    assert f"| Some CPU | `vgg16` | 32 | 500 | 1,600 | 2,000 | 3.20 (2.88 to 3.52) | {measured}" in render.render(
        readme("forward"), contents
    )
    assert f"| Some CPU | `vgg16` | 32 | 400.0 | 100.0 | 4.00 (3.60 to 4.40) | {measured}" in render.render(
        readme("steps"), contents
    )
    assert f"| Some CPU | forward+backward | residual | 3.00 | 1.50 | 0.90 | {measured}" in render.render(
        readme("operator"), contents
    )
    convolutions = render.render(readme("convolutions"), contents)
    assert "`vgg16`, Some CPU, batch 32; 2026-01-02, torch 2.11.0, 0123456." in convolutions
    assert "| 1 x 3x3 3 to 64 at 32x32 | 50 % |  | 33 % |" in convolutions
    assert "| all | 100 % | 80 % | 62 % |" in convolutions


def step(seconds, device="Some CPU"):
    return [row("step", "vgg16", candidate, seconds, device=device) for candidate in ("fastres", "eager")]


def test_each_device_is_shown():
    devices = ["Some CPU", "H100", "H200"]
    text = render.render(readme("steps"), [benchmarks(*step(0.1, device)) for device in devices])
    assert re.findall(r"^\| (.+?) \| `vgg16`", text, re.M) == devices


def test_the_newest_benchmark_is_shown():
    contents = [benchmarks(*step(seconds), date=f"2026-0{month}-01 00:00") for month, seconds in ((2, 0.1), (1, 0.9))]
    text = render.render(readme("steps"), contents)
    assert "100.0" in text
    assert "900.0" not in text


def test_candidates_of_two_measurements_are_not_mixed():
    older = [row("forward", "vgg16", candidate, 0.9) for candidate in ("fastres", "eager", "compiled")]
    newer = [row("forward", "vgg16", candidate, 0.1) for candidate in ("fastres", "eager")]
    contents = [benchmarks(*newer, date="2026-02-01 00:00"), benchmarks(*older, date="2026-01-01 00:00")]
    assert "| 320 | 320 |  | 1.00 (0.90 to 1.10) | 2026-02-01" in render.render(readme("forward"), contents)


def test_each_batch_size_is_shown():
    profiles = [profile("2026-02-01 10:00", 4.0) | {"batch_size": size} for size in (32, 128)]
    text = render.render(readme("profile"), profiles)
    assert re.findall(r"an epoch, batch (\d+)", text) == ["32", "128"]


def test_candidates_take_turns_in_random_order():
    calls = []
    seconds = interleave({name: partial(calls.append, name) for name in "abcd"}, 6)
    assert calls[:4] == list("abcd")  # to warm up
    rounds = [calls[start : start + 4] for start in range(4, 28, 4)]
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abcd", 6)


def test_rows_are_medians_and_times_as_long_as_the_first_candidate():
    seconds = {"fused": np.array([2.0, 1.0, 0.5]), "eager": np.array([2.0, 3.0, 8.0])}
    fused, eager = timing.rows_of("operator", "64x32x32 forward plain", 128, "Some CPU", seconds)
    assert [eager[name] for name in ("candidate", "seconds", "p20", "p80")] == ["eager", 3.0, 2.4, 6.0]
    assert [row["times_as_long"] for row in (fused, eager)] == [1.0, 3.0]  # 3 / 1, of the medians
    assert [eager["times_p20"], eager["times_p80"]] == pytest.approx([1.8, 10.8])  # of 1, 3 and 16


def test_the_table_at_the_end_shows_images_a_second_and_times_eager():
    rows = [
        row("step", "vgg16", "fastres", 0.1) | {"p20": 0.09, "p80": 0.11},
        row("step", "vgg16", "eager", 0.2, 1.9),
        row("step", "resnet50", "fastres", 0.5),
        row("decoding", "jpeg", "dali", 0.25),
    ]
    lines = [line.split() for line in script("conftest").tables(rows)]
    assert lines == [
        [],
        ["step,", "images/s,", "Some", "CPU"],
        ["fastres", "eager", "x", "eager"],
        ["vgg16", "320.0", "±10%", "160.0", "±0%", "1.90"],
        ["resnet50", "64.0", "±0%"],
        [],
        ["decoding,", "images/s,", "Some", "CPU"],
        ["dali"],
        ["jpeg", "128.0", "±0%"],
    ]


def pytest_in_the_root(*arguments):
    """The output of pytest, and then the modules that it has imported."""
    code = "import sys, pytest; code = pytest.main(sys.argv[1:]); print('imported', *sys.modules); sys.exit(code)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=environment | {"FASTRES_BENCHMARK_BATCH": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed, imported = done.stdout.rsplit("imported ", 1)
    return printed, imported.split()


@pytest.mark.parametrize(
    ("arguments", "folder", "file"),
    [
        ([], "tests", "test_train.py"),
        (["benchmarks/test_loaders.py", "--benchmark-only"], "benchmarks", "test_loaders.py"),
    ],
)
def test_tests_and_benchmarks_are_collected_apart(arguments, folder, file):
    printed, imported = pytest_in_the_root("--collect-only", "-q", *arguments)
    found = {Path(line.split(":")[0]) for line in printed.splitlines() if re.fullmatch(r"\S+\.py: \d+", line)}
    assert {path.parts[0] for path in found} == {folder}
    assert Path(folder, file) in found
    assert ("tests" in imported, "timing" in imported) == (folder == "tests", folder == "benchmarks")


def test_benchmark_only_shows_a_table_and_keeps_it_for_the_readme(tmp_path):
    path = tmp_path / "bench-x.csv"
    printed, imported = pytest_in_the_root("--benchmark-only", "-k", "step and vgg16", f"--benchmark-csv={path}")
    assert "tests" not in imported
    assert {"test_batch_norm_relu", "test_loaders", "test_training"} <= set(imported)
    shown = re.search(r"step, images/s, .*\n +fastres +eager +x eager\nvgg16 .*", printed)
    assert shown, printed
    content = render.read_benchmarks(path)
    assert content["command"].endswith(f"--benchmark-csv={path}")
    assert {"date", "machine", "versions", "commit"} < content.keys()
    fastres, eager = content["rows"]
    assert shown[0].endswith(f" {eager['times_as_long']:.2f}")
    assert f" {fastres['images'] / fastres['seconds']:,.1f} ±" in shown[0]
    line = f"| `vgg16` | 2 | {1000 * eager['seconds']:,.1f} | {1000 * fastres['seconds']:,.1f} |"
    assert line in render.render(readme("steps"), [content])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark-csv=x.csv"], "--benchmark-csv x.csv: needs --benchmark-only"),
        (["--benchmark-only", "--benchmark-csv=no/x.csv"], "--benchmark-csv no/x.csv: there is no such folder"),
    ],
)
def test_a_table_that_could_not_be_kept_is_refused_before_anything_is_measured(arguments, message):
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (pytest.ExitCode.USAGE_ERROR, f"ERROR: {message}")


def test_convolutions_are_measured_without_products_with_padding():
    convolutions = script("test_convolutions")
    layers = convolutions.layers_of("vgg16")
    assert sum(map(len, layers.values())) == 13
    expected = {(2, 512, 512): (2 * 512) ** 2 * 4, (32, 3, 64): (3 * 32 - 2) ** 2 * 3 * 64}  # an output pixel sees all
    for layer, (conv, *_) in layers.items():
        key = layer.size, layer.channels, layer.out_channels
        if key in expected:
            _, flops, _ = convolutions.passes(conv, layer)
            assert flops == 2 * convolutions.BATCH * expected.pop(key)
    assert not expected


def test_the_operator_moves_what_the_roofline_counts():
    moved = script("test_batch_norm_relu").tensors_moved
    assert [moved(False, residual) for residual in (False, True)] == [3, 4]
    assert [moved(True, residual) for residual in (False, True)] == [8, 10]  # as in test_roofline.py


def test_tuning_goes_on_from_the_best_so_far(tmp_path, monkeypatch):
    tune, own, trained = script("tune_batch_norm_relu"), launch.Tuning(num_warps=8, programs=264), []
    monkeypatch.setattr(launch, "TUNING", own)
    fastest = replace(own, num_warps=4, programs=132, tile=8192)

    class Trainer:
        def warm_up(self, evaluation):
            self.captured = launch.TUNING

    def timed(candidates, rounds):
        seconds = {}
        for name, run in candidates.items():
            run()
            captured = trained[-1].captured
            assert str(captured) == name
            differing = sum(value != getattr(fastest, field) for field, value in asdict(captured).items())
            seconds[name] = np.full(rounds, tune.STEPS * (1 + differing) / 1000)
        return seconds

    monkeypatch.setattr(tune, "resolve", lambda config, dataset: (replace(config, device="cpu"), ""))
    monkeypatch.setattr(tune, "create_trainer", lambda *_: Trainer())
    monkeypatch.setattr(tune, "train", lambda trainer, batch: trained.append(trainer))
    monkeypatch.setattr(tune, "interleave", timed)
    tune.main(tmp_path / "tunings.jsonl")
    where, *rows = [json.loads(line) for line in (tmp_path / "tunings.jsonl").read_text().splitlines()]
    assert {"machine", "versions", "commit"} < where.keys()
    assert len(rows) == sum(map(len, tune.CHOICES.values()))
    assert rows[0].items() >= asdict(own).items()
    best = min(rows, key=lambda row: row["step_ms"])
    assert best.items() >= asdict(fastest).items()
    assert (best["step_ms"], best["best_so_far"]) == (1, 2)
    assert launch.TUNING is own


def test_loaders_are_measured_in_images_a_second(monkeypatch):
    module, measured = script("test_loaders"), []
    monkeypatch.setattr(module, "IMAGES", 256)
    monkeypatch.setattr(module, "ROUNDS", 1)
    module.test_loader(lambda *found: measured.append(found), synthetic(256), "cpu")
    dali, eager = timing.rows_of(*measured[0])
    assert (dali["candidate"], dali["images"], eager["candidate"]) == ("dali", 256, "eager")
    assert eager["times_as_long"] == pytest.approx(eager["seconds"] / dali["seconds"])


@pytest.mark.parametrize(
    ("text", "message"), [("no place", "has no <!-- results:NAME --> to fill"), (None, "No such file")]
)
def test_a_readme_without_a_place_is_an_error(text, message, tmp_path, capsys):
    if text:
        (tmp_path / "README.md").write_text(text)
    assert render.main([str(tmp_path), str(tmp_path / "README.md")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", ["", "# no JSON\na,b\n1,2\n", '# {"date": "x"}\na,b\n1,2,3\n4\n5,6,7,8\n'])
def test_a_damaged_table_of_benchmarks_is_an_error(content, tmp_path, capsys):
    (tmp_path / "README.md").write_text(readme("steps"))
    (tmp_path / "bench-x.csv").write_text(content)
    assert render.main([str(tmp_path), str(tmp_path / "README.md")]) == 2
    assert "bench-x.csv: not readable as a table of benchmarks" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == readme("steps")


def test_a_damaged_table_of_kernels_is_an_error_and_one_of_a_cpu_is_not(tmp_path, capsys):
    text = (RESULTS / "NVIDIA-H100-2026-11-27/kernels-fastres-128.log").read_text()
    file, document = tmp_path / "kernels-fastres-8.log", tmp_path / "README.md"
    document.write_text(readme("kernels"))
    file.write_text("a warning\n" + text.replace(", 0.754 ms idle", "").replace(" 212.0 ", " 1,212.0 "))
    assert render.main([str(tmp_path), str(document)]) == 0
    assert "--batch-size 128`: 7.867 ms a step; NVIDIA H100" in document.read_text()
    assert "| fused operator | 3,721.3 | 48.6 % | 1,212 |" in document.read_text()
    for damaged in (
        text.replace("# step", "step"),
        text.split("\nby ")[0],
        "",
        text.replace("{'python", "{python"),
    ):
        file.write_text(damaged)
        assert render.main([str(tmp_path), str(document)]) == 2
        assert "kernels-fastres-8.log: not readable as what kernel_table.py prints" in capsys.readouterr().err


def event(name, start, end, annotation=False):
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=span, device_type=DeviceType.CUDA, is_user_annotation=annotation)


def test_time_on_a_gpu_is_counted_by_kind_of_kernel():
    events = [
        event("split_moments", 0, 4),
        event("sm90_xmma_wgrad_implicit_gemm_bf16", 10, 16),
        event("void at::native::bfloat16_copy_kernel_cuda", 15, 18),  # beside the one before
        event("split_moments", 20, 24),
        event("Optimizer.step", 0, 24, annotation=True),
        SimpleNamespace(device_type=DeviceType.CPU),
    ]
    frame = kernel_table.kernels(events, "cuda")
    assert kernel_table.idle(frame) == (10 - 4) + (20 - 18)
    table = kernel_table.table(frame, "kind", 2)
    assert table["us/step"].to_dict() == {
        "fused operator": 4, "convolution, weight gradient": 3, "copies and casts": 1.5,
    }  # fmt: skip
    assert table["calls"].to_list() == [1, 0.5, 0.5]
    assert table["%"].sum() == pytest.approx(100)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("triton_red_fused_native_batch_norm_backward_7", "fused by Inductor"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float>", "batch norm"),
        ("sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32", "convolution, input gradient"),
        ("nvjet_hsh_128x192_64x5", "convolutions and products"),
        ("multi_tensor_apply_kernel<TensorListMetadata<2>, CopyFunctor<float>>", "copies and casts"),
        ("multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<3>, FusedSgdMathFunctor>", "optimizer"),
        ("void cunn_SoftMaxForward<8, float>", "loss and accuracy"),
        ("vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", "element-wise and sums"),
        ("something", "other"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert kernel_table.kind(name) == kind


def test_the_operators_kernels_are_of_one_kind():
    kernels = [name for name, value in vars(triton_kernels).items() if isinstance(value, KernelInterface)]
    kernels = [name for name in kernels if not name.startswith("_")]  # a helper is part of the kernels that call it
    assert len(kernels) >= 6
    assert {kernel_table.kind(name) for name in kernels} == {"fused operator"}


def test_a_step_on_a_cpu_is_timed_and_broken_down(tiny_vgg11, capsys):
    assert kernel_table.main(["--model", "vgg11", "--batch-size", "4", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    step, profiled = (float(re.search(rf"^# {name}step: (\S+) ms", printed, re.M)[1]) for name in ("", "profiled "))
    assert min(step, profiled) > 0
    shares = re.findall(r"^[a-z ,-]+? +[\d,.]+ +([\d.]+) ", printed.split("by kernel")[0].split("by kind")[1], re.M)
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.5)


def test_the_kernels_compiled_ahead_are_those_of_the_models_norms():
    calls = precompile.calls_of("resnet18", 4)
    assert {tuple(shape) for shape, *_ in calls} == {
        (4, 64, 32, 32), (4, 128, 16, 16), (4, 256, 8, 8), (4, 512, 4, 4),
    }  # fmt: skip
    assert {(residual, relu) for _, residual, relu in calls} == {(False, True), (True, True), (False, False)}
    for call in calls:
        precompile.run(call)


@pytest.mark.parametrize("between", [" ", "="])
def test_runs_are_kept_and_shown_with_their_command(between, tmp_path):
    summary = {
        "best_accuracy": 90.333, "last_accuracy": 89.5, "epoch_seconds": 48.37, "images_per_second": 309.6,
        "data_wait_fraction": 0.0027, "device": "Some CPU", "versions": VERSIONS, "commit": "0123456789",
        "command": f"python -m fastres.train --data-dir{between}/home/me/x --output-dir{between}'/me/my runs/y' --lr 1",
        "date": "2026-01-02 03:04", "dataset": "digits", "epochs_work": 0.47,
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.json").write_text(
        json.dumps({"asked": {"data_dir": "/home/me/x", "lr": 1.0}, "chosen": {"amp": "off"}})
    )
    run = keep_run.kept(tmp_path)
    assert run["config"] == {"data_dir": None, "output_dir": None, "lr": 1.0, "amp": "off"}
    text = render.render(readme("training"), [run | {"file": "train-mine-Some-CPU-2026-01-02"}])
    assert "| `mine-Some-CPU` | digits | 90.33 / 89.50 % | 48.4 | 310 | 0.3 % | Some CPU, 2026-01-02, " in text
    assert "* `mine-Some-CPU`: `python -m fastres.train --data-dir DIR --lr 1`\n" in text


def test_a_profile_is_kept_without_the_users_folders(tmp_path):
    measured = profile("2026-02-01 10:00", 4.0) | {
        "command": "python -m fastres.profile --dataset folder --data-dir /home/me/x --output-dir /home/me/y",
        "config": {"dataset": "folder", "data_dir": "/home/me/x", "output_dir": "/home/me/y"},
    }  # fmt: skip
    (tmp_path / "profile.json").write_text(json.dumps(measured))
    assert keep_run.kept(tmp_path) == measured | {
        "command": "python -m fastres.profile --dataset folder --data-dir DIR",
        "config": {"dataset": "folder", "data_dir": None, "output_dir": None},
    }


def test_the_front_page_has_what_each_recipe_reaches(tmp_path):
    def config(**given):
        return as_json(TrainConfig(**over_recipe({"dataset": "folder", "classes": MINI_CIFAR10_CLASSES, **given})))

    def run(accuracy, date="2026-01-02", **given):
        return {
            "data": "three classes",
            "config": config(**given),
            "last_accuracy": accuracy,
            "date": date,
            "file": "x",
        }

    study = {
        "study": "mine",
        "images": "PNG",
        "runs": [{"folders": ["run-seed0", "run-seed1"]}],
        "folder": tmp_path,
        "date": "2026-01-03",
    }
    for seed, accuracy in enumerate((96.0, 97.0)):
        asked = config(model="resnet50", recipe="fast", epochs=4, seed=seed)
        (tmp_path / f"run-seed{seed}").mkdir()
        (tmp_path / f"run-seed{seed}/config.json").write_text(json.dumps({"asked": asked}))
        summary = {"last_accuracy": accuracy, "epochs_work": 1.875}
        (tmp_path / f"run-seed{seed}/summary.json").write_text(json.dumps(summary))
    runs = [
        run(91.0, model="vgg16", epochs=5),
        run(90.0, model="vgg16", epochs=5, date="2025-12-31"),  # again, before
        run(94.0, model="vgg16", epochs=5, train_fraction=0.2),  # no recipe has this and the next
        run(94.0, model="vgg16", epochs=5, lr=0.5),
        run(50.0, model="resnet34", epochs=5),
        run(50.0, model="vgg16", epochs=5, classes=("cat", "dog")),
    ]
    muon = (row("optimizer", "resnet50", f"muon, {size}x{size}", size / 10, images=100) for size in (16, 24, 32))
    sgd = (row("optimizer", model, "sgd", 2.0, images=100) for model in ("resnet50", "vgg16"))
    text = render.render(readme("front"), [study, *runs, benchmarks(*muon, *sgd)])
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert rows == [
        # 4 epochs of 15,000 images: half of 1.6 s a hundred, 35 % of 2.4 and 15 % of 3.2
        ["| `resnet50`, mini-CIFAR-10 (PNG)", "fast", "4", "1.88", "96.50 ± 0.71", "2", "1,272 |"],
        ["| `vgg16`, mini-CIFAR-10 (JPEG q75)", "default", "5", "5.00", "91.00", "1", "1,500 |"],
    ]
    assert "of one, at the rates of Some CPU, 2026-01-02, torch 2.11.0, 0123456, without evaluation.*" in text
    with pytest.raises(UserError, match="no benchmark of a step of vgg16, sgd"):
        render.render(readme("front"), runs)


def test_the_front_pages_picture(tmp_path):
    accuracy = pd.Series([90.0, 91.0])
    rows = [recipes.Reached("vgg16", "mini", "PNG", "fast", 3, 3.0, accuracy, 120.0)]
    recipes.draw(rows, "here", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_every_kept_file_says_where_its_figures_come_from():
    readers = {
        "profile-*.json": render.read_json,
        "train-*.json": render.read_json,
        "bench-*.csv": render.read_benchmarks,
    }
    kept = [[read(path) for path in RESULTS.glob(pattern)] for pattern, read in readers.items()]
    assert all(kept)
    for content in chain(*kept):
        assert content["device" if "device" in content else "machine"]
        assert all(content[name] for name in ("command", "date", "commit"))
        assert content["versions"].keys() >= {"python", "torch", "nvidia-dali-cuda130"}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("train-*.json")), ids=lambda path: path.stem)
def test_the_shown_command_gives_the_settings_of_its_run(path):
    run = json.loads(path.read_text())
    _, command = run["command"].split("python -m fastres.train ")
    parser = Parser("fastres.train")
    add_flags(parser, TrainConfig)
    given = parser.parse_flags(command.split())
    defaults = DATASET_DEFAULTS.get(run["config"]["dataset"], {})
    config = as_json(TrainConfig(**{**defaults, **over_recipe(given)}))
    of_the_machine = {
        "data_dir", "output_dir", "device", "amp", "loader", "fused", "compile", "compile_mode", "cuda_graphs",
    }  # fmt: skip
    for name, value in run["config"].items():
        if name not in of_the_machine | {"warmup_epochs"}:
            assert config[name] == value, name


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_plain_pytorchs_networks_are_the_same_functions(name):
    torch.manual_seed(0)
    plain, ours = getattr(plain_pytorch, name)(), create_model(name, 3, fused=False)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        nn.init.normal_(theirs, std=theirs[0].numel() ** -0.5) if theirs.ndim > 1 else nn.init.uniform_(theirs)
        mine.data.copy_(theirs)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(images), plain(images), rtol=1e-3, atol=1e-3)


class Batches:
    """A loader of the same batch ``times``, which calls ``begin`` as its first epoch begins."""

    def __init__(self, batch, times, begin=lambda: None):
        self.batches, self.begin, self.dataset = [batch] * times, begin, range(times * len(batch[1]))

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.begin()
        self.begin = lambda: None
        return iter(self.batches)


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_plain_pytorch_trains_as_the_study_of_its_settings_does(name, rng):
    study = tomllib.loads((ROOT / "benchmarks/parity.toml").read_text())
    flags = study["flags"] | study["runs"][name]["flags"]
    config = TrainConfig(**over_recipe({flag.replace("-", "_"): value for flag, value in flags.items()}))
    assert (config.batch_size, config.epochs) == (plain_pytorch.BATCH, plain_pytorch.EPOCHS)
    assert config.augmentation == "crop-flip"
    split = Split(rng.integers(0, 255, (8, 32, 32, 3), dtype=np.uint8), np.arange(8) % 3)
    dataset = Dataset("three", MINI_CIFAR10_CLASSES, split, split)
    config, _ = resolve(replace(config, **EAGER, batch_size=4, device="cpu"), dataset)
    batch, trainer = first_batch(config, dataset), create_trainer(config, dataset)
    plain = getattr(plain_pytorch, name)()

    def take_over():
        for mine, theirs in zip(trainer.model.parameters(), plain.parameters(), strict=True):
            mine.data.copy_(theirs)

    batches = Batches(batch, 2, take_over)
    for number, (loss, _) in enumerate(
        plain_pytorch.train(plain, plain_pytorch.LR[name], batches, Batches(batch, 1), "cpu")
    ):
        epoch = train(trainer, RepeatedBatch(batch, 2), number)
        assert epoch.loss_sum.item() / epoch.images == pytest.approx(loss, rel=1e-3)
    for mine, theirs in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-4)


def test_plain_pytorch_trains(tmp_path, rng, monkeypatch):
    classes, labels = tuple(plain_pytorch.CLASSES), np.arange(12) % 3
    split = Split((70 * labels[:, None, None, None] + rng.integers(0, 60, (12, 32, 32, 3))).astype(np.uint8), labels)
    write_folder(tmp_path, Dataset("three shades", classes, split, split))
    monkeypatch.setattr(plain_pytorch, "BATCH", 4)
    monkeypatch.setattr(sys, "argv", ["plain_pytorch.py", str(tmp_path), str(tmp_path / "out.csv"), "--seeds", "1"])
    plain_pytorch.main()
    rows = pd.read_csv(tmp_path / "out.csv")
    assert rows[["model", "seed", "epoch"]].to_numpy().tolist() == [
        [model, 1, epoch] for model in ("vgg16", "resnet18") for epoch in (1, 2, 3)
    ]
    last = rows[rows["epoch"] == 3].set_index("model")
    assert (last["train_loss"] < rows[rows["epoch"] == 1].set_index("model")["train_loss"]).all()


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("study-*")), ids=lambda path: path.name)
def test_a_kept_report_is_what_its_results_say(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "study")
    write_report(copy)
    assert (copy / "report.md").read_text() == (folder / "report.md").read_text()


def test_the_documents_show_what_is_in_the_results(tmp_path):
    copies = {name: tmp_path / Path(name).name for name in render.DOCUMENTS}
    for name, copy in copies.items():
        shutil.copy(ROOT / name, copy)
    assert render.main([str(RESULTS), *map(str, copies.values())]) == 0
    for name, copy in copies.items():
        assert copy.read_text() == (ROOT / name).read_text()


def kept_study(folder, name, labels, published=None, **runs):
    """study.json and runs of a kept study: ``runs`` are accuracies of each epoch, by name and seed."""
    for run, seeds in runs.items():
        for seed, accuracies in seeds.items():
            write_run(folder / f"{run}-seed{seed}", run, accuracies, 1.0, seed, date=f"2026-01-0{seed + 1} 00:00")
    rows = [
        {
            "name": run, "label": label, "folders": [f"{run}-seed{seed}" for seed in runs[run]], "eager_folder": None,
            "forward_gflop": 1.0, "published": published or {},
        }
        for run, label in zip(runs, labels, strict=True)
    ]  # fmt: skip
    study = {"study": name, "runs": rows, "scale": 1.0, "data_scale": 1.0, "overrides": {}, "conjectures": []}
    return study | {"date": "2026-01-01 00:00", "folder": folder, "file": "study"}


def test_parity_is_by_model_and_epoch_and_not_paired(tmp_path):
    study = kept_study(tmp_path / "a", "parity", ["A"], vgg16={0: [70.0, 80.0], 1: [72.0, 84.0]})
    pd.DataFrame(
        {
            "model": "vgg16", "seed": [5, 5, 6, 6], "epoch": [1, 2, 1, 2], "train_loss": [2.0, 1.1, 2.0, 0.9],
            "test_accuracy": [70.0, 81.0, 70.0, 81.0], "device": "H", "torch": "2.11",
        }
    ).to_csv(tmp_path / "a/plain_pytorch.csv", index=False)  # fmt: skip
    text = render.render(readme("parity"), [study])
    # Welch: of 82 +- 2.83 and 81, the error is 2 with one degree of freedom
    low, high = 1 - 12.7062 * 2, 1 + 12.7062 * 2
    assert (
        f"| `vgg16` | 2 | 1.000 ± 0.141 | 1.000 ± 0.000 | +0.000 (-1.271 to +1.271) | 81.00 ± 0.00 | 82.00 ± 2.83 | \
+1.00 ({low:+.2f} to {high:+.2f}) |"
        in text
    )
    assert "plain PyTorch: 2 seeds, H, float32, torch 2.11." in text
    with pytest.raises(UserError, match="results:parity: no such study is kept"):
        render.render(readme("parity"), [])


def test_claims_of_runs_that_studies_share_are_listed_once(tmp_path):
    published = {"best_accuracy": 90.0}
    large = kept_study(
        tmp_path / "large", "large", ["A, constant", "B"], published, vgg16={0: [88.0]}, resnet18={0: [80.0]}
    )
    small = kept_study(tmp_path / "small", "small", ["A"], published, vgg16={0: [88.0], 1: [89.0]})
    rows = re.findall(r"\| (`.*`) \| (.*?): best accuracy", render.render(readme("claims"), [large, small]))
    assert rows == [("`large`", "B"), ("`large`", "B minus A, constant"), ("`small`", "A")]
