"""Keeps what a run of fastres.train measured as one file, from which `make results` renders a row of the README.

    python benchmarks/keep_run.py RUN DATA FILE

RUN is the run's folder, DATA says what it was trained on, and FILE is to lie in benchmarks/results/.
"""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd

from fastres.config import Parser, read_json
from fastres.errors import UserError


def kept(run: Path, data: str) -> dict[str, Any]:
    """The content of FILE. The command is the user's but for his folders. Raises UserError for a run not finished."""
    summary, config = read_json(run / "summary.json"), read_json(run / "config.json")
    command = re.sub(r" --output-dir[ =]\S+", "", summary["command"])
    return {
        "command": re.sub(r"--data-dir[ =]\S+", "--data-dir DIR", command),
        "data": data,
        "date": summary["date"],
        "summary": summary,
        "config": config | {"data_dir": None, "output_dir": None},
        "history": pd.read_csv(run / "history.csv").to_dict("records"),
    }


if __name__ == "__main__":
    parser = Parser("keep_run.py", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("data")
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    try:
        given.file.write_text(json.dumps(kept(given.run, given.data), indent=1) + "\n", encoding="utf-8")
    except (OSError, UserError) as error:
        parser.error(str(error))
