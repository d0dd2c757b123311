"""Whatever comes over any RPC: an answer that is not INTERNAL, and no byte changed but in the caller's own slots.

`make fuzz` does the same a million times.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnd.v1 import tensor_pb2
from attnd_server.kv.cache import Cache
from attnd_server.kv.caches import CacheTable
from attnd_server.kv.layer_group import LayerGroup
from attnd_server.service import validation
from tests.fuzz import tensors
from tests.fuzz.attack import Attack, attack
from tests.fuzz.caches import shapes
from tests.fuzz.context import Context, Ended
from tests.fuzz.world import World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


def run(world: World, random_: random.Random, num_requests: int) -> Attack:
    with Attack(world, random_) as made:
        asyncio.run(attack(made, num_requests))
    return made


@settings(deadline=None, derandomize=True, max_examples=25)
@given(random_=st.randoms(use_true_random=False))
def test_almost_valid_requests_change_nothing_of_anybody_else(random_: random.Random) -> None:
    # A world of its own, so that what failed can be tried again.
    with World() as world, Attack(world, random_) as made:
        for _ in range(3):
            asyncio.run(made.go())


def test_requests_of_every_kind_are_done_and_refused(world: World) -> None:
    made = run(world, random.Random(5), 4_000)
    done = {method for method, outcome in made.outcomes if outcome == "done"}
    refused = {method for method, outcome in made.outcomes if outcome != "done"}
    assert done == {*world.service.unary, "ReadKv", "StoreKv", "Attend", "shm"}
    assert done - refused <= {"GetCapabilities", "GetStatus", "ListCaches"}  # which look at nothing that was sent


def test_every_layer_group_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    written, mark = set(), LayerGroup._mark

    def noted(self: LayerGroup, pages: Any) -> None:
        if len(pages):
            written.add(self.config)
        mark(self, pages)

    monkeypatch.setattr(LayerGroup, "_mark", noted)
    with World() as world:
        run(world, random.Random(7), 3_000)
    assert {config for shape in shapes() for config in shape.groups} <= written


@settings(deadline=None, derandomize=True, max_examples=300)
@given(data=st.binary(max_size=200), method=st.integers(0, 14))
def test_any_bytes_are_answered(world: World, data: bytes, method: int) -> None:
    name = [*sorted(world.service.unary), "ReadKv", "StoreKv", "Attend"][method]
    handler: Any = world.servicer._handlers[name]
    context = Context(data)

    async def call() -> None:
        if name in ("StoreKv", "Attend"):
            await handler.stream_stream(None, context)
            assert len(context.answers) == 1
        elif name == "ReadKv":
            await handler.stream_stream(None, context)
        else:
            await handler.stream_unary(None, context)

    try:
        asyncio.run(call())
    except Ended:
        assert context.code is not None
    finally:
        context.end()
    world.check(f"{name} {data.hex()}")


@pytest.mark.parametrize("shape", [(0, 3), (1,), (3, 2, 8), (4, 4096), (9, 4, 4096)])
def test_tensors_of_any_size_can_be_drawn(shape: tuple[int, ...]) -> None:
    """Some of more elements than there are: of a cache that a spoiled message asked for and got."""
    drawn = [tensors.floats(random.Random(seed), tensor_pb2.DTYPE_FLOAT16, *shape) for seed in range(20)]
    assert {len(each.data) for each in drawn} == {2 * math.prod(shape)}
    assert all(np.isfinite(np.frombuffer(each.data, np.float16)).all() for each in drawn)


def test_a_hole_between_principals_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(self: CacheTable, ref: Any, principal: str) -> Cache:
        return self._caches.get(ref.id) or next(iter(self._caches.values()))

    monkeypatch.setattr(CacheTable, "get", get)
    with World() as world, pytest.raises(AssertionError):  # by whatever check it meets first
        run(world, random.Random(1), 20_000)


def test_a_group_taken_for_another_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "group", lambda value, cache: value % len(cache.groups) // 2)

    async def copy(made: Attack) -> None:
        for _ in range(1_000):
            await made._unary("CopyPages")

    with (
        World() as world,
        Attack(world, random.Random(1)) as made,
        pytest.raises(AssertionError, match=r"bytes of|is none"),
    ):
        asyncio.run(copy(made))


def test_a_store_beside_its_slots_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    store = LayerGroup.store

    def store_and_spill(self: LayerGroup, layer: int, k: Any, v: Any, stored: Any) -> None:
        store(self, layer, k, v, stored)
        assert self.pages is not None
        after = self.pages.first + self.config.num_layers * self.config.num_pages
        self.pages.space.k.view(torch.uint8)[after + 4] += 1  # where the next cache begins, more or less

    monkeypatch.setattr(LayerGroup, "store", store_and_spill)
    with World() as world, pytest.raises(AssertionError, match=r"bytes of .* changed"):
        run(world, random.Random(1), 2_000)
