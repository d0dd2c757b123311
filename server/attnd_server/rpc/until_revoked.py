"""The end of a stream whose principal's token has gone, whatever the stream waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from attnd_server.identity import OpenByToken, refuse_if_revoked

# Seconds for telling a client why its stream ends. One that reads nothing is not waited for.
TELL_S = 5.0


@contextmanager
def until_revoked(opened: OpenByToken, principal: str) -> Iterator[None]:
    """For as long as a stream lasts, on its task.

    Raises:
        Unauthenticated: from whatever the task waits for, a while after the token has gone.
    """
    task, ended = asyncio.current_task(), asyncio.Event()

    def end() -> None:
        ended.set()
        if task is not None:
            task.cancel()

    with opened.held(principal, end):
        try:
            yield
        except asyncio.CancelledError:
            if ended.is_set():
                refuse_if_revoked(principal)
            raise
