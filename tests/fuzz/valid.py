"""Valid requests for one cache: small pages, shared pages, holes, slots beside the context, every mask and option."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

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

# Elements of calls come from here, so that none has to be made for each. Reinterpreted in a type of two bytes they are
# still finite.
_VALUES = np.random.default_rng(7).standard_normal(1 << 14).astype(np.float32)
BYTES = {
    tensor_pb2.DTYPE_FLOAT32: _VALUES.tobytes(),
    tensor_pb2.DTYPE_FLOAT16: _VALUES.astype(np.float16).tobytes(),
}
SIZES = {tensor_pb2.DTYPE_FLOAT32: 4, tensor_pb2.DTYPE_FLOAT16: 2}


def ints(values: Sequence[int], *shape: int, wide: bool = False) -> tensor_pb2.Tensor:
    """An int32 or int64 tensor; of one dimension if no shape is given."""
    dtype = tensor_pb2.DTYPE_INT64 if wide else tensor_pb2.DTYPE_INT32
    data = array("q" if wide else "i", values).tobytes()
    return tensor_pb2.Tensor(dtype=dtype, shape=shape or (len(values),), data=data)


def floats(random_: random.Random, dtype: int, *shape: int) -> tensor_pb2.Tensor:
    """Numbers of order 1."""
    size = SIZES[dtype]
    num_bytes = int(np.prod(shape)) * size
    source = BYTES[dtype]
    if num_bytes >= len(source):  # of a cache that a spoiled message asked for and got
        source *= num_bytes // len(source) + 2
    start = random_.randrange((len(source) - num_bytes) // size) * size
    data = source[start : start + num_bytes]
    return tensor_pb2.Tensor(dtype=tensor_pb2.Dtype.ValueType(dtype), shape=shape, data=data)


def step(random_: random.Random, info: cache_pb2.CacheInfo, step_id: int = 0) -> step_pb2.Step:
    """A step that keeps every rule."""
    config = info.config
    page_size, num_reqs, max_pages = config.page_size, random_.randint(1, 3), random_.randint(0, 4)
    lens = [random_.randint(0, 3) for _ in range(num_reqs)]
    is_decode = random_.random() < 0.5
    if is_decode or not any(lens):
        lens = [random_.randint(1, 2)] * num_reqs
    table = [random_.randint(-1, config.num_pages - 1) for _ in range(num_reqs * max_pages)]
    context_lens = [random_.randint(0, max_pages * page_size) for _ in range(num_reqs)]
    prefix_lens = [random_.randint(0, 9) for _ in range(num_reqs)]
    padded = [prefix + random_.randint(0, 5) for prefix in prefix_lens]
    ends = [0]
    for length in lens:
        ends.append(ends[-1] + length)
    mode = random_.choice(("store", "store", "store", "store_only", "cache_only", "nothing"))
    message = step_pb2.Step(
        id=step_id,
        cache=info.cache,
        kind=step_pb2.STEP_KIND_DECODE if is_decode else step_pb2.STEP_KIND_PREFILL,
        cu_seqlens_q=ints(ends),
        context_lens=ints(context_lens),
        page_tables=ints(table, num_reqs, max_pages),
        mask=step_pb2.Mask.ValueType(random_.randint(1, 4)),
        block_size=random_.choice((1, 4, 2**32 - 1)),
        prefix_lens=ints(prefix_lens),
        padded_prefix_lens=ints(padded),
        mask_prefix_hole=random_.random() < 0.3,
        cache_only=mode == "cache_only",
        store_only=mode == "store_only",
    )
    if random_.random() < 0.3:
        message.masks.CopyFrom(ints([random_.randint(1, 4) for _ in lens]))
    if random_.random() < 0.3:
        message.valid_lens.CopyFrom(ints([random_.randint(0, length) for length in lens]))
    if mode in ("store", "nothing"):
        _as_engines_say(random_, message, config)
    if mode.startswith("store"):
        free = set(range(config.num_pages * page_size))
        if mode == "store" and not message.store_first:
            free -= read_slots(message, page_size)
        choice = random_.sample(sorted(free), min(len(free), ends[-1]))
        slots = [choice.pop() if choice and random_.random() < 0.8 else -1 for _ in range(ends[-1])]
        for request, context_len in enumerate(array("i", message.context_lens.data)):
            if context_len < 0:
                slots[ends[request] : ends[request + 1]] = [-1] * lens[request]
        message.slot_mapping.CopyFrom(ints(slots, wide=random_.random() < 0.5))
    if random_.random() < 0.3:
        message.traceparent = f"00-{random_.getrandbits(128) | 1:032x}-{random_.getrandbits(64) | 1:016x}-01"
    return message


def _as_engines_say(random_: random.Random, message: step_pb2.Step, config: cache_pb2.CacheConfig) -> None:
    """At times stores first, has a window whose pages are gone, owners, first positions, rows that pad the batch."""
    ends, num_reqs = array("i", message.cu_seqlens_q.data), message.context_lens.shape[0]
    context_lens, max_pages = array("i", message.context_lens.data), message.page_tables.shape[1]
    message.store_first = random_.random() < 0.4
    if random_.random() < 0.3:
        message.window = random_.choice((1, 2, config.page_size, 2**31 - 1, 2**31, 2**32 - 1))
        table = array("i", message.page_tables.data)
        for request, context_len in enumerate(context_lens):
            for column in range(max(0, context_len - message.window + 1) // config.page_size):
                table[request * max_pages + column] = random_.choice((-1, 0, config.num_pages, -(2**31), 2**31 - 1))
        message.page_tables.CopyFrom(ints(table, num_reqs, max_pages))
    if random_.random() < 0.3:
        message.attend_new.CopyFrom(ints([random_.randint(0, 1) for _ in range(num_reqs)]))
    in_blocks = {2, 4} & {message.mask, *array("i", message.masks.data)}
    if random_.random() < 0.3 and (not in_blocks or message.block_size <= 4):
        message.first_position.CopyFrom(
            ints([message.block_size * random_.randint(0, 3) % 2**20 for _ in range(num_reqs)])
        )
    if random_.random() < 0.2:
        context_lens[-1] = ends[-2] - ends[-1]
        message.context_lens.CopyFrom(ints(context_lens))
        table = array("i", message.page_tables.data)
        table[(num_reqs - 1) * max_pages :] = array("i", [-1] * max_pages)
        message.page_tables.CopyFrom(ints(table, num_reqs, max_pages))


def read_slots(message: step_pb2.Step, page_size: int) -> set[int]:
    """Every slot that a step reads as context, holes included."""
    max_pages = message.page_tables.shape[1]
    table, read = array("i", message.page_tables.data), set()
    for request, context_len in enumerate(array("i", message.context_lens.data)):
        for position in range(context_len):
            page = table[request * max_pages + position // page_size]
            read.add(page * page_size + position % page_size)
    return read


def with_delta(random_: random.Random, message: step_pb2.Step, base_id: int, base: Any) -> None:
    """Tells the page tables of a step by those of another, `base`, `[rows, max_pages]`."""
    rows, columns = message.page_tables.shape
    source_rows = [random_.randint(-1, base.shape[0] - 1) for _ in range(rows)]
    table = np.frombuffer(message.page_tables.data, "<i4").reshape(rows, columns)
    start = np.full((rows, columns), -1, np.int32)
    for row, source in enumerate(source_rows):
        if source >= 0:
            width = min(columns, base.shape[1])
            start[row, :width] = base[source, :width]
    changed = np.flatnonzero(start.ravel() != table.ravel())
    message.page_table_delta.CopyFrom(
        step_pb2.PageTableDelta(
            base_step_id=base_id,
            source_rows=ints(source_rows),
            max_pages=columns,
            indices=ints(changed.tolist()),
            pages=ints(table.ravel()[changed].tolist()),
        )
    )
    message.ClearField("page_tables")


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
    num_heads = config.num_kv_heads * random_.choice((1, 1, 2, 2, 100))
    if random_.random() < 0.5:
        message.options.CopyFrom(options(random_, num_heads))
        if of.window:
            message.options.window = random_.choice((0, of.window))
    if not of.store_only:
        message.q.CopyFrom(floats(random_, config.dtype, num_tokens, num_heads, config.head_dim))
    if not of.cache_only:
        message.k.CopyFrom(floats(random_, config.dtype, num_tokens, config.num_kv_heads, config.head_dim))
        message.v.CopyFrom(floats(random_, config.dtype, num_tokens, config.num_kv_heads, config.head_dim_v))
    return message


def _some_slots(random_: random.Random, config: cache_pb2.CacheConfig) -> list[int]:
    num_slots = config.num_pages * config.page_size
    return random_.sample(range(num_slots), random_.randint(0, min(5, num_slots)))


def store_kv(random_: random.Random, info: cache_pb2.CacheInfo) -> attention_pb2.StoreKvRequest:
    """A chunk to store."""
    config, slots = info.config, _some_slots(random_, info.config)
    return attention_pb2.StoreKvRequest(
        cache=info.cache,
        layer=random_.randrange(config.num_layers),
        slot_mapping=ints(slots, wide=random_.random() < 0.5),
        k=floats(random_, config.dtype, len(slots), config.num_kv_heads, config.head_dim),
        v=floats(random_, config.dtype, len(slots), config.num_kv_heads, config.head_dim_v),
    )


def create_cache(random_: random.Random, info: cache_pb2.CacheInfo) -> cache_pb2.CreateCacheRequest:
    """A cache like another, or nearly; or the same again, by its key."""
    num_pages = random_.randint(1, 6)
    request = cache_pb2.CreateCacheRequest(config=info.config, ttl_s=(0, 3600)[num_pages % 2], name="made")
    request.config.num_pages = num_pages
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
    if method == "CopyPages":
        half = random_.randint(0, config.num_pages // 2)
        pages = random_.sample(range(config.num_pages), 2 * half)
        return cache_pb2.CopyPagesRequest(
            cache=info.cache, source_pages=ints(pages[:half]), target_pages=ints(pages[half:])
        )
    if method == "WarmUp":
        warm = {"num_heads": config.num_kv_heads, "query_len": 1, "max_reqs": 2}
        return attention_pb2.WarmUpRequest(cache=info.cache, **warm, options=options(random_, config.num_kv_heads))
    if method == "ReadKv":
        slots = ints(_some_slots(random_, config))
        return attention_pb2.ReadKvRequest(
            cache=info.cache, layer=random_.randrange(config.num_layers), slot_mapping=slots
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
