"""The answers of one stream in the order of its requests, while later requests are read and wait for the executor."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from attnd.protocol.requests import MAX_CALLS_UNDER_WAY
from attnd_server.rpc.shares import Share


class ReplyOrder:
    """Writes answers, each when it is there and all before it were written.

    While nothing is under way an answer that is there is written by whoever puts it, and no other task is woken. Put,
    finish and close are for one task.

    Attributes:
        waiting: answers that were put and are not written yet; while there are none, others may write.
        num_bytes: of the large ones among the stream's answers that are under way or not written yet.
    """

    def __init__(
        self,
        write: Callable[[bytes], Awaitable[None]],
        told: Callable[[Exception], bytes],
        share: Share | None = None,
    ) -> None:
        """Nothing is under way.

        Args:
            write: sends an answer.
            told: the answer that tells of an error.
            share: of the stream's principal, in which large answers count; None: in none.
        """
        self._write = write
        self._told = told
        self._share = share
        self.waiting: deque[bytes | asyncio.Future[bytes]] = deque()
        self.num_bytes = 0
        self._large: deque[tuple[object, int]] = deque()  # of `waiting`, in its order
        self._places = asyncio.Semaphore(MAX_CALLS_UNDER_WAY)
        self._writer: asyncio.Task[None] | None = None

    async def put(self, answer: bytes | asyncio.Future[bytes], num_bytes: int = 0) -> None:
        """Takes the next answer, or what will be it. Waits only while as many are under way as may be.

        Args:
            answer: the next one.
            num_bytes: for which there was `room`; 0: it is none of the large ones.

        Raises:
            Exception: what `write` raised, of this or of an earlier answer.
        """
        if not self.waiting and isinstance(answer, bytes):
            await self._write(answer)
            self._written(num_bytes)
            return
        await self._places.acquire()
        self.waiting.append(answer)
        if num_bytes:
            self._large.append((answer, num_bytes))
        if self._writer is None or self._writer.done():
            await self.finish()
            self._writer = asyncio.ensure_future(self._write_waiting())

    async def room(self, num_bytes: int) -> None:
        """Waits until an answer of so many bytes may be begun, and counts it until it is written."""
        if self._share is not None:
            while not self._share.has_room(num_bytes, self.num_bytes):
                await self._share.wait()
            self._share.answer_bytes += num_bytes
        self.num_bytes += num_bytes

    async def finish(self) -> None:
        """Waits until everything was written. Raises what `write` raised."""
        if self._writer is not None:
            await self._writer

    def close(self) -> None:
        """Gives up what was not written: nobody reads it any more."""
        if self._writer is not None and not self._writer.cancel() and not self._writer.cancelled():
            self._writer.exception()  # whoever put the last answer has gone too
        for answer in self.waiting:
            if not isinstance(answer, bytes):
                answer.cancel()
        self.waiting.clear()
        self._written(self.num_bytes)

    async def _write_waiting(self) -> None:
        while self.waiting:
            answer = self.waiting[0]
            try:
                await self._write(answer if isinstance(answer, bytes) else await self._outcome(answer))
            finally:
                self._places.release()  # also if that failed: whoever puts the next answer learns it
            self.waiting.popleft()
            if self._large and self._large[0][0] is answer:
                self._written(self._large.popleft()[1])

    def _written(self, num_bytes: int) -> None:
        if num_bytes and self._share is not None:
            self._share.give_back_answer(num_bytes)
        self.num_bytes -= num_bytes

    async def _outcome(self, answer: asyncio.Future[bytes]) -> bytes:
        try:
            return await answer
        except Exception as error:
            return self._told(error)
