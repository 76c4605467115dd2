"""The choices that ``auto`` stands for on this machine, each with its reason for the line that a run prints."""

import os
import shutil
from dataclasses import replace

import torch

from fastres.config import TrainConfig
from fastres.data import choose_loader, pixels_in_memory, pixels_on_gpu
from fastres.data.datasets import DATASETS
from fastres.data.plan import mixes
from fastres.data.splits import Dataset
from fastres.errors import UserError
from fastres.fields import as_flag
from fastres.ops.batch_norm_relu import extension_error
from fastres.training import selfcheck
from fastres.training.distributed import local_device, world_size
from fastres.training.memory import keep_freed_memory
from fastres.training.schedule import SCHEDULES

# of torch.compile: they capture CUDA graphs
GRAPH_MODES = ("reduce-overhead", "max-autotune", "max-autotune-no-coordinate-descent")
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


def choose_fused(
    wanted: bool | None, device: torch.device, sync_bn: bool, fault: str = "", captured: bool = True
) -> tuple[bool, str]:
    """Whether norm, residual add and ReLU are the fused operator, which ``sync_bn`` needs; ``fault`` is what a check of
    it has found, and ``captured`` whether steps are CUDA graphs.

    Raises UserError where it is asked for and cannot run here.
    """
    if wanted is False:
        return False, "asked for"
    if device.type == "cpu":
        kernels, missing = "C++", extension_error
    else:  # Triton compiles what launches its kernels
        found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        kernels, missing = "Triton", fault if found else "Triton finds no C compiler: install gcc or clang, or set CC"
    if missing and sync_bn:
        raise UserError(f"--sync-bn: needs the fused operator: {missing}")
    if missing and wanted:
        raise UserError(f"--fused: {missing}; or take --no-fused")
    if missing:
        return False, missing
    if device.type == "cuda" and not (captured or wanted or sync_bn):
        return False, "outside of a CUDA graph its launches take longer than PyTorch's"
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


def choose_cuda_graphs(
    wanted: bool | None, device: torch.device, compile_mode: str | None, fault: str = ""
) -> tuple[bool, str]:
    """Whether to capture the training step, if possible here; ``compile_mode`` is None without torch.compile.

    Raises UserError where it is asked for and a check has found a ``fault``.
    """
    if device.type == "cpu":
        return False, "CPU"
    if compile_mode in GRAPH_MODES:
        return False, f"--compile-mode {compile_mode} has its own"
    if world_size() > 1:
        return False, "several processes"
    if fault and wanted:
        raise UserError(f"--cuda-graphs: {fault}; or take --no-cuda-graphs")
    if fault or wanted is not None:
        return bool(wanted), fault or "asked for"
    return True, "the GPU need not wait for Python"


def tune_libraries(device_type: str) -> None:
    """Process-wide settings: freed memory is kept on a CPU, cuDNN tries its algorithms on a GPU."""
    if device_type == "cpu":
        keep_freed_memory()
    else:
        torch.backends.cudnn.benchmark = True


def resolve(config: TrainConfig, dataset: Dataset) -> tuple[TrainConfig, str]:
    """``config`` with every ``auto`` but the output folder replaced by what this machine and dataset call for, and a
    line with the reasons."""
    images = len(dataset.train) - round(len(dataset.train) * config.val_fraction)
    evaluated = max(len(dataset.test), len(dataset.train) - images, 1)
    if config.batch_size > images:
        left = f" that {as_flag('val_fraction', config.val_fraction)} leaves" * (config.val_fraction > 0)
        raise UserError(f"--batch-size {config.batch_size}: larger than the training set of {images} images{left}")
    processes, last_batch = world_size(), images % config.batch_size
    unit = 2 if mixes(config.augmentation) and processes > 1 else 1
    if config.batch_size % (unit * processes):
        pairs = ", each with pairs of images to mix" if unit == 2 else ""
        raise UserError(
            f"--batch-size {config.batch_size}: must be a multiple of {'twice ' * (unit == 2)}the {processes} "
            f"processes{pairs}"
        )
    if 0 < -(-last_batch // unit) < processes and not config.drop_last:
        raise UserError(
            f"--batch-size {config.batch_size}: leaves {last_batch} of {images} images for the last batch of "
            f"{processes} processes; add --drop-last, or choose another"
        )
    steps = config.epochs * steps_per_epoch(config, images)
    device, device_why = choose_device(config.device)
    amp, amp_why = choose_amp(config.amp, device)
    faults = selfcheck.faults(device)
    compiled, compile_why = choose_compile(config.compile, device, steps)
    compile_mode = config.compile_mode if compiled else None
    graph_fault = faults.get("cuda-graph", "")
    if amp == "fp16" and config.optimizer == "muon":
        graph_fault = "Muon in fp16 waits for the GPU at every step"  # whether GradScaler found inf
    cuda_graphs, graphs_why = choose_cuda_graphs(config.cuda_graphs, device, compile_mode, graph_fault)
    fused, fused_why = choose_fused(
        config.fused, device, config.sync_bn, faults.get("operator", ""), cuda_graphs or compile_mode in GRAPH_MODES
    )
    loader, loader_why = choose_loader(config.loader, faults.get("loaders", ""))
    decode = config.decode
    if loader == "dali" and decode == "auto" and dataset.train.encoded:
        decode = "once" if pixels_in_memory(len(dataset.train), config.image_size) else "every-epoch"
        loader_why += "; decodes in every epoch, for want of memory for all pixels" * (decode == "every-epoch")
    files_each_epoch = dataset.train.encoded and decode == "every-epoch"
    if loader == "dali" and device.type == "cuda" and not files_each_epoch:
        fits = pixels_on_gpu(images, device, config.image_size)
        kept = "on the GPU" if fits else "in host memory, over a quarter of the GPU's free"
        loader_why += f"; pixels stay {kept}"
    warmup_epochs = config.warmup_epochs
    if warmup_epochs is None:
        warmup_epochs = SCHEDULES[config.schedule].default_warmup(config.epochs)
    chosen = replace(
        config,
        dataset=dataset.name if dataset.name in DATASETS else config.dataset,  # others are a caller's own
        eval_batch_size=min(config.eval_batch_size, evaluated),
        warmup_epochs=warmup_epochs,
        device=device.type,
        amp=amp,
        fused=fused,
        compile=compiled,
        cuda_graphs=cuda_graphs,
        loader=loader,
        decode=decode,
    )
    on = {True: "on", False: "off"}
    line = (
        f"device {device.type} ({device_why}), amp {amp} ({amp_why}), fused {on[fused]} ({fused_why}), "
        f"compile {on[compiled]} ({compile_why}), CUDA graphs {on[cuda_graphs]} ({graphs_why}), "
        f"loader {loader} ({loader_why})"
    )
    return chosen, line


def steps_per_epoch(config: TrainConfig, images: int) -> int:
    return images // config.batch_size if config.drop_last else -(-images // config.batch_size)
