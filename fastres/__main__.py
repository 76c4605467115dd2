"""The command ``fastres``: train, predict, export, profile, compare, study, doctor."""

import gc
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a model, or evaluate a finished run again",
    "predict": "print the classes of image files by a trained model",
    "export": "write a trained model to a file that PyTorch loads without fastres",
    "profile": "measure what each step from eager PyTorch to fastres gains",
    "compare": "tell whether groups of runs differ, and what they cost",
    "doctor": "check every fast part on this machine",
    "study": "train all runs of a study and write its report",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``fastres COMMAND ...`` and returns its exit code."""
    name, *rest = arguments if arguments is not None else sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        if arguments is None:  # the command reads sys.argv itself, and so knows that this process is its own
            sys.argv[1:] = rest
            gc.disable()  # as in the package's __init__
        command = importlib.import_module(f"fastres.{name}")
        return command.main(None if arguments is None else rest, f"fastres {name}")
    lines = [f"  fastres {command:8} {what}" for command, what in COMMANDS.items()]
    if name in ("-h", "--help"):
        print(
            "\n".join(["Train CIFAR-scale networks fast. fastres COMMAND --help lists a command's flags.", "", *lines])
        )
        return 0
    print(f"fastres: error: unknown command {name!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
