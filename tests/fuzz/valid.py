"""Valid requests for one cache, with or without layer groups: every method, layer, group and option."""

from __future__ import annotations

import random
from array import array
from typing import Any

from attnd.v1 import (
    attention_pb2,
    backend_pb2,
    cache_pb2,
    capabilities_pb2,
    plane_pb2,
    status_pb2,
    step_pb2,
    tensor_pb2,
)
from tests.fuzz.parts import Part, part_of, parts_of
from tests.fuzz.tensors import floats, ints
from tests.fuzz.valid_steps import step


def options(random_: random.Random, num_heads: int) -> step_pb2.AttentionOptions:
    """Any options that keep the rules."""
    message = step_pb2.AttentionOptions(
        softcap=random_.choice((0, 0, 5.0)),
        window=random_.choice((0, 0, 1, 5, 2**30, 2**31 - 1, 2**31, 2**32 - 1)),
        return_lse=random_.random() < 0.5,
        backend=backend_pb2.Backend.ValueType(random_.choice((0, 0, 1, 2, 3, 4))),
    )
    if random_.random() < 0.5:
        message.scale = random_.choice((0.3, -1.0, 0.0))
    if random_.random() < 0.2:
        message.alibi_slopes.CopyFrom(floats(random_, tensor_pb2.DTYPE_FLOAT32, num_heads))
    if random_.random() < 0.2:
        message.sinks.CopyFrom(floats(random_, tensor_pb2.DTYPE_FLOAT32, num_heads))
    return message


def call(random_: random.Random, info: cache_pb2.CacheInfo, of: step_pb2.Step) -> step_pb2.Call:
    """A call of a step."""
    config = info.config
    num_tokens = array("i", of.cu_seqlens_q.data)[-1]
    message = step_pb2.Call(step_id=of.id, layer=random_.randrange(config.num_layers))
    part = part_of(config, message.layer)
    num_heads = part.num_kv_heads * random_.choice((1, 1, 2, 2, 100))
    if random_.random() < 0.5:
        message.options.CopyFrom(options(random_, num_heads))
        window = (of.groups[part.index] if of.groups else of).window or part.window
        if window:
            message.options.window = random_.choice((0, window))
    if not of.store_only:
        message.q.CopyFrom(floats(random_, config.dtype, num_tokens, num_heads, part.head_dim))
    if not of.cache_only:
        _with_kv(random_, message, config, part, num_tokens)
    return message


def _with_kv(
    random_: random.Random,
    message: step_pb2.Call | attention_pb2.StoreKvRequest,
    config: cache_pb2.CacheConfig,
    part: Part,
    num_tokens: int,
) -> None:
    message.k.CopyFrom(floats(random_, config.dtype, num_tokens, part.num_kv_heads, part.head_dim))
    if not part.latent:
        message.v.CopyFrom(floats(random_, config.dtype, num_tokens, part.num_kv_heads, part.head_dim_v))


def _some_slots(random_: random.Random, part: Part) -> list[int]:
    return random_.sample(range(part.num_slots), random_.randint(0, min(5, part.num_slots)))


def store_kv(random_: random.Random, info: cache_pb2.CacheInfo) -> attention_pb2.StoreKvRequest:
    """A chunk to store."""
    layer = random_.randrange(info.config.num_layers)
    part = part_of(info.config, layer)
    slots = _some_slots(random_, part)
    message = attention_pb2.StoreKvRequest(
        cache=info.cache, layer=layer, slot_mapping=ints(slots, wide=random_.random() < 0.5)
    )
    _with_kv(random_, message, info.config, part, len(slots))
    return message


def create_cache(random_: random.Random, info: cache_pb2.CacheInfo) -> cache_pb2.CreateCacheRequest:
    """A cache like another, or nearly; or the same again, by its key."""
    num_pages = random_.randint(1, 6)
    request = cache_pb2.CreateCacheRequest(config=info.config, ttl_s=(0, 3600)[num_pages % 2], name="made")
    for told in request.config.groups or [request.config]:
        told.num_pages = num_pages
    if random_.random() < 0.5:
        request.key = bytes([num_pages]) * 16
    return request


def unary(random_: random.Random, method: str, info: cache_pb2.CacheInfo) -> Any:
    """A valid request of a method of one request, in a cache."""
    config = info.config
    if method in ("Prefill", "Decode"):
        kind = step_pb2.StepKind.Value(f"STEP_KIND_{method.upper()}")
        of = step(random_, info)
        while of.kind != kind:
            of = step(random_, info)
        message_type = attention_pb2.PrefillRequest if method == "Prefill" else attention_pb2.DecodeRequest
        return message_type(step=of, call=call(random_, info, of))
    part = random_.choice(parts_of(config))
    if method == "CopyPages":
        half = random_.randint(0, part.num_pages // 2)
        pages = random_.sample(range(part.num_pages), 2 * half)
        return cache_pb2.CopyPagesRequest(
            cache=info.cache, source_pages=ints(pages[:half]), target_pages=ints(pages[half:]), group=part.index
        )
    if method == "WarmUp":
        warm = {"num_heads": part.num_kv_heads, "query_len": 1, "max_reqs": 2, "group": part.index}
        message = attention_pb2.WarmUpRequest(cache=info.cache, **warm, options=options(random_, part.num_kv_heads))
        if part.window:
            message.options.window = random_.choice((0, part.window))
        return message
    if method == "RenewCache":
        return cache_pb2.RenewCacheRequest(
            cache=info.cache, with_written_pages=random_.random() < 0.7, group=part.index
        )
    if method == "ReadKv":
        return attention_pb2.ReadKvRequest(
            cache=info.cache, layer=random_.choice(part.layers), slot_mapping=ints(_some_slots(random_, part))
        )
    if method == "CreateCache":
        return create_cache(random_, info)
    if method == "OpenPlane":
        return plane_pb2.OpenPlaneRequest(plane=plane_pb2.Plane.ValueType(random_.randint(0, 3)))
    if method == "ClosePlane":
        return plane_pb2.ClosePlaneRequest(id=random_.randint(0, 40))
    if method == "GetCapabilities":
        return capabilities_pb2.GetCapabilitiesRequest()
    if method == "GetStatus":
        return status_pb2.GetStatusRequest()
    if method == "ListCaches":
        return cache_pb2.ListCachesRequest()
    message_type = getattr(cache_pb2, f"{method}Request")  # the rest name a cache, and nothing else
    return message_type(cache=info.cache)
