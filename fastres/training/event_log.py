"""The history for TensorBoard, in its format. Its own writer takes only paths that are UTF-8."""

import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from fastres.errors import RunError
from fastres.files import cannot_be_written


class EventLog:
    """A new file of events in ``folder``, which replaces what older ones hold from ``first_epoch`` on."""

    def __init__(self, folder: Path, first_epoch: int) -> None:
        self.path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._append(file_version="brain.Event:2")
        self._append(step=first_epoch, session_log=SessionLog(status=SessionLog.START))

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row of the history."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items() if name != "epoch"]
        self._append(step=row["epoch"], summary=Summary(value=values))

    def _append(self, **content: Any) -> None:
        try:
            with self.path.open("ab") as file:
                RecordWriter(file).write(Event(wall_time=time.time(), **content).SerializeToString())
        except OSError as error:
            raise RunError(cannot_be_written(self.path, error)) from error
