"""The answers of one stream in the order of its requests, while later requests are read and wait for the executor."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from attnd.protocol.requests import MAX_CALLS_UNDER_WAY


class ReplyOrder:
    """Writes answers, each when it is there and all before it were written.

    While nothing is under way an answer that is there is written by whoever puts it, and no other task is woken. Put,
    finish and close are for one task.

    Attributes:
        waiting: answers that were put and are not written yet; while there are none, others may write.
    """

    def __init__(self, write: Callable[[bytes], Awaitable[None]], told: Callable[[Exception], bytes]) -> None:
        """Nothing is under way.

        Args:
            write: sends an answer.
            told: the answer that tells of an error.
        """
        self._write = write
        self._told = told
        self.waiting: deque[bytes | asyncio.Future[bytes]] = deque()
        self._places = asyncio.Semaphore(MAX_CALLS_UNDER_WAY)
        self._writer: asyncio.Task[None] | None = None

    async def put(self, answer: bytes | asyncio.Future[bytes]) -> None:
        """Takes the next answer, or what will be it. Waits only while as many are under way as may be.

        Raises:
            Exception: what `write` raised, of this or of an earlier answer.
        """
        if not self.waiting and isinstance(answer, bytes):
            await self._write(answer)
            return
        await self._places.acquire()
        self.waiting.append(answer)
        if self._writer is None or self._writer.done():
            await self.finish()
            self._writer = asyncio.ensure_future(self._write_waiting())

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

    async def _write_waiting(self) -> None:
        while self.waiting:
            answer = self.waiting[0]
            try:
                await self._write(answer if isinstance(answer, bytes) else await self._outcome(answer))
            finally:
                self._places.release()  # also if that failed: whoever puts the next answer learns it
            self.waiting.popleft()

    async def _outcome(self, answer: asyncio.Future[bytes]) -> bytes:
        try:
            return await answer
        except Exception as error:
            return self._told(error)
