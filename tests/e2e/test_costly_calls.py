"""Calls that ask for much with few bytes: they take bounded memory, hold up nobody, and end when nobody wants them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

import attnd
from tests.servers import ServerProcess, wait_for

GEOMETRY: dict[str, Any] = {
    "num_layers": 1,
    "num_kv_heads": 1,
    "head_dim": 8,
    "num_pages": 64,
    "page_size": 16,
    "dtype": "float32",
}
# Beside a call's results: what it gathers, its masks and scores, and what the allocator keeps of them.
MOST_BYTES = 700 << 20
SMALL = {**GEOMETRY, "num_pages": 2}


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[ServerProcess]:
    with ServerProcess(folder / "log", "--device", "cpu", "--drain-s", "1", *options) as server:
        yield server
        log = server.log
    assert "internal error" not in log, log


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


def most_bytes(server: ServerProcess) -> int:
    """The most memory that the server has had since `forget_most_bytes`."""
    (line,) = (line for line in Path(f"/proc/{server.pid}/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) << 10


def forget_most_bytes(server: ServerProcess) -> None:
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")


def over_one_page(num_tokens: int, context_len: int, slot: int = 16, **more: Any) -> attnd.StepMetadata:
    """A step of one request whose page table names one page again and again; its last token goes to `slot`."""
    slots = [-1] * (num_tokens - 1) + [slot]
    return attnd.StepMetadata([num_tokens], [context_len], [[0] * (context_len // 16)], slots, **more)


def tensors(
    num_tokens: int, num_heads: int, geometry: dict[str, Any] = GEOMETRY
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype, dim, dim_v = (
        getattr(torch, geometry["dtype"]),
        geometry["head_dim"],
        geometry.get("head_dim_v") or geometry["head_dim"],
    )
    kv_heads = geometry["num_kv_heads"]
    q = torch.ones(num_tokens, num_heads, dim, dtype=dtype)
    return q, torch.ones(num_tokens, kv_heads, dim, dtype=dtype), torch.ones(num_tokens, kv_heads, dim_v, dtype=dtype)


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "context_len", "change", "options"),
    [
        (512, 1, 1 << 18, {}, attnd.AttentionOptions(window=1 << 20)),
        (256, 16, 1 << 16, {}, attnd.AttentionOptions(backend="naive")),
        (64, 32, 1 << 16, {}, attnd.AttentionOptions(softcap=3.0)),
        (64, 32, 1 << 16, {"head_dim_v": 16}, attnd.AttentionOptions()),
        (16, 16, 1 << 18, {"num_kv_heads": 16, "head_dim": 32}, attnd.AttentionOptions()),
        (1, 64, 1 << 18, {"num_kv_heads": 64, "head_dim": 16, "kv_dtype": "float8_e4m3fn"}, attnd.AttentionOptions()),
    ],
    ids=["masks", "scores", "scores of what only naive has", "scores of unequal dims", "gathered", "gathered fp8"],
)
def test_a_page_that_is_named_again_and_again_takes_bounded_memory(
    server: ServerProcess,
    num_tokens: int,
    num_heads: int,
    context_len: int,
    change: dict[str, Any],
    options: attnd.AttentionOptions,
) -> None:
    geometry = {**GEOMETRY, **change}
    q, k, v = tensors(num_tokens, num_heads, geometry)
    with attnd.connect(server.address, timeout_s=300) as client, client.create_cache(**geometry) as cache:
        cache.store_kv(0, list(range(16)), *(each[:1].expand(16, -1, -1).contiguous() for each in (k, v)))
        with cache.session() as session:
            forget_most_bytes(server)
            before = most_bytes(server)
            output = session.step(over_one_page(num_tokens, context_len)).attend(0, q, k, v, options)
            assert most_bytes(server) - before < MOST_BYTES
            assert torch.allclose(output, torch.ones_like(output), atol=1e-3)  # every value is 1, so their mean is


def test_others_are_answered_while_a_million_heads_are_computed(server: ServerProcess) -> None:
    """On the event loop they would keep health checks waiting."""
    answered: list[float] = []
    stop = threading.Event()

    def probe() -> None:
        with grpc.insecure_channel(server.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while not stop.is_set():
                health.Check(health_pb2.HealthCheckRequest(), timeout=60)
                answered.append(time.monotonic())

    probing = threading.Thread(target=probe)
    q, k, v = tensors(1, 1 << 20)
    with attnd.connect(server.address, plane="inline", timeout_s=120) as client:
        with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
            step = session.step(over_one_page(1, 1024, kind="decode"))
            probing.start()
            wait_for(lambda: bool(answered), "no health check is answered")
            pending = step.submit(0, q, k, v)
            started = time.monotonic()
            pending.wait()
            ended = time.monotonic()
    stop.set()
    probing.join()
    gaps = [later - earlier for earlier, later in pairwise(answered) if started < later]
    assert gaps
    assert max(gaps) < max(0.5, (ended - started) / 2)


def long_call(client: attnd.Client, cache: attnd.Cache, num_heads: int = 64) -> tuple[threading.Thread, list[object]]:
    """A call of minutes on a session of its own, and what comes of it."""
    outcome: list[object] = []

    def attend() -> None:
        with cache.session() as session:
            try:
                outcome.append(session.step(over_one_page(256, 1 << 20)).attend(0, *tensors(256, num_heads)))
            except attnd.AttndError as error:
                outcome.append(error)

    thread = threading.Thread(target=attend)
    thread.start()
    return thread, outcome


def used_ticks(server: ServerProcess) -> int:
    """Processor time of the server, in hundredths of a second."""
    return sum(map(int, Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


def is_idle(server: ServerProcess) -> bool:
    """Whether the server has nothing to compute."""
    before = used_ticks(server)
    time.sleep(1)
    return used_ticks(server) - before < 5


@pytest.mark.parametrize(
    ("num_tokens", "options"), [(256, attnd.AttentionOptions()), (64, attnd.AttentionOptions(softcap=2.0))]
)
def test_others_have_turns_during_a_long_call(
    server: ServerProcess, num_tokens: int, options: attnd.AttentionOptions
) -> None:
    with attnd.connect(server.address, timeout_s=300) as client, client.create_cache(**GEOMETRY) as cache:
        outcome: list[torch.Tensor] = []

        def attend() -> None:
            with cache.session() as session:
                step = session.step(over_one_page(num_tokens, 1 << 18))
                outcome.append(step.attend(0, *tensors(num_tokens, 16), options))

        thread = threading.Thread(target=attend)
        with client.create_cache(**SMALL) as other, other.session() as session:
            small_step = session.step(attnd.StepMetadata([1], [0], [[0]], [0], kind="decode"))
            before = used_ticks(server)
            thread.start()
            wait_for(lambda: used_ticks(server) > before + 20, "the long call does not begin", timeout_s=60)
            for _ in range(3):
                q, k, v = tensors(1, 1)
                assert torch.equal(small_step.attend(0, q, k, v), v)
            assert not outcome, "the others' calls waited for the long one"
        thread.join()
        assert len(outcome) == 1


@pytest.mark.parametrize("way", ["cancelled", "max_call_s"])
def test_a_long_call_ends_when_nobody_wants_it_or_its_time_is_over(tmp_path: Path, way: str) -> None:
    timeout_s = 2 if way == "cancelled" else 300
    with serving(tmp_path, "--max-call-s", "3") as server:
        with attnd.connect(server.address, timeout_s=timeout_s) as client, client.create_cache(**GEOMETRY) as cache:
            thread, outcome = long_call(client, cache)
            thread.join()
            (error,) = outcome
            assert isinstance(error, attnd.DeadlineExceeded)
            if way == "max_call_s":
                assert "max_call_s is 3" in str(error)
            wait_for(lambda: is_idle(server), "the call goes on")
            k, _ = cache.read_kv(0, [16], like=torch.ones(1))
            assert not k.any(), "a call that failed has stored something"


def test_what_could_not_end_in_time_is_refused_with_the_number(tmp_path: Path) -> None:
    with serving(tmp_path, "--max-call-s", "1", "--threads", "1") as server:
        with attnd.connect(server.address, timeout_s=60) as client, client.create_cache(**GEOMETRY) as cache:
            thread, outcome = long_call(client, cache, num_heads=512)
            thread.join()
            (error,) = outcome
            assert isinstance(error, attnd.Exhausted)
            assert error.field == "q"
            assert "products" in str(error)
            assert str(1 << 37) in str(error)
            k, _ = cache.read_kv(0, [16], like=torch.ones(1))
            assert not k.any()
