"""Which thread a call runs on: a small one of a lone caller at once, on the event loop; any other on the executor's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

import attnd
from attnd_server.app import Server
from attnd_server.config import ServerConfig
from attnd_server.execution.runner import Runner
from attnd_server.execution.work import Work
from tests.server_thread import server_thread

GEOMETRY = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
DECODE = attnd.StepMetadata([1], [5], [[1, 2]], [9], kind="decode")
PREFILL = attnd.StepMetadata([2], [0], [[1]], [4, 5])


@pytest.fixture
def server() -> Iterator[Server]:
    with server_thread(ServerConfig(port=0, device="cpu")) as (running, _):
        yield running


@pytest.fixture
def ran_on(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that calls ran on."""
    names: list[str] = []

    def noting(name: str) -> None:
        run: Callable[..., object] = getattr(Runner, name)

        def noted(self: Runner, work: Work, *rest: object, **named: object) -> object:
            names.append(threading.current_thread().name)
            return run(self, work, *rest, **named)

        monkeypatch.setattr(Runner, name, noted)

    for name in ("perform", "outcomes"):
        noting(name)
    return names


def is_executors(name: str) -> bool:
    return name.startswith("executor-")


def tensors(num_tokens: int) -> list[torch.Tensor]:
    return [torch.randn(num_tokens, heads, 16) for heads in (4, 2, 2)]


def test_a_small_unary_call_of_a_lone_caller_runs_at_once_and_no_other_does(server: Server, ran_on: list[str]) -> None:
    q, k, v = tensors(1)
    with attnd.connect(server.address, plane="inline") as client:
        cache = client.create_cache(**GEOMETRY, renew=False)
        client.prefill(cache, PREFILL, 0, *tensors(2))
        assert is_executors(ran_on[-1])  # no decode step
        ran_on.clear()
        first = client.decode(cache, DECODE, 0, q, k, v)
        assert ran_on
        assert not any(map(is_executors, ran_on))
        ran_on.clear()
        with cache.session() as session:
            step = session.step(DECODE)
            second = step.attend(0, q, k, v)
            ran_on.clear()
            again = client.decode(cache, DECODE, 0, q, k, v)  # beside a stream that is idle
            assert not any(map(is_executors, ran_on))
            with cache.session() as another:
                another.step(DECODE).attend(0, q, k, v)
                ran_on.clear()
                last = client.decode(cache, DECODE, 0, q, k, v)  # there are others to wait for the event loop
                assert all(map(is_executors, ran_on))
        for each in (second, again, last):
            assert torch.equal(each, first)
        cache.delete()


def test_a_refusal_of_a_call_that_ran_at_once_is_told_as_ever(server: Server) -> None:
    q, k, v = tensors(1)
    with attnd.connect(server.address, plane="inline") as client, client.create_cache(**GEOMETRY, renew=False) as cache:
        with pytest.raises(attnd.errors.InvalidRequest, match="layer"):
            client.decode(cache, DECODE, 7, q, k, v)
        with pytest.raises(attnd.errors.Unsupported, match="triton"):
            client.decode(cache, DECODE, 0, q, k, v, attnd.AttentionOptions(backend="triton"))
        assert client.decode(cache, DECODE, 0, q, k, v).shape == q.shape
