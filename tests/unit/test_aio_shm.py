"""The asyncio client's end of a shm plane's socket, by a server that takes its time or goes wrong."""

from __future__ import annotations

import asyncio
import mmap
import socket
import threading
from collections.abc import Awaitable, Callable

import pytest

from attnd.aio import shm as aio_shm
from attnd.aio.shm import AsyncShmStream
from attnd.errors import DeadlineExceeded, Disconnected, ServerFault
from attnd.planes.shm.lanes import Lanes
from attnd.planes.shm.stream import Handshake
from attnd.protocol import frames
from attnd.protocol.regions import Region
from attnd.protocol.shm import framing
from attnd.v1 import attention_pb2, cache_pb2, plane_pb2, step_pb2

MIB = 1 << 20
REPLY = attention_pb2.AttendResponse(step=attention_pb2.StepReply(step_id=7)).SerializeToString()


def run(test: Callable[[AsyncShmStream, socket.socket], Awaitable[None]], timeout_s: float = 30) -> None:
    async def with_stream() -> None:
        one, other = socket.socketpair()
        other.setblocking(False)
        with other:
            region = Region(1, mmap.mmap(-1, 4096))
            stream = AsyncShmStream(Handshake(one, region, Lanes(4096, 16), "/somewhere/a.sock"), timeout_s)
            await test(stream, other)
            await stream.close()
            assert one.fileno() == -1
            assert region.num_bytes == 0

    asyncio.run(asyncio.wait_for(with_stream(), 60))


async def drained(peer: socket.socket) -> bytes:
    """All that comes until nothing more does."""
    data = b""
    while True:
        try:
            data += await asyncio.wait_for(asyncio.get_running_loop().sock_recv(peer, MIB), 0.2)
        except asyncio.TimeoutError:
            return data


def test_a_message_that_the_socket_takes_in_parts_arrives_whole_and_before_the_next() -> None:
    async def test(stream: AsyncShmStream, peer: socket.socket) -> None:
        big, small = b"a" * (4 * MIB), framing.repeated_call(1, 2, 0)
        sending = [asyncio.ensure_future(stream.ask(lambda data=data: data, 30)) for data in (big, small)]  # type: ignore[misc]
        await asyncio.sleep(0.05)
        assert not any(each.done() for each in sending)
        assert await drained(peer) == big + small
        first, second = await asyncio.gather(*sending)
        peer.send(2 * framing.reply_bytes(REPLY))
        assert (await first).message.step_id == (await second).message.step_id == 7

    run(test)


def test_a_server_that_takes_no_more_ends_the_stream_in_time() -> None:
    async def test(stream: AsyncShmStream, peer: socket.socket) -> None:
        waiting = await stream.ask(lambda: b"first", 30)
        with pytest.raises(DeadlineExceeded, match=r"took no message within 0\.1 s"):
            await stream.ask(lambda: b"a" * (4 * MIB), 30)
        assert isinstance(waiting.exception(), DeadlineExceeded)
        with pytest.raises(Disconnected, match="open the step again"):
            await stream.ask(lambda: b"next", 30)

    run(test, timeout_s=0.1)


def test_what_was_answered_before_the_server_hung_up_is_there() -> None:
    """The client learns of it when it sends, and has not read yet what came before."""

    async def test(stream: AsyncShmStream, peer: socket.socket) -> None:
        answered, late = [await stream.ask(lambda: b"first", 30) for _ in range(2)]
        going_away = attention_pb2.AttendResponse(going_away=attention_pb2.GoingAway(reason="the server is draining"))
        peer.send(framing.reply_bytes(REPLY) + framing.reply_bytes(going_away.SerializeToString()))
        peer.close()
        unsent = await stream.ask(lambda: b"next", 30)
        assert answered.result().message.step_id == 7
        for each in (late, unsent):
            assert isinstance(each.exception(), Disconnected)
        with pytest.raises(Disconnected, match="the server is draining; open the step again"):
            await stream.ask(lambda: b"next", 30)

    run(test)


def test_whoever_is_interrupted_in_the_middle_of_a_message_ends_the_stream() -> None:
    async def test(stream: AsyncShmStream, peer: socket.socket) -> None:
        waiting = await stream.ask(lambda: b"first", 30)
        sending = asyncio.ensure_future(stream.ask(lambda: b"a" * (4 * MIB), 30))
        await asyncio.sleep(0.05)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert isinstance(waiting.exception(), Disconnected)
        assert not stream.is_open

    run(test)


def test_closing_lets_whoever_is_sending_go() -> None:
    async def test(stream: AsyncShmStream, peer: socket.socket) -> None:
        sending = asyncio.ensure_future(stream.ask(lambda: b"a" * (4 * MIB), 30))
        await asyncio.sleep(0.05)
        await stream.close()
        with pytest.raises(Disconnected, match="the session was closed"):
            await (await sending)

    run(test)


@pytest.mark.parametrize("num_asked", [0, 1])
def test_what_no_server_sends_ends_the_stream(num_asked: int) -> None:
    async def test(stream: AsyncShmStream, peer: socket.socket) -> None:
        waiting = [await stream.ask(lambda: b"first", 30) for _ in range(num_asked)]
        # Unasked, and then a reply like the one before, of which there was none.
        peer.send(framing.repeated_reply(0, 1, 0, 0, 0, 0) if num_asked else framing.reply_bytes(REPLY))
        while stream.is_open:
            await asyncio.sleep(0.01)
        assert all(isinstance(each.exception(), ServerFault) for each in waiting)

    run(test)


def test_the_end_of_the_socket_in_the_middle_of_a_message_disconnects() -> None:
    async def test(stream: AsyncShmStream, peer: socket.socket) -> None:
        waiting = await stream.ask(lambda: frames.step_request(step_pb2.Step(id=7)), 30)
        peer.send(framing.reply_bytes(REPLY)[:-1])
        await asyncio.sleep(0.05)
        assert not waiting.done()
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(Disconnected, match=r"no connection to the server at /somewhere/a\.sock: end of file"):
            await waiting

    run(test)


def test_a_plane_that_opens_after_its_task_was_cancelled_is_let_go_while_the_task_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = socket.socketpair()
    handshake = Handshake(one, Region(1, mmap.mmap(-1, 4096)), Lanes(4096, 16), "/somewhere/a.sock")
    has_begun, is_cancelled = threading.Event(), threading.Event()

    def shake_hands(*_: object) -> Handshake:
        has_begun.set()
        assert is_cancelled.wait(30)
        return handshake

    monkeypatch.setattr(aio_shm, "shake_hands", shake_hands)

    async def test() -> None:
        plane, config = plane_pb2.OpenPlaneResponse(), cache_pb2.CacheConfig()
        opening = asyncio.ensure_future(aio_shm.open_shm(plane, config, "", 30))
        while not has_begun.is_set():
            await asyncio.sleep(0.01)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        is_cancelled.set()
        while one.fileno() >= 0:
            await asyncio.sleep(0.01)
        assert opening.cancelled()  # and so it is still here, with the frame that waited for the handshake
        assert handshake.region.num_bytes == 0

    with other:
        asyncio.run(asyncio.wait_for(test(), 30))
