"""What a step of many layer groups may take: it is counted before any of it is there, and all of it is counted."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from attnd.errors import Exhausted
from attnd.v1 import attention_pb2, cache_pb2, step_pb2, tensor_pb2
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.kv import cache as cache_module
from attnd_server.service.kept_steps import BIG_STEP_ELEMENTS, is_big, step_bytes
from attnd_server.service.service import AttentionService
from attnd_server.service.session import MAX_GROUPS_AHEAD, AttendSession
from tests.fuzz.tensors import ints

NUM_GROUPS = 60
ROOM = 16 << 20
LIMITS = ServerConfig(device="cpu", threads=1, kv_bytes=1 << 22, max_step_bytes=ROOM)


@pytest.fixture(scope="module")
def service() -> Iterator[AttentionService]:
    made = build_service(LIMITS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def ref(service: AttentionService) -> cache_pb2.CacheRef:
    """A cache whose layers are all groups of their own; every third has a window."""
    config = cache_pb2.CacheConfig(num_layers=NUM_GROUPS, dtype=tensor_pb2.DTYPE_FLOAT32)
    for index in range(NUM_GROUPS):
        config.groups.add(
            layers=ints([index]), num_kv_heads=1, head_dim=8, page_size=4, num_pages=64, window=5 * (index % 3 == 1)
        )
    create: Any = service.create_cache(cache_pb2.CreateCacheRequest(config=config).SerializeToString(), "alice")
    return cache_pb2.CreateCacheResponse.FromString(create()).cache.cache


def step(
    ref: cache_pb2.CacheRef, step_id: int, columns: int, context_len: int = 0, num_reqs: int = 4, **fields: Any
) -> step_pb2.Step:
    """A step of requests with one new token each; page 1 throughout, and -1 where windows hide it."""
    message = step_pb2.Step(
        id=step_id,
        cache=ref,
        kind=step_pb2.STEP_KIND_PREFILL,
        cu_seqlens_q=ints([*range(num_reqs + 1)]),
        context_lens=ints([context_len] * num_reqs),
        mask=step_pb2.MASK_CAUSAL,
    )
    message.MergeFrom(step_pb2.Step(**fields))
    table = np.full((num_reqs, columns), 1, np.int32)
    for index in range(NUM_GROUPS):
        if index == 0 or columns < 5_000:
            told = table.copy()
            if index % 3 == 1:
                told[:, : (context_len - 4) // 4] = -1
            message.groups.add(page_tables=ints(told.ravel().tolist(), *table.shape))
        else:
            message.groups.add(tables_of=0)
    return message


def sent(session: AttendSession, message: step_pb2.Step) -> None:
    session.request(attention_pb2.AttendRequest(step=message).SerializeToString())


def growth(do: Callable[[], object]) -> tuple[int, int]:
    """Bytes that are held after it, and that were at the most meanwhile."""
    gc.collect()
    tracemalloc.start()
    try:
        do()
        gc.collect()
        return tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


def deltas(message: step_pb2.Step, max_pages: int) -> None:
    for group in message.groups:
        group.Clear()
        delta = step_pb2.PageTableDelta(base_step_id=1, source_rows=ints([0, 1, 2, 3]), max_pages=max_pages)
        delta.indices.CopyFrom(ints([]))
        delta.pages.CopyFrom(ints([]))
        group.page_table_delta.CopyFrom(delta)


def test_a_few_bytes_in_each_of_many_groups_take_nothing(service: AttentionService, ref: cache_pb2.CacheRef) -> None:
    session = service.open_session("alice")
    sent(session, step(ref, 1, 4))
    message = step(ref, 2, 4)
    deltas(message, LIMITS.max_page_table_elements // 4)
    assert len(message.SerializeToString()) < 6_000
    before = service.step_room.num_bytes

    def refused() -> None:
        with pytest.raises(Exhausted, match=r"the step takes [56]\d{8} bytes, and open steps take \d+, but the server"):
            sent(session, message)

    _, most = growth(refused)
    assert most < 1 << 20
    assert service.step_room.num_bytes == before
    sent(session, step(ref, 2, 4))


def test_groups_that_have_anothers_tables_take_their_own_copy_of_what_windows_leave(
    service: AttentionService, ref: cache_pb2.CacheRef
) -> None:
    """One table of 160 KB is told once; twenty groups with windows would make 20 others of it."""
    columns, session = 10_000, service.open_session("alice")
    message = step(ref, 1, columns, context_len=4 * columns)
    message.groups[0].page_tables.data = (
        np.where(np.arange(4 * columns) % columns < 9_000, -1, 1).astype("<i4").tobytes()
    )
    service.step_room._limit = 2 << 20
    try:

        def refused() -> None:
            with pytest.raises(Exhausted, match=r"the step takes \d+ bytes"):
                sent(session, message)

        _, most = growth(refused)
        assert most < 1 << 20
    finally:
        service.step_room._limit = ROOM
    held, _ = growth(lambda: sent(session, message))
    assert 20 * 160_000 < held < service.step_room.num_bytes


@pytest.mark.parametrize(
    ("columns", "context_len", "fields"),
    [
        (1, 0, {}),
        (100, 400, {}),
        (100, 400, {"store_first": True, "attend_new": ints([0, 1] * 2)}),
        (100, 400, {"kind": step_pb2.STEP_KIND_DECODE}),
        (10_000, 400, {"first_position": ints([8] * 4), "valid_lens": ints([0, 1] * 2)}),
    ],
)
@pytest.mark.parametrize("has_empty", [False, True])
def test_all_that_a_step_takes_is_counted(
    service: AttentionService,
    ref: cache_pb2.CacheRef,
    columns: int,
    context_len: int,
    fields: dict[str, Any],
    has_empty: bool,
) -> None:
    message = step(ref, 1, columns, context_len, **fields)
    if has_empty:
        message.cu_seqlens_q.CopyFrom(ints([0, 1, 1, 2, 3]))
        message.ClearField("valid_lens")
    session = service.open_session("alice")
    gc.collect()  # sessions of other tests
    before = service.step_room.num_bytes
    held, _ = growth(lambda: sent(session, message))
    assert 100 * NUM_GROUPS < held <= service.step_room.num_bytes - before


def test_steps_of_many_groups_again_and_again_take_no_more(service: AttentionService, ref: cache_pb2.CacheRef) -> None:
    session = service.open_session("alice")
    for step_id in range(1, 10):
        sent(session, step(ref, step_id, 100, 400))
    taken = service.step_room.num_bytes

    def goes_on() -> None:
        for step_id in range(10, 60):
            sent(session, step(ref, step_id, 100, 400))

    held, _ = growth(goes_on)
    assert service.step_room.num_bytes == taken
    assert held < taken
    session.close()


def test_many_groups_are_big_however_few_bytes_they_have(ref: cache_pb2.CacheRef) -> None:
    """What takes long to check is checked where nobody else waits."""
    assert is_big(step(ref, 1, 1))
    few = step(ref, 1, 1)
    del few.groups[3:]
    assert not is_big(few)
    few.groups[0].slot_mapping.CopyFrom(ints([-1] * 500))
    assert not is_big(few)
    for group in few.groups[1:]:
        group.CopyFrom(step_pb2.StepGroup(tables_of=0))
    few.groups[0].page_tables.CopyFrom(ints([1] * (BIG_STEP_ELEMENTS // 4 + 4), 4, -1))
    assert not is_big(few)
    few.groups[0].slot_mapping.CopyFrom(ints([-1] * 4_000))  # looked at three times
    assert is_big(few)


def call(layer: int, num_heads: int, slopes: bool) -> bytes:
    def zeros(*shape: int) -> tensor_pb2.Tensor:
        data = bytes(4 * int(np.prod(shape)))
        return tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT32, shape=shape, data=data)

    options = step_pb2.AttentionOptions(alibi_slopes=zeros(num_heads) if slopes else None)
    tensors = {"q": zeros(4, num_heads, 8), "k": zeros(4, 1, 8), "v": zeros(4, 1, 8)}
    message = step_pb2.Call(step_id=1, layer=layer, options=options, **tensors)
    return attention_pb2.AttendRequest(call=message).SerializeToString()


def test_options_are_kept_for_a_few_groups_and_a_thousand_heads(
    service: AttentionService, ref: cache_pb2.CacheRef
) -> None:
    session = service.open_session("alice")
    sent(session, step(ref, 1, 1))
    for layer in range(NUM_GROUPS):
        session.request(call(layer, 5_000, slopes=True))
    assert not session._last_options
    for layer in range(NUM_GROUPS):
        session.request(call(layer, 1_024, slopes=True))
    assert len(session._last_options) == MAX_GROUPS_AHEAD < NUM_GROUPS


def test_the_config_of_a_cache_is_said_once(
    service: AttentionService, ref: cache_pb2.CacheRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = service.caches.get(ref, "alice")
    first = cache.info()
    monkeypatch.setattr(cache_module, "config_message", lambda shape: pytest.fail("it was said again"))
    again = cache.info()
    assert again.config == first.config
    again.config.groups[0].num_pages = 7  # of the message alone
    assert cache.info().config == first.config


def test_room_for_tokens_is_counted_for_those_that_are_left_out() -> None:
    limits = ServerConfig()
    decode = step_pb2.Step(kind=step_pb2.STEP_KIND_DECODE, cu_seqlens_q=ints([0, 1, 2]), page_tables=ints([1] * 8_000))
    whole = step_bytes(decode, limits)
    decode.cu_seqlens_q.CopyFrom(ints([0, 1, 1]))
    assert 32_000 <= step_bytes(decode, limits) - whole < 40_000
    for data in (b"", b"\0", bytes(7), bytes(4), b"\xff" * 8, b"\x7f" * 8, bytes(5 * limits.max_step_reqs)):
        decode.cu_seqlens_q.data = data  # not looked at yet
        assert step_bytes(decode, limits) > 32_000
