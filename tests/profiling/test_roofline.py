"""FLOPs against the published ones and torch's own counter; bytes and the limit against sums done by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastres.models import create_model, list_models
from fastres.nn import BatchNormReLU2d
from fastres.profiling import roofline
from fastres.profiling.roofline import Kernel, Machine, forward_macs, limit_seconds, measure_machine, step_kernels


def on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, 10, **options)


@pytest.mark.parametrize(("name", "gmac"), [("resnet50", 1.298), ("resnet18", 0.555), ("vgg16", 0.313)])
def test_forward_macs_are_the_published_ones(name, gmac):
    assert forward_macs(on_meta(name)) / 1e9 == pytest.approx(gmac, abs=5e-4)


@pytest.mark.parametrize("name", list_models())
def test_step_flops_are_what_torch_counts(name):
    model = on_meta(name)
    with FlopCounterMode(display=False) as counter:
        model.train()(torch.empty(4, 3, 32, 32, device="meta")).sum().backward()
    assert sum(kernel.flops for kernel in step_kernels(model, 4, torch.bfloat16)) == counter.get_total_flops()


def test_torchs_modules_have_the_same_limit():
    assert step_kernels(on_meta("resnet18"), 4, torch.bfloat16) == step_kernels(
        on_meta("resnet18", fused=False), 4, torch.bfloat16
    )


def test_kernels_by_hand():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 8, 1, bias=False)
            self.bn1 = BatchNormReLU2d(8)
            self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.bn2 = BatchNormReLU2d(8)
            self.pool = nn.MaxPool2d(2)

        def forward(self, x):
            x = self.bn1(self.conv1(x))
            return self.pool(self.bn2(self.conv2(x), residual=x))

    pixels = 2 * 32 * 32
    first = Kernel(2 * pixels * 8 * 3, 2 * (pixels * 3 + 8 * 3 + pixels * 8))
    second = Kernel(2 * pixels * 8 * 72, 2 * (pixels * 8 + 8 * 72 + pixels * 8))
    norm, norm_and_add = Kernel(0, 2 * 8 * pixels * 8), Kernel(0, 2 * 10 * pixels * 8)
    pool = Kernel(0, 2 * 2 * (pixels + pixels // 4) * 8)
    with torch.device("meta"):
        kernels = step_kernels(Block(), 2, torch.bfloat16)
    assert kernels == [first, first, norm, second, second, second, norm_and_add, pool]


@pytest.mark.parametrize(
    ("name", "seconds"), [("resnet18", 0.41), ("resnet50", 1.87), ("vgg16", 0.21), ("vgg19", 0.24)]
)
def test_limits_worked_out_elsewhere(name, seconds):
    """An epoch of 50,000 images at an H100's 800 TFLOP/s and 3.0 TB/s."""
    limit = limit_seconds(step_kernels(on_meta(name), 128, torch.bfloat16), Machine(800e12, 3.0e12))
    assert limit * 50_000 / 128 == pytest.approx(seconds, abs=0.007)


def test_a_kernel_takes_the_longer_of_arithmetic_and_traffic():
    assert limit_seconds([Kernel(100, 1), Kernel(10, 40)], Machine(10.0, 2.0)) == 100 / 10 + 40 / 2


def test_counting_leaves_no_hook_behind():
    model = on_meta("vgg11")
    step_kernels(model, 2, torch.float32)
    assert not any(module._forward_hooks for module in model.modules())


def test_machine_rates_count_both_operations_and_both_directions(monkeypatch):
    monkeypatch.setattr(roofline, "_best_seconds", lambda run, device: 0.5)
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**22)
    monkeypatch.setitem(roofline.MATRIX_SIZE, "cpu", 128)
    assert measure_machine(torch.device("cpu"), torch.float32) == Machine(2 * 2 * 128**3, 2 * 2 * 2**22)


@pytest.mark.parametrize(("seconds", "best"), [(10.0, 0.1), (1.0, 0.3)])  # on a slow machine, of at least one
def test_the_best_of_several_measurements_counts(seconds, best, monkeypatch):
    now, durations = [0.0], iter([9.0, 0.3, 0.1, 0.2, 0.5])  # the first to warm up

    def function():
        now[0] += next(durations)

    monkeypatch.setattr(roofline, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(roofline, "MEASURE_SECONDS", seconds)
    assert roofline._best_seconds(function, torch.device("cpu")) == pytest.approx(best)


def test_waiting_for_a_gpu_is_a_small_part_of_a_measurement(monkeypatch):
    now = [0.0]

    def take(seconds):
        now[0] += seconds

    monkeypatch.setattr(roofline, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(roofline, "_synchronize", lambda device: take(9e-6))
    assert roofline._best_seconds(lambda: take(179e-6), torch.device("cuda")) == pytest.approx(179e-6, rel=0.01)


def test_machine_rates_are_those_of_the_moment(monkeypatch):
    monkeypatch.setattr(roofline, "MEASURE_SECONDS", 0.5)
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**22)
    monkeypatch.setitem(roofline.MATRIX_SIZE, "cpu", 128)
    machine = measure_machine(torch.device("cpu"), torch.float32)
    assert 1e8 < machine.flops_per_second < 1e14
    assert 1e8 < machine.bytes_per_second < 1e13
