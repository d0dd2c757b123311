"""Where the words and tensors of a cuda plane lie: what client and server both go by (see CudaPlane in plane.proto).

No torch: a place is an offset, a dtype and a shape.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from attnd.errors import InvalidRequest
from attnd.protocol.tensors import ITEM_SIZES
from attnd.v1 import tensor_pb2

# Bytes: of the host memory with the words, and of the beginning of the region.
WORDS_BYTES = 4096
# Bytes into either: the word that the worker writes for the server, and that which the server writes. The latter is in
# the memory of results, where there is one.
TO_SERVER, TO_WORKER = 0, 256
# Bytes: where tensors start.
ALIGNMENT = 256


class Geometry(NamedTuple):
    """What the tensors of a call have in common with its cache.

    Attributes:
        num_kv_heads: KV heads.
        head_dim: of q and k.
        head_dim_v: of v and the output.
        dtype: the wire's, of q, k, v and the output.
    """

    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: int


class Place(NamedTuple):
    """A tensor of the region, or of the memory of results.

    Attributes:
        offset: bytes from the memory's start.
        dtype: the wire's.
        shape: extent of each dimension.
        num_bytes: its size.
        is_result: whether the server writes it.
    """

    offset: int
    dtype: int
    shape: tuple[int, int] | tuple[int, int, int]
    num_bytes: int
    is_result: bool

    def first_rows(self, num_rows: int) -> Place:
        """The first so many of its rows."""
        row_bytes = self.num_bytes // self.shape[0]
        return self._replace(shape=(num_rows, *self.shape[1:]), num_bytes=num_rows * row_bytes)


class StepLayout(NamedTuple):
    """The places of one layer's tensors."""

    q: Place
    k: Place
    v: Place
    output: Place
    lse: Place

    def first_rows(self, num_rows: int) -> StepLayout:
        """The first so many rows of each."""
        return StepLayout(*(place.first_rows(num_rows) for place in self))


def step_layout(num_tokens: int, num_heads: int, geometry: Geometry, region_bytes: int) -> StepLayout:
    """Where the tensors of a step lie.

    Args:
        num_tokens: rows of each.
        num_heads: query heads; 0 in a store-only step.
        geometry: of the cache.
        region_bytes: of the region.

    Raises:
        InvalidRequest: the region does not hold them.
    """
    kv_heads, head_dim, head_dim_v, dtype = geometry
    shapes: list[tuple[int, tuple[int, int] | tuple[int, int, int]]] = [
        (dtype, (num_tokens, num_heads, head_dim)),
        (dtype, (num_tokens, kv_heads, head_dim)),
        (dtype, (num_tokens, kv_heads, head_dim_v)),
        (dtype, (num_tokens, num_heads, head_dim_v)),
        (tensor_pb2.DTYPE_FLOAT32, (num_tokens, num_heads)),
    ]
    places, end = [], WORDS_BYTES
    for index, (kind, shape) in enumerate(shapes):
        num_bytes = math.prod(shape) * ITEM_SIZES[kind]
        places.append(Place(end, kind, shape, num_bytes, is_result=index > 2))
        end = -(-(end + num_bytes) // ALIGNMENT) * ALIGNMENT
    if end > region_bytes:
        raise InvalidRequest(
            f"the step has {num_tokens} tokens of {num_heads} heads, which take {end} bytes of a cuda plane's region, "
            f"but it has {region_bytes}; the server's --cuda-region-bytes gives more",
            field="step",
        )
    return StepLayout(*places)
