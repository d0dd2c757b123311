"""A server on a thread of this process, so that a test can look into it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from attnd_server.app import Server
from attnd_server.config import ServerConfig


@contextmanager
def server_thread(config: ServerConfig) -> Iterator[tuple[Server, asyncio.AbstractEventLoop]]:
    """The server, and its event loop, which runs on the thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = Server(config)
    asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result(60)
    try:
        yield server, loop
    finally:
        asyncio.run_coroutine_threadsafe(server.__aexit__(None, None, None), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
