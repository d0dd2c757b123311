"""What the RPCs of one principal hold in bytes, and who waits until less is held. For one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from weakref import WeakValueDictionary

from attnd.errors import Exhausted
from attnd_server.config import ServerConfig

# Bytes up to which a message or an answer is not counted: queues and streams bound how many of them there are.
SMALL_BYTES = 64 << 10
# Bytes of answers that the streams of a principal may have before one is written, and those up to which a stream that
# has none yet may begin one: a stream whose client does not read holds up itself first. One larger answer may be alone.
ANSWER_BYTES, MOST_ANSWER_BYTES = 64 << 20, 128 << 20
# Bytes of an answer that a stream which has none may begin in any case: its principal's others do not hold it up.
FREE_ANSWER_BYTES = 512 << 10
# Least bytes of messages that are read before more are; half of the largest message, if that is more.
MIN_MESSAGE_BYTES = 64 << 20
# RPCs of a principal that may wait for one of these; each holds a window of what was sent.
MAX_WAITING = 64


class Share:
    """What one principal's RPCs hold.

    Attributes:
        message_bytes: of messages that were read, and whose calls have not run yet.
        most_message_bytes: with which no more are read.
        answer_bytes: of answers that were begun, and are not written yet.
        checks: threads that it may have at one time for what takes long to check.
    """

    def __init__(self, config: ServerConfig, num_checks: int, max_unary: int) -> None:
        """It holds nothing.

        Args:
            config: the limits.
            num_checks: threads for checks.
            max_unary: RPCs with one request and one answer that may be under way.
        """
        self._num_unary, self._max_unary = 0, max_unary
        self.message_bytes = self.answer_bytes = 0
        self.checks = asyncio.Semaphore(num_checks)
        self.most_message_bytes = max(MIN_MESSAGE_BYTES, config.max_message_bytes // 2)
        self._waiting: list[asyncio.Future[None]] = []

    def reads_on(self) -> bool:
        """Whether more of its messages may be read."""
        return self.message_bytes < self.most_message_bytes

    def has_room(self, num_bytes: int, of_stream: int | None = None) -> bool:
        """Whether an answer of so many bytes may be begun, on a stream that has `of_stream` of them; None: on none."""
        total = self.answer_bytes + num_bytes
        if of_stream == 0 and num_bytes <= FREE_ANSWER_BYTES:
            return True
        if of_stream:
            return total <= ANSWER_BYTES
        return total <= MOST_ANSWER_BYTES or not self.answer_bytes

    async def until_it_reads_on(self) -> None:
        """Waits. Raises Exhausted if too many do."""
        while not self.reads_on():
            await self._wait()

    async def room(self, num_bytes: int) -> None:
        """Waits until an answer of so many bytes, of no stream, may be begun, and counts it. Raises likewise."""
        while not self.has_room(num_bytes):
            await self._wait()
        self.answer_bytes += num_bytes

    @asynccontextmanager
    async def answering(self, num_bytes: int) -> AsyncIterator[None]:
        """Waits until an answer of so many bytes may be begun, and counts it for as long as the context lasts."""
        while not self.has_room(num_bytes):
            await self.wait()
        self.answer_bytes += num_bytes
        try:
            yield
        finally:
            self.give_back_answer(num_bytes)

    @contextmanager
    def holding(self, num_bytes: int) -> Iterator[None]:
        """Counts a message that was read for as long as the context lasts."""
        num_bytes = self.take_message(num_bytes)
        try:
            yield
        finally:
            if num_bytes:
                self.give_back_message(num_bytes)

    def let_go(self, num_bytes: int, answer: object) -> None:
        """Gives back a message with its answer, if that is yet to come."""
        if isinstance(answer, asyncio.Future):
            answer.add_done_callback(lambda _: self.give_back_message(num_bytes))
        else:
            self.give_back_message(num_bytes)

    def begin_unary(self) -> None:
        """One more RPC with one request and one answer.

        Raises:
            Exhausted: as many are under way as may be, their answers not taken.
        """
        if self._num_unary >= self._max_unary:
            use = f"{self._num_unary} RPCs of this principal are under way or were not read"
            raise Exhausted(f"{use}, but there may be at most {self._max_unary}: come again", retry_after_s=0.1)
        self._num_unary += 1

    def finish_unary(self, _: object) -> None:
        """One has ended."""
        self._num_unary -= 1

    async def wait(self) -> None:
        """Waits until something is given back. For streams, of which there are only so many."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    def take_message(self, num_bytes: int) -> int:
        """Counts a message that was read; returns what was counted, to be given back."""
        if num_bytes <= SMALL_BYTES:
            return 0
        self.message_bytes += num_bytes
        return num_bytes

    def give_back_message(self, num_bytes: int) -> None:
        """A message is needed no more."""
        self.message_bytes -= num_bytes
        self._wake()

    def give_back_answer(self, num_bytes: int) -> None:
        """An answer was written, or will never be."""
        self.answer_bytes -= num_bytes
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if not each.done():
                each.set_result(None)

    async def _wait(self) -> None:
        if sum(not each.done() for each in self._waiting) >= MAX_WAITING:
            use = f"messages and answers of this principal hold {self.message_bytes + self.answer_bytes} bytes"
            raise Exhausted(f"{use}, and {MAX_WAITING} RPCs wait until they are less: come again", retry_after_s=0.1)
        await self.wait()


class Shares:
    """The shares of those who have RPCs under way."""

    def __init__(self, config: ServerConfig, num_checks: int, max_unary: int) -> None:
        """Nobody has any. The arguments are those of a share."""
        self._arguments = config, num_checks, max_unary
        self._shares: WeakValueDictionary[str, Share] = WeakValueDictionary()
        self._last: Share | None = None  # so that whoever calls again and again gets the same one

    def of(self, principal: str) -> Share:
        """A principal's, which lasts as long as somebody has it."""
        share = self._shares.get(principal)
        if share is None:
            share = self._last = self._shares[principal] = Share(*self._arguments)
        return share
