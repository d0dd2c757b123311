"""What a worker says of itself when it asks for a cuda plane."""

from __future__ import annotations

from typing import NamedTuple


class Worker(NamedTuple):
    """A worker.

    Attributes:
        gpu_uuid: UUID of its GPU.
        has_mps: whether it shares GPUs by CUDA's Multi-Process Service.
    """

    gpu_uuid: str
    has_mps: bool = False
