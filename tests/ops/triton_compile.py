"""The Triton kernels, compiled for an H100 on a machine without one: no register may be spilled, activations move 16
bytes at a time, and the passes that reduce ask for tiles before they work on them. test_batch_norm_relu.py runs this
in a process of its own, as it replaces Triton's driver."""

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from fastres.ops.batch_norm_relu import triton_kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NoDevice:
    """A driver for which kernels are compiled, but that runs none."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that were called, by name, as the machine code that they were compiled to."""
    kernels = {}
    run = JITFunction.run

    def compile_only(kernel, *arguments, warmup, **options):
        kernels[kernel.fn.__name__] = run(kernel, *arguments, warmup=True, **options).asm["cubin"]

    monkeypatch.setattr(JITFunction, "run", compile_only)
    driver.set_active(NoDevice())
    return kernels


def resources(code):
    """Bytes of stack and of local memory, and the accesses of global memory: what, and how wide."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(code)
        command = [CUOBJDUMP, "--dump-resource-usage", "--dump-sass", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (spilled,) = re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return [int(size) for size in spilled], {*re.findall(r"(LDGSTS|LDG|STG)\.E(?:\.BYPASS)?(\.\d+)?", text)}


TWO_PASSES = "split_moments", "normalize", "split_sums", "input_gradient"


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [((128, 256, 32, 32), TWO_PASSES), ((128, 64, 2, 2), ("forward_once", "backward_once"))],
    ids=str,
)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
def test_resources(shape, kernels, channels_last, has_residual, compiled):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16).to(memory_format=memory_format)
    residual = torch.empty_like(x) if has_residual else None
    weight, bias, *running = torch.empty(4, shape[1]).unbind()
    batches = torch.tensor(0)
    y, mean, var = triton_kernels.forward(x, residual, weight, bias, *running, batches, True, 0.1, 1e-5, True)
    output = y if has_residual else None
    triton_kernels.backward(y, output, x, output, weight, bias, mean, var, True, 1e-5, True)
    assert tuple(compiled) == kernels
    for name, code in compiled.items():
        spilled, accesses = resources(code)
        assert spilled == [0, 0], name
        if name.startswith("split"):
            assert ("LDGSTS", ".128") in accesses, name  # a copy that is not waited for
        elif channels_last or not name.endswith("once"):
            # planes of 2x2 pixels are no 16 bytes
            assert {("LDG", ".128"), ("STG", ".128")} <= accesses, name
