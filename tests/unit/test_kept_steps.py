"""How many steps a stream keeps, and what those of a principal and of everybody may take."""

from __future__ import annotations

import gc
import mmap
from typing import Any

import pytest
import torch

import attnd
from attnd.errors import Exhausted
from attnd.protocol import frames, requests
from attnd.protocol.regions import Region
from attnd.v1 import cache_pb2, step_pb2, tensor_pb2
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.service import session as session_module
from attnd_server.service.kept_steps import LEAST_OPEN_STEPS, MANY_STEPS_BYTES, KeptSteps, StepRoom, step_bytes
from attnd_server.service.replies import RegionReplies

MOST = 8
SMALL, BIG = 1_000, MANY_STEPS_BYTES


class FakeStep:
    """A step that holds its room."""

    def __init__(self, step_id: int, held: object) -> None:
        self.id, self.held, self.metadata = step_id, held, f"metadata {step_id}"


def opened(kept: KeptSteps, step_id: int, num_bytes: int, *bases: int) -> list[int]:
    """Opens a step; returns which others had to go."""
    step: Any = FakeStep(step_id, kept.take(bases, num_bytes))
    return kept.add((step,))


def test_many_small_steps_are_kept_and_few_big_ones() -> None:
    room = StepRoom(1 << 30, 1 << 30)
    small, big = KeptSteps(room, "alice", MOST), KeptSteps(room, "alice", MOST)
    assert [opened(small, step_id, SMALL) for step_id in range(1, 11)] == [*[[]] * 8, [1], [2]]
    assert [opened(big, step_id, BIG) for step_id in range(1, 7)] == [[], [], [], [], [1], [2]]
    assert str(big) == "3, 4, 5, 6"
    assert big.get(2) is None
    assert big.metadata() == {step_id: [f"metadata {step_id}"] for step_id in range(3, 7)}
    assert room.num_bytes == MOST * SMALL + LEAST_OPEN_STEPS * BIG
    small.clear()
    big.clear()
    assert room.num_bytes == 0
    assert str(big) == "none"


def test_a_principal_leaves_room_for_others() -> None:
    room = StepRoom(10 * BIG, 6 * BIG)
    first, second, other = (KeptSteps(room, name, MOST) for name in ("alice", "alice", "bob"))
    for step_id in range(LEAST_OPEN_STEPS):
        opened(first, step_id, BIG)
    opened(second, 1, BIG)
    opened(second, 2, BIG)
    rule = f"the step takes {BIG} bytes, and open steps take {6 * BIG}, but a principal's limit is {6 * BIG}"
    with pytest.raises(Exhausted, match=rule):
        opened(second, 3, BIG)
    assert str(second) == "1, 2"
    assert opened(first, 9, BIG) == []  # an older one of its own went for it
    assert str(first) == "1, 2, 3, 9"
    for step_id in range(4):
        opened(other, step_id, BIG)
    with pytest.raises(Exhausted, match=f"open steps take {10 * BIG}, but the server's limit is {10 * BIG}"):
        KeptSteps(room, "carol", MOST).take((), 1)
    first.clear()
    opened(second, 3, BIG)
    assert room.num_bytes == 7 * BIG


def test_the_base_of_a_step_does_not_go_for_it() -> None:
    room = StepRoom(LEAST_OPEN_STEPS * BIG, LEAST_OPEN_STEPS * BIG)
    kept = KeptSteps(room, "alice", MOST)
    for step_id in range(LEAST_OPEN_STEPS):
        opened(kept, step_id, BIG)
    with pytest.raises(Exhausted):
        kept.take({0}, BIG)
    with pytest.raises(Exhausted):
        kept.take({3, 0}, BIG)
    assert kept.get(0) is not None
    assert opened(kept, 7, BIG, 1) == []
    assert kept.get(0) is None


def test_the_last_call_of_a_lane_does_not_hold_the_room_of_a_step_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "plan_ahead", lambda *_: None)  # which holds a step for a moment, too
    service = build_service(ServerConfig(device="cpu", max_step_bytes=1 << 20))
    try:
        config = cache_pb2.CacheConfig(
            num_layers=1, num_kv_heads=2, head_dim=8, page_size=16, num_pages=4, dtype=tensor_pb2.DTYPE_FLOAT32
        )
        create: Any = service.create_cache(cache_pb2.CreateCacheRequest(config=config).SerializeToString(), "alice")
        ref = cache_pb2.CreateCacheResponse.FromString(create()).cache.cache
        session = service.open_session("alice", RegionReplies(Region(1, mmap.mmap(-1, 1 << 12))))
        metadata = attnd.StepMetadata([1], [0], [[0] + [-1] * 50_000])  # five of them fit
        q, kv, options = torch.zeros(1, 4, 8), torch.zeros(1, 2, 8), attnd.AttentionOptions()
        for step_id in range(1, 12):
            session.request(frames.step_request(metadata.to_message(step_id, ref)))
            session.request(requests.attend_call(step_id, 0, q, kv, kv, options), lane=min(step_id, 4) - 1)
        assert service.step_room.num_bytes <= 1 << 20
    finally:
        service.close()


def test_room_is_held_by_whoever_holds_the_step() -> None:
    room = StepRoom(1 << 30, 1 << 30)
    kept = KeptSteps(room, "alice", MOST)
    opened(kept, 1, BIG)
    step = kept.get(1)
    kept.clear()
    assert room.num_bytes == BIG  # a call of it waits
    del step
    gc.collect()
    assert room.num_bytes == 0


def test_what_a_step_takes_is_known_before_it_is_made() -> None:
    limits = ServerConfig()

    def tensor(num_elements: int) -> tensor_pb2.Tensor:
        return tensor_pb2.Tensor(data=bytes(4 * num_elements))

    empty = step_bytes(step_pb2.Step(), limits)
    assert 0 < empty < 1 << 16
    sent = step_pb2.Step(cu_seqlens_q=tensor(5), page_tables=tensor(4_000))
    assert step_bytes(sent, limits) - empty >= 16_000
    delta = step_pb2.Step(cu_seqlens_q=tensor(5), page_table_delta=step_pb2.PageTableDelta(max_pages=1_000))
    assert step_bytes(delta, limits) - empty >= 16_000
    # What the limits refuse takes no more than the most that they allow.
    absurd = step_pb2.Step(cu_seqlens_q=tensor(9_000), page_table_delta=step_pb2.PageTableDelta(max_pages=2**32 - 1))
    assert step_bytes(absurd, limits) < 4 * limits.max_page_table_elements + (1 << 20)
