import pytest
import torch

from fastres.config import COMPILE_MODES, TrainConfig
from fastres.errors import UserError
from fastres.training import hardware
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
