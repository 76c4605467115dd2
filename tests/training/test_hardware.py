import pytest
import torch

from fastres.training import hardware

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
