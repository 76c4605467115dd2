"""The profile from flags to files at a tiny size, how it scales what it measured, and what it advises."""

import json
import re
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from fastres import profile, roofline
from fastres.models import create_model
from fastres.nn import BatchNormReLU2d, EagerBatchNormReLU2d
from fastres.report.profile import advice
from fastres.training.baseline import StudyLoop
from fastres.training.trainer import Trainer
from tests.conftest import CommandLine

NAMES = ["eager", "+ channels-last", "+ AMP", "+ DALI loader", "+ fused operator", "fastres"]


@pytest.fixture
def command_line(capfd, monkeypatch):
    monkeypatch.setattr(roofline, "MEASURE_SECONDS", 0.05)
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**22)
    monkeypatch.setitem(roofline.MATRIX_SIZE, "cpu", 128)
    monkeypatch.setattr("fastres.training.hardware.torch.cpu._is_avx512_bf16_supported", lambda: True)
    return CommandLine(capfd, profile.main)


@pytest.fixture
def flags(tmp_path):
    """A profile of seconds."""
    return [
        "--model", "vgg11", "--images", 20, "--batch-size", 4, "--seconds", 0.5, "--device", "cpu",
        "--output-dir", tmp_path / "profile",
    ]  # fmt: skip


def test_profiles_every_step_on_the_way(command_line, flags, tmp_path):
    assert command_line(*flags, "--rounds", 2, "--trace") == 0
    folder = tmp_path / "profile"
    result = json.loads((folder / "profile.json").read_text())
    assert [row["name"] for row in result["variants"]] == NAMES
    engines = [row["engine"] for row in result["variants"]]
    for before, after in pairwise(engines[:-1]):
        assert sum(before[name] != after[name] for name in before) == 1
    assert engines[-1] == engines[-2]
    assert any("+ compile" in line for line in result["left_out"])

    assert result["images_per_epoch"] == 20
    for row in [*result["variants"], result["model_alone"]]:
        seconds = row["epoch_seconds"]
        assert len(seconds["rounds"]) == result["rounds"]
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
        assert row["images_per_second"] == pytest.approx(20 / seconds["median"])
        assert row["limit_share"] == pytest.approx(result["limit_epoch_seconds"] / seconds["median"])
        assert row["times_eager"] == pytest.approx(result["variants"][0]["epoch_seconds"]["median"] / seconds["median"])
        assert 0 <= row["data_wait_fraction"] < 1
    weights = 4 * sum(parameter.numel() for parameter in create_model("vgg11", 10).parameters()) / 2**20
    for row in result["variants"]:
        assert 3 * weights < row["peak_memory_mb"] < 5 * weights  # they, momentum, gradients, and little at batch 4
    assert set(result["loader_alone_images_per_second"]) == {"eager", "dali"}

    for name in NAMES:
        assert re.search(rf"^{re.escape(name)} +\d", command_line.out, re.M)
    assert result["advice"] in command_line.out
    assert max(map(len, command_line.out.splitlines()[-16:-6])) <= 80
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert any("convolution" in event.get("name", "") for event in events)


def test_profiles_a_dataset_of_files(command_line, flags, image_folder):
    assert command_line(*flags, "--dataset", "folder", "--data-dir", image_folder, "--rounds", 1) == 0
    assert "dataset: folder, 60 training images" in command_line.out


def test_without_dali_and_bf16_those_steps_are_left_out(command_line, flags, monkeypatch, tmp_path):
    monkeypatch.setattr("fastres.training.hardware.torch.cpu._is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("fastres.training.hardware.torch.cpu._is_amx_tile_supported", lambda: False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert command_line(*flags) == 0
    result = json.loads((tmp_path / "profile/profile.json").read_text())
    assert [row["name"] for row in result["variants"]] == ["eager", "+ channels-last", "+ fused operator", "fastres"]
    assert "left out: + AMP (" in command_line.out
    assert "left out: + DALI loader (" in command_line.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet17"], "--model: invalid choice: 'resnet17'"),
        (["--dataset", "imagenet"], "--dataset: invalid choice: 'imagenet'"),
        (["--dataset", "folder", "--data-dir", "nowhere"], "--data-dir nowhere: no such folder"),
        (["--batchsize", "1"], "unknown argument --batchsize; did you mean --batch-size"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--batch-size", "21"], "--batch-size 21: larger than the training set of 20 images"),
        (["--images", "0"], "--images 0: must be at least 1"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--rounds", "few"], "--rounds: invalid int value: 'few'"),
        (["--seconds", "-1"], "--seconds -1.0: must be positive"),
        (["--seconds", "nan"], "--seconds nan: must be positive"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
    ],
)
def test_bad_flags(arguments, message, command_line, flags, tmp_path):
    assert command_line(*flags, *arguments) == 2
    assert re.search(message, command_line.err)
    assert command_line.err.count("\n") == 1
    assert not (tmp_path / "profile").exists()


def test_a_folder_that_holds_another_profile_is_left_as_it_is(command_line, flags, tmp_path):
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile/profile.json").write_text("{}")
    assert command_line(*flags) == 2
    assert "already holds a profile" in command_line.err
    assert (tmp_path / "profile/profile.json").read_text() == "{}"


def test_the_rival_is_the_compiled_model_without_the_operator():
    config = profile.ProfileConfig(model="vgg11", images=20, batch_size=4, device="cpu", compile_variant=True)
    defaults, dataset, _ = profile.prepare(config)
    variants, left_out = profile.build_variants(config, defaults, dataset, torch.device("cpu"))
    assert [variant.name for variant in variants][-3:] == ["+ compile", "compile, not fused", "fastres"]
    rival, fastres = variants[-2:]
    assert rival.config == replace(defaults, fused=False, compile=True)
    assert fastres.config == defaults
    assert type(variants[0].engine) is StudyLoop
    assert type(rival.engine) is type(fastres.engine) is Trainer
    for variant in variants:
        norms = {type(module) for module in variant.engine.model.modules() if isinstance(module, nn.BatchNorm2d)}
        assert norms == {BatchNormReLU2d if variant.config.fused else EagerBatchNormReLU2d}
    assert not any("compile" in line for line in left_out)


def measured(name, seconds, wait=0.0, **engine):
    default = {
        "channels_last": True, "amp": "bf16", "loader": "dali", "fused": True, "compile": False,
        "compile_mode": "default", "cuda_graphs": False,
    }  # fmt: skip
    return {
        "name": name,
        "epoch_seconds": {"median": seconds},
        "images_per_second": 100 / seconds,
        "data_wait_fraction": wait,
        "limit_share": 0.4,
        "engine": default | engine,
    }


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([measured("eager", 9.0), measured("fastres", 2.0)], "keep the defaults: data wait is 0.0%"),
        (
            [measured("eager", 9.0), measured("fastres", 2.0, 0.31)],
            "data wait is 31%: the dali loader.*raise --workers",
        ),
        ([measured("eager", 9.0), measured("fastres", 2.0, 0.31, loader="eager")], "data wait is 31%.*install DALI"),
        (
            [measured("+ AMP", 1.0, fused=False), measured("+ compile", 0.5, compile=True), measured("fastres", 2.0)],
            r"\+ compile is 4.00x as fast as the defaults here: train with --compile$",
        ),
        (
            [
                measured("eager", 3.0),
                measured("compile, not fused", 1.0, fused=False, compile=True, compile_mode="max-autotune"),
                measured("fastres", 2.0),
            ],
            "compile, not fused is 2.00x as fast .* train with --no-fused --compile --compile-mode max-autotune$",
        ),
        ([measured("+ AMP", 1.98, fused=False), measured("fastres", 2.0)], "keep the defaults"),
        ([measured("+ fused operator", 1.5), measured("fastres", 2.0)], "keep the defaults: .* no other setting is"),
    ],
)
def test_advice(rows, expected):
    alone = measured("model alone", 1.5)
    rates = {"dali": 1000.0, "eager": 10.0}
    line = advice({"variants": rows, "model_alone": alone, "loader_alone_images_per_second": rates})
    assert re.match(expected, line)
    assert "\n" not in line
