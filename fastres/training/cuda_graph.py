"""Capturing work on a GPU as a CUDA graph."""

import gc
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # images, labels -> loss, logits


def capture(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """``run`` as a CUDA graph, captured after three warm-up calls, and its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries compile and choose kernels, and allocate their workspaces
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # freeing an old graph during capture would invalidate it
    # thread-local, because a loader's threads may call CUDA meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = run()
    return graph, results


def captured(step: Step, images: torch.Tensor, labels: torch.Tensor) -> Step:
    """``step`` as one CUDA graph, for batches like ``images`` and ``labels``, which become its input buffers.

    Its results are overwritten by the next call.
    """
    graph, results = capture(lambda: step(images, labels))

    def replay(new_images: torch.Tensor, new_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images.copy_(new_images)
        labels.copy_(new_labels)
        graph.replay()
        return results

    return replay
