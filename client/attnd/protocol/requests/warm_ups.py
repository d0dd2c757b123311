"""Warm-ups: what is asked for, and what they gave."""

from __future__ import annotations

from dataclasses import dataclass

from attnd.protocol import frames
from attnd.protocol.attention_options import BACKEND_NAMES, AttentionOptions
from attnd.protocol.packing import uint32
from attnd.v1 import attention_pb2, cache_pb2


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


def warm_up(
    cache: cache_pb2.CacheRef,
    *,
    num_heads: int,
    query_len: int,
    max_reqs: int,
    max_context_len: int,
    options: AttentionOptions,
    group: int = 0,
) -> bytes:
    """The request of WarmUp. Raises InvalidRequest for what the message cannot carry."""
    return attention_pb2.WarmUpRequest(
        cache=cache,
        num_heads=uint32(num_heads, "num_heads"),
        options=options.message,
        query_len=uint32(query_len, "query_len"),
        max_reqs=uint32(max_reqs, "max_reqs"),
        max_context_len=uint32(max_context_len, "max_context_len"),
        group=uint32(group, "group"),
    ).SerializeToString()


def warmed_up(data: bytes) -> WarmUp:
    """What WarmUp answered."""
    message = frames.parse(attention_pb2.WarmUpResponse, data)
    backend = BACKEND_NAMES.get(message.backend, "")
    return WarmUp(message.num_graphs, message.num_bytes, message.seconds, backend, message.reason)
