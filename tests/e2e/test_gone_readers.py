"""Clients that go while they are answered: the server ends what they asked for, and its log has no word of a fault."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import torch

import attnd
from attnd.planes.grpc import SERVICE
from attnd.protocol import frames, requests
from tests.servers import ServerProcess, wait_for

# A cache whose K and V are far more than one chunk, or one window of HTTP/2.
GEOMETRY = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 64, "num_pages": 2048, "page_size": 16, "dtype": "float32"}
NUM_SLOTS = 2048 * 16
NUM_HEADS = 512
DECODE = attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")
Q, K = torch.ones(1, NUM_HEADS, 64), torch.ones(1, 1, 64)
Begun = Callable[[grpc.Channel], Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    process = ServerProcess(tmp_path_factory.mktemp("gone") / "log", "--device", "cpu", "--threads", "1")
    yield process
    process.stop()


@pytest.fixture(scope="module")
def cache(server: ServerProcess) -> Iterator[attnd.Cache]:
    with attnd.connect(server.address) as client, client.create_cache(**GEOMETRY) as made:
        yield made


def read_kv(cache: attnd.Cache) -> Begun:
    """A call of ReadKv of the whole cache."""
    data = requests.read_kv(cache.ref, 0, torch.arange(NUM_SLOTS))
    return lambda channel: channel.unary_stream(SERVICE + "ReadKv")(data)


def store_kv(cache: attnd.Cache) -> Begun:
    """A call of StoreKv, whose chunks come without end."""
    k = torch.ones(1024, 1, 64)
    (data,) = requests.store_kv(cache.ref, 0, torch.arange(1024), k, k)

    def chunks() -> Iterator[bytes]:
        while True:
            yield data

    return lambda channel: channel.stream_stream(SERVICE + "StoreKv")(chunks())


def attend(cache: attnd.Cache) -> Begun:
    """A stream of Attend, whose calls come without end."""
    call = requests.attend_call(1, 0, Q, K, K, requests.DEFAULT_OPTIONS)

    def messages() -> Iterator[bytes]:
        yield frames.step_request(DECODE.to_message(1, cache.ref))
        while True:
            yield call

    return lambda channel: channel.stream_stream(SERVICE + "Attend")(messages())


def decode(cache: attnd.Cache) -> Begun:
    """Decode, whose answer comes at once."""
    data = requests.unary_call("decode", DECODE, cache.ref, 0, Q, K, K, requests.DEFAULT_OPTIONS)
    return lambda channel: channel.unary_unary(SERVICE + "Decode").future(data)


def create_cache(_: attnd.Cache) -> Begun:
    """CreateCache, which is refused."""
    return lambda channel: channel.unary_unary(SERVICE + "CreateCache").future(b"")


@pytest.mark.parametrize("way", ["cancel", "close"])
@pytest.mark.parametrize("kind", [read_kv, store_kv, attend, decode, create_cache])
def test_whoever_goes_while_it_is_answered_leaves_nothing(
    server: ServerProcess, cache: attnd.Cache, kind: Callable[[attnd.Cache], Begun], way: str
) -> None:
    begin, before = kind(cache), len(server.log)
    for number in range(40):
        with grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = begin(channel)
            time.sleep(number % 8 * 0.001)
            if way == "cancel":
                call.cancel()
    with attnd.connect(server.address) as client:
        wait_for(lambda: not client.status().sessions, "streams of those who have gone go on")
        assert len(client.list_caches()) == 1
    told = server.log[before:]
    faults = [word for word in ("internal error", "Traceback", "Unexpected") if word in told]
    assert not faults, told[:3000]
