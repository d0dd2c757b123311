"""What a warm-up gave."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WarmUp:
    """What the server made ready for decode steps of one shape.

    Attributes:
        num_graphs: CUDA graphs that stand ready, one for each layer and size of batch; 0 is no error.
        num_bytes: bytes of the device's memory that their buffers hold until the cache is deleted.
        seconds: how long it took.
        backend: what computes these steps.
        reason: why there are fewer graphs than there could be; "" if none is missing.
    """

    num_graphs: int
    num_bytes: int
    seconds: float
    backend: str
    reason: str
