"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch

import attnd
from attnd.aio import AsyncCache, AsyncClient
from tests.attention import dense_attention
from tests.servers import ServerProcess

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "num_pages": 32, "page_size": 4, "dtype": "float32"}
Q, K, V = torch.randn(5, 6, 16), torch.randn(5, 2, 16), torch.randn(5, 2, 16)
PREFILL = attnd.StepMetadata([5], [0], [[0, 1]], [0, 1, 2, 3, 4])


def run(address: str, test: Callable[[AsyncClient, AsyncCache], Awaitable[None]]) -> None:
    async def connected() -> None:
        async with await attnd.aio.connect(address) as client:
            async with await client.create_cache(**GEOMETRY) as cache:
                await test(client, cache)

    asyncio.run(connected())


def test_calls_of_several_tasks_are_under_way_at_once(server_address: str) -> None:
    async def test(client: AsyncClient, cache: AsyncCache) -> None:
        async with cache.session() as session:
            step = await session.step(PREFILL)
            outputs = await asyncio.gather(*(step.attend(layer, Q * (layer + 1), K, V) for layer in (0, 1, 0, 1)))
        for layer, output in zip((0, 1, 0, 1), outputs, strict=True):
            torch.testing.assert_close(output, dense_attention(Q * (layer + 1), K, V))

    run(server_address, test)


def test_a_refused_step_says_why_at_its_calls(server_address: str) -> None:
    async def test(client: AsyncClient, cache: AsyncCache) -> None:
        async with cache.session() as session:
            refused = await session.step(attnd.StepMetadata([5], [0], [[0, 99]], None))
            with pytest.raises(attnd.InvalidRequest, match=r"page_tables\[0, 1\] is 99"):
                await refused.attend(0, Q, K, V)
            sound = await session.step(PREFILL)
            torch.testing.assert_close(await sound.attend(0, Q, K, V), dense_attention(Q, K, V))

    run(server_address, test)


def test_a_step_for_a_stream_that_ended_does_not_go_to_the_next(server_address: str) -> None:
    async def test(client: AsyncClient, cache: AsyncCache) -> None:
        async with cache.session() as session:
            await (await session.step(PREFILL)).attend(0, Q, K, V)
            async with session._writing:  # another task writes
                late = asyncio.ensure_future(session.step(PREFILL))
                await asyncio.sleep(0)
                await session.close()
                sound = asyncio.ensure_future(session.step(PREFILL))
                await asyncio.sleep(0)
            with pytest.raises(attnd.Disconnected, match="open the step again"):
                await late
            torch.testing.assert_close(await (await sound).attend(0, Q, K, V), dense_attention(Q, K, V))

    run(server_address, test)


def test_kv_in_and_out(server_address: str) -> None:
    async def test(client: AsyncClient, cache: AsyncCache) -> None:
        assert await cache.store_kv(1, [9, 3, 7, 1, 120], K, V) == 5
        read_k, read_v = await cache.read_kv(1, [120, 9], like=K)
        assert torch.equal(read_k, K[[4, 0]])
        assert torch.equal(read_v, V[[4, 0]])
        await cache.copy_pages([30], [2])
        assert (await cache.info()).num_pages_written == 4
        with pytest.raises(attnd.InvalidRequest, match=r"slot_mapping\[0\] is 128"):
            await cache.store_kv(1, [128], K[:1], V[:1])
        with pytest.raises(attnd.InvalidRequest, match="layer is 2"):
            await cache.read_kv(2, [0], like=K)
        assert len(await client.list_caches()) >= 1

    run(server_address, test)


def test_a_deleted_cache_is_lost(server_address: str) -> None:
    async def test(client: AsyncClient, cache: AsyncCache) -> None:
        await cache.delete()
        async with cache.session() as session:
            with pytest.raises(attnd.CacheLost):
                await (await session.step(PREFILL)).attend(0, Q, K, V)

    run(server_address, test)


def test_a_killed_server_disconnects_every_waiting_call(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log", "--device", "cpu") as server:

        async def test(client: AsyncClient, cache: AsyncCache) -> None:
            async with cache.session() as session:
                step = await session.step(PREFILL)
                await step.attend(0, Q, K, V)
                server.kill()
                for _ in range(2):
                    with pytest.raises(attnd.Disconnected):
                        await step.attend(1, Q, K, V)

        run(server.address, test)


def test_nobody_at_the_address() -> None:
    with pytest.raises(attnd.Disconnected, match=r"no answer from 127.0.0.1:1 within 0.3 s"):
        asyncio.run(attnd.aio.connect("127.0.0.1:1", connect_timeout_s=0.3))
