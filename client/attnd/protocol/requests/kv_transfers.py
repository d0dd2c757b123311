"""K and V of a cache's slots in and out, in bulk: the messages of StoreKv and ReadKv."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnd.errors import InvalidRequest, from_message
from attnd.protocol import frames
from attnd.protocol.packing import slots_tensor
from attnd.protocol.tensors import Array, from_array, to_array
from attnd.v1 import attention_pb2, cache_pb2, tensor_pb2

# Bytes of K and V in one chunk of StoreKv.
STORE_CHUNK_BYTES = 4 << 20


def store_kv(cache: cache_pb2.CacheRef, layer: int, slots: Any, k: Any, v: Any) -> Iterator[bytes]:
    """The chunks of StoreKv. Checks before the first: they are made on a thread of gRPC's, which would hide errors."""
    packed = slots_tensor(slots, "slot_mapping")
    arrays = {"k": to_array(k, "k")} if v is None else {"k": to_array(k, "k"), "v": to_array(v, "v")}
    if packed is None:
        raise InvalidRequest("slots is None, but must name the slot of each token", field="slot_mapping")
    slot_mapping = Array(packed.dtype, tuple(packed.shape), memoryview(packed.data))
    num_tokens = slot_mapping.shape[0]
    for name, array in arrays.items():
        if len(array.shape) != 3 or array.shape[0] != num_tokens:
            raise InvalidRequest(
                f"{name} has shape {list(array.shape)}, but slot_mapping has {num_tokens} tokens: must be "
                "[num_tokens, num_kv_heads, head_dim]",
                field=name,
            )
    return _store_chunks(cache, layer, slot_mapping, arrays)


def _store_chunks(
    cache: cache_pb2.CacheRef, layer: int, slot_mapping: Array, arrays: Mapping[str, Array]
) -> Iterator[bytes]:
    num_tokens = slot_mapping.shape[0]
    per_token = sum(array.num_bytes for array in arrays.values()) // max(1, num_tokens)
    rows = max(1, STORE_CHUNK_BYTES // max(1, per_token))
    for first in range(0, num_tokens, rows):
        chunk = slice(first, min(first + rows, num_tokens))
        header = attention_pb2.StoreKvRequest(
            cache=cache, layer=layer, slot_mapping=_message(_rows(slot_mapping, chunk))
        )
        yield frames.STORE_KV_REQUEST.encode(header, {name: _rows(array, chunk) for name, array in arrays.items()})


def _message(array: Array) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=tensor_pb2.Dtype.ValueType(array.dtype), shape=array.shape, data=bytes(array.data))


def stored(data: bytes) -> int:
    """Slots that one chunk of StoreKv wrote. Raises the error that the server answered."""
    message = frames.parse(attention_pb2.StoreKvResponse, data)
    if message.HasField("error"):
        raise from_message(message.error)
    return int(message.num_slots)


def _rows(array: Array, rows: slice) -> Array:
    size = array.num_bytes // max(1, array.shape[0])
    return Array(
        array.dtype, (rows.stop - rows.start, *array.shape[1:]), array.data[rows.start * size : rows.stop * size]
    )


def read_kv(cache: cache_pb2.CacheRef, layer: int, slots: Any) -> bytes:
    """The request of ReadKv."""
    slot_mapping = slots_tensor(slots, "slot_mapping")
    return attention_pb2.ReadKvRequest(cache=cache, layer=layer, slot_mapping=slot_mapping).SerializeToString()


def joined(chunks: Sequence[frames.Framed], like: Any, head_dim_v: int = 0) -> tuple[Any, Any]:
    """K and V of all chunks of ReadKv; where V is absent, it is the first `head_dim_v` elements of K's heads."""
    k = _concatenated([chunk.tensors["k"] for chunk in chunks])
    if any("v" in chunk.tensors for chunk in chunks):
        v = _concatenated([chunk.tensors["v"] for chunk in chunks])
    else:
        v = _first_elements(k, head_dim_v)
    return from_array(k, like), from_array(v, like)


def _first_elements(array: Array, head_dim: int) -> Array:
    """A dense copy of the first elements of each head."""
    *rows, dims = array.shape
    row_bytes = array.num_bytes // max(1, math.prod(rows))
    num_bytes = row_bytes // dims * head_dim
    data = b"".join(array.data[first : first + num_bytes] for first in range(0, array.num_bytes, max(1, row_bytes)))
    return Array(array.dtype, (*rows, head_dim), memoryview(data))


def _concatenated(arrays: Sequence[Array]) -> Array:
    if len(arrays) == 1:
        return arrays[0]
    num_tokens = sum(array.shape[0] for array in arrays)
    data = b"".join(array.data for array in arrays)
    return Array(arrays[0].dtype, (num_tokens, *arrays[0].shape[1:]), memoryview(data))
