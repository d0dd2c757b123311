"""What has come in part is counted by connection and principal, and ends where it is most, beyond the limit."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable

import pytest

from attnd.errors import Exhausted
from attnd_server.rpc import arrivals
from attnd_server.rpc.arrivals import MORE_BYTES, NOBODY, NOBODYS_BYTES, Arrivals

MOST = 100 << 20
LIMIT = MOST + MORE_BYTES


class Rpc:
    """What a reader needs of gRPC's context: messages come when the test says so."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.messages: asyncio.Queue[bytes] = asyncio.Queue()

    def peer(self) -> str:
        return f"ipv4:127.0.0.1:{self.port}"

    async def read(self) -> bytes:
        return await self.messages.get()


def run(test: Callable[[Arrivals], Awaitable[None]]) -> None:
    asyncio.run(test(Arrivals(MOST)))  # type: ignore[arg-type]


async def started(counted: Arrivals, rpc: Rpc, principal: str) -> asyncio.Task[None]:
    """An RPC that reads again and again."""

    async def reads() -> None:
        with counted.reading(rpc, principal) as reader:
            while True:
                await reader.read(rpc)

    task = asyncio.ensure_future(reads())
    await asyncio.sleep(0)
    return task


def sizes(**received: int) -> dict[str, int]:
    return {f"127.0.0.1:{name.removeprefix('p')}": number for name, number in received.items()}


async def ended(task: asyncio.Task[None]) -> bool:
    for _ in range(3):
        await asyncio.sleep(0)
    if not task.done():
        return False
    with pytest.raises(Exhausted, match="have come in part hold more than"):
        await task
    return True


def test_the_largest_part_of_a_principal_beyond_its_limit_ends() -> None:
    async def test(counted: Arrivals) -> None:
        small, large, other = [await started(counted, Rpc(port), who) for port, who in ((1, "a"), (2, "a"), (3, "b"))]
        counted.look(counted.handed(), sizes(p1=MORE_BYTES, p2=MOST, p3=LIMIT))
        assert not any([await ended(task) for task in (small, large, other)])
        counted.look(counted.handed(), sizes(p1=MORE_BYTES + 1, p2=MOST, p3=LIMIT))
        assert [await ended(task) for task in (small, large, other)] == [False, True, False]
        for task in (small, other):
            task.cancel()

    run(test)


def test_messages_that_were_handed_over_do_not_count() -> None:
    async def test(counted: Arrivals) -> None:
        rpc = Rpc(1)
        task = await started(counted, rpc, "a")
        total = 0
        for _ in range(50):
            counted.look(counted.handed(), sizes(p1=total + MOST // 2))
            rpc.messages.put_nowait(bytes(MOST // 2))
            await asyncio.sleep(0.001)
            total += MOST // 2 + (MOST >> 10)  # and the frames around it
            counted.look(counted.handed(), sizes(p1=total))
        assert not await ended(task)
        counted.look(counted.handed(), sizes(p1=total + LIMIT + 1))
        assert await ended(task)

    run(test)


def test_what_was_handed_over_before_the_first_look_at_a_connection_does_not_count() -> None:
    """A client that connects, stores a GB by calls one after the other, and waits in the next when it is looked at."""

    async def test(counted: Arrivals) -> None:
        rpc = Rpc(1)
        for _ in range(6):
            task = await started(counted, rpc, "a")
            rpc.messages.put_nowait(bytes(MOST // 2))
            await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.sleep(0)
        task = await started(counted, rpc, "a")
        counted.look(counted.handed(), sizes(p1=6 * (MOST // 2)))
        assert not await ended(task)
        task.cancel()

    run(test)


def test_what_comes_and_is_handed_over_between_a_look_at_the_counters_and_its_turn_does_not_count_later() -> None:
    """A stream that is read as fast as it comes holds nothing, however late the event loop gets to look."""

    async def test(counted: Arrivals) -> None:
        rpc = Rpc(1)
        task = await started(counted, rpc, "a")
        total = 0
        for num_messages in (5, 1, 7):
            handed, received = counted.handed(), sizes(p1=total)
            for _ in range(num_messages):
                rpc.messages.put_nowait(bytes(MOST // 2))
                await asyncio.sleep(0.001)
            total += num_messages * (MOST // 2)
            counted.look(handed, received)
            assert not await ended(task)
            counted.look(counted.handed(), sizes(p1=total))
            assert not await ended(task)
        counted.look(counted.handed(), sizes(p1=total + LIMIT + 1))
        assert await ended(task)

    run(test)


def test_what_was_handed_over_before_its_turn_is_no_longer_pending() -> None:
    async def test(counted: Arrivals) -> None:
        rpc = Rpc(1)
        task = await started(counted, rpc, "a")
        handed, received = counted.handed(), sizes(p1=LIMIT + 1)
        rpc.messages.put_nowait(bytes(MOST))
        await asyncio.sleep(0.001)
        counted.look(handed, received)
        assert not await ended(task)
        counted.look(counted.handed(), sizes(p1=LIMIT + 1 + MOST))
        assert not await ended(task)
        counted.look(counted.handed(), sizes(p1=LIMIT + 1 + 2 * MOST))
        assert await ended(task)

    run(test)


def test_a_connection_that_is_gone_leaves_nothing() -> None:
    async def test(counted: Arrivals) -> None:
        rpc = Rpc(1)
        task = await started(counted, rpc, "a")
        rpc.messages.put_nowait(bytes(100))
        await asyncio.sleep(0.001)
        assert list(counted.handed()) == ["127.0.0.1:1"]
        counted.look(counted.handed(), sizes(p2=1))
        assert list(counted.handed()) == ["127.0.0.1:1"]  # its reader has not ended yet
        task.cancel()
        await asyncio.sleep(0)
        counted.look(counted.handed(), sizes(p2=1))
        assert not counted.handed()

    run(test)


def test_credit_for_frames_is_not_saved_up() -> None:
    async def test(counted: Arrivals) -> None:
        rpc = Rpc(1)
        task = await started(counted, rpc, "a")
        for _ in range(100):
            for _ in range(1_000):
                rpc.messages.put_nowait(b"")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            counted.look(counted.handed(), sizes(p1=0))
        counted.look(counted.handed(), sizes(p1=LIMIT + 1))
        assert await ended(task)

    run(test)


def test_a_connection_on_which_nobody_waits_is_forgiven_what_came() -> None:
    async def test(counted: Arrivals) -> None:
        task = await started(counted, Rpc(1), "a")
        counted.look(counted.handed(), sizes(p1=LIMIT))
        task.cancel()
        await asyncio.sleep(0)
        counted.look(counted.handed(), sizes(p1=2 * LIMIT))
        again = await started(counted, Rpc(1), "a")
        counted.look(counted.handed(), sizes(p1=2 * LIMIT + 100))
        assert not await ended(again)
        again.cancel()

    run(test)


def test_who_has_shown_no_token_has_little() -> None:
    async def test(counted: Arrivals) -> None:
        task = await started(counted, Rpc(1), NOBODY)
        counted.look(counted.handed(), sizes(p1=NOBODYS_BYTES))
        assert not await ended(task)
        counted.look(counted.handed(), sizes(p1=NOBODYS_BYTES + 1))
        assert await ended(task)

    run(test)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's counters")
@pytest.mark.parametrize(
    ("family", "host", "named"),
    [(socket.AF_INET, "127.0.0.1", "ipv4:127.0.0.1"), (socket.AF_INET6, "::1", "ipv6:%5B::1%5D")],
)
def test_the_kernel_counts_what_came_on_a_connection(family: int, host: str, named: str) -> None:
    try:
        listening = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip("this host has no IPv6")
    with listening, socket.create_connection(listening.getsockname()[:2]) as client:
        served, peer = listening.accept()
        with served:
            key = arrivals._key(f"{named}:{peer[1]}")
            assert arrivals._received()[key] == 0
            client.sendall(bytes(1_000))
            served.recv(1_000, socket.MSG_WAITALL)
            assert arrivals._received()[key] == 1_000
            served.sendall(b"still open")
            assert client.recv(100) == b"still open"
