"""Trains the planned runs of a study by fastres.train, one after another or side by side."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import cycle, islice
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, NamedTuple

import torch

from fastres.errors import RunError, UserError
from fastres.fields import as_arguments
from fastres.files import read_json
from fastres.flags import STOP_WITH_STDIN
from fastres.machine import commit
from fastres.models import is_function
from fastres.report.results import read_summary
from fastres.studies.plan import PlannedRun
from fastres.training.start import RESUMABLE, read_saved

COMMAND = (sys.executable, "-m", "fastres.train")
COPYING = ".tmp"  # at the end of the name of a folder that is being copied
# settings that change nothing in the results
PLACES = {"output_dir", "checkpoint_every", "checkpoint_minutes", "checkpoint_steps", "price_per_hour", "tta"}


class Place(NamedTuple):
    """Where a run is trained: the variables that it needs, and the cores that it is bound to, or all."""

    environment: dict[str, str]
    cores: set[int] | None = None


def visible_gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))


def places(jobs: int, device: str) -> list[Place]:
    """A place for each of ``jobs`` runs side by side: a GPU, in turn, or an equal share of the cores and as many
    threads."""
    if jobs == 1:
        return [Place({})]
    if device == "cuda":
        return [Place({"CUDA_VISIBLE_DEVICES": gpu}) for gpu in islice(cycle(visible_gpus()), jobs)]
    cores = sorted(os.sched_getaffinity(0))
    if jobs > len(cores):
        raise UserError(f"--jobs {jobs}: there are {len(cores)} cores; take fewer")
    share = len(cores) // jobs
    threads = {"OMP_NUM_THREADS": str(share)}
    return [Place(threads, set(cores[i * share : (i + 1) * share])) for i in range(jobs)]


def share_gpus(jobs: int, device: str) -> bool:
    """Whether more runs train side by side than there are GPUs."""
    return device == "cuda" and jobs > len(visible_gpus())


class Executor:
    """Trains runs in processes of their own, as many at a time as there are places.

    The processes save and stop when this one is interrupted, or when it dies, which closes the pipes to their standard
    inputs.
    """

    def __init__(self, places: Iterable[Place]) -> None:
        self.free: SimpleQueue[Place] = SimpleQueue()
        for place in places:
            self.free.put(place)
        self.processes: list[subprocess.Popen[str]] = []
        self.stopped, self.lock = False, Lock()

    def train(
        self,
        runs: list[PlannedRun],
        advance: Callable[[PlannedRun, float], None],
        done: Callable[[PlannedRun, dict[str, Any]], None],
    ) -> None:
        """Trains ``runs``, or the rest of them. The first that fails ends the others, which are saved.

        ``advance`` is called with the ``work`` of every epoch of a run, ``done`` with its summary.
        """
        with ThreadPoolExecutor(self.free.qsize()) as pool:
            futures = {pool.submit(self._train, run, advance): run for run in runs}
            try:
                for future in as_completed(futures):
                    done(futures[future], future.result())
            except BaseException:
                with self.lock:
                    self.stopped = True
                    for process in self.processes:
                        process.terminate()  # the run saves
                raise

    def _train(self, run: PlannedRun, advance: Callable[[PlannedRun, float], None]) -> dict[str, Any]:
        place = self.free.get()
        try:
            if place.cores:
                os.sched_setaffinity(0, place.cores)  # of this thread, and so of the process that it starts
            with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
                process = self._start(run, place, errors)
                done = 0
                for line in process.stdout or ():
                    if epoch := re.match(r"epoch +(\d+)/", line):
                        advance(run, (int(epoch[1]) - done) / run.config.epochs * run.work)
                        done = int(epoch[1])
                code = process.wait()
                if not self.stopped:
                    errors.seek(0)
                    explain_exit(run, code, errors.read())
            return read_summary(run.folder)
        finally:
            self.free.put(place)

    def _start(self, run: PlannedRun, place: Place, errors: Any) -> "subprocess.Popen[str]":
        command, flags = [*COMMAND], run.flags
        if (run.folder / "last.pt").exists():
            command += ["--resume", str(run.folder)]
            flags = {name: value for name, value in flags.items() if name in RESUMABLE | {"model"}}
        environment = {**os.environ, **place.environment, STOP_WITH_STDIN: "1", "PYTHONIOENCODING": "utf-8"}
        environment.pop("FORCE_COLOR", None)  # which would colour the lines that are counted
        pipe = subprocess.PIPE
        with self.lock:
            if self.stopped:
                raise RunError(f"{run.name}: not started")
            process = subprocess.Popen(
                command + as_arguments(flags), env=environment, stdin=pipe, stdout=pipe, stderr=errors, encoding="utf-8"
            )
            self.processes.append(process)
        return process


def explain_exit(run: PlannedRun, code: int, said: str) -> None:
    """Raises the error that ended the run's process, if one did, and passes on what it ``said`` otherwise."""
    lines = said.strip().splitlines()
    if lines and code in (RunError.exit_code, UserError.exit_code) and "Traceback" not in said:
        message = lines[-1].removeprefix("python -m fastres.train: error: ")
        raise (RunError if code == RunError.exit_code else UserError)(f"{run.name}: {message}")
    sys.stderr.write(said)
    if code:
        raise RunError(f"{run.folder}: the run ended with exit code {code}; mend it and add --resume")


def reusable(folder: Path) -> Callable[[PlannedRun], Path | None]:
    """A function that finds a planned run's finished twin in or below ``folder``: of equal settings and this commit.

    It finds none for a model that is a function of the user's, or that begins with another run's weights: both may have
    changed.
    """
    ours = commit()
    if ours is None or ours.endswith("-dirty"):
        raise UserError("--reuse: the commit of fastres is not known, or files have changed; commit them, or remove it")
    if not folder.is_dir():
        raise UserError(f"--reuse {folder}: no such folder")
    known = {}
    for path in sorted(folder.rglob("summary.json")):
        if path.parent.suffix == COPYING:
            continue  # a copy that was cut off
        try:
            if read_summary(path.parent)["commit"] == ours:
                saved = read_saved(read_json(path.with_name("config.json")), path.parent)
                known[_key(saved.config)] = path.parent
        except UserError:
            continue  # another file of that name, or of another version

    def find(run: PlannedRun) -> Path | None:
        changing = is_function(run.config.model) or run.config.initial_checkpoint
        return None if changing else known.get(_key(run.config))

    return find


def _key(config: Any) -> str:
    settings = vars(config) | {"data_dir": config.data_dir.resolve()}
    return str({name: value for name, value in settings.items() if name not in PLACES})


def copy_run(source: Path, target: Path) -> None:
    """Copies a finished run's folder to ``target``, whole or not at all."""
    partial = target.with_name(target.name + COPYING)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        partial.rename(target)
    except OSError as error:
        raise RunError(f"{target}: {source} cannot be copied there ({error}); make room, or remove --reuse") from error
