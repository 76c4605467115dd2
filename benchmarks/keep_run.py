"""Keeps what a run of fastres.train or fastres.profile measured as one file, from which `make results` renders a table.

    python benchmarks/keep_run.py RUN FILE [DATA]

RUN is the run's folder, FILE is to lie in benchmarks/results/, and DATA says what it was trained on; the dataset's name
unless it is given. Of its figures FILE has those that the README shows, in a table or a picture.
"""

import re
from pathlib import Path
from typing import Any

from fastres.errors import UserError
from fastres.fields import as_flag, as_json, path
from fastres.files import read_json, write_json
from fastres.flags import Parser
from fastres.profile import ProfileConfig

PROVENANCE = ("device", "date", "versions", "commit")
TRAINING = ("best_accuracy", "last_accuracy", "epoch_seconds", "images_per_second", "data_wait_fraction")
PROFILE = (
    "model", "dataset", "images_per_epoch", "batch_size", "augmentation", "rounds", "steps_per_round",
    "steps_per_epoch", "limit_epoch_seconds", "limit_images_per_second", "loader_alone_images_per_second",
)  # fmt: skip
CANDIDATE = ("name", "images_per_second", "times_eager", "data_wait_fraction", "peak_memory_mb", "limit_share")


def kept(run: Path, data: str | None = None) -> dict[str, Any]:
    """The content of FILE. The command is the user's but for his folders. Raises UserError for a run not finished."""
    if (run / "profile.json").exists():
        return kept_profile(read_json(run / "profile.json"))
    summary, config = read_json(run / "summary.json"), read_json(run / "config.json")
    return {
        "command": without_folders(summary["command"]),
        "data": data or summary["dataset"],
        **{name: summary[name] for name in PROVENANCE + TRAINING},
        "config": config["asked"] | config["chosen"] | {"data_dir": None, "output_dir": None},
    }


def kept_profile(profile: dict[str, Any]) -> dict[str, Any]:
    defaults = as_json(ProfileConfig()) | {"model": None}  # which is always shown
    settings = {name: value for name, value in profile["config"].items() if name not in ("output_dir", "trace")}
    flags = [as_flag(name, value) for name, value in settings.items() if value != defaults[name]]
    return {
        "command": without_folders(" ".join(["python -m fastres.profile", *flags])),
        **{name: profile[name] for name in PROVENANCE + PROFILE},
        "model_alone": {"images_per_second": profile["model_alone"]["images_per_second"]},
        "candidates": [
            {name: candidate[name] for name in CANDIDATE}
            | {"epoch_seconds": {name: candidate["epoch_seconds"][name] for name in ("median", "p20", "p80")}}
            for candidate in profile["candidates"]
        ],
    }


def without_folders(command: str) -> str:
    return re.sub(r"--data-dir[ =]\S+", "--data-dir DIR", re.sub(r" --output-dir[ =]\S+", "", command))


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
