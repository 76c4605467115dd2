import pytest
import torch

from fastres.training import hardware

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "processes", "wanted", "steps", "compiled", "recorded", "mode"),
    [
        (CPU, 1, None, 10**6, False, False, "default"),
        (CUDA, 1, None, 10**6, False, True, "reduce-overhead"),
        (CUDA, 1, True, 10, True, False, "reduce-overhead"),
        (CUDA, 2, None, 10, False, False, "default"),
        (CUDA, 2, None, 10**6, True, False, "default"),
        (CUDA, 2, False, 10**6, False, False, "default"),
    ],
)
def test_a_step_is_compiled_or_recorded(device, processes, wanted, steps, compiled, recorded, mode, monkeypatch):
    monkeypatch.setattr(hardware, "world_size", lambda: processes)
    assert hardware.choose_compile(wanted, device, steps)[0] == compiled
    assert hardware.choose_cuda_graphs(None, device, compiled)[0] == recorded
    assert hardware.choose_compile_mode("auto", device) == mode
    assert hardware.choose_compile_mode("max-autotune", device) == "max-autotune"


def test_what_was_asked_for_is_taken_where_it_can_be_had():
    assert hardware.choose_cuda_graphs(False, CUDA, False) == (False, "asked for")
    assert hardware.choose_cuda_graphs(True, CUDA, False) == (True, "asked for")
    assert hardware.choose_cuda_graphs(True, CPU, False) == (False, "CPU")
