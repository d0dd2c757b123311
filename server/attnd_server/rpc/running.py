"""Work of an RPC on the executor, whose answer a coroutine waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from attnd_server.execution.executor import Executor
from attnd_server.execution.step import Call
from attnd_server.execution.work import Work


def start_on(
    executor: Executor, work: Work, timeout_s: float | None = None, is_wanted: Callable[[], bool] | None = None
) -> asyncio.Future[bytes]:
    """Queues `work` for the executor, unless the future is cancelled before its turn: what it will give.

    gRPC cancels whoever waits when the client cancels the RPC, its connection ends or its deadline passes.
    Raises what `Executor.submit` raises.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[bytes] = loop.create_future()

    def done(result: bytes | None, error: BaseException | None) -> None:
        loop.call_soon_threadsafe(settle, future, result, error)

    def cancel_if_cancelled(future: asyncio.Future[bytes]) -> None:
        if future.cancelled():
            executor.cancel(job)

    job = executor.submit(work, done, timeout_s, is_wanted)
    future.add_done_callback(cancel_if_cancelled)
    return future


def settle(future: asyncio.Future[Any], result: bytes | None, error: BaseException | None) -> None:
    """Gives a future what came of some work, unless whoever waited is gone. In the event loop."""
    if future.done():
        return
    if error is None:
        future.set_result(result or b"")
    else:
        future.set_exception(error)


def soonest(context: Any, work: Work) -> float | None:
    """Seconds within which work must have started: those that its RPC has left or its call allows; None is forever."""
    left_s, timeout_s = context.time_remaining(), work.step.call_timeout_s if isinstance(work, Call) else None
    return min((each for each in (left_s, timeout_s) if each is not None), default=None)
