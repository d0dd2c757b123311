"""Answers that nobody takes: what they hold is bounded for a stream and a principal, others go on, and none is lost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
import torch

import attnd
from attnd.planes.grpc import SERVICE
from attnd.protocol import frames, requests
from attnd_server.identity.tokens import add_token
from tests.servers import ServerProcess

# Answers of 16 MiB to calls of 1 MiB.
NUM_TOKENS, NUM_HEADS, HEAD_DIM, HEAD_DIM_V = 8_192, 2, 16, 256
ANSWER_BYTES = NUM_TOKENS * NUM_HEADS * HEAD_DIM_V * 4
WIDE = {
    "num_layers": 1,
    "num_kv_heads": 2,
    "head_dim": HEAD_DIM,
    "head_dim_v": HEAD_DIM_V,
    "num_pages": 1_024,
    "page_size": 4,
    "dtype": "float32",
}
SMALL = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
DECODE = attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")
Q, K, V = torch.ones(1, 2, 16), torch.ones(1, 2, 16), torch.ones(1, 2, 16)
CHANNEL = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
# What may wait of a principal is 128 MiB. gRPC has a copy of what it writes, and the calls under way have inputs.
MOST_BYTES = 600 << 20


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[ServerProcess, dict[str, attnd.Credentials]]]:
    """A server with two principals, and what each shows."""
    tokens = str(tmp_path / "tokens")
    shown = {name: attnd.Credentials(add_token(tokens, name), tls=False) for name in ("greedy", "other")}
    with ServerProcess(tmp_path / "log", "--device", "cpu", "--drain-s", "0", "--tokens", tokens) as server:
        yield server, shown
        assert "internal error" not in server.log


def works(server: ServerProcess, shown: attnd.Credentials) -> bool:
    """Whether a worker with a new session gets what it should."""
    with attnd.connect(server.address, credentials=shown, plane="inline", timeout_s=60) as client:
        with client.create_cache(**SMALL) as cache, cache.session() as session:
            return torch.equal(session.step(DECODE).attend(0, Q, K, V), V)


def wide_calls(cache: attnd.Cache, num_calls: int) -> list[bytes]:
    """A step, and calls of it with large answers."""
    metadata = attnd.StepMetadata([NUM_TOKENS], [1], [[0]], None, cache_only=True)
    q = torch.ones(NUM_TOKENS, NUM_HEADS, HEAD_DIM)
    call = requests.attend_call(1, 0, q, None, None, requests.DEFAULT_OPTIONS)
    return [frames.step_request(metadata.to_message(1, cache.ref)), *[call] * num_calls]


def outcome(answers: Iterable[bytes]) -> int:
    """Bytes of an RPC's answers; -1: it was told to come again."""
    try:
        return sum(len(data) for data in answers)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:  # type: ignore[attr-defined]
            return -1
        raise


def settled(server: ServerProcess, before: int) -> int:
    """The most memory that the server has taken since, once it takes no more."""
    peak, last, changed = 0, 0, time.monotonic()
    deadline = changed + 60
    while time.monotonic() < min(changed + 4, deadline):
        now = server.resident_bytes - before
        peak = max(peak, now)
        if abs(now - last) > 1 << 20:
            last, changed = now, time.monotonic()
        time.sleep(0.05)
    return peak


def test_streams_that_are_not_read_hold_a_bounded_amount_and_lose_nothing(
    guarded: tuple[ServerProcess, dict[str, attnd.Credentials]],
) -> None:
    server, shown = guarded
    num_streams, num_calls = 12, 6
    with ExitStack() as stack:
        client = stack.enter_context(attnd.connect(server.address, credentials=shown["greedy"]))
        cache = stack.enter_context(client.create_cache(**WIDE, ttl_s=600))
        cache.store_kv(0, [0], torch.ones(1, 2, HEAD_DIM), torch.ones(1, 2, HEAD_DIM_V))
        messages = wide_calls(cache, num_calls)
        assert works(server, shown["other"])
        before = server.resident_bytes
        streams = []
        for _ in range(num_streams):
            channel = stack.enter_context(grpc.insecure_channel(server.address, CHANNEL))
            method = channel.stream_stream(SERVICE + "Attend")
            streams.append(method(iter(messages), metadata=shown["greedy"].metadata()))
        assert settled(server, before) < MOST_BYTES
        assert works(server, shown["other"])
        assert works(server, shown["greedy"])  # also of the same principal, what is small
        pool = stack.enter_context(ThreadPoolExecutor(num_streams))
        kinds = pool.map(lambda stream: [requests.attend_reply(data).kind for data in stream], streams)
        assert list(kinds) == [["step"] + ["call"] * num_calls] * num_streams
        assert works(server, shown["greedy"])


def test_unary_answers_and_chunks_that_are_not_read_count_too(
    guarded: tuple[ServerProcess, dict[str, attnd.Credentials]],
) -> None:
    server, shown = guarded
    metadata = shown["greedy"].metadata()
    with ExitStack() as stack:
        client = stack.enter_context(attnd.connect(server.address, credentials=shown["greedy"]))
        cache = stack.enter_context(client.create_cache(**WIDE, ttl_s=600))
        cache.store_kv(0, [0], torch.ones(1, 2, HEAD_DIM), torch.ones(1, 2, HEAD_DIM_V))
        step = attnd.StepMetadata([NUM_TOKENS], [1], [[0]], None, cache_only=True)
        q = torch.ones(NUM_TOKENS, NUM_HEADS, HEAD_DIM)
        prefill = requests.unary_call("prefill", step, cache.ref, 0, q, None, None, requests.DEFAULT_OPTIONS)
        read = requests.read_kv(cache.ref, 0, list(range(4_096)))
        before = server.resident_bytes
        waiting = []
        for _ in range(20):
            channel = stack.enter_context(grpc.insecure_channel(server.address, CHANNEL))
            for method, request in (("Prefill", prefill), ("ReadKv", read)):
                waiting.append(channel.stream_stream(SERVICE + method)(iter([request]), metadata=metadata))
        assert settled(server, before) < MOST_BYTES
        assert works(server, shown["other"])
        outcomes = list(stack.enter_context(ThreadPoolExecutor(len(waiting))).map(outcome, waiting))
        assert all(each >= ANSWER_BYTES // 2 or each == -1 for each in outcomes)
        assert max(outcomes) >= ANSWER_BYTES
        assert works(server, shown["greedy"])
