"""A CUDA graph of launches, captured while other threads use the device."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import torch

from attnd_server.device.kernels.launch import for_graphs

Launches = Callable[[], None]


def captured(launches: Launches, stream: torch.cuda.Stream) -> Launches:
    """Records `launches`, made once before, on `stream`, and returns what launches them all at once.

    By hand, because `torch.cuda.graph` waits for all threads' work, empties their caches and collects garbage first.
    Whoever calls it keeps what the launches read and write: the graph has only the addresses.
    """
    return _graph(launches, stream).replay


def captured_for(launches: Launches, stream: torch.cuda.Stream) -> Launches:
    """As `captured`, but what is returned launches on `stream`, whatever stream is current.

    By the driver: to make a stream current and back costs four times what the launch does.
    """
    from attnd.protocol.cuda.driver import call

    graph, handle = _graph(launches, stream), stream.cuda_stream
    executable = graph.raw_cuda_graph_exec()

    def launch(graph: torch.cuda.CUDAGraph = graph) -> None:  # which must live as long
        call("cuGraphLaunch", executable, handle)

    return launch


def _graph(launches: Launches, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(stream.device), torch.cuda.stream(stream), _no_collection:
        graph.capture_begin(capture_error_mode="thread_local")  # other threads may do what cannot be captured
        try:
            with for_graphs():
                launches()
        finally:
            graph.capture_end()
    return graph


class _NoCollection:
    """A block in which no garbage is collected, on several threads at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._was_enabled = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_inside:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside and self._was_enabled:
                gc.enable()


_no_collection = _NoCollection()
"""Inside, no older graph among the garbage is destroyed by the capturing thread, which would end the capture."""
