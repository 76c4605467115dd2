"""Prints the host's time to launch the operator's Triton kernels: Triton's own launch, and the operator's.

    python -m benchmarks.launch_time

No GPU is needed: a driver stands in that launches nothing, so that the time is Python's.
"""

import numpy as np
from triton.runtime import driver

from fastres.ops.batch_norm_relu import launch
from fastres.profiling.measure import interleave
from tests.ops.triton_compile import NoDevice, call

LAUNCHES, ROUNDS = 2000, 15


def main() -> None:
    calls, ours = [], launch._Launcher.__call__
    device = NoDevice()
    device.launcher_cls = lambda *_: lambda *arguments: None
    driver.set_active(device)
    launch._Launcher.__call__ = lambda *arguments: calls.append(arguments) or ours(*arguments)
    call((128, 64, 32, 32))
    launch._Launcher.__call__ = ours

    def fastres() -> None:
        for _ in range(LAUNCHES // len(calls)):
            for arguments in calls:
                ours(*arguments)

    def triton() -> None:
        for _ in range(LAUNCHES // len(calls)):
            for launcher, kernel, grid, tensors, numbers, flags in calls:
                warps = launcher.tiling.num_warps
                kernel[grid](*tensors, *numbers, *flags, *launcher.constants, num_warps=warps)

    seconds = interleave({"fastres": fastres, "triton": triton}, ROUNDS)
    for name, values in seconds.items():
        print(f"{name}: {1e6 * np.median(values) / LAUNCHES:.2f} us a launch")
    low, ratio, high = np.percentile(seconds["fastres"] / seconds["triton"], (20, 50, 80))
    print(f"ratio: {ratio:.3f} (20th to 80th percentile of {ROUNDS} interleaved rounds: {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
