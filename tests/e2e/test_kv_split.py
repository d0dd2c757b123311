"""How KV is cut, chosen at a cache's creation and told by the server."""

from __future__ import annotations

import asyncio

import pytest
import torch

import attnd
from attnd.v1 import cache_pb2
from tests.attention import dense_attention

GEOMETRY = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 16, "dtype": "float32"}


@pytest.mark.parametrize(
    ("kv_split", "told"),
    [
        (None, {"max_splits": 128}),
        (attnd.KVSplit(), {"max_splits": 128}),
        (attnd.KVSplit(chunk_size=64, max_splits=5), {"chunk_size": 64, "max_splits": 5}),
        (attnd.KVSplit(batch_invariant=True), {"max_splits": 128, "batch_invariant": True}),
        (attnd.KVSplit(batch_invariant=False), {"max_splits": 128, "batch_invariant": False}),
    ],
)
def test_a_cache_says_how_it_cuts(
    any_client: attnd.Client, kv_split: attnd.KVSplit | None, told: dict[str, int]
) -> None:
    with any_client.create_cache(**GEOMETRY, kv_split=kv_split, name="cut") as cache:
        expected = cache_pb2.KvSplit(**told)
        assert cache.config.kv_split == expected
        assert cache.info().config.kv_split == expected
        assert [info.config.kv_split for info in any_client.list_caches() if info.name == "cut"] == [expected]


def test_a_cache_with_its_own_cut_attends(any_client: attnd.Client) -> None:
    q, k, v = torch.randn(40, 4, 16), torch.randn(40, 2, 16), torch.randn(40, 2, 16)
    pages, slots = [5, 0, 3], [*range(80, 96), *range(16), *range(48, 56)]
    kv_split = attnd.KVSplit(chunk_size=16, max_splits=2, batch_invariant=True)
    with any_client.create_cache(**GEOMETRY, kv_split=kv_split) as cache, cache.session() as session:
        session.step(attnd.StepMetadata([39], [0], [pages], slots[:39])).attend(0, q[:39], k[:39], v[:39])
        step = session.step(attnd.StepMetadata([1], [39], [pages], slots[39:]))
        output = step.attend(0, q[39:], k[39:], v[39:])
    torch.testing.assert_close(output, dense_attention(q[39:], k, v))


@pytest.mark.parametrize(
    ("kv_split", "field", "text"),
    [
        (
            attnd.KVSplit(chunk_size=100),
            "kv_split.chunk_size",
            "is 100, but must be 0 or a power of two in 16..1048576",
        ),
        (attnd.KVSplit(max_splits=2000), "kv_split.max_splits", "is 2000, but must be 1..1024"),
        (attnd.KVSplit(max_splits=-1), "kv_split.max_splits", "is -1, but must be an integer in 0..4294967295"),
    ],
)
def test_refusals(any_client: attnd.Client, kv_split: attnd.KVSplit, field: str, text: str) -> None:
    with pytest.raises(attnd.InvalidRequest) as caught:
        any_client.create_cache(**GEOMETRY, kv_split=kv_split)
    assert str(caught.value) == f"{field} {text}"
    assert caught.value.field == field


def test_asyncio_has_it_too(server_address: str) -> None:
    async def told() -> cache_pb2.KvSplit:
        kv_split = attnd.KVSplit(chunk_size=32, batch_invariant=True)
        async with await attnd.aio.connect(server_address) as client:
            async with await client.create_cache(**GEOMETRY, kv_split=kv_split) as cache:
                return (await cache.info()).config.kv_split

    assert asyncio.run(told()) == cache_pb2.KvSplit(chunk_size=32, max_splits=128, batch_invariant=True)
