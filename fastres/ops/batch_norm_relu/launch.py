# mypy: disable-error-code="no-untyped-def"
"""The division of the Triton kernels' work into programs, and their launch."""

import functools
import operator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.knobs import runtime as knobs
from triton.runtime import driver

DTYPE, REST_OF_16 = operator.attrgetter("dtype"), (15).__and__
WORD = tl.constexpr(32)  # channels whose bits share a word of the mask
GRAPH_COUNTERS = 1 << 16  # that the kernels of CUDA graphs share out


@dataclass(frozen=True)
class Tuning:
    """The constants of `tiling`. Width, programs and warps are the best that benchmarks/tune_batch_norm_relu.py found
    for ResNet-50 on an H100; the others are arithmetic."""

    tile: int = 4096  # elements of a tile
    width: int = 64  # channels of a tile, if channels-last
    programs: int = 132  # that reduce a tensor: one for each of an H100's multiprocessors
    num_warps: int = 4  # of two passes over a channels-last tensor; otherwise 8, or registers would be spilled
    single_pass: int = 16384  # elements that one program holds at most
    single_pass_width: int = 16  # channels of them


TUNING = Tuning()


@dataclass(frozen=True)
class Tiling:
    """The division of the work into programs."""

    single_pass: bool  # one program holds all rows of its channels
    block_rows: int
    block_channels: int
    splits: int  # programs that share the tiles of a channel in a reduction
    num_warps: int


def tiling(rows: int, channels: int, channels_last: bool) -> Tiling:
    """The tiling for a matrix `[rows, channels]`."""
    few_channels = min(TUNING.single_pass_width, triton.next_power_of_2(channels))
    elements = triton.next_power_of_2(rows) * few_channels
    if elements <= TUNING.single_pass:
        return Tiling(True, elements // few_channels, few_channels, 1, 8)
    block_channels = min(TUNING.width, triton.next_power_of_2(channels)) if channels_last else 1
    block_rows = TUNING.tile // block_channels
    splits = TUNING.programs // triton.cdiv(channels, block_channels)
    splits = max(1, min(splits, triton.cdiv(rows, 2 * block_rows)))
    return Tiling(False, block_rows, block_channels, splits, TUNING.num_warps if channels_last else 8)


def mask_words(shape: torch.Size, channels_last: bool) -> int:
    """The number of int32 words that hold a bit for each element of a tensor; 0 where the kernels keep none."""
    rows, channels = shape.numel() // max(shape[1], 1), shape[1]
    if not channels_last or channels % WORD.value or not rows or tiling(rows, channels, True).single_pass:
        return 0
    return rows * channels // WORD.value


class _Launcher:
    """The sizes, grids and options of the kernels for tensors of one shape, type and device, and the compiled kernels.

    Triton's own launch looks at every argument to find the compiled kernel, which takes longer than the launch. Here
    the types of the tensors and the flags are looked up.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, channels_last: bool, device: int | None) -> None:
        self.device = device
        batch, self.channels = shape[:2]
        self.rows = shape.numel() // self.channels
        self.shape = self.rows, self.channels, self.rows // batch
        self.tiling = tiling(self.rows, self.channels, channels_last)
        accumulator = tl.float64 if dtype == torch.float64 else tl.float32
        self.constants = channels_last, accumulator, self.tiling.block_rows, self.tiling.block_channels
        tiles = triton.cdiv(self.rows, self.tiling.block_rows)
        across = triton.cdiv(self.channels, self.tiling.block_channels)
        self.channel_grid = across, 1, 1
        self.tile_grid = across * tiles, 1, 1
        self.split_grid = across, self.tiling.splits, 1
        self.split_shape = *self.shape, self.tiling.splits, triton.cdiv(tiles, self.tiling.splits)
        # fused multiply-adds are Triton's default up to 3.9, which warns that 3.10 will round products
        self.options = {"num_warps": self.tiling.num_warps, "enable_fp_fusion": True}
        self.compiled: dict[Any, Any] = {}

    def parts(self, like: Tensor) -> tuple[Tensor, ...]:
        """Two uninitialised tensors ``[splits, channels]``, and the numbers of the programs that have arrived."""
        first, second = like.new_empty(2, self.tiling.splits, self.channels).unbind()
        return first, second, _arrivals(like.device, self.channel_grid[0])

    def __call__(self, kernel, grid, tensors: tuple[Tensor, ...], numbers: tuple[float, ...], flags: tuple[bool, ...]):
        """Launches ``kernel``, whose parameters are tensors, numbers, flags and the constants, in this order."""
        pointers = tuple(map(Tensor.data_ptr, tensors))
        unaligned = max(map(REST_OF_16, pointers))  # for such pointers Triton compiles another kernel
        key = kernel.fn, *flags, *map(DTYPE, tensors)  # a JITFunction is slow to hash
        found = self.compiled.get(key)
        if found is None or unaligned or knobs.launch_enter_hook.calls:
            compiled = kernel[grid](*tensors, *numbers, *flags, *self.constants, **self.options)
            if not unaligned and compiled is not None:  # the interpreter compiles nothing
                self.compiled[key] = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)
        else:
            run, handles = found
            stream = driver.active.get_current_stream(self.device)
            run(*grid, stream, *handles, *pointers, *numbers, *flags, *self.constants)


launcher = functools.lru_cache(maxsize=1024)(_Launcher)
_counters: dict[Any, Tensor] = {}  # zeros, by device and stream
_graph_counters: dict[torch.device, Tensor] = {}  # zeros that no kernel has got yet


def _arrivals(device: torch.device, count: int) -> Tensor:
    """``count`` int32 zeros that a kernel leaves as zeros, to which no other kernel writes at the same time.

    Those of a stream, whose kernels run one after another; each kernel of a CUDA graph, which may be replayed on
    another stream, has its own.
    """
    count = triton.cdiv(count, 4) * 4  # 16 bytes
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        unused = _graph_counters.get(device, torch.empty(0))
        if len(unused) < count:
            return torch.zeros(count, dtype=torch.int32, device=device)  # in every replay
        _graph_counters[device] = unused[count:]
        return unused[:count]
    if device.type == "cuda" and device not in _graph_counters:
        _graph_counters[device] = _lasting_zeros(GRAPH_COUNTERS, device)
    key = device, driver.active.get_current_stream(device.index) if device.type == "cuda" else 0
    if key not in _counters or len(_counters[key]) < count:
        _counters[key] = _lasting_zeros(max(count, 4096), device)
    return _counters[key]


def _lasting_zeros(count: int, device: torch.device) -> Tensor:
    """int32 zeros, allocated by another thread: while torch.compile prepares a CUDA graph, the graph's pool takes back
    what this one allocates."""

    def allocate() -> Tensor:
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # filled on the helper thread's stream; kernels count on others
        return zeros

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(allocate).result()
