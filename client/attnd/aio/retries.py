"""Sending a request again, for as long as `attnd.planes.retry_deadline` allows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from attnd.errors import AttndError, Disconnected
from attnd.planes.retry_deadline import RECONNECT_PAUSE_S, RetryDeadline

Result = TypeVar("Result")


async def retried(send: Callable[[float], Awaitable[Result]], timeout_s: float, gone: Result | None = None) -> Result:
    """What `send` gives, called again where that is safe and of use, while the time lasts.

    Args:
        send: sends the request and waits for its answer, for as many seconds as it is given.
        timeout_s: seconds for all of it.
        gone: of a deletion, what to give when there is nothing left to delete the second time; None: it is none.
    """
    deadline = RetryDeadline(timeout_s, is_delete=gone is not None)
    left_s = timeout_s
    while True:
        try:
            return await send(left_s)
        except AttndError as error:
            if gone is not None and deadline.is_done(error):
                return gone
            pause_s = deadline.pause_s(error)
            if pause_s is None:
                raise
        await asyncio.sleep(pause_s)
        left_s = deadline.left_s


async def until_answered(send: Callable[[float], Awaitable[Result]], timeout_s: float) -> Result:
    """What `send` gives, called again while the time lasts if the connection broke: a server that ends ends calls too.

    Args:
        send: waits for a server, and for its answer, for as many seconds as it is given. May be done twice.
        timeout_s: seconds for all of it.

    Raises:
        Disconnected: there was no answer in time.
    """
    deadline, left_s = RetryDeadline(timeout_s), timeout_s
    while True:
        try:
            return await send(left_s)
        except Disconnected as error:
            if error.is_final or deadline.left_s <= RECONNECT_PAUSE_S:
                raise
        await asyncio.sleep(RECONNECT_PAUSE_S)
        left_s = deadline.left_s
