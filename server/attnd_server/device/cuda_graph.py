"""A CUDA graph of launches, captured while other threads use the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from attnd_server.device.kernels.launch import for_graphs

Launches = Callable[[], None]


def captured(launches: Launches, stream: torch.cuda.Stream) -> Launches:
    """Records `launches`, made once before, on `stream`, and returns what launches them all at once.

    By hand, because `torch.cuda.graph` waits for all threads' work, empties their caches and collects garbage first.
    Whoever calls it keeps what the launches read and write: the graph has only the addresses.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")  # other threads may do what cannot be captured
        try:
            with for_graphs():
                launches()
        finally:
            graph.capture_end()
    return graph.replay
