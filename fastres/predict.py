"""python -m fastres.predict: the most probable class of image files, by a trained model."""

import json
import sys
from collections.abc import Sequence

from fastres.config import WEIGHTS
from fastres.fields import path
from fastres.flags import Parser, open_console, run_command
from fastres.trained import load_model


def main(arguments: Sequence[str] | None = None, prog: str = "python -m fastres.predict") -> int:
    """Runs the command line and returns its exit code, which ``run_command`` describes."""
    parser = Parser(
        prog, description="Prints a line for each image file: its most probable class and that one's probability."
    )
    parser.add_argument("run", metavar="RUN", type=path, help="folder of a finished run")
    parser.add_argument("files", metavar="IMAGE", nargs="+", type=path, help="image file, or folder of image files")
    parser.add_argument("--weights", choices=WEIGHTS, help="of which epoch; default: the run's --select")
    parser.add_argument("--model", help="the run's --model if that is a function of your own")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each file")

    def command() -> None:
        flags, console = parser.parse_flags(arguments), open_console()
        model = load_model(flags["run"], flags["weights"], flags["model"])
        for file, class_name, probability in model.predict(flags["files"]):
            if flags["json"]:
                row = {"file": str(file), "class": class_name, "probability": probability}
                console.print(json.dumps(row, ensure_ascii=False))
            else:
                console.print(f"{file}: {class_name}, {100 * probability:.2f} %")

    return run_command(parser.prog, command)


if __name__ == "__main__":
    sys.exit(main())
