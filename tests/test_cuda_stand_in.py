"""What only a GPU reaches, with tests/cuda_stand_in.py in its place."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch

from fastres import profile
from fastres.data import create_loader
from fastres.data.image_folder import folder
from fastres.data.plan import training_plan
from fastres.models import MODELS, create_model
from fastres.ops.batch_norm_relu import launch
from fastres.profiling import roofline
from fastres.profiling.measure import interleave
from fastres.training import selfcheck
from tests.conftest import tiny_model
from tests.training.test_trainer import make_trainer, random_batches, train_epoch

dali = pytest.importorskip("fastres.data.dali")
cuda_stand_in = pytest.importorskip("tests.cuda_stand_in")
SMALL = {"batch_size": 8, "lr": 0.01, "schedule": "cosine", "epochs": 2}


@pytest.fixture
def log(monkeypatch):
    with cuda_stand_in.in_place(monkeypatch) as log:
        yield log


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_replayed_step_is_the_step(log, amp):
    batches = random_batches([8, 8, 5])
    states, losses = [], []
    for device, graphs in (("cuda", True), ("cpu", False)):
        torch.manual_seed(0)
        trainer = make_trainer(
            batches, create_model("resnet20_b", 4), device, amp=amp, cuda_graphs=graphs, channels_last=True, **SMALL
        )
        trainer.warm_up()
        log.clear()
        losses.append(train_epoch(trainer, batches).loss)
        states.append(trainer.model.state_dict())
        assert log.count("replay") == (2 if graphs else 0)  # the last batch has 5 images
    assert losses[0] == losses[1]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=0)


def test_no_two_kernels_that_may_run_together_count_in_the_same_memory(log, monkeypatch):
    device, stream = torch.device("cuda", 0), [7]
    monkeypatch.setattr(
        launch, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: stream[0]))
    )
    for name in ("_counters", "_graph_counters"):
        monkeypatch.setattr(launch, name, {})
    monkeypatch.setattr(launch, "_lasting_zeros", lambda count, _: torch.zeros(count, dtype=torch.int32))

    def places(counts):
        tensors = [launch._arrivals(device, count) for count in counts]
        assert all(not tensor.any() and tensor.data_ptr() % 16 == 0 for tensor in tensors)
        return [tensor[: -(-count // 4) * 4].data_ptr() for tensor, count in zip(tensors, counts, strict=True)]

    assert places([5, 16])[0] == places([7])[0]  # one after another
    on_this = places([5])
    stream[0] = 8
    assert places([5]) != on_this
    log += ["capture"]
    first = places([5, 1, 32])
    log += ["captured", "capture"]
    in_graphs = first + places([5, 1, 32])
    assert len(set(in_graphs)) == 6
    assert len({*in_graphs, *on_this}) == 7
    assert len(set(places([launch.GRAPH_COUNTERS] * 2))) == 2


def test_counters_are_allocated_by_another_thread_and_filled_before_they_are_used(monkeypatch):
    steps = []

    def zeros(count, dtype, device):
        steps.append(("zeros", threading.get_ident()))
        return torch.empty(count, dtype=dtype)

    monkeypatch.setattr(
        launch,
        "torch",
        SimpleNamespace(
            zeros=zeros,
            int32=torch.int32,
            cuda=SimpleNamespace(synchronize=lambda device: steps.append(("synchronize", threading.get_ident()))),
        ),
    )
    assert launch._lasting_zeros(8, torch.device("cuda", 0)).shape == (8,)
    assert [step for step, _ in steps] == ["zeros", "synchronize"]
    assert len({thread for _, thread in steps} | {threading.get_ident()}) == 2


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("decode", ["once", "every-epoch"])
def test_batches_are_those_of_the_cpu(log, encoded, fits, decode, arrays, image_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**21 if fits else 2**17, 2**21))
    split = folder(image_folder).train if encoded else arrays.train
    batches = {}
    for device in ("cpu", "cuda"):
        loader = create_loader(
            "dali",
            split,
            lambda epoch: training_plan(3, epoch, 60, "crop-flip-cutout"),
            8,
            device=device,
            decode=decode,
        )
        log.clear()
        batches[device] = [(x.clone(), y.clone()) for epoch in (0, 1) for x, y in loader.epoch(epoch)]
    for ours, theirs in zip(batches["cuda"], batches["cpu"], strict=True):
        assert all(map(torch.equal, ours, theirs))
    # a batch's memory is DALI's again when the work that read it is done, and the host is at most so far ahead
    assert log.count("record") == 16
    assert log.count("event.synchronize") == 16 - dali.MAX_BATCHES_IN_FLIGHT
    placed = "dali.external_source gpu" in log
    assert placed == (fits and (decode == "once" or not encoded))
    assert ("dali.image mixed" in log) == (encoded and decode == "every-epoch")


def test_a_measurement_begins_and_ends_with_a_gpu_that_has_nothing_to_do(log):
    interleave({name: lambda name=name: log.append(name) for name in "ab"}, 3)
    warm_up, measured = log[:2], log[2:]
    assert sorted(warm_up) == ["a", "b"]
    names = [i for i, entry in enumerate(measured) if entry != "synchronize"]
    assert len(names) == 6
    assert all(measured[i - 1] == measured[i + 1] == "synchronize" for i in names)


def test_a_run_and_its_continuation(log, arrays, tmp_path, tiny_vgg11, command_line):
    flags = ("--model", "vgg11", "--dataset", "digits", "--device", "cuda", "--amp", "bf16")
    folder = tmp_path / "run"
    assert command_line(*flags, "--epochs", 2, "--output-dir", folder) == 0
    assert "device cuda (stand-in), amp bf16" in command_line.out
    assert "CUDA graphs on (the GPU need not wait for Python)" in command_line.out
    assert "loader dali (DALI imports; pixels stay on the GPU)" in command_line.out
    summary = json.loads((folder / "summary.json").read_text())
    assert log.count("capture") == 1
    assert log.count("replay") > 2 * summary["train_images"] // 32 - 2
    assert command_line("--resume", folder, "--epochs", 3) == 0


def test_the_fast_recipe_and_mixup(log, tmp_path, monkeypatch, command_line):
    monkeypatch.setitem(MODELS, "resnet18", tiny_model)
    flags = ("--recipe", "fast", "--model", "resnet18", "--dataset", "digits", "--device", "cuda", "--amp", "bf16")
    graphs = tmp_path / "graphs"
    flags = (*flags, "--epochs", 1, "--augmentation", "reflectcrop-altflip-mixup")
    assert command_line(*flags, "--output-dir", graphs) == 0
    assert log.count("capture") == 3  # one for each size
    assert log.count("replay") == 1437 // 32
    assert "images are mixed: training accuracy is that of each one's larger part" in command_line.out
    assert command_line(*flags, "--no-cuda-graphs", "--fused", "--output-dir", tmp_path / "plain") == 0
    losses = [
        json.loads((folder / "summary.json").read_text())["first_losses"] for folder in (graphs, tmp_path / "plain")
    ]
    assert losses[0] == losses[1]


def test_a_profile(log, tmp_path, tiny_vgg11, monkeypatch):
    monkeypatch.setitem(roofline.MATRIX_SIZE, "cuda", 256)
    monkeypatch.setattr(roofline, "MEASURE_SECONDS", 0.05)
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**22)
    flags = ["--model", "vgg11", "--dataset", "digits", "--device", "cuda", "--batch-size", "8", "--seconds", "0.2"]
    assert profile.main([*flags, "--no-compile", "--output-dir", str(tmp_path / "p")]) == 0
    result = json.loads((tmp_path / "p/profile.json").read_text())
    names = [row["name"] for row in result["candidates"]]
    assert names == ["eager", "+ channels-last", "+ AMP", "+ DALI loader", "+ fused operator", "fastres"]
    assert "replay" in log


@pytest.mark.parametrize(
    ("check", "flag", "without", "line"),
    [
        ("operator", "--fused", "--no-fused", "fused off (the check of operator"),
        ("cuda-graph", "--cuda-graphs", "--no-cuda-graphs", "CUDA graphs off (the check of cuda-graph"),
        ("loaders", "--loader dali", "--loader eager", "loader eager (the check of loaders"),
    ],
)
def test_a_part_with_a_fault_is_left_out_or_refused(check, flag, without, line, log, tmp_path, tiny_vgg11, command_line,
                                                    monkeypatch):  # fmt: skip
    fault = f"the check of {check} on this machine failed: differs"
    monkeypatch.setattr(selfcheck, "faults", lambda device: {check: fault})
    flags = ("--model", "vgg11", "--dataset", "digits", "--device", "cuda", "--epochs", 1)
    assert f"{flag}: {fault}; or take {without}" in command_line.one_line(*flags, *flag.split())
    assert command_line(*flags, "--output-dir", tmp_path / "run") == 0
    assert f"{line} on this machine failed: differs)" in command_line.out


def test_the_check_of_graphs(log, monkeypatch):
    monkeypatch.setattr(selfcheck, "STEPS", 2)
    monkeypatch.setattr(selfcheck, "create_model", lambda name, classes: create_model("resnet20_b", classes))
    selfcheck.check_cuda_graph(torch.device("cuda"))
    assert log.count("replay") == selfcheck.STEPS
    monkeypatch.setattr(cuda_stand_in.Graph, "replay", lambda graph: None)
    with pytest.raises(ArithmeticError, match="differs by"):
        selfcheck.check_cuda_graph(torch.device("cuda"))
