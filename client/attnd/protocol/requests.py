"""Requests to bytes and replies to values: what the sync and the asyncio client share."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from attnd.errors import InvalidRequest, ServerFault, Unsupported, from_message
from attnd.integrations.diffulex.steps import from_diffulex
from attnd.protocol import frames
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.kv_split import KVSplit
from attnd.protocol.packing import float32_tensor, int32_tensor, ints, slots_tensor, uint32
from attnd.protocol.regions import Region
from attnd.protocol.step_metadata import StepMetadata
from attnd.protocol.tensors import KV_DTYPES, Array, dtype_of, from_array, to_array
from attnd.protocol.warm_up import WarmUp
from attnd.v1 import attention_pb2, backend_pb2, cache_pb2, step_pb2, tensor_pb2

# Bytes of K and V in one chunk of StoreKv.
STORE_CHUNK_BYTES = 4 << 20
CACHE_ID_BYTES = 16
# Calls of one session that may be under way: those of two halves of a batch, and as many again. A shm plane has so many
# lanes (see ShmPlane in plane.proto), and a server reads so many requests of a stream ahead.
MAX_CALLS_UNDER_WAY = 4

DEFAULT_OPTIONS = AttentionOptions()


def as_step_metadata(metadata: Any) -> StepMetadata:
    """`metadata` itself, or what an object with the attributes of Diffulex's metadata means."""
    return metadata if isinstance(metadata, StepMetadata) else from_diffulex(metadata)


def enum_value(enum: Any, prefix: str, name: str, field: str) -> int:
    """The value of an enum by the short name that people type, such as "auto" for BACKEND_AUTO.

    Raises:
        InvalidRequest: no such name.
    """
    try:
        return int(enum.Value(f"{prefix}_{name.upper()}"))
    except ValueError:
        names = ", ".join(key.removeprefix(f"{prefix}_").lower() for key in enum.keys()[1:])
        raise InvalidRequest(f"{field} is {name!r}, but must be one of {names}", field=field) from None


def create_cache(
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    num_pages: int,
    page_size: int,
    head_dim_v: int,
    dtype: object,
    layout: str,
    backend: str,
    precision: str,
    kv_dtype: object,
    k_scales: Any,
    v_scales: Any,
    kv_split: KVSplit | None,
    ttl_s: float,
    name: str,
) -> bytes:
    """The request of CreateCache. Raises InvalidRequest for what the message cannot carry."""
    counts = {
        "num_layers": num_layers,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "page_size": page_size,
        "num_pages": num_pages,
    }
    for field, value in counts.items():
        if not 0 <= value < 1 << 32:
            raise InvalidRequest(f"{field} is {value}, but must be 0..{(1 << 32) - 1}", field=field)
    config = cache_pb2.CacheConfig(
        **counts,
        dtype=dtype_of(dtype),
        layout=cache_pb2.Layout.ValueType(enum_value(cache_pb2.Layout, "LAYOUT", layout, "layout")),
        backend=backend_pb2.Backend.ValueType(enum_value(backend_pb2.Backend, "BACKEND", backend, "backend")),
        precision=cache_pb2.Precision.ValueType(enum_value(cache_pb2.Precision, "PRECISION", precision, "precision")),
        kv_dtype=tensor_pb2.DTYPE_UNSPECIFIED if kv_dtype is None else dtype_of(kv_dtype, "kv_dtype", KV_DTYPES),
        k_scales=_scales(k_scales, "k_scales"),
        v_scales=_scales(v_scales, "v_scales"),
        kv_split=None if kv_split is None else kv_split.to_message(),
    )
    key = secrets.token_bytes(16)  # so that the request may be sent twice
    return cache_pb2.CreateCacheRequest(config=config, ttl_s=ttl_s, name=name, key=key).SerializeToString()


def _scales(values: Any, field: str) -> tensor_pb2.Tensor | None:
    return float32_tensor([values] if isinstance(values, int | float) else values, field)


def cache_id(value: bytes | str) -> bytes:
    """A cache's id, of its bytes or their hexadecimal digits. Raises InvalidRequest."""
    try:
        data = bytes.fromhex(value) if isinstance(value, str) else value
    except ValueError:
        data = b""
    if len(data) != CACHE_ID_BYTES:
        rule = f"must be {CACHE_ID_BYTES} bytes or {2 * CACHE_ID_BYTES} hexadecimal digits"
        raise InvalidRequest(f"cache.id is {value!r}, but {rule}", field="cache.id")
    return data


def open_cache(ref: cache_pb2.CacheRef, epoch: int) -> tuple[str, bytes, Any]:
    """How to find a cache on a server with this epoch: method, request, and the type of its response."""
    if ref.epoch == epoch:
        return "RenewCache", cache_pb2.RenewCacheRequest(cache=ref).SerializeToString(), cache_pb2.RenewCacheResponse
    return "AdoptCache", cache_pb2.AdoptCacheRequest(cache=ref).SerializeToString(), cache_pb2.AdoptCacheResponse


def ask_written_pages(cache: cache_pb2.CacheRef) -> bytes:
    """The request of RenewCache that also asks which pages were written to."""
    return cache_pb2.RenewCacheRequest(cache=cache, with_written_pages=True).SerializeToString()


def written_pages(data: bytes) -> list[int]:
    """The pages that RenewCache told of. Raises Unsupported: the server cannot tell."""
    response = frames.parse(cache_pb2.RenewCacheResponse, data)
    if not response.HasField("written_pages"):
        raise Unsupported("the server does not tell which pages were written to: it is of an earlier version")
    return ints(memoryview(response.written_pages.data).cast("i"), "written_pages")


def copy_pages(cache: cache_pb2.CacheRef, sources: Sequence[int], targets: Sequence[int]) -> bytes:
    """The request of CopyPages."""
    return cache_pb2.CopyPagesRequest(
        cache=cache,
        source_pages=int32_tensor(sources, "source_pages"),
        target_pages=int32_tensor(targets, "target_pages"),
    ).SerializeToString()


def warm_up(
    cache: cache_pb2.CacheRef,
    *,
    num_heads: int,
    query_len: int,
    max_reqs: int,
    max_context_len: int,
    options: AttentionOptions,
) -> bytes:
    """The request of WarmUp. Raises InvalidRequest for what the message cannot carry."""
    return attention_pb2.WarmUpRequest(
        cache=cache,
        num_heads=uint32(num_heads, "num_heads"),
        options=options.message,
        query_len=uint32(query_len, "query_len"),
        max_reqs=uint32(max_reqs, "max_reqs"),
        max_context_len=uint32(max_context_len, "max_context_len"),
    ).SerializeToString()


def warmed_up(data: bytes) -> WarmUp:
    """What WarmUp answered."""
    message = frames.parse(attention_pb2.WarmUpResponse, data)
    backend = _BACKEND_NAMES.get(message.backend, "")
    return WarmUp(message.num_graphs, message.num_bytes, message.seconds, backend, message.reason)


def timeout_ms(timeout_s: float) -> int:
    """A timeout as `Step.call_timeout_ms` has it: at least 1, and no more than its type holds."""
    return int(min(max(timeout_s * 1e3, 1), 2**32 - 1))


def tensor_message(array: Array) -> tensor_pb2.Tensor:
    """A small Array as a message."""
    return tensor_pb2.Tensor(dtype=tensor_pb2.Dtype.ValueType(array.dtype), shape=array.shape, data=bytes(array.data))


def attend_call(step_id: int, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions) -> bytes:
    """The AttendRequest of one call."""
    return frames.ATTEND_REQUEST.encode(*call_message(step_id, layer, q, k, v, options))


def unary_call(
    kind: str,
    metadata: StepMetadata,
    cache: cache_pb2.CacheRef,
    layer: int,
    q: Any,
    k: Any,
    v: Any,
    options: AttentionOptions,
) -> bytes:
    """The PrefillRequest or DecodeRequest of one call."""
    frame = frames.DECODE_REQUEST if kind == "decode" else frames.PREFILL_REQUEST
    step = frame.message_type(step=metadata.to_message(0, cache)).SerializeToString()
    return frame.encode(*call_message(0, layer, q, k, v, options), outer=step)


def call_message(
    step_id: int, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions
) -> tuple[step_pb2.Call, dict[str, Array]]:
    """A call and its tensors."""
    return step_pb2.Call(step_id=step_id, layer=layer, options=options.message), call_arrays(q, k, v)


def call_arrays(q: Any, k: Any, v: Any) -> dict[str, Array]:
    """The tensors of a call that are present, by name."""
    return {name: to_array(value, name) for name, value in (("q", q), ("k", k), ("v", v)) if value is not None}


# Short names of backends by the wire's number; a store-only step has none.
_BACKEND_NAMES = {
    number: name.removeprefix("BACKEND_").lower() for name, number in backend_pb2.Backend.items() if number
}


class Reply(NamedTuple):
    """What a call gave; times as `CallReply` has them."""

    output: Any
    backend: str
    queue_us: int
    copy_in_us: int
    kernel_us: int
    copy_out_us: int


def reply(message: step_pb2.CallReply, tensors: Any, like: Any, return_lse: bool) -> Reply:
    """A call's result: the output, or `(output, lse)`, or None for a store-only step; of the kind that `like` is."""
    output = from_array(tensors["output"], like) if "output" in tensors else None
    if return_lse and output is not None:
        output = (output, from_array(tensors["lse"], like))
    return Reply(
        output=output,
        backend=_BACKEND_NAMES.get(message.backend, ""),
        queue_us=message.queue_us,
        copy_in_us=message.copy_in_us,
        kernel_us=message.kernel_us,
        copy_out_us=message.copy_out_us,
    )


def unary_reply(kind: str, data: bytes, like: Any, return_lse: bool) -> Any:
    """The result in a PrefillResponse or DecodeResponse."""
    frame = frames.DECODE_RESPONSE if kind == "decode" else frames.PREFILL_RESPONSE
    message, tensors = frame.decode(data)
    return reply(message.reply, tensors, like, return_lse).output


class AttendReply(NamedTuple):
    """A message from an Attend stream.

    Attributes:
        kind: the name of the field that is set: "step", "call", "error" or "going_away".
        message: the field.
        tensors: of a call, by name.
        num_bytes: what was received.
    """

    kind: str
    message: Any
    tensors: Mapping[str, Array]
    num_bytes: int


def attend_reply(data: bytes, region: Region | None = None) -> AttendReply:
    """An AttendResponse, of a plane with `region` if it has one."""
    message, tensors = frames.ATTEND_RESPONSE.decode(data, region)
    kind = message.WhichOneof("message")
    if kind is None:
        raise ServerFault("the server sent an AttendResponse without a message")
    return AttendReply(kind, getattr(message, kind), tensors, len(data))


def store_kv(cache: cache_pb2.CacheRef, layer: int, slots: Any, k: Any, v: Any) -> Iterator[bytes]:
    """The chunks of StoreKv. Checks before the first: they are made on a thread of gRPC's, which would hide errors."""
    packed, k_array, v_array = slots_tensor(slots, "slot_mapping"), to_array(k, "k"), to_array(v, "v")
    if packed is None:
        raise InvalidRequest("slots is None, but must name the slot of each token", field="slot_mapping")
    slot_mapping = Array(packed.dtype, tuple(packed.shape), memoryview(packed.data))
    num_tokens = slot_mapping.shape[0]
    for name, array in (("k", k_array), ("v", v_array)):
        if len(array.shape) != 3 or array.shape[0] != num_tokens:
            raise InvalidRequest(
                f"{name} has shape {list(array.shape)}, but slot_mapping has {num_tokens} tokens: must be "
                "[num_tokens, num_kv_heads, head_dim]",
                field=name,
            )
    return _store_chunks(cache, layer, slot_mapping, k_array, v_array)


def _store_chunks(
    cache: cache_pb2.CacheRef, layer: int, slot_mapping: Array, k_array: Array, v_array: Array
) -> Iterator[bytes]:
    num_tokens = slot_mapping.shape[0]
    per_token = (k_array.num_bytes + v_array.num_bytes) // max(1, num_tokens)
    rows = max(1, STORE_CHUNK_BYTES // max(1, per_token))
    for first in range(0, num_tokens, rows):
        chunk = slice(first, min(first + rows, num_tokens))
        header = attention_pb2.StoreKvRequest(
            cache=cache, layer=layer, slot_mapping=tensor_message(_rows(slot_mapping, chunk))
        )
        yield frames.STORE_KV_REQUEST.encode(header, {"k": _rows(k_array, chunk), "v": _rows(v_array, chunk)})


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


def joined(chunks: Sequence[frames.Framed], like: Any) -> tuple[Any, Any]:
    """K and V of all chunks of ReadKv."""
    return tuple(from_array(_concatenated([chunk.tensors[name] for chunk in chunks]), like) for name in ("k", "v"))


def _concatenated(arrays: Sequence[Array]) -> Array:
    if len(arrays) == 1:
        return arrays[0]
    num_tokens = sum(array.shape[0] for array in arrays)
    data = b"".join(array.data for array in arrays)
    return Array(arrays[0].dtype, (num_tokens, *arrays[0].shape[1:]), memoryview(data))
