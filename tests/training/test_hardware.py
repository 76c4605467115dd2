from dataclasses import replace

import pytest
import torch

from fastres.config import COMPILE_MODES, TrainConfig
from fastres.errors import UserError
from fastres.training import hardware, selfcheck
from fastres.training.trainer import compiled

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "processes", "wanted", "steps", "compiled", "captured"),
    [
        (CPU, 1, None, 10**6, False, False),
        (CUDA, 1, None, 10**6, False, True),
        (CUDA, 1, True, 10, True, True),
        (CUDA, 2, None, 10, False, False),
        (CUDA, 2, None, 10**6, True, False),
        (CUDA, 2, False, 10**6, False, False),
    ],
)
def test_a_step_is_compiled_and_captured(device, processes, wanted, steps, compiled, captured, monkeypatch):
    monkeypatch.setattr(hardware, "world_size", lambda: processes)
    assert hardware.choose_compile(wanted, device, steps)[0] == compiled
    assert hardware.choose_cuda_graphs(None, device, "default" if compiled else None)[0] == captured


def test_muon_in_fp16_is_not_captured(arrays, monkeypatch):
    """GradScaler asks the GPU for its verdict before each of Muon's steps, which a capture does not allow."""
    monkeypatch.setattr(hardware, "choose_device", lambda name: (CUDA, "there"))
    monkeypatch.setattr(hardware, "choose_amp", lambda name, device: (name, "asked for"))
    monkeypatch.setattr(selfcheck, "faults", lambda device: {})
    monkeypatch.setattr(hardware, "pixels_on_gpu", lambda *arguments: True)
    config = TrainConfig(optimizer="muon", amp="fp16", batch_size=8)
    chosen, line = hardware.resolve(config, arrays)
    assert not chosen.cuda_graphs
    assert "CUDA graphs off (Muon in fp16 waits for the GPU at every step)" in line
    with pytest.raises(UserError, match=r"--cuda-graphs: Muon in fp16 waits .*; or take --no-cuda-graphs"):
        hardware.resolve(replace(config, cuda_graphs=True), arrays)
    for others in ({"optimizer": "sgd"}, {"amp": "bf16"}):
        assert hardware.resolve(replace(config, **others), arrays)[0].cuda_graphs


def test_what_was_asked_for_is_taken_where_it_can_be_had():
    assert hardware.choose_cuda_graphs(False, CUDA, None) == (False, "asked for")
    assert hardware.choose_cuda_graphs(True, CUDA, None) == (True, "asked for")
    assert hardware.choose_cuda_graphs(True, CPU, None) == (False, "CPU")
    assert not hardware.choose_cuda_graphs(True, CUDA, "max-autotune")[0]
    assert hardware.choose_fused(True, CPU, False) == (True, "asked for")
    assert hardware.choose_fused(False, CPU, False) == (False, "asked for")


@pytest.mark.parametrize("mode", COMPILE_MODES)
def test_a_step_is_captured_unless_the_compiler_captures(mode):
    model = compiled(torch.nn.Identity(), TrainConfig(compile=True, compile_mode=mode))
    captures = (model.get_compiler_config() or {}).get("triton.cudagraphs", False)
    assert hardware.choose_cuda_graphs(None, CUDA, mode)[0] == (not captures)


def test_the_operator_is_chosen_where_its_kernels_can_run(monkeypatch):
    monkeypatch.setattr(hardware, "extension_error", "not built")
    assert hardware.choose_fused(None, CPU, False) == (False, "not built")
    for path, fused in (("/bin:/usr/bin", True), ("", False)):
        monkeypatch.setenv("PATH", path)
        monkeypatch.delenv("CC", raising=False)
        assert hardware.choose_fused(None, CUDA, False)[0] == fused
    with pytest.raises(UserError, match=r"--fused: Triton finds no C compiler.*; or take --no-fused"):
        hardware.choose_fused(True, CUDA, False)
    monkeypatch.setenv("CC", "cc")
    assert hardware.choose_fused(None, CUDA, False) == (True, "Triton kernels")
    reason = "outside of a CUDA graph its launches take longer than PyTorch's"
    assert hardware.choose_fused(None, CUDA, False, captured=False) == (False, reason)
    assert hardware.choose_fused(True, CUDA, False, captured=False) == (True, "asked for")
    assert hardware.choose_fused(None, CUDA, True, captured=False) == (True, "Triton kernels")
