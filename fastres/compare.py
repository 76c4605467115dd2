"""python -m fastres.compare: which of several groups of runs is better, whether that can be told, and at what cost."""

import sys
from collections.abc import Sequence

from rich.markdown import Markdown

from fastres.fields import path
from fastres.files import claimed
from fastres.flags import Parser, open_console, run_command
from fastres.report.compare import comparison, read_groups, write_comparison


def main(arguments: Sequence[str] | None = None, prog: str = "python -m fastres.compare") -> int:
    """Runs the command line and returns its exit code, which ``run_command`` describes."""
    parser = Parser(
        prog,
        description="Compares finished runs. Those that differ only in their seed are one group; every group is "
        "compared with the first, paired by seed where two seeds or more are shared.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=path, help="folder of a finished run")
    parser.add_argument(
        "--output-dir", metavar="DIR", type=path, help="also write compare.html and compare.md with pictures to DIR"
    )

    def command() -> None:
        flags = parser.parse_flags(arguments)
        groups, folder, console = read_groups(flags["runs"]), flags["output_dir"], open_console()
        console.print(Markdown(comparison(groups, {})), soft_wrap=False)
        if folder:
            with claimed(folder, ("compare.html", "compare.md")):
                console.print(f"page: {write_comparison(groups, folder)}")

    return run_command(parser.prog, command)


if __name__ == "__main__":
    sys.exit(main())
