"""A token is replaced by another of the same principal: whoever gives the new one goes on, in both clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import attnd
from attnd.aio.transport import HIDDEN, AsyncTransport
from attnd_server.identity.tokens import add_token
from tests.dying import GEOMETRY
from tests.interrupted import ONE_TOKEN, some_v
from tests.servers import ServerProcess, wait_for

PLANES = ("inline", "shm")


class Rotating:
    """A server and the token of one principal, which may be replaced."""

    def __init__(self, server: ServerProcess, path: Path) -> None:
        self.server = server
        self.path = path
        self.token = add_token(str(path), "alice")

    def credentials(self) -> attnd.Credentials:
        """Give the token of now."""
        return attnd.Credentials(lambda: self.token, tls=False)

    def knows(self, token: str) -> bool:
        try:
            attnd.connect(self.server.address, credentials=attnd.Credentials(token, tls=False)).close()
        except attnd.Unauthenticated:
            return False
        return True

    def rotate(self) -> None:
        """Replaces the token; returns when the server has noticed."""
        old = self.token
        self.path.write_text("")
        self.token = add_token(str(self.path), "alice")
        wait_for(lambda: self.knows(self.token) and not self.knows(old), "the server does not read its tokens")

    def remove(self) -> None:
        """Takes the token out, and there is no other."""
        self.path.write_text("alice sha256:" + 64 * "0" + "\n")
        wait_for(lambda: not self.knows(self.token), "the server does not read its tokens")


@pytest.fixture
def rotating(tmp_path: Path) -> Iterator[Rotating]:
    path = tmp_path / "tokens"
    add_token(str(path), "alice")
    options = ("--device", "cpu", "--socket-dir", str(tmp_path), "--tokens", str(path))
    with ServerProcess(tmp_path / "log", *options) as server:
        it = Rotating(server, path)
        wait_for(lambda: it.knows(it.token), "a new token is not known")
        yield it


def attends(session: attnd.Session) -> None:
    v = some_v()
    np.testing.assert_array_equal(session.step(ONE_TOKEN).attend(0, v, v, v), v)


@pytest.mark.parametrize("plane", PLANES)
def test_a_session_opens_with_the_new_token(rotating: Rotating, plane: str) -> None:
    with attnd.connect(rotating.server.address, plane=plane, credentials=rotating.credentials()) as client:
        with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
            for _ in range(2):
                v = some_v()
                step = session.step(ONE_TOKEN)
                np.testing.assert_array_equal(step.attend(0, v, v, v), v)
                rotating.rotate()
                with pytest.raises((attnd.Unauthenticated, attnd.Disconnected)):
                    step.attend(1, v, v, v)  # the step is over, and told so once
                attends(session)
                cache.store_kv(0, [0], v, v)
                np.testing.assert_array_equal(cache.read_kv(0, [0], v)[0], v)
            rotating.remove()
            for _ in range(2):  # again and again, and each time at once
                with pytest.raises(attnd.Unauthenticated):
                    attends(session)
                with pytest.raises(attnd.Unauthenticated):
                    cache.info()
            rotating.rotate()
            attends(session)


def test_a_lease_outlives_the_token_with_which_it_was_taken(rotating: Rotating) -> None:
    with attnd.connect(rotating.server.address, credentials=rotating.credentials()) as client:
        with client.create_cache(**GEOMETRY, ttl_s=3.0) as cache:
            rotating.rotate()
            threading.Event().wait(5.0)
            cache.info()


def test_a_unary_call_whose_token_goes_meanwhile_is_sent_again_once(rotating: Rotating) -> None:
    gone = "a-token-that-was-good-until-now"
    good = rotating.token
    for left, is_fine in (([gone, good], True), ([gone, gone], False), ([gone, "neither-is-this", good], False)):
        with attnd.connect(rotating.server.address, credentials=rotating.credentials()) as client:
            client.transport._metadata = attnd.Credentials(lambda left=left: left.pop(0), tls=False).metadata  # type: ignore[attr-defined]
            if is_fine:
                assert client.list_caches() == []
            else:
                with pytest.raises(attnd.Unauthenticated):
                    client.list_caches()


def test_a_refusal_that_grpc_hides_is_asked_for(rotating: Rotating) -> None:
    """A message that is sent between the refusal and its coming: grpc.aio has a status of its own for it."""
    hidden = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), HIDDEN)
    other = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), "another")

    async def run() -> None:
        address = rotating.server.address
        for token, reason in ((rotating.token, attnd.Disconnected), ("not-this-one", attnd.Unauthenticated)):
            transport = AsyncTransport(address, attnd.Credentials(token, tls=False))
            assert type(await transport._told(hidden)) is reason
            assert type(await transport._told(other)) is attnd.Disconnected
            await transport.close()

    asyncio.run(run())


@pytest.mark.parametrize("plane", PLANES)
def test_an_asyncio_session_opens_with_the_new_token(rotating: Rotating, plane: str) -> None:
    async def attended(session: Any) -> None:
        v = some_v()
        step = await session.step(ONE_TOKEN)
        np.testing.assert_array_equal(await step.attend(0, v, v, v), v)

    async def run() -> None:
        credentials = rotating.credentials()
        async with await attnd.aio.connect(rotating.server.address, plane=plane, credentials=credentials) as client:
            async with await client.create_cache(**GEOMETRY, ttl_s=5.0) as cache, cache.session() as session:
                v = some_v()
                step = await session.step(ONE_TOKEN)
                np.testing.assert_array_equal(await step.attend(0, v, v, v), v)
                await asyncio.to_thread(rotating.rotate)
                with pytest.raises((attnd.Unauthenticated, attnd.Disconnected)):
                    await step.attend(1, v, v, v)
                await attended(session)
                await cache.store_kv(0, [0], v, v)
                await asyncio.to_thread(rotating.remove)
                for _ in range(2):
                    with pytest.raises(attnd.Unauthenticated):
                        await attended(session)
                await asyncio.to_thread(rotating.rotate)
                await attended(session)

    asyncio.run(run())
