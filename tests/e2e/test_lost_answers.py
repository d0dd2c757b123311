"""Requests whose answers are lost: sent again by the clients, or by hand, they do nothing twice."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

import attnd
from attnd.protocol import frames
from attnd.protocol.cache_spec import CacheSpec
from attnd.v1 import cache_pb2
from tests import raw_http2

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
Q, K, V = torch.ones(1, 2, 16), torch.ones(1, 2, 16), torch.ones(1, 2, 16)
DECODE = attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")


class Wire:
    """Passes bytes between clients and a server, and cuts a connection instead when it is told to.

    Attributes:
        address: where clients connect.
        num_cuts: connections that were cut.
    """

    def __init__(self, server_address: str) -> None:
        host, _, port = server_address.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_cuts = 0
        self._cuts_next = False
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_before_the_next_answer(self) -> None:
        """The server gets the next request, and its client no answer."""
        self._cuts_next = True

    def close(self) -> None:
        end(self._listener)
        for each in self._ends:
            end(each)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            self._ends += [client, server]
            threading.Thread(target=self._pass_on, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(server, client, True), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        frames = raw_http2.Frames()
        try:
            while data := source.recv(1 << 16):
                if frames.hold_an_answer(data) and is_answer and self._cuts_next:
                    self._cuts_next = False
                    self.num_cuts += 1
                    break
                target.sendall(data)
        except OSError:
            pass  # the other direction has ended
        end(source)
        end(target)


def end(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it has ended already
    connection.close()


@pytest.fixture
def cutting(server_address: str) -> Iterator[Wire]:
    proxy = Wire(server_address)
    yield proxy
    proxy.close()


def names(client: attnd.Client) -> list[str]:
    return [info.name for info in client.list_caches()]


def test_the_client_sends_again_what_was_lost_and_nothing_is_done_twice(client: attnd.Client, cutting: Wire) -> None:
    with attnd.connect(cutting.address, plane="inline") as through:

        def cut(call: Callable[[], object]) -> object:
            before = cutting.num_cuts
            cutting.cut_before_the_next_answer()
            result = call()
            assert cutting.num_cuts == before + 1
            return result

        cache = cut(lambda: through.create_cache(**GEOMETRY, name="created once"))
        assert isinstance(cache, attnd.Cache)
        assert names(client).count("created once") == 1
        for context_len in (0, 0, 1):
            metadata = attnd.StepMetadata([1], [context_len], [[0]], [context_len], kind="decode")
            output = cut(lambda metadata=metadata: through.decode(cache, metadata, 0, Q, K, V))  # type: ignore[misc]
            assert torch.equal(output, V)  # type: ignore[arg-type]
        cut(lambda: cache.copy_pages([0], [3]))
        assert torch.equal(cache.read_kv(0, [12, 13], like=K)[0], torch.cat([K, K]))
        cut(cache.renew)
        assert "created once" in cut(lambda: names(through))  # type: ignore[operator]
        cut(cache.delete)  # the second time it is gone, which is what was wanted
        assert "created once" not in names(client)
        with pytest.raises(attnd.CacheLost):
            cache.delete()


def test_in_asyncio_too(client: attnd.Client, cutting: Wire) -> None:
    async def run() -> None:
        async with await attnd.aio.connect(cutting.address, plane="inline") as through:
            cutting.cut_before_the_next_answer()
            cache = await through.create_cache(**GEOMETRY, name="created once")
            assert names(client).count("created once") == 1
            cutting.cut_before_the_next_answer()
            assert torch.equal(await through.decode(cache, DECODE, 0, Q, K, V), V)
            cutting.cut_before_the_next_answer()
            await cache.delete()
            assert "created once" not in names(client)
            assert cutting.num_cuts == 3

    asyncio.run(run())


def test_a_step_whose_answer_was_lost_is_opened_again_on_a_new_stream(cutting: Wire) -> None:
    behind = attnd.StepMetadata([1], [1], [[0]], [1], kind="decode")
    with attnd.connect(cutting.address, plane="inline") as through, through.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            assert torch.equal(session.step(DECODE).attend(1, Q, K, V), V)
            step = session.step(behind)
            step.attend(0, Q, K, V)
            cutting.cut_before_the_next_answer()
            with pytest.raises(attnd.Disconnected):
                step.attend(1, Q, 3 * K, 3 * V)  # it was stored, but nobody knows
            with pytest.raises(attnd.Disconnected, match="open the step again"):
                step.attend(1, Q, 3 * K, 3 * V)
            first, second = (opened_again(session, behind, Q, 3 * K, 3 * V) for _ in range(2))
            assert torch.equal(first, second)
            assert torch.equal(cache.read_kv(1, [0, 1], like=V)[1], torch.cat([V, 3 * V]))


def opened_again(
    session: attnd.Session, metadata: attnd.StepMetadata, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """What a caller does after Disconnected; gRPC may not have seen yet that the connection is gone for all streams."""
    for _ in range(20):
        try:
            output: torch.Tensor = session.step(metadata).attend(1, q, k, v)
        except attnd.Disconnected:
            time.sleep(0.05)
        else:
            return output
    raise AssertionError("there is no connection again")


def test_store_kv_sent_twice_stores_the_same(client: attnd.Client) -> None:
    with client.create_cache(**GEOMETRY) as cache:
        k, v = torch.randn(3, 2, 16), torch.randn(3, 2, 16)
        for _ in range(2):
            assert cache.store_kv(1, [4, 9, 2], k, v) == 3
            read_k, read_v = cache.read_kv(1, [4, 9, 2], like=k)
            assert torch.equal(read_k, k)
            assert torch.equal(read_v, v)
        assert cache.info().num_pages_written == 3


def test_create_cache_sent_twice_makes_one_cache_and_delete_cache_sent_twice_is_done(server_address: str) -> None:
    with attnd.connect(server_address) as client:
        request = CacheSpec(**GEOMETRY, name="sent twice").to_request()
        answers = [client.transport.unary("CreateCache", request, 30) for _ in range(2)]
        one, other = (frames.parse(cache_pb2.CreateCacheResponse, data).cache for data in answers)
        assert one.cache == other.cache
        assert [info.name for info in client.list_caches()].count("sent twice") == 1
        deletion = cache_pb2.DeleteCacheRequest(cache=one.cache).SerializeToString()
        client.transport.unary("DeleteCache", deletion, 30)
        with pytest.raises(attnd.CacheLost):  # which means done to whoever has sent it before
            client.transport.unary("DeleteCache", deletion, 30)
