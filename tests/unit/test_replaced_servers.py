"""What a client knows of a server's features is known of one life of the server, and asked anew of the next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

import attnd
import attnd.aio
from attnd.errors import Unsupported
from attnd.protocol.features import KNOWN
from attnd.v1 import cache_pb2, capabilities_pb2
from tests.released.calls import settled

GEOMETRY: dict[str, Any] = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "num_pages": 4, "renew": False}
STEP = {"query_lens": [1], "context_lens": [0], "page_tables": [[0]]}


@dataclass
class Stream:
    """Takes what is sent."""

    sent: list[bytes] = field(default_factory=list)
    plane = "inline"
    is_open = True
    going_away = ""
    lost = None

    def step_request(self, step: Any) -> bytes:
        return bytes(step.SerializeToString())

    def send(self, request: bytes) -> None:
        self.sent.append(request)

    async def ask(self, request: Callable[[], bytes], timeout_s: float) -> asyncio.Future[Any]:
        self.sent.append(request())
        return asyncio.get_running_loop().create_future()


@dataclass
class Servers:
    """One address, at which one server after the other is.

    Attributes:
        features: of the server that is there.
        epoch: its.
        asked: names of the RPCs that came.
        replaced_at: of what RPC's coming another server, without features, takes the place.
        stream: of sessions.
    """

    features: frozenset[Any] = KNOWN
    epoch: int = 1
    asked: list[str] = field(default_factory=list)
    replaced_at: str = ""
    stream: Stream = field(default_factory=Stream)

    def replace(self, features: frozenset[Any]) -> None:
        """By a server that has these."""
        self.features, self.epoch = features, self.epoch + 1

    def unary(self, method: str, request: bytes, timeout_s: float, wait: bool = False) -> bytes:
        self.asked.append(method)
        if method == self.replaced_at:
            self.replace(frozenset())
        if method == "GetCapabilities":
            version = "0.2.0" if self.features else "0.1.0"
            told = capabilities_pb2.GetCapabilitiesResponse(version=version, epoch=self.epoch, features=self.features)
            return told.SerializeToString()
        info = cache_pb2.CacheInfo(cache=cache_pb2.CacheRef(id=bytes(16), epoch=self.epoch))
        responses = {
            "CreateCache": cache_pb2.CreateCacheResponse(cache=info),
            "AdoptCache": cache_pb2.AdoptCacheResponse(cache=info),
            "DeleteCache": cache_pb2.DeleteCacheResponse(),
        }
        return responses[method].SerializeToString()

    def attend(self) -> Any:
        return self.stream

    def may_close(self) -> bool:
        return True

    def close(self) -> None:
        pass


class AsyncServers:
    """The same for asyncio."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._servers, name)

    async def unary(self, *args: Any, **kwargs: Any) -> bytes:
        return self._servers.unary(*args, **kwargs)


Client = Callable[[Servers], Any]


@pytest.fixture(params=["sync", "aio"])
def client_of(request: pytest.FixtureRequest) -> Client:
    if request.param == "sync":
        return lambda servers: attnd.Client(servers, plane="inline")
    return lambda servers: attnd.aio.AsyncClient(AsyncServers(servers), plane="inline")  # type: ignore[arg-type]


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


async def store_first(cache: Any) -> None:
    await settled(cache.session().step(attnd.StepMetadata(**STEP, store_first=True)))


def test_a_server_is_asked_once(client_of: Client) -> None:
    servers = Servers()

    async def test() -> None:
        client = client_of(servers)
        await settled(client.capabilities())
        for _ in range(2):
            await store_first(await settled(client.create_cache(**GEOMETRY)))
        assert servers.asked == ["GetCapabilities", "CreateCache", "CreateCache"]
        assert len(servers.stream.sent) == 2

    run(test)


def test_a_client_that_has_not_asked_asks(client_of: Client) -> None:
    servers = Servers(features=frozenset())

    async def test() -> None:
        cache = await settled(client_of(servers).create_cache(**GEOMETRY))
        with pytest.raises(Unsupported, match=r"of version 0\.1\.0, which has no store-first steps"):
            await store_first(cache)
        assert servers.stream.sent == []

    run(test)


def test_an_older_server_is_known_once_it_has_the_cache(client_of: Client) -> None:
    servers = Servers()

    async def test() -> None:
        client = client_of(servers)
        cache = await settled(client.create_cache(**GEOMETRY))
        session = cache.session()
        await settled(session.step(attnd.StepMetadata(**STEP, store_first=True)))
        servers.replace(frozenset())
        await settled(cache.adopt())
        with pytest.raises(Unsupported, match="store-first"):  # on a stream that may not know of its end
            await settled(session.step(attnd.StepMetadata(**STEP, store_first=True)))
        await settled(session.step(attnd.StepMetadata(**STEP)))
        assert len(servers.stream.sent) == 2

    run(test)


def test_a_later_server_is_known_once_it_has_the_cache(client_of: Client) -> None:
    servers = Servers(features=frozenset())

    async def test() -> None:
        client = client_of(servers)
        cache = await settled(client.create_cache(**GEOMETRY))
        with pytest.raises(Unsupported):
            await store_first(cache)
        servers.replace(KNOWN)
        await settled(cache.adopt())
        await store_first(cache)
        assert len(servers.stream.sent) == 1

    run(test)


def test_each_cache_is_of_one_life_of_the_server(client_of: Client) -> None:
    servers = Servers()

    async def test() -> None:
        client = client_of(servers)
        earlier = await settled(client.create_cache(**GEOMETRY))
        servers.replace(frozenset())
        later = await settled(client.create_cache(**GEOMETRY))
        await store_first(earlier)  # which any server of another epoch refuses
        with pytest.raises(Unsupported):
            await store_first(later)

    run(test)


def test_a_new_cache_is_not_asked_of_an_older_server(client_of: Client) -> None:
    servers = Servers()

    async def test() -> None:
        client = client_of(servers)
        await settled(client.capabilities())
        servers.replace(frozenset())
        with pytest.raises(Unsupported, match=r"^v_dtype is given, but the server is of version 0\.1\.0"):
            await settled(client.create_cache(**GEOMETRY, v_dtype="float8_e4m3fn"))
        assert servers.asked == ["GetCapabilities", "GetCapabilities"]
        servers.replace(KNOWN)
        assert (await settled(client.create_cache(**GEOMETRY, v_dtype="float8_e4m3fn"))).missing is None

    run(test)


def test_a_cache_that_an_older_server_made_of_a_part_of_the_request_is_deleted(client_of: Client) -> None:
    servers = Servers(replaced_at="CreateCache")

    async def test() -> None:
        with pytest.raises(Unsupported, match="v_dtype is given"):
            await settled(client_of(servers).create_cache(**GEOMETRY, v_dtype="float8_e4m3fn"))
        assert servers.asked == ["GetCapabilities", "CreateCache", "GetCapabilities", "DeleteCache"]

    run(test)
