"""The public API: imported lazily, and usable as the README says."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import fastres
from fastres import models
from fastres.__main__ import main
from fastres.data.splits import Split
from fastres.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny_vgg11")


def test_importing_the_package_imports_no_library():
    code = "import sys, fastres; dir(fastres); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "fastres" in modules
    assert not {"torch", "nvidia.dali", "numpy", "matplotlib"} & set(modules)


def test_only_a_process_of_fastres_imports_without_collecting_garbage(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("__init__", "__main__"):
        (tmp_path / f"mine/{name}.py").write_text("import fastres, gc; print(gc.isenabled())")
    script = (
        "import runpy, sys, gc; sys.argv[0] = '-m'; import fastres; print(gc.isenabled()); from fastres import flags; "
    )
    script += "flags.run_command('x', lambda: print(gc.isenabled()))"
    for arguments, enabled in ((["-m", "mine"], "True"), (["-c", script, "fastres.train"], "False")):
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [enabled, "True"]


def test_training_imports_no_library_that_it_does_not_need_yet():
    code = "import sys, fastres.train, fastres.report.results; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in modules
    assert not {"torchvision", "torch._dynamo", "matplotlib", "scipy.stats", "nvidia.dali", "triton"} & set(modules)


def test_every_public_name_is_there_and_documented():
    for name in fastres.__all__:
        assert getattr(fastres, name).__doc__, name
        assert name in fastres.__doc__
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        _ = fastres.trainer


def test_callbacks_of_fit(settings, tmp_path):
    steps, rows = [], []
    summary = fastres.fit(
        **settings,
        quiet=True,
        on_step=lambda step, loss: steps.append((step, loss.item())),
        on_epoch=lambda row: rows.append(row) or row.clear(),  # it is the caller's
    )
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in steps[:3]] == summary["first_losses"][:3]
    assert len(rows) == summary["epochs"] == 2
    again = fastres.fit(config=tmp_path / "run/config.json", output_dir=tmp_path / "again", seed=1, quiet=True)
    assert (again["seed"], again["epochs"]) == (1, 2)
    with pytest.raises(UserError, match="config: is for a new run"):
        fastres.fit(config=tmp_path / "run/config.json", resume=tmp_path / "run")


@pytest.fixture
def settings(image_folder, tmp_path):
    return {
        "model": "vgg11", "dataset": "folder", "data_dir": str(image_folder), "epochs": 2, "batch_size": 20,
        "lr": 0.02, "device": "cpu", "output_dir": tmp_path / "run",
    }  # fmt: skip


def test_fit_returns_the_summary(settings, tmp_path, capfd):
    summary = fastres.fit(**settings, quiet=True)
    assert capfd.readouterr().out == ""
    assert summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert fastres.fit(resume=tmp_path / "run", epochs=3)["epochs"] == 3
    assert "epoch   3/3" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"modle": "vgg11"}, "unknown key modle; did you mean model"),
        ({"epochs": "3"}, "epochs: must be an integer, not '3'"),
        ({"model": "vgg12"}, "--model: invalid choice 'vgg12'"),
    ],
)
def test_fit_refuses_what_the_command_refuses(wrong, message, settings):
    with pytest.raises(UserError, match=message):
        fastres.fit(**settings | wrong)


@pytest.mark.parametrize("weights", ["best", "last"])
def test_a_loaded_model_predicts_as_the_run_evaluated(weights, settings, tmp_path, arrays):
    summary = fastres.fit(**settings, quiet=True, amp="off")
    model = fastres.load_model(tmp_path / "run", weights)
    assert model.class_names == ("bright", "dark")
    assert not model.training
    images = torch.from_numpy(arrays.test.images).permute(0, 3, 1, 2) / 255
    labels = torch.from_numpy(1 - arrays.test.labels)  # the folder's classes are sorted by name
    with torch.no_grad():
        logits = model(images)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(summary[f"{weights}_test_loss"], rel=0.1)  # JPEG


def test_a_loaded_network_of_ones_own(own_models, settings, tmp_path):
    source = (
        "from torch import nn\ndef net(n): return nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3072, n))"
    )
    (tmp_path / "nets.py").write_text(source)
    name = f"{tmp_path}/nets.py:net"
    fastres.fit(**settings | {"model": name}, quiet=True)
    assert fastres.load_model(tmp_path / "run", model=name)(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    del models.MODELS[name]
    with pytest.raises(UserError, match="a function is imported only where it is given"):
        fastres.load_model(tmp_path / "run")


def test_load_model_says_what_is_wrong(settings, tmp_path):
    with pytest.raises(UserError, match=r"config.json: not readable as JSON"):
        fastres.load_model(tmp_path)
    fastres.fit(**settings, quiet=True)
    with pytest.raises(UserError, match="weights 'first': choose from last, best"):
        fastres.load_model(tmp_path / "run", "first")
    (tmp_path / "run/last.safetensors").unlink()
    with pytest.raises(UserError, match=r"last.safetensors: does not hold weights of this model"):
        fastres.load_model(tmp_path / "run", "last")
    config = json.loads((tmp_path / "run/config.json").read_text())
    for wrong in ([0.2, 0.2], [0.2, 0.2, 0]):
        (tmp_path / "run/config.json").write_text(json.dumps(config | {"std": wrong}))
        with pytest.raises(UserError, match=r"config.json: mean and std: must be three numbers each, and std above 0"):
            fastres.load_model(tmp_path / "run")


@pytest.mark.parametrize("name", ["DaliLoader", "EagerLoader"])
def test_a_loader_in_a_loop_of_ones_own(name, rng):
    split = Split(rng.integers(0, 256, (10, 32, 32, 3), np.uint8), np.arange(10))
    loader = getattr(fastres, name)(
        split,
        lambda epoch: fastres.training_plan(0, epoch, 10, "crop-flip"),
        batch_size=4,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        device=torch.device("cpu"),
    )
    labels = torch.cat([labels for _, labels in loader.epoch(0)])
    assert labels.tolist() == fastres.training_plan(0, 0, 10, "crop-flip").order.tolist()


def test_the_command(capsys, tmp_path):
    assert main(["--help"]) == 0
    assert "fastres study" in capsys.readouterr().out
    assert main(["trian"]) == 2
    choices = "train, predict, export, profile, compare, doctor, study"
    assert capsys.readouterr().err == f"fastres: error: unknown command 'trian'; choose from {choices}\n"
    assert main(["train", "--resume", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("fastres train: error: --resume ")
