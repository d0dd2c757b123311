"""The asyncio client on the shm plane: who gets it, the bits of inline, and calls for which there is no room yet."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import attnd
from attnd.aio import AsyncSession
from tests.servers import ServerProcess, mapped

GEOMETRY = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 16, "num_pages": 32, "page_size": 4, "dtype": "float32"}
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def shm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("aio_shm")
    with ServerProcess(folder / "log", "--device", "cpu", "--socket-dir", str(folder / "sockets")) as process:
        yield process
        log = process.log
    assert "internal error" not in log, log


def tensors(num_tokens: int) -> Tensors:
    return torch.randn(num_tokens, 6, 16), torch.randn(num_tokens, 2, 16), torch.randn(num_tokens, 2, 16)


def prefill(request: int, num_tokens: int) -> attnd.StepMetadata:
    """Tokens of one of four requests, each with pages of its own."""
    pages = list(range(8 * request, 8 * request + 8))
    return attnd.StepMetadata([num_tokens], [0], [pages], [4 * pages[0] + token for token in range(num_tokens)])


DECODE = attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")


def test_auto_takes_shm_and_says_what_else_there_is_not(shm_server: ServerProcess, server: ServerProcess) -> None:
    async def planes(address: str) -> tuple[str, dict[str, str]]:
        async with await attnd.aio.connect(address) as client:
            async with await client.create_cache(**GEOMETRY) as cache, cache.session() as session:
                assert session.plane == ""
                await (await session.step(DECODE)).attend(0, *tensors(1))
                return session.plane, dict(session.refusals)

    no_gpu = "the server's device is cpu, and it needs a GPU"
    assert asyncio.run(planes(shm_server.address)) == ("shm", {"cuda": no_gpu})
    plane, refusals = asyncio.run(planes(server.address))
    assert plane == "inline"
    assert refusals["shm"] == "the server was started without --socket-dir"


def test_a_pinned_plane_that_cannot_be_had_is_an_error_that_says_why(
    server: ServerProcess, shm_server: ServerProcess, tmp_path: Path
) -> None:
    async def pinned() -> None:
        async with await attnd.aio.connect(server.address, plane="shm") as client:
            async with await client.create_cache(**GEOMETRY) as cache:
                with pytest.raises(attnd.Unsupported, match="shm, but the server was started without --socket-dir"):
                    await cache.session().step(DECODE)
                with pytest.raises(attnd.InvalidRequest, match="plane is 'smh', but must be one of auto, inline, shm"):
                    cache.session(plane="smh")
                with pytest.raises(attnd.Unsupported, match="plane is cuda, which the sync client alone has"):
                    cache.session(plane="cuda")
        async with await attnd.aio.connect(shm_server.address, plane="shm", socket_dir=str(tmp_path)) as client:
            async with await client.create_cache(**GEOMETRY) as cache:
                with pytest.raises(attnd.Unsupported, match=f"socket {tmp_path}/.* cannot be reached: .*No such file"):
                    await cache.session().step(DECODE)
                async with cache.session(plane="auto") as session:
                    await (await session.step(DECODE)).attend(0, *tensors(1))
                    assert session.plane == "inline"
                    assert "cannot be reached" in session.refusals["shm"]

    asyncio.run(pinned())


def test_many_tasks_get_the_bits_that_inline_gives_one(shm_server: ServerProcess) -> None:
    lens = [7, 1, 3, 1]  # of each request: calls of several shapes, with and without lse, beside each other
    options = [attnd.AttentionOptions(), attnd.AttentionOptions(window=3, return_lse=True)]
    made = {(request, layer): tensors(lens[request]) for request in range(4) for layer in range(3)}

    async def attend(session: AsyncSession, request: int) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = []
        for _ in range(3):
            step = await session.step(prefill(request, lens[request]))
            for layer in range(3):
                # Two calls of each task, twice as many as may be under way.
                pair = [step.attend(layer, *made[request, layer], option) for option in options]
                alone, with_lse = await asyncio.gather(*pair)
                outputs += [alone, *with_lse]
        return outputs

    async def both() -> None:
        async with await attnd.aio.connect(shm_server.address) as client:
            async with (
                await client.create_cache(**GEOMETRY) as cache,
                await client.create_cache(**GEOMETRY) as other,
                cache.session(plane="inline") as inline,
                other.session() as shm,
            ):
                expected = [await attend(inline, request) for request in range(4)]
                outputs = await asyncio.gather(*(attend(shm, request) for request in range(4)))
                assert (inline.plane, shm.plane) == ("inline", "shm")
                for one, two in zip(expected, outputs, strict=True):
                    assert len(one) == len(two) == 27
                    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    asyncio.run(both())


def test_tasks_that_open_the_first_steps_at_once_share_one_stream(shm_server: ServerProcess) -> None:
    async def steps() -> None:
        async with await attnd.aio.connect(shm_server.address, plane="shm") as client:
            async with await client.create_cache(**GEOMETRY) as cache, cache.session() as session:
                first, second = await asyncio.gather(*(session.step(prefill(request, 1)) for request in (0, 1)))
                assert first.stream is second.stream
                for step in (first, second):
                    q, k, v = tensors(1)
                    assert torch.equal(await step.attend(0, q, k, v), v.repeat_interleave(3, 1))

    asyncio.run(steps())


def test_whoever_is_interrupted_while_the_plane_opens_leaves_nothing(shm_server: ServerProcess) -> None:
    async def interrupted() -> None:
        async with await attnd.aio.connect(shm_server.address, plane="shm") as client:
            async with await client.create_cache(**GEOMETRY) as cache, cache.session() as session:
                for delay in (0, 0.001, 0.003, 0.01):
                    opening = asyncio.ensure_future(session.step(DECODE))
                    await asyncio.sleep(delay)
                    opening.cancel()
                    await asyncio.wait([opening])
                    await session.close()
                q, k, v = tensors(1)
                assert torch.equal(await (await session.step(DECODE)).attend(0, q, k, v), v.repeat_interleave(3, 1))
            deadline = time.monotonic() + 20
            while mapped(os.getpid()) or mapped(shm_server.pid):
                assert time.monotonic() < deadline, "somebody kept a region"
                await asyncio.sleep(0.02)

    asyncio.run(interrupted())


def test_calls_wait_for_room_in_the_region_and_too_big_ones_are_refused(tmp_path: Path) -> None:
    options = ("--device", "cpu", "--socket-dir", str(tmp_path / "sockets"), "--region-bytes", "4096")

    async def crowded(address: str) -> None:
        async with await attnd.aio.connect(address, plane="shm") as client:
            async with await client.create_cache(**GEOMETRY) as cache, cache.session() as session:
                too_big = await session.step(prefill(0, 7))
                with pytest.raises(attnd.InvalidRequest, match=r"call has offset .* ends at byte 4096"):
                    await too_big.attend(0, *tensors(7))
                step, inputs = await session.step(prefill(0, 3)), tensors(3)  # 3072 bytes: two do not fit
                expected = await step.attend(0, *inputs)
                outputs = await asyncio.gather(*(step.attend(layer % 3, *inputs) for layer in range(6)))
                assert all(torch.equal(output, expected) for output in outputs)
                big = asyncio.gather(*(too_big.attend(0, *tensors(7)) for _ in range(2)), return_exceptions=True)
                sound = asyncio.ensure_future(step.attend(1, *inputs))
                assert [type(error) for error in await big] == [attnd.InvalidRequest] * 2
                assert torch.equal(await sound, expected)

    with ServerProcess(tmp_path / "log", *options) as server:
        asyncio.run(crowded(server.address))
