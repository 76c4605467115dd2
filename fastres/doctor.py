"""python -m fastres.doctor: what this machine has, and whether every fast part is right on it."""

import sys
from collections.abc import Sequence

import torch
from rich.table import Table

from fastres.errors import RunError, UserError, first_line
from fastres.flags import Parser, open_console, run_command
from fastres.machine import device_name, free_memory, versions
from fastres.ops.batch_norm_relu import extension_error
from fastres.training.hardware import choose_amp, choose_device
from fastres.training.selfcheck import CHECKS, check_all, close
from fastres.training.trainer import AMP_DTYPES

LITTLE_MEMORY = 2.0  # GiB that ResNet-50 takes at batch size 128, and the libraries
MENDS = {
    "operator": "take --no-fused; on CUDA, torch and triton must fit together, and a C compiler be there",
    "loaders": "pip install nvidia-dali-cuda130, or take --loader eager",
    "cuda-graph": "take --no-cuda-graphs",
}


def main(arguments: Sequence[str] | None = None, prog: str = "python -m fastres.doctor") -> int:
    """Runs the command line and returns its exit code: 0, or 1 if something is wrong."""
    parser = Parser(prog, description="Checks every fast part of fastres on this machine, in under a minute.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to check")
    parser.add_argument("--only", choices=tuple(CHECKS), help="make one check, in this process")
    failed: list[str] = []

    def command() -> None:
        flags = parser.parse_flags(arguments)
        device = choose_device(flags["device"])[0]
        if flags["only"]:
            make(flags["only"], device)
        else:
            failed.extend(report(device))

    return run_command(parser.prog, command) or int(bool(failed))


def make(name: str, device: torch.device) -> None:
    """Makes one check. Raises RunError for whatever it raises."""
    try:
        CHECKS[name](device)
    except UserError:
        raise
    except Exception as error:
        raise RunError(f"{type(error).__name__}: {first_line(error)}") from error


def report(device: torch.device) -> list[str]:
    """Prints the table and returns the names of what failed."""
    table = Table("check", "", "what was found, and what to do")
    rows: list[tuple[str, bool | None, str]] = [
        ("machine", None, f"{device_name(device)}; {', '.join(map(' '.join, versions().items()))}")
    ]
    missing = None if device.type == "cuda" else False  # a GPU does not use it
    rows.append(("C++ extension", missing if extension_error else True, extension_error or "loads"))
    rows += [(name, *found) for name, found in (("bf16, channels-last", mixed(device)), ("memory", memory(device)))]
    for name, fault in check_all(device).items():
        compared = (CHECKS[name].__doc__ or "").strip()
        rows.append((name, not fault, f"{fault}; {MENDS[name]}" if fault else compared))
    for name, passed, text in rows:
        table.add_row(name, {True: "pass", False: "FAIL", None: ""}[passed], text)
    open_console().print(table)
    return [name for name, passed, _ in rows if passed is False]


def mixed(device: torch.device) -> tuple[bool, str]:
    """Whether a convolution in mixed precision and channels-last is right, and which precision ``auto`` takes."""
    amp, why = choose_amp("auto", device)
    torch.manual_seed(0)
    conv, x = torch.nn.Conv2d(16, 32, 3).to(device), torch.randn(4, 16, 9, 9, device=device)
    expected = conv(x)
    conv, x = conv.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off"):
        y = conv(x)
    try:
        close(y, expected, 3e-2)
    except ArithmeticError as error:
        return False, f"{error}; take --amp off"
    if not y.is_contiguous(memory_format=torch.channels_last):
        return False, "a channels-last convolution gives another layout; take --no-channels-last"
    return True, f"amp {amp}: {why}"


def memory(device: torch.device) -> tuple[bool, str]:
    """Whether there is memory for a training, and how much is free."""
    free = (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()) / 2**30
    mend = "" if free >= LITTLE_MEMORY else "; end other programs, or take a smaller --batch-size"
    return not mend, f"{free:.1f} GiB free{mend}"


if __name__ == "__main__":
    sys.exit(main())
