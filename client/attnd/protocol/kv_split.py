"""How a server cuts the KV of a request into chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnd.errors import InvalidRequest
from attnd.protocol.packing import uint32
from attnd.v1 import cache_pb2


@dataclass(frozen=True)
class KVSplit:
    """How the Triton backends cut the KV of a request into chunks; other backends ignore it. Automatic by default.

    The partial results of the chunks are merged in order, so the cut decides the last bits of an output. With
    `batch_invariant` these bits never depend on what shares the batch, at a price: on an H200, with 64 requests of
    8192 tokens each, about 2 to 4 % of the time of a decode step, about 16 % with 5 new tokens for each request, and
    about 55 % with blocks of 32. So by default decode has it, and steps of more new tokens do not.

    Attributes:
        chunk_size: tokens of KV in a chunk, a power of two in 16..1048576; 0 is automatic. If given, it cuts every
            request by its own length alone, whatever `batch_invariant` says.
        max_splits: most chunks of a request, 1..1024; 0 is the server's default. Chunks are longer than `chunk_size`
            where there would be more.
        batch_invariant: True cuts by the request's own length alone, False lets the cut follow the batch. None is True
            for requests with one new token in the step, False for those with more.
    """

    chunk_size: int = 0
    max_splits: int = 0
    batch_invariant: bool | None = None

    def to_message(self) -> cache_pb2.KvSplit:
        """The wire's form.

        Raises:
            InvalidRequest: a field holds what the wire cannot carry. Ranges are left to the server.
        """
        return cache_pb2.KvSplit(
            chunk_size=uint32(self.chunk_size, "kv_split.chunk_size"),
            max_splits=uint32(self.max_splits, "kv_split.max_splits"),
            batch_invariant=_optional_bool(self.batch_invariant, "kv_split.batch_invariant"),
        )


def _optional_bool(value: Any, field: str) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise InvalidRequest(f"{field} is {value!r}, but must be True, False or None", field=field)
