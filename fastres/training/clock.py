"""The wall time of a run by phase."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PHASES = ("start_up", "data", "measuring", "warm_up", "training", "evaluation", "writing")


class Clock:
    """Seconds of wall time by phase, in ``seconds``, which add up to all the time since it was started.

    The phases: ``start_up`` (imports, choices, building the model: whatever is in no other phase), ``data`` (reading,
    checking and decoding images), ``measuring`` (the machine's rates), ``warm_up`` (compiling, capturing, choosing
    kernels), ``training``, ``evaluation``, and ``writing`` (checkpoints, weights and history).

    age: seconds that have already passed.
    """

    def __init__(self, age: float = 0.0) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = "start_up", time.monotonic() - age

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time within as ``name``'s, not as that of the phase around it."""
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def read(self) -> dict[str, float]:
        """The seconds of all phases up to now."""
        self._switch(self._phase)
        return dict(self.seconds)

    def add(self, earlier: Mapping[str, float]) -> None:
        """Adds the seconds of an earlier process of the same run."""
        for name in PHASES:
            self.seconds[name] += earlier[name]

    def _switch(self, name: str) -> str:
        now = time.monotonic()
        self.seconds[self._phase] += now - self._since
        before, self._phase, self._since = self._phase, name, now
        return before


def process_age() -> float:
    """Seconds since this process was started, to 10 ms."""
    stat = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
    ticks = int(stat.rpartition(")")[2].split()[19])  # after boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
