"""Keeps what a run of fastres.train measured as one file, from which `make results` renders a row of the README.

    python benchmarks/keep_run.py RUN DATA FILE

RUN is the run's folder, DATA says what it was trained on, and FILE is to lie in benchmarks/results/.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from fastres.config import read_json
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
    if len(sys.argv) != 4:
        sys.exit("keep_run.py RUN DATA FILE: needs these three")
    try:
        Path(sys.argv[3]).write_text(json.dumps(kept(Path(sys.argv[1]), sys.argv[2]), indent=1) + "\n")
    except (OSError, UserError) as error:
        print(f"keep_run.py: error: {error}", file=sys.stderr)
        sys.exit(2)
