"""Checks that each fast part gives right results on this machine, and the parts that ``auto`` must do without."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import fastres
from fastres.config import TrainConfig
from fastres.data import create_loader
from fastres.data.plan import training_plan
from fastres.data.splits import CIFAR10_STD, Split
from fastres.errors import UserError
from fastres.files import write_json
from fastres.machine import device_name, versions
from fastres.models import create_model
from fastres.nn import BatchNormReLU2d, EagerBatchNormReLU2d
from fastres.training.trainer import Trainer

CASES = (  # of the operator: shape, type, and whether there is a residual
    ((32, 64, 32, 32), torch.bfloat16, True),
    ((16, 256, 16, 16), torch.float32, True),
    ((8, 20, 5, 3), torch.float32, False),
)
STEPS = 10
LEVELS = 3.5  # of 255, by which decoders of JPEG may differ
SECONDS = 300  # that a check may take; compiling the kernels takes a few
DRIVER = Path("/proc/driver/nvidia/version")
COMMAND = (sys.executable, "-m", "fastres.doctor", "--only")


def check_operator(device: torch.device) -> None:
    """The fused operator, forward and backward in training, against PyTorch's own operators in float64."""
    for shape, dtype, has_residual in CASES:
        x, residual, grad = (torch.randn(shape) for _ in range(3))
        residual = 8 * residual.sign()  # so that no result is within rounding of 0
        results = []
        for norm, kind in ((BatchNormReLU2d, dtype), (EagerBatchNormReLU2d, torch.float64)):
            layer = norm(shape[1]).to(device, torch.float64 if kind == torch.float64 else torch.float32)
            if not has_residual:
                nn.init.constant_(layer.bias, 8)
            tensors = [
                t.to(dtype).to(device, kind, memory_format=torch.channels_last).requires_grad_() for t in (x, residual)
            ]
            y = layer(tensors[0], tensors[1] if has_residual else None)
            inputs = [*tensors[: 1 + has_residual], layer.weight, layer.bias]
            gradients = torch.autograd.grad(y, inputs, grad.to(device, y.dtype))
            results.append([y.detach(), layer.running_mean, layer.running_var, *gradients])
        for ours, expected in zip(*results, strict=True):
            scale = max(1.0, expected.abs().max().item())
            close(ours.double() / scale, expected / scale, 3e-2 if dtype == torch.bfloat16 else 2e-5)


def check_loaders(device: torch.device) -> None:
    """The DALI loader against the eager one, from pixels and from JPEG files."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (64, 4, 4, 3), np.uint8)
    images = [Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC) for pixels in coarse]
    files = []
    for image in images:
        image.save(file := BytesIO(), "JPEG", quality=75)
        files.append(np.frombuffer(file.getvalue(), np.uint8))
    labels = np.arange(64)
    plan = partial(training_plan, 0, num_images=64, augmentation="crop-flip-cutout")
    for split, levels in (
        (Split(np.stack([np.asarray(i) for i in images]), labels), 1e-2),
        (Split(files, labels), LEVELS),
    ):
        loaders = (create_loader(name, split, plan, 16, device=device, workers=2) for name in ("dali", "eager"))
        ours, expected = (
            [(x.to(device, copy=True), y.to(device, copy=True)) for x, y in loader.epoch(1)] for loader in loaders
        )
        for (x, y), (x_expected, y_expected) in zip(ours, expected, strict=True):
            close(y, y_expected, 0)
            close(x, x_expected, levels / 255 / min(CIFAR10_STD))


def check_cuda_graph(device: torch.device) -> None:
    """Ten captured training steps against ten that are not."""
    if device.type == "cpu":
        raise UserError("--only cuda-graph: there is no GPU here")
    config = TrainConfig(
        model="resnet18", device=device.type, amp="off", batch_size=16, lr=0.01, warmup_epochs=0.0, compile=False
    )
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    losses = []
    for graphs in (True, False):
        torch.manual_seed(0)
        model = create_model("resnet18", 10)
        trainer = Trainer(model, replace(config, cuda_graphs=graphs), device, 10, STEPS)
        trainer.warm_up(evaluation=False)
        trainer.model.train()
        step = trainer.replays.get(images.shape, trainer._step)
        seen = []
        for number in range(STEPS):
            trainer._set_lr(number)
            seen.append(step(*trainer._to_device(images, labels))[0].clone())
        losses.append(torch.stack(seen))
    close(losses[0], losses[1], 2e-2)


CHECKS: dict[str, Callable[[torch.device], None]] = {
    "operator": check_operator, "loaders": check_loaders, "cuda-graph": check_cuda_graph,
}  # fmt: skip


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raises ArithmeticError where they differ by more than the tolerance."""
    difference = (ours.double() - expected.double()).abs().max().item()
    if not difference <= tolerance:
        raise ArithmeticError(f"differs by {difference:.2g}, more than {tolerance:.2g}")


def run_check(name: str, device: torch.device) -> str:
    """Runs a check in a child process, because a failed kernel leaves CUDA unusable in its process.

    Returns what is wrong, in one line, or "" if the check passed.
    """
    try:
        done = subprocess.run(
            [*COMMAND, name, "--device", device.type],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"the check of {name} on this machine took longer than {SECONDS} s"
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    if done.returncode == 1 and lines:
        return f"the check of {name} on this machine failed: {lines[-1].partition('error: ')[2] or lines[-1]}"
    return f"the check of {name} on this machine ended with exit code {done.returncode}"


def kept_at(device: torch.device) -> Path:
    """Where the outcome is kept, by card, driver, versions of the libraries and of fastres' files."""
    package = Path(fastres.__file__).parent
    newest = max(path.stat().st_mtime_ns for path in package.rglob("*.py"))
    driver = DRIVER.read_text(encoding="utf-8") if DRIVER.exists() else ""
    key = [device_name(device), driver, versions(), newest]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastres" / f"check-{name}.json"


def check_all(device: torch.device) -> dict[str, str]:
    """The faults of the checks, which run side by side, by name; on CUDA they are kept for later runs."""
    names = [name for name in CHECKS if name != "cuda-graph" or device.type == "cuda"]
    with ThreadPoolExecutor() as pool:
        faults = dict(zip(names, pool.map(lambda name: run_check(name, device), names), strict=True))
    if device.type == "cuda":
        with suppress(OSError, RuntimeError):  # without a place to keep it, it is found again
            path = kept_at(device)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, faults)
    return faults


@cache
def faults(device: torch.device) -> dict[str, str]:
    """What is wrong with each part that must not be used, by the check's name; on a CPU the tests show it beforehand.

    Checked once for each card, driver and versions; in a job, by rank 0. Not a collective call.
    """
    if device.type == "cpu":
        return {}
    try:
        found = json.loads(kept_at(device).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = check_all(device)
    return {name: f"{fault}; fastres doctor checks again" for name, fault in found.items() if fault}
