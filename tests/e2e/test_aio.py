"""The asyncio client, on each plane."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import torch

import attnd
from attnd.aio import AsyncCache, AsyncClient
from tests.attention import dense_attention
from tests.descriptors import open_links
from tests.servers import ServerProcess, mapped

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "num_pages": 32, "page_size": 4, "dtype": "float32"}
Q, K, V = torch.randn(5, 6, 16), torch.randn(5, 2, 16), torch.randn(5, 2, 16)
PREFILL = attnd.StepMetadata([5], [0], [[0, 1]], [0, 1, 2, 3, 4])


Test = Callable[[AsyncClient, AsyncCache], Awaitable[None]]


def serve(folder: Path, *options: str) -> ServerProcess:
    return ServerProcess(folder / "log", "--device", "cpu", "--socket-dir", str(folder / "sockets"), *options)


@pytest.fixture(scope="module")
def socket_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serve(tmp_path_factory.mktemp("aio")) as process:
        yield process
        log = process.log
    assert "internal error" not in log, log


@pytest.fixture(params=["inline", "shm"])
def plane(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(address: str, test: Test, plane: str = "auto", timeout_s: float = 30) -> None:
    async def connected() -> None:
        async with await attnd.aio.connect(address, plane=plane, timeout_s=timeout_s) as client:
            async with await client.create_cache(**GEOMETRY) as cache:
                await test(client, cache)
                assert mapped(os.getpid()) == 0  # all sessions are closed

    asyncio.run(connected())


def test_calls_of_several_tasks_are_under_way_at_once(socket_server: ServerProcess, plane: str) -> None:
    async def test(client: AsyncClient, cache: AsyncCache) -> None:
        async with cache.session() as session:
            step = await session.step(PREFILL)
            outputs = await asyncio.gather(*(step.attend(layer, Q * (layer + 1), K, V) for layer in (0, 1, 0, 1)))
            assert session.plane == plane
        for layer, output in zip((0, 1, 0, 1), outputs, strict=True):
            torch.testing.assert_close(output, dense_attention(Q * (layer + 1), K, V))

    run(socket_server.address, test, plane)


def test_a_refused_step_says_why_at_its_calls(socket_server: ServerProcess, plane: str) -> None:
    async def test(client: AsyncClient, cache: AsyncCache) -> None:
        async with cache.session() as session:
            refused = await session.step(attnd.StepMetadata([5], [0], [[0, 99]], None))
            with pytest.raises(attnd.InvalidRequest, match=r"page_tables\[0, 1\] is 99"):
                await refused.attend(0, Q, K, V)
            sound = await session.step(PREFILL)
            torch.testing.assert_close(await sound.attend(0, Q, K, V), dense_attention(Q, K, V))

    run(socket_server.address, test, plane)


def test_a_step_for_a_stream_that_ended_does_not_go_to_the_next(socket_server: ServerProcess, plane: str) -> None:
    async def test(client: AsyncClient, cache: AsyncCache) -> None:
        async with cache.session() as session:
            await (await session.step(PREFILL)).attend(0, Q, K, V)
            async with session._stream._writing:  # another task writes
                late = asyncio.ensure_future(session.step(PREFILL))
                await asyncio.sleep(0)
                await session.close()
                sound = asyncio.ensure_future(session.step(PREFILL))
                await asyncio.sleep(0)
            with pytest.raises(attnd.Disconnected, match="open the step again"):
                await late
            torch.testing.assert_close(await (await sound).attend(0, Q, K, V), dense_attention(Q, K, V))

    run(socket_server.address, test, plane)


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


def test_a_deleted_cache_is_lost(socket_server: ServerProcess, plane: str) -> None:
    async def test(client: AsyncClient, cache: AsyncCache) -> None:
        await cache.delete()
        async with cache.session() as session:
            with pytest.raises(attnd.CacheLost):
                await (await session.step(PREFILL)).attend(0, Q, K, V)

    run(socket_server.address, test, plane)


def test_a_killed_server_disconnects_every_waiting_call(tmp_path: Path, plane: str) -> None:
    with serve(tmp_path) as server:

        async def test(client: AsyncClient, cache: AsyncCache) -> None:
            async with cache.session() as session:
                step = await session.step(PREFILL)
                await step.attend(0, Q, K, V)
                server.freeze()  # so that it is in the middle of the calls when it is killed
                waiting = [asyncio.ensure_future(step.attend(layer, Q, K, V)) for layer in (0, 1, 0)]
                await asyncio.sleep(0.1)
                server.kill()
                for call in waiting:
                    with pytest.raises(attnd.Disconnected, match="no connection to"):
                        await call
                for _ in range(2):
                    with pytest.raises(attnd.Disconnected):
                        await step.attend(1, Q, K, V)

        run(server.address, test, plane)


def test_nobody_at_the_address() -> None:
    with pytest.raises(attnd.Disconnected, match=r"no answer from 127.0.0.1:1 within 0.3 s"):
        asyncio.run(attnd.aio.connect("127.0.0.1:1", connect_timeout_s=0.3))


def test_a_server_that_hangs_ends_the_session_within_the_deadline(tmp_path: Path, plane: str) -> None:
    with serve(tmp_path) as server:

        async def test(client: AsyncClient, cache: AsyncCache) -> None:
            async with cache.session() as session:
                step = await session.step(PREFILL)
                expected = await step.attend(0, Q, K, V)
                server.freeze()
                try:
                    late, given_up = (asyncio.ensure_future(step.attend(layer, Q, K, V)) for layer in (0, 1))
                    await asyncio.sleep(0.1)
                    given_up.cancel()
                    with pytest.raises(attnd.DeadlineExceeded, match="no answer within 1 s"):
                        await late
                finally:
                    os.kill(server.pid, signal.SIGCONT)
                with pytest.raises(attnd.Disconnected, match="open the step again"):
                    await step.attend(1, Q, K, V)
                assert torch.equal(await (await session.step(PREFILL)).attend(0, Q, K, V), expected)

        run(server.address, test, plane, timeout_s=1)


def test_sigterm_lets_calls_under_way_finish_and_refuses_the_next_step(tmp_path: Path, plane: str) -> None:
    with serve(tmp_path) as server:

        async def test(client: AsyncClient, cache: AsyncCache) -> None:
            async with cache.session() as session:
                step = await session.step(PREFILL)
                expected = await step.attend(0, Q, K, V)
                server.terminate()
                deadline = time.monotonic() + 20
                while "draining" not in server.log:
                    assert time.monotonic() < deadline, "the server does not drain"
                    await asyncio.sleep(0.02)
                # Not the last layer: after that nothing is under way, and the server may end the stream.
                await step.attend(0, Q, K, V)
                calls = [asyncio.ensure_future(step.attend(layer, Q, K, V)) for layer in (0, 1)]
                await asyncio.sleep(0)
                with pytest.raises(attnd.Disconnected, match="drain"):
                    await (await session.step(PREFILL)).attend(0, Q, K, V)
                for call in calls:
                    assert torch.equal(await call, expected)

        run(server.address, test, plane)
        assert server.wait() == 0


def test_close_ends_what_is_under_way_and_leaves_nothing(tmp_path: Path, plane: str) -> None:
    def descriptors() -> list[str]:
        return sorted(link for link in open_links(os.getpid()) if link.startswith("socket:") or "memfd" in link)

    with serve(tmp_path) as server:

        async def test(client: AsyncClient, cache: AsyncCache) -> None:
            await client.list_caches()  # whatever gRPC needs is there
            before, tasks = descriptors(), asyncio.all_tasks()
            async with cache.session() as session:
                step = await session.step(PREFILL)
                await step.attend(0, Q, K, V)
                server.freeze()
                waiting = [asyncio.ensure_future(step.attend(0, Q, K, V)) for _ in range(6)]
                await asyncio.sleep(0.1)
                await session.close()
                for call in waiting:
                    with pytest.raises(attnd.Disconnected):
                        await call
                os.kill(server.pid, signal.SIGCONT)
                deadline = time.monotonic() + 10
                while asyncio.all_tasks() != tasks and time.monotonic() < deadline:
                    await asyncio.sleep(0.01)  # gRPC's own task ends a little later than the call that it is for
                assert asyncio.all_tasks() == tasks
                assert set(descriptors()) <= set(before)  # what earlier tests left may have ended
                assert mapped(os.getpid()) == 0
                await (await session.step(PREFILL)).attend(0, Q, K, V)

        run(server.address, test, plane)
