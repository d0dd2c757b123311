"""The asyncio client's end of the shm plane: `attnd.planes.shm.stream`, awaited."""

from __future__ import annotations

import asyncio
import socket
import weakref

from attnd.aio.homes import Home
from attnd.aio.streams import AsyncStream
from attnd.errors import AttndError, DeadlineExceeded, Disconnected
from attnd.planes.shm.messages import ShmMessages
from attnd.planes.shm.stream import Handshake, hung_up, shake_hands
from attnd.protocol.shm import framing
from attnd.v1 import cache_pb2, plane_pb2


async def open_shm(
    plane: plane_pb2.OpenPlaneResponse, config: cache_pb2.CacheConfig, socket_dir: str, timeout_s: float
) -> AsyncShmStream:
    """A stream over a plane that OpenPlane gave. Arguments and errors as `attnd.planes.shm.stream.shake_hands`."""
    # In a thread: it waits for the server, and passes a descriptor, which event loops do not.
    shaking = asyncio.ensure_future(asyncio.to_thread(shake_hands, plane, config, socket_dir, timeout_s))
    try:
        return AsyncShmStream(await asyncio.shield(shaking), timeout_s)
    except asyncio.CancelledError:
        shaking.add_done_callback(_close_unused)  # whoever was interrupted may keep this frame for long
        raise


def _close_unused(shaking: asyncio.Future[Handshake]) -> None:
    if not shaking.cancelled() and shaking.exception() is None:
        shaking.result().close()


class AsyncShmStream(ShmMessages, AsyncStream):
    """Calls in lanes of their own. Beyond these, or where the region has no room left, they wait for answers."""

    plane = "shm"

    def __init__(self, handshake: Handshake, timeout_s: float) -> None:
        """Owns the connection, and has the running event loop read from it.

        Args:
            handshake: what was opened.
            timeout_s: how long a message may take to be sent.
        """
        ShmMessages.__init__(self, handshake.region, handshake.lanes)
        AsyncStream.__init__(self)
        self._connection = handshake.connection
        self._connection.setblocking(False)
        self._path = handshake.path
        self._timeout_s = timeout_s
        self._replies = framing.Replies(self._connection)
        self._writable: asyncio.Future[None] | None = None  # of a message that went out in part
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._connection, _read, weakref.ref(self))
        weakref.finalize(self, _let_go, self._connection, self._loop, self._home).atexit = False

    def read(self) -> None:
        """Takes what has come."""
        try:
            while self.is_open:
                reply = self._replies.receive()
                if reply is None:
                    raise hung_up(self._path, "end of file")
                self._answered(self.answer(reply))
        except AttndError as error:
            self._end(error)
        except BlockingIOError:
            pass  # that was all
        except OSError as error:
            self._end(hung_up(self._path, error))

    async def _send(self, data: bytes) -> None:
        self.sent()  # now: the answer may come before this task goes on
        left = memoryview(data)
        try:
            while self.is_open:
                try:
                    left = left[self._connection.send(left) :]
                except BlockingIOError:
                    pass
                if not left:
                    return
                await self._until_writable()
        except AttndError as error:
            self._end(error)
            raise
        except OSError as error:
            self.read()  # what came before the server hung up
            self._end(hung_up(self._path, error))
        except BaseException:
            self._end(Disconnected("a message went out in part, and whoever sent it was interrupted"))
            raise

    async def _until_writable(self) -> None:
        writable = self._writable = self._loop.create_future()
        self._loop.add_writer(self._connection, _done, writable)
        try:
            await asyncio.wait_for(writable, self._timeout_s)
        except asyncio.TimeoutError:
            raise DeadlineExceeded(f"the server took no message within {self._timeout_s:g} s") from None
        finally:
            self._writable = None
            if self.is_open:
                self._loop.remove_writer(self._connection)

    def _end(self, error: AttndError) -> None:
        if self.is_open and self._home.is_here:  # else the loop's selector is the parent's too
            self._loop.remove_reader(self._connection)
            self._loop.remove_writer(self._connection)
            self._connection.close()
            self.forget()  # steps that somebody keeps hold this object
        if self._writable is not None:
            _done(self._writable)
        super()._end(error)


def _read(reference: weakref.ref[AsyncShmStream]) -> None:
    """What came for a stream, if somebody has it."""
    stream = reference()
    if stream is not None:
        stream.read()


def _let_go(connection: socket.socket, loop: asyncio.AbstractEventLoop, home: Home) -> None:
    """Ends the plane of a stream that nobody has any more, from any thread."""
    if not home.is_here or loop.is_closed():
        connection.close()
    elif connection.fileno() >= 0:
        loop.call_soon_threadsafe(_close, connection, loop)


def _close(connection: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
    loop.remove_reader(connection)
    loop.remove_writer(connection)
    connection.close()


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
