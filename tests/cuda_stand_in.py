"""A stand-in for a GPU, so that code that only a GPU reaches runs on a machine without one.

`torch.device("cuda")` stands for the CPU: tensors that are made there, or moved there, stay in the CPU's memory.
Streams, events and graphs are recorded in `log`, in the order in which they are used, and work is done at once. A graph
is captured by noting the operators that run, and replayed by running them again into the memory of their first results.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastres.data import dali
from fastres.training import selfcheck

log: list[str] = []
PLAIN_AUTOCAST = torch.autocast


def on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


class CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: on_cpu(value) for name, value in (kwargs or {}).items()}
        if func is torch.device:
            return func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func in (torch.Tensor.pin_memory, torch.Tensor.record_stream):
            return args[0]
        return func(*map(on_cpu, args), **kwargs)


class Stream:
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, stream: "Stream") -> None:
        log.append("wait_stream")

    def synchronize(self) -> None:
        log.append("synchronize")


class Event:
    """Its time is that of a clock that goes on by a millisecond with every entry of `log`."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.timing = enable_timing
        self.at: int | None = None

    def record(self, stream: Any = None) -> None:
        log.append("record")
        self.at = len(log)

    def synchronize(self) -> None:
        assert self.at is not None, "waits for an event that was not recorded"
        log.append("event.synchronize")

    def elapsed_time(self, end: "Event") -> float:
        assert self.timing
        assert end.timing
        assert self.at is not None
        assert end.at is not None
        assert "synchronize" in log[end.at :], "reads the time of an event that may not have been reached"
        return float(end.at - self.at)


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the GPU inside a capture"
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Graph:
    def __init__(self) -> None:
        self.recorder = Recorder()

    def pool(self) -> object:
        return self

    def replay(self) -> None:
        log.append("replay")
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, result in self.recorder.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextmanager
def capturing(graph: Graph, **_: Any) -> Iterator[None]:
    assert log[-1] == "wait_stream", "captures without waiting for the warm-up on another stream"
    log.append("capture")
    with graph.recorder:
        yield
    log.append("captured")


def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
    return PLAIN_AUTOCAST(on_cpu(device_type), *args, **kwargs)


def without_device(function: Any) -> Any:
    """DALI's ``function`` on the CPU, with its device noted."""

    def call(*args: Any, **options: Any) -> Any:
        for name in ("device", "device_id"):
            if name in options:
                log.append(f"dali.{function.__name__} {options[name]}")
                options[name] = "cpu" if name == "device" else None
        return function(*args, **options)

    return call


def memory(*_: Any) -> int:
    return 2**20


REPLACED = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_name": lambda device=None: "stand-in",
    "get_device_properties": lambda device=None: SimpleNamespace(uuid="0", total_memory=2**34, multi_processor_count=1),
    "is_bf16_supported": lambda **_: True,
    "synchronize": lambda device=None: log.append("synchronize"),
    "current_stream": lambda device=None: Stream(),
    "stream": lambda stream: nullcontext(),
    "is_current_stream_capturing": lambda: log.count("capture") > log.count("captured"),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "mem_get_info": lambda device=None: (2**33, 2**34),
    "memory_allocated": memory,
    "max_memory_allocated": memory,
    "max_memory_reserved": memory,
    "reset_peak_memory_stats": lambda device=None: None,
    "Stream": Stream,
    "Event": Event,
    "CUDAGraph": Graph,
    "graph": capturing,
}


@contextmanager
def in_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """`log`, emptied, while the stand-in is there."""
    log.clear()
    for name, value in REPLACED.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)  # pinned memory would need one
    for place, name in ((fn, "external_source"), (fn.decoders, "image")):
        monkeypatch.setattr(place, name, without_device(getattr(place, name)))
    monkeypatch.setattr(DataNode, "gpu", lambda node: log.append("dali.gpu") or node)
    monkeypatch.setattr(dali, "Pipeline", without_device(dali.Pipeline))
    monkeypatch.setattr(selfcheck, "faults", lambda device: {})  # whose processes have no stand-in
    with CudaIsCpu():
        yield log
