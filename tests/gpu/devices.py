"""The GPUs of tests that have a server and a worker at work at once: one each, or one under CUDA's MPS."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def reason_against() -> str:
    """Why such tests cannot run here; "": they can."""
    count = torch.cuda.device_count()
    if count == 0:
        return "needs a GPU"
    return "" if count > 1 or has_mps() else "needs two GPUs, or one and CUDA's Multi-Process Service"


def has_mps() -> bool:
    """Whether kernels of several processes run at once on the first GPU."""
    from attnd.protocol.cuda.driver import device

    return device(0).has_mps


# Index of the worker's; the server has the first.
WORKER = 1 if torch.cuda.device_count() > 1 else 0


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """As `torch.cuda.graph`, in a process with a server: what that does on other threads does not end the capture.

    Nor do graphs of earlier tests, or of its caches, that are garbage by now: to destroy one is what a capture forbids.
    """
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            yield
    finally:
        gc.enable()
