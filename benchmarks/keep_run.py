"""Keeps what a run of fastres.train or fastres.profile measured as one file, from which `make results` renders a table.

    python benchmarks/keep_run.py RUN FILE [DATA]

RUN is the run's folder, FILE is to lie in benchmarks/results/, and DATA says what it was trained on; the dataset's name
unless it is given. FILE has all of a profile, and of a training run the figures that the README shows.
"""

import re
from pathlib import Path
from typing import Any

from fastres.errors import UserError
from fastres.fields import path
from fastres.files import read_json, write_json
from fastres.flags import Parser

SUMMARY = (
    "device", "date", "versions", "commit",
    "best_accuracy", "last_accuracy", "epoch_seconds", "images_per_second", "data_wait_fraction", "epochs_work",
)  # fmt: skip
FOLDERS = {"data_dir": None, "output_dir": None}  # the user's own


def kept(run: Path, data: str | None = None) -> dict[str, Any]:
    """The content of FILE, without the user's folders. Raises UserError for a run not finished."""
    if (run / "profile.json").exists():
        profile = read_json(run / "profile.json")
        return profile | {"command": without_folders(profile["command"]), "config": profile["config"] | FOLDERS}
    summary, config = read_json(run / "summary.json"), read_json(run / "config.json")
    return {
        "command": without_folders(summary["command"]),
        "data": data or summary["dataset"],
        **{name: summary[name] for name in SUMMARY if name in summary},
        "config": config["asked"] | config["chosen"] | FOLDERS,
    }


def without_folders(command: str) -> str:
    for pattern, text in (
        (" --output-dir", ""), ("--data-dir", "--data-dir DIR"), ("--resume", "--resume RUN"),
    ):  # fmt: skip
        command = re.sub(rf"{pattern}[ =]('[^']*'|\S)+", text, command)  # as shlex quotes it
    return command


if __name__ == "__main__":
    parser = Parser("keep_run.py", description=__doc__)
    parser.add_argument("run", type=path)
    parser.add_argument("file", type=path)
    parser.add_argument("data", nargs="?")
    given = parser.parse_args()
    try:
        write_json(given.file, kept(given.run, given.data))
    except (OSError, UserError) as error:
        parser.error(str(error))
