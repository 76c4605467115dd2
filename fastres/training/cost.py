"""The cost of a run beyond its seconds: floating-point operations, the machine's limit, and energy."""

import ctypes
from contextlib import suppress

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fastres.config import TrainConfig
from fastres.data.sizes import image_sizes
from fastres.errors import RunError
from fastres.models import create_to_count
from fastres.models.own import explained
from fastres.profiling.roofline import (
    Machine,
    forward_macs,
    limit_seconds,
    measure_machine,
    step_kernels,
    unknown_layers,
)
from fastres.training import distributed
from fastres.training.trainer import AMP_DTYPES, explain_out_of_memory

# a run of fewer FLOP, of less than a minute or two, is not worth the seconds of measuring the machine
MEASURED_FLOP = {"cpu": 1e14, "cuda": 1e16}


def flop_an_image(config: TrainConfig, num_classes: int) -> dict[int, float]:
    """Floating-point operations of training on an image, by its size: three times those of a forward pass (forward,
    gradient of the input, gradient of the weight), of convolutions and linear layers; a multiply-add is two."""
    model = create_to_count(config.model, num_classes, False, config.image_size)
    sizes = image_sizes(config.image_size_schedule, config.image_size)
    return {size: 3 * 2 * forward_macs(model, size) for size, _ in sizes}


def describe_model(config: TrainConfig, num_classes: int) -> str:
    """A line on a model that is not fastres' own: its size, and the layers that are left out of something."""
    model = create_to_count(config.model, num_classes, bool(config.fused), config.image_size)
    with explained(config.model, "cannot be counted"):
        macs = [forward_macs(model, size) for size, _ in image_sizes(config.image_size_schedule, config.image_size)]
        step_kernels(model, config.batch_size, AMP_DTYPES[config.amp], config.image_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    unknown = unknown_layers(model)
    left_out = f"; the limit leaves out {', '.join(unknown)}" if unknown else ""
    norms = {type(module).__name__ for module in model.modules() if isinstance(module, _BatchNorm)}
    if config.sync_bn and (others := sorted(norms - {"BatchNormReLU2d"})):
        left_out += f"; --sync-bn leaves {', '.join(others)} as it is"
    return f"model {config.model}: {parameters / 1e6:.2f} M parameters, {max(macs) / 1e9:.3f} GMAC forward{left_out}"


def measure_rates(config: TrainConfig, device: torch.device, flop: float) -> Machine | None:
    """The machine's rates now, for a run of ``flop``.

    None for a short run, for one of several processes, and where memory does not suffice for measuring.
    """
    if distributed.world_size() == 1 and flop >= MEASURED_FLOP[device.type]:
        with suppress(RunError), explain_out_of_memory("--batch-size", config.batch_size):
            return measure_machine(device, AMP_DTYPES[config.amp])
    return None


def share_of_limit(
    config: TrainConfig, num_classes: int, steps: dict[int, int], seconds: float, rates: list[Machine]
) -> float | None:
    """The fewest seconds that the roofline allows for ``steps``, their number by size of image, at the mean of
    ``rates``, divided by the ``seconds`` that they took: 1 is the limit. None without rates."""
    if not rates:
        return None
    mean = Machine(
        sum(machine.flops_per_second for machine in rates) / len(rates),
        sum(machine.bytes_per_second for machine in rates) / len(rates),
    )
    model = create_to_count(config.model, num_classes, bool(config.fused), config.image_size)
    kernels = {size: step_kernels(model, config.batch_size, AMP_DTYPES[config.amp], size) for size in steps}
    return sum(count * limit_seconds(kernels[size], mean) for size, count in steps.items()) / seconds


def energy(device: torch.device) -> float | None:
    """Joules that the GPU has used since its driver was loaded, by NVML; None where that is not available."""
    if device.type != "cuda":
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if (
            nvml.nvmlInit_v2()  # 0, or the number of an error
            or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle))
            or nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        ):
            return None
    except (OSError, AttributeError):
        return None
    return millijoules.value / 1000
