"""Caches whose layers are all groups of their own: what the server tells of them is more than it was asked with."""

from __future__ import annotations

import asyncio

import pytest

import attnd

# Each with one page of one token. Asked for with fewer fields than a message may have, and told with more.
GROUPS = [
    attnd.LayerGroup(
        layers=[layer],
        num_kv_heads=1,
        head_dim=8,
        num_pages=1,
        page_size=1,
        kv_dtype="float8_e4m3fn",
        v_dtype="float32",
    )
    for layer in range(250)
]


def test_a_client_reads_what_it_is_told_of_many_groups(server_address: str) -> None:
    with (
        attnd.connect(server_address) as client,
        client.create_cache(groups=GROUPS, dtype="float32") as cache,
        client.open_cache(cache.ref.id.hex()) as same,
    ):
        assert len(same.config.groups) == len(GROUPS)
        assert cache.written_pages(group=249) == []
        assert cache.info().num_pages_written == 0


def test_an_async_client_does_likewise(server_address: str) -> None:
    async def go() -> int:
        async with (
            await attnd.aio.connect(server_address) as client,
            await client.create_cache(groups=GROUPS, dtype="float32") as cache,
            await client.open_cache(cache.ref.id.hex()) as same,
        ):
            assert await cache.written_pages(group=249) == []
            return len(same.config.groups)

    assert asyncio.run(go()) == len(GROUPS)


def test_more_than_a_message_may_have_are_refused_before_there_are_any(server_address: str) -> None:
    with attnd.connect(server_address) as client:
        before = len(client.list_caches())
        groups = [
            attnd.LayerGroup(layers=[layer], num_kv_heads=1, head_dim=8, num_pages=1, page_size=1, window=1)
            for layer in range(900)
        ]
        with pytest.raises(attnd.InvalidRequest, match="starts a field beyond the 4096 that a message may have"):
            client.create_cache(groups=groups, dtype="float32")
        assert len(client.list_caches()) == before
