"""What ``auto`` stands for on this machine. Every choice comes with its reason, for the line that a run prints."""

import os
import shutil

import torch

from fastres.errors import UserError
from fastres.ops.batch_norm_relu import extension_error
from fastres.training.distributed import local_device, world_size
from fastres.training.memory import keep_freed_memory

GRAPH_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile: they capture CUDA graphs
COMPILE_STEPS = 2000  # a run shorter than this may not win back the minute that compiling takes


def choose_device(name: str) -> tuple[torch.device, str]:
    """Raises UserError for ``cuda`` without a usable GPU, and with fewer of them than processes."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError(
            "--device cuda: torch sees no CUDA device; take --device cpu, or check nvidia-smi and the driver"
        )
    if name == "cuda" or (name == "auto" and available):
        return local_device("cuda"), torch.cuda.get_device_name()
    return torch.device("cpu"), "asked for" if name == "cpu" else "no CUDA device"


def choose_amp(name: str, device: torch.device) -> tuple[str, str]:
    """``bf16``, ``fp16`` or ``off``. Raises UserError for fp16 on a CPU, which torch would run more slowly."""
    if name == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16: needs a GPU; take --amp bf16 or --amp off")
    if name != "auto":
        return name, "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU has it"
        return "fp16", "the GPU has no bf16"
    if torch.cpu._is_amx_tile_supported():
        return "bf16", "the CPU has AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "bf16", "the CPU has AVX512-BF16"
    return "off", "the CPU has neither AMX nor AVX512-BF16"


def choose_fused(wanted: bool | None, device: torch.device, sync_bn: bool) -> tuple[bool, str]:
    """Whether norm, residual add and ReLU are the fused operator, which ``sync_bn`` needs.

    Raises UserError where it is asked for and cannot run here.
    """
    if wanted is False:
        return False, "asked for"
    if device.type == "cpu":
        kernels, missing = "C++", extension_error
    else:  # Triton compiles what launches its kernels
        found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        kernels, missing = "Triton", "" if found else "Triton finds no C compiler: install gcc or clang, or set CC"
    if missing and sync_bn:
        raise UserError(f"--sync-bn: needs the fused operator: {missing}")
    if missing and wanted:
        raise UserError(f"--fused: {missing}; or take --no-fused")
    if missing:
        return False, missing
    return True, "asked for" if wanted else f"{kernels} kernels"


def choose_compile(wanted: bool | None, device: torch.device, steps: int) -> tuple[bool, str]:
    """Whether to compile a run of ``steps`` training steps."""
    if wanted is not None:
        return wanted, "asked for"
    if device.type == "cpu":
        return False, "CPU"
    if world_size() == 1:
        return False, "takes a minute; --compile asks for it"
    long_enough = steps >= COMPILE_STEPS
    return long_enough, f"{steps:,} steps, pays from about {COMPILE_STEPS:,}"


def choose_cuda_graphs(wanted: bool | None, device: torch.device, compile_mode: str | None) -> tuple[bool, str]:
    """Whether to capture the training step, if possible here; ``compile_mode`` is None without torch.compile."""
    if device.type == "cpu":
        return False, "CPU"
    if compile_mode in GRAPH_MODES:
        return False, f"--compile-mode {compile_mode} has its own"
    if world_size() > 1:
        return False, "several processes"
    if wanted is not None:
        return wanted, "asked for"
    return True, "the GPU need not wait for Python"


def tune_libraries(device_type: str) -> None:
    """Settings of the whole process: memory that stays on the CPU, and cuDNN's trial of its algorithms on a GPU."""
    if device_type == "cpu":
        keep_freed_memory()
    else:
        torch.backends.cudnn.benchmark = True
