"""One layer: its tensors and its options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from google.protobuf.message import Message

from attnd.errors import Exhausted
from attnd.protocol import frames
from attnd.protocol.tensors import Array, torch_tensor
from attnd.v1 import attention_pb2, step_pb2, tensor_pb2
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.kv.cache_shape import CacheShape
from attnd_server.service.validation import caches
from attnd_server.service.validation.arrays import payload, refuse, required, view
from attnd_server.service.validation.pages import slots

_FLOAT32 = (tensor_pb2.DTYPE_FLOAT32,)
# More than all of a reply but its elements.
REPLY_HEADER_BYTES = 1024


class CallTensors(NamedTuple):
    """The tensors of a call, views of the received bytes on the host: do not write to them.

    Attributes:
        q: `[num_tokens, num_heads, head_dim]`, or None in a store-only step.
        k: `[num_tokens, num_kv_heads, head_dim]`, or None in a cache-only step.
        v: `[num_tokens, num_kv_heads, head_dim_v]`, or None in a cache-only step; of a latent cache a view of k.
        num_heads: query heads; 0 in a store-only step.
    """

    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor | None
    num_heads: int


class StoreTensors(NamedTuple):
    """A chunk to store.

    Attributes:
        slots: int64 `[num_tokens]`, none twice.
        k: `[num_tokens, num_kv_heads, head_dim]`, a view of the received bytes: do not write to it.
        v: `[num_tokens, num_kv_heads, head_dim_v]`, likewise; of a latent cache a view of k.
    """

    slots: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def layer(value: int, num_layers: int) -> int:
    """`value`, if a cache of `num_layers` has such a layer.

    Raises:
        InvalidRequest: it has not.
    """
    if not 0 <= value < num_layers:
        refuse("layer", f"layer is {value}, but the cache has layers 0..{num_layers - 1}")
    return value


def place(value: int, cache: CacheShape[AttentionConfig]) -> tuple[int, int]:
    """The layer group of layer `value` of the cache, and its index there.

    Raises:
        InvalidRequest: the cache has no such layer.
    """
    return cache.places[layer(value, cache.num_layers)]


def group(value: int, cache: CacheShape[AttentionConfig]) -> int:
    """`value`, if the cache has such a layer group.

    Raises:
        InvalidRequest: it has not.
    """
    if value >= len(cache.groups):
        refuse("group", f"group is {value}, but the cache has layer groups 0..{len(cache.groups) - 1}")
    return value


def call(
    message: step_pb2.Call, payloads: Mapping[str, Array], config: AttentionConfig, metadata: AttentionMetadata
) -> CallTensors:
    """The tensors of a call.

    Args:
        message: the call; its layer is for `layer`, its options are for `options`.
        payloads: "q", "k" and "v" as received, as far as they are present.
        config: the layer's group.
        metadata: the call's step.

    Raises:
        InvalidRequest: a tensor is absent, present in a step that has none, of another dtype or
            shape, or not as long as its shape says.
        Exhausted: the reply would not fit a message.
    """
    q = k = v = None
    if metadata.store_only:
        _absent(payloads, ("q",), "store-only")
    else:
        q = _q(payloads, config, metadata.num_tokens)
        _check_reply_bytes(q.shape[0] * q.shape[1], config, message.options.return_lse)
    if metadata.cache_only:
        _absent(payloads, ("k", "v"), "cache-only")
    else:
        k, v = _k_and_v(payloads, config, metadata.num_tokens)
    return CallTensors(q, k, v, 0 if q is None else q.shape[1])


def _absent(payloads: Mapping[str, Array], fields: tuple[str, ...], kind: str) -> None:
    for field in fields:
        if field in payloads:
            refuse(field, f"{field} is given, but must be absent in a {kind} step")


def _q(payloads: Mapping[str, Array], config: AttentionConfig, num_tokens: int) -> torch.Tensor:
    dtype = caches.WIRE_DTYPES[config.dtype]
    array = payload(payloads, "q", dtype, (num_tokens, "num_heads", config.head_dim))
    num_heads = array.shape[1]
    if num_heads == 0 or num_heads % config.num_kv_heads:
        refuse("q", f"q has {num_heads} heads, but must have a multiple of the cache's {config.num_kv_heads} KV heads")
    return torch_tensor(array)


def _check_reply_bytes(num_rows: int, config: AttentionConfig, return_lse: bool) -> None:
    """A small head_dim and a large head_dim_v make an output of many times q's size."""
    num_bytes = num_rows * (config.head_dim_v * config.dtype.itemsize + 4 * return_lse)
    limit = frames.MAX_MESSAGE_BYTES - REPLY_HEADER_BYTES
    if num_bytes > limit:
        raise Exhausted(f"q asks for {num_bytes} bytes of output, but a reply has room for {limit}", field="q")


def _k_and_v(
    payloads: Mapping[str, Array], config: AttentionConfig, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = caches.WIRE_DTYPES[config.dtype]
    k = payload(payloads, "k", dtype, (num_tokens, config.num_kv_heads, config.head_dim))
    if config.latent:
        if "v" in payloads:
            refuse("v", f"v is given, but must be absent: it is the first {config.head_dim_v} elements of k")
        rows = torch_tensor(k)
        return rows, rows[..., : config.head_dim_v]
    v = payload(payloads, "v", dtype, (num_tokens, config.num_kv_heads, config.head_dim_v))
    return torch_tensor(k), torch_tensor(v)


def store_kv(
    message: attention_pb2.StoreKvRequest, payloads: Mapping[str, Array], config: AttentionConfig
) -> StoreTensors:
    """A chunk to store in a layer of a group; `payloads` holds "k" and "v" as received.

    Raises:
        InvalidRequest: a slot that is wrong or comes twice, or a tensor that is absent or not of the
            cache's geometry.
    """
    targets = slots(required(message, "slot_mapping"), config, "slot_mapping", unique=True)
    return StoreTensors(targets, *_k_and_v(payloads, config, len(targets)))


def read_kv(message: attention_pb2.ReadKvRequest, config: AttentionConfig) -> torch.Tensor:
    """Slots, int64 `[num_tokens]`, to read in a layer of a group.

    Raises:
        InvalidRequest: no such slot.
    """
    return slots(required(message, "slot_mapping"), config, "slot_mapping", unique=False)


def options(
    message: step_pb2.AttentionOptions, config: AttentionConfig, num_heads: int, window: int = 0
) -> AttentionOptions:
    """What a layer computes besides plain attention, with every default filled in.

    Args:
        message: the options; an empty message gives every default.
        config: the cache.
        num_heads: query heads of the call; 0 in a store-only step, where arrays count for nothing.
        window: of the step, in tokens: pages that it hides may be others' by now. 0: the call's own counts.

    Raises:
        InvalidRequest: the window is not that of the step, a number is not finite or out of its range, or an array is
            not float32 `[num_heads]`.
    """
    scale = message.scale if message.HasField("scale") else config.head_dim**-0.5
    if not math.isfinite(scale):
        refuse("scale", f"scale is {scale}, but must be finite")
    if not (math.isfinite(message.softcap) and message.softcap >= 0):
        refuse("softcap", f"softcap is {message.softcap:g}, but must be finite and at least 0")
    if window and message.window not in (0, window):
        refuse("window", f"window is {message.window}, but must be 0 or {window}, that of the step or its layer group")
    return AttentionOptions(
        num_heads=num_heads,
        scale=scale,
        softcap=message.softcap,
        window=window or message.window,
        alibi_slopes=_per_head(message, "alibi_slopes", num_heads, "must be finite"),
        sinks=_per_head(message, "sinks", num_heads, "must be finite or -inf", besides=-math.inf),
        return_lse=message.return_lse,
        backend=caches.backend(message.backend, config.backend),
    )


def _per_head(message: Message, field: str, num_heads: int, rule: str, besides: float = 0.0) -> torch.Tensor | None:
    """A copy of the float32 `[num_heads]` tensor `field`, each finite or `besides`; None without field or heads."""
    if not (num_heads and message.HasField(field)):
        return None
    values = view(getattr(message, field), field, _FLOAT32, (num_heads,)).astype(np.float32)
    wrong = ~np.isfinite(values) & (values != besides)
    if wrong.any():
        index = int(wrong.argmax())
        refuse(field, f"{field}[{index}] is {values[index]}, but {rule}")
    return torch.from_numpy(values)
