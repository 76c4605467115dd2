"""The profile from flags to files at a tiny size, how it scales what it measured, and what it advises."""

import io
import json
import re
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from torch import nn

from fastres import profile
from fastres.config import TrainConfig
from fastres.errors import UserError
from fastres.models import MODELS, create_model
from fastres.nn import BatchNormReLU2d, EagerBatchNormReLU2d
from fastres.profiling import roofline
from fastres.profiling.measure import Candidate, PlainTrainer, create_trainer
from fastres.profiling.roofline import Machine, limit_seconds, step_kernels
from fastres.report.profile import advice, plot_profile, profile_table
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


def model_of_weights(num_classes, norm_layer):
    """A model whose weights take far more memory than its activations, and that trains in milliseconds."""
    stem = nn.Conv2d(3, 8, 3, stride=2, bias=False), norm_layer(8), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    return nn.Sequential(*stem, nn.Linear(128, 4096), nn.Linear(4096, num_classes))


def test_profiles_every_step_on_the_way(command_line, flags, monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "vgg11", model_of_weights)
    assert command_line(*flags, "--rounds", 2, "--trace") == 0
    folder = tmp_path / "profile"
    result = json.loads((folder / "profile.json").read_text())
    assert [row["name"] for row in result["candidates"]] == NAMES
    engines = [row["engine"] for row in result["candidates"]]
    for before, after in pairwise(engines[:-1]):
        assert sum(before[name] != after[name] for name in before) == 1
    assert engines[-1] == engines[-2]
    assert any("+ compile" in line for line in result["left_out"])

    assert result["images_per_epoch"] == 20
    for row in [*result["candidates"], result["model_alone"]]:
        seconds = row["epoch_seconds"]
        assert len(seconds["rounds"]) == result["rounds"]
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
        assert row["images_per_second"] == pytest.approx(20 / seconds["median"])
        assert row["limit_share"] == pytest.approx(result["limit_epoch_seconds"] / seconds["median"])
        assert row["times_eager"] == pytest.approx(
            result["candidates"][0]["epoch_seconds"]["median"] / seconds["median"]
        )
        assert 0 <= row["data_wait_fraction"] < 1
    weights = 4 * sum(parameter.numel() for parameter in create_model("vgg11", 10).parameters()) / 2**20
    for row in result["candidates"]:
        assert 3 * weights < row["peak_memory_mb"] < 5 * weights  # they, momentum, gradients, and little at batch 4
    assert set(result["loader_alone_images_per_second"]) == {"eager", "dali"}

    machine = Machine(result["machine"]["flops_per_second"], result["machine"]["bytes_per_second"])
    with torch.device("meta"):
        step = limit_seconds(step_kernels(create_model("vgg11", 10), 4, torch.bfloat16), machine)
    assert result["limit_epoch_seconds"] == pytest.approx(5 * step)
    rates = f"{machine.flops_per_second / 1e12:.3g} TFLOP/s in torch.bfloat16 products, "
    assert f"machine: {rates}{machine.bytes_per_second / 1e9:.3g} GB/s in copies" in command_line.out

    for name in NAMES:
        assert re.search(rf"^{re.escape(name)} +\d", command_line.out, re.M)
    assert result["advice"] in command_line.out
    assert max(map(len, command_line.out.splitlines()[-16:-6])) <= 80
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert any("convolution" in event.get("name", "") for event in events)


def test_an_interrupted_profile_keeps_the_rounds_that_were_finished(
    command_line, flags, tiny_vgg11, monkeypatch, tmp_path
):
    measure = Candidate.measure

    def interrupted(candidate, loader, number, steps_of_epoch):
        if number == 2:
            raise KeyboardInterrupt
        measure(candidate, loader, number, steps_of_epoch)

    monkeypatch.setattr(Candidate, "measure", interrupted)
    assert command_line(*flags, "--seconds", 1000, "--rounds", 3) == 130
    assert "interrupted; profile.json holds the finished rounds" in command_line.err
    result = json.loads((tmp_path / "profile/profile.json").read_text())
    assert result["rounds"] == 2
    assert {len(row["epoch_seconds"]["rounds"]) for row in result["candidates"]} == {2}
    assert "2 interleaved rounds of" in profile_table(result)
    assert plot_profile(tmp_path / "profile").exists()


def test_profiles_a_dataset_of_files(command_line, flags, tiny_vgg11, image_folder):
    assert command_line(*flags, "--dataset", "folder", "--data-dir", image_folder, "--rounds", 1) == 0
    assert "dataset: folder, 60 training images" in command_line.out


def test_settings_and_dataset_are_those_of_the_flags(image_folder, tmp_path):
    config = profile.ProfileConfig(
        model="vgg13", dataset="folder", data_dir=image_folder, classes=("dark",), augmentation="flip-crop", workers=3,
        device="cpu", output_dir=tmp_path,
    )  # fmt: skip
    chosen, dataset, _ = profile.prepare(config)
    assert (chosen.model, chosen.augmentation, chosen.workers, chosen.output_dir) == ("vgg13", "crop-flip", 3, tmp_path)
    assert dataset.classes == ("dark",)
    assert chosen.batch_size == 30  # all there are
    assert profile.prepare(profile.ProfileConfig(images=100, device="cpu"))[0].batch_size == 32


def test_figures_are_of_the_median_round():
    eager, fastres = (
        Candidate(name, TrainConfig(), None, epoch_seconds=seconds, wait_seconds=[0.5, 0.5])
        for name, seconds in (("eager", [8.0, 8.0]), ("fastres", [1.0, 3.0]))
    )
    row = profile.row(fastres, images=100, limit=0.5, eager=eager)
    assert (row["images_per_second"], row["times_eager"], row["limit_share"]) == (50, 4, 0.25)
    assert row["data_wait_fraction"] == 0.25
    seconds = row["epoch_seconds"]
    assert (seconds["p20"], seconds["median"], seconds["p80"]) == pytest.approx((1.4, 2, 2.6))


def test_the_table_has_every_figure():
    row = measured("eager", 4.0, 0.031) | {
        "epoch_seconds": {"median": 4.0, "p20": 3.0, "p80": 5.0}, "times_eager": 1.0, "peak_memory_mb": 1234.5,
    }  # fmt: skip
    result = {
        "model": "vgg16", "dataset": "synthetic", "images_per_epoch": 100, "batch_size": 4, "augmentation": "none",
        "device": "Some CPU", "rounds": 5, "steps_per_round": 2, "steps_per_epoch": 25, "candidates": [row],
        "model_alone": row | {"name": "model alone"}, "loader_alone_images_per_second": {"dali": 1000.0},
        "limit_epoch_seconds": 0.5, "limit_images_per_second": 200.0,
    }  # fmt: skip
    printed = io.StringIO()
    Console(file=printed, width=120).print(profile_table(result))
    lines = [" ".join(line.split()) for line in printed.getvalue().splitlines()]
    for line in (
        "vgg16, 100 synthetic images an epoch, batch 4, none, Some CPU",
        "5 interleaved rounds of 2 of 25 steps, scaled to an epoch",
        "eager 4.00 3.00 5.00 25 1.00 3.1% 1,234 40.0%",
        "model alone 4.00 3.00 5.00 25 1.00 40.0%",
        "dali loader alone 0.10 1,000",
        "limit (roofline) 0.50 200",
    ):
        assert line in lines


def test_without_dali_and_bf16_those_steps_are_left_out(command_line, flags, tiny_vgg11, monkeypatch, tmp_path):
    monkeypatch.setattr("fastres.training.hardware.torch.cpu._is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("fastres.training.hardware.torch.cpu._is_amx_tile_supported", lambda: False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert command_line(*flags) == 0
    result = json.loads((tmp_path / "profile/profile.json").read_text())
    assert [row["name"] for row in result["candidates"]] == ["eager", "+ channels-last", "+ fused operator", "fastres"]
    assert "left out: + AMP (" in command_line.out
    assert "left out: + DALI loader (" in command_line.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet17"], "--model: invalid choice 'resnet17'"),
        (["--dataset", "imagenet"], "--dataset: invalid choice: 'imagenet'"),
        (["--dataset", "folder", "--data-dir", "nowhere"], "--data-dir nowhere: no such folder"),
        (["--batchsize", "1"], "unknown argument --batchsize; did you mean --batch-size"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--batch-size", "21"], "--batch-size 21: larger than the training set of 20 images"),
        (["--augmentation", "crop-x"], "--augmentation 'crop-x': must be none, or steps joined by dashes"),
        (["--images", "0"], "--images 0: must be at least 1"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--rounds", "few"], "--rounds: invalid int value: 'few'"),
        (["--seconds", "-1"], "--seconds -1: must be above 0"),
        (["--seconds", "nan"], "--seconds nan: must be above 0"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
    ],
)
def test_bad_flags(arguments, message, command_line, flags, tmp_path):
    assert command_line(*flags, *arguments) == 2
    assert re.search(message, command_line.err)
    assert command_line.err.count("\n") == 1
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([".lock", "profile.json"], "already holds a profile"),
        (["profile.json"], "profile.json in it would be overwritten and is not from fastres"),
    ],
)
def test_a_folder_that_holds_another_profile_is_left_as_it_is(files, message, command_line, flags, tmp_path):
    (tmp_path / "profile").mkdir()
    for name in files:
        (tmp_path / "profile" / name).write_text("{}")
    assert command_line(*flags) == 2
    assert message in command_line.err
    assert (tmp_path / "profile/profile.json").read_text() == "{}"


def test_the_rival_is_the_compiled_model_without_the_operator():
    defaults, dataset, _ = profile.prepare(profile.ProfileConfig(model="vgg11", images=20, batch_size=4, device="cpu"))
    rows, left_out = profile.plan_rows(True, defaults)
    assert [name for name, *_ in rows][-3:] == ["+ compile", "compile without fused operator", "fastres"]
    rival = replace(defaults, fused=False, compile=True)
    assert rows[-2:] == [("compile without fused operator", rival, False), ("fastres", defaults, False)]
    assert [plain for *_, plain in rows] == [True] * (len(rows) - 2) + [False, False]
    assert not any("compile" in line for line in left_out)
    for _, settings, plain in (rows[0], *rows[-2:]):
        trainer = create_trainer(settings, dataset, plain)
        assert type(trainer) is (PlainTrainer if plain else Trainer)
        norms = {type(module) for module in trainer.model.modules() if isinstance(module, nn.BatchNorm2d)}
        assert norms == {BatchNormReLU2d if settings.fused else EagerBatchNormReLU2d}


def test_on_a_gpu_the_rival_and_fastres_are_compiled_as_fast_as_can_be():
    defaults = TrainConfig(device="cuda", amp="bf16", loader="dali", fused=True, compile=False, cuda_graphs=True)
    rows, left_out = profile.plan_rows(None, defaults)
    assert left_out == []
    *_, compiled, rival, strongest, fastres = rows
    assert compiled[:2] == ("+ compile", replace(defaults, compile=True, cuda_graphs=False))
    assert (rival[0], strongest[0], fastres) == (
        "max-autotune without descent", "fastres with max-autotune", ("fastres", defaults, False),
    )  # fmt: skip
    changes = {"compile": True, "compile_mode": "max-autotune-no-coordinate-descent", "cuda_graphs": False}
    assert rival[1] == replace(defaults, fused=False, **changes)
    assert strongest[1] == replace(defaults, compile=True, compile_mode="max-autotune-no-cudagraphs")
    assert [name for name, *_ in profile.plan_rows(False, defaults)[0]][-2:] == ["+ fused operator", "fastres"]


def test_rows_are_chosen_by_name():
    defaults, *_ = profile.prepare(profile.ProfileConfig(model="vgg11", images=20, batch_size=4, device="cpu"))
    rows, left_out = profile.plan_rows(None, defaults, ("+ AMP",))
    assert [name for name, *_ in rows] == ["eager", "+ AMP", "fastres"]
    assert "+ channels-last (not among --rows)" in left_out
    with pytest.raises(UserError, match=r"--rows \+ amp: is not measured here; choose from \+ channels-last, \+ AMP"):
        profile.plan_rows(None, defaults, ("+ amp",))


def test_without_its_kernels_the_operator_is_left_out(monkeypatch):
    monkeypatch.setattr("fastres.training.hardware.extension_error", "the C++ extension is not built")
    config = profile.ProfileConfig(model="vgg11", images=20, batch_size=4, device="cpu")
    defaults, _, why = profile.prepare(config)
    assert "fused off (the C++ extension is not built)" in why
    rows, left_out = profile.plan_rows(config.compile, defaults)
    assert "+ fused operator (--no-fused, or its kernels are missing)" in left_out
    assert not any(settings.fused for _, settings, _ in rows)


def measured(name, seconds, wait=0.0, **engine):
    default = {
        "channels_last": True, "amp": "bf16", "loader": "dali", "fused": True, "compile": False,
        "compile_mode": "default", "cuda_graphs": False,
    }  # fmt: skip
    return {
        "name": name,
        "epoch_seconds": {"rounds": [0.9 * seconds, seconds, 1.5 * seconds]},  # other work slows all rows of a round
        "images_per_second": 100 / seconds,
        "data_wait_fraction": wait,
        "limit_share": 0.4,
        "engine": default | engine,
    }


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [measured("eager", 9.0), measured("fastres", 2.0)],
            "keep the defaults: data wait is 0.0%, .*, and the model reaches 40% of the limit$",
        ),
        (
            [measured("eager", 9.0), measured("fastres", 2.0, 0.31)],
            "data wait is 31%: the dali loader gives 1,000 images/s by itself, the model takes 67; raise --workers$",
        ),
        (
            [measured("eager", 9.0), measured("fastres", 2.0, 0.03, loader="eager")],
            "data wait is 3%: the eager loader gives 10 images/s by itself, the model takes 67; install DALI",
        ),
        (
            [measured("+ AMP", 1.8, fused=False), measured("fastres", 2.0)],
            r"\+ AMP is 1.11x as fast as the defaults here: train with --no-fused$",
        ),
        (
            [
                measured("+ AMP", 1.8, fused=False) | {"epoch_seconds": {"rounds": [2.1, 1.8, 1.8]}},
                measured("fastres", 2.0),
            ],
            "keep the defaults: .*, no other setting measured is clearly faster, ",
        ),
        (
            [measured("+ AMP", 1.0, fused=False), measured("+ compile", 0.5, compile=True), measured("fastres", 2.0)],
            r"\+ compile is 4.00x as fast as the defaults here: train with --compile$",
        ),
        (
            [
                measured("eager", 3.0),
                measured("max-autotune without descent", 1.0, fused=False, compile=True, compile_mode="max-autotune"),
                measured("fastres", 2.0),
            ],
            "max-autotune without descent is 2.00x as fast .* "
            "train with --no-fused --compile --compile-mode max-autotune$",
        ),
        ([measured("+ AMP", 1.98, fused=False), measured("fastres", 2.0)], "keep the defaults"),
        (
            [measured("+ fused operator", 1.5), measured("fastres", 2.0)],
            "keep the defaults: .* no other setting measured is",
        ),
    ],
)
def test_advice(rows, expected):
    alone = measured("model alone", 1.5)
    rates = {"dali": 1000.0, "eager": 10.0}
    line = advice({"candidates": rows, "model_alone": alone, "loader_alone_images_per_second": rates})
    assert re.match(expected, line)
    assert "\n" not in line
