"""The Triton kernels, compiled for an H100 on a machine without one: no register may be spilled, activations move 16
bytes at a time, and the passes that reduce ask for tiles before they work on them. test_batch_norm_relu.py runs this
in a process of its own, as it replaces Triton's driver."""

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from fastres.ops.batch_norm_relu import launch, triton_kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NoDevice:
    """A driver for which kernels are compiled, but that runs none; it keeps what they were launched with."""

    def __init__(self):
        self.launched = []
        self.utils = SimpleNamespace(
            load_binary=lambda *_: ("module", "function", 32, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def launcher_cls(self, source, metadata):
        return lambda *arguments: self.launched.append(arguments)

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


def call(shape, channels_last=True, has_residual=True, offset=0):
    """The operator, forward and backward, in training; `offset` of x from aligned memory, in elements."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.bfloat16).to(memory_format=memory_format)
    if offset:
        x = torch.empty(x.numel() + offset, dtype=x.dtype)[offset:].as_strided(x.shape, x.stride())
    residual = torch.empty_like(x) if has_residual else None
    weight, bias, *running = torch.empty(4, shape[1]).unbind()
    batches = torch.tensor(0)
    y, mean, var, mask = triton_kernels.forward(x, residual, weight, bias, *running, batches, True, 0.1, 1e-5, True)
    twin, output = (y, mask if mask.numel() else y) if has_residual else (None, None)
    triton_kernels.backward(y, twin, x, output, weight, bias, mean, var, True, 1e-5, True)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", [(128, 64, 32, 32), (128, 64, 2, 2)], ids=str)
def test_a_launch_passes_on_what_tritons_own_does(shape, offset, monkeypatch):
    device, ours = NoDevice(), launch._Launcher.__call__
    driver.set_active(device)
    compared = []

    def passed_on(arguments):  # grid, stream, function, metadata, three hooks, arguments
        return arguments[:6], [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments[9:]]

    def three_times(launcher, kernel, grid, tensors, numbers, flags):
        kernel[grid](*tensors, *numbers, *flags, *launcher.constants, **launcher.options)
        for _ in range(2):  # looks for the compiled kernel, and finds it
            ours(launcher, kernel, grid, tensors, numbers, flags)
        own, *others = map(passed_on, device.launched)
        assert others == [own, own]
        compared.append(kernel.fn.__name__)
        device.launched.clear()

    monkeypatch.setattr(launch._Launcher, "__call__", three_times)
    launch.launcher.cache_clear()
    call(shape, offset=offset)
    assert len(compared) == (4 if shape[2] == 32 else 2)


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [((128, 256, 32, 32), TWO_PASSES), ((128, 64, 2, 2), ("forward_once", "backward_once"))],
    ids=str,
)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
def test_resources(shape, kernels, channels_last, has_residual, compiled):
    call(shape, channels_last, has_residual)
    assert tuple(compiled) == kernels
    for name, code in compiled.items():
        spilled, accesses = resources(code)
        assert spilled == [0, 0], name
        if name.startswith("split"):
            assert ("LDGSTS", ".128") in accesses, name  # a copy that is not waited for
        elif channels_last or not name.endswith("once"):
            # planes of 2x2 pixels are no 16 bytes
            assert {("LDG", ".128"), ("STG", ".128")} <= accesses, name
