"""What a tenant does to a server to make it stop, without end: one process of `benchmarks.under_attack`.

`python -m benchmarks.attackers ADDRESS ATTACK --token TOKEN`. It says `ready` and goes on until it is ended. Refusals
are what it expects: after each it waits a moment and tries again. Its last word, upon SIGTERM, is a line of JSON that
counts what was answered and what was refused.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc
import torch

import attnd
from attnd.credentials import NO_CREDENTIALS
from attnd.planes.grpc import SERVICE
from attnd.protocol import frames, requests
from attnd.protocol.packing import int32_tensor
from attnd.v1 import attention_pb2, step_pb2
from benchmarks import half_messages

PAUSE_S = 0.01
# Of a unary call, and of the answers of a stream.
TIMEOUT_S = 20.0
PAGE_SIZE = 16
# Of a cache's lease: attackers are killed, and their caches are not what is looked at then.
TTL_S = 5.0
MAX_CONTEXT_LEN, MAX_TABLE_ELEMENTS = 1 << 20, 1 << 21
NUM_HALF_MESSAGES, HALF_MESSAGE_BYTES = 40, 100 << 20

counts: Counter[str] = Counter()


class Target:
    """A server, and who attacks it."""

    def __init__(self, address: str, token: str) -> None:
        """Connects lazily. With an empty token the server is one that asks for none."""
        self.address = address
        self._credentials = attnd.Credentials(token, tls=False) if token else NO_CREDENTIALS

    def client(self) -> attnd.Client:
        """A client of the SDK."""
        return attnd.connect(self.address, credentials=self._credentials, timeout_s=TIMEOUT_S, connect_timeout_s=60)

    def channel(self) -> grpc.Channel:
        """A connection of its own, which may send and receive messages of any size."""
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        return grpc.insecure_channel(self.address, options=options)

    def attend(self, channel: grpc.Channel, messages: Iterator[bytes], **more: Any) -> Any:
        """An Attend stream that sends `messages`."""
        return channel.stream_stream(SERVICE + "Attend")(messages, metadata=self._credentials.metadata(), **more)


def cache_of(client: attnd.Client, num_pages: int, *, head_dim: int = 8, backend: str = "auto") -> attnd.Cache:
    """A cache of one KV head and one layer."""
    return client.create_cache(
        num_layers=1,
        num_kv_heads=1,
        head_dim=head_dim,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        dtype="float32",
        backend=backend,
        ttl_s=TTL_S,
    )


def ones(num_tokens: int, num_heads: int, head_dim: int = 8) -> torch.Tensor:
    """float32 `[num_tokens, num_heads, head_dim]`."""
    return torch.ones(num_tokens, num_heads, head_dim)


def long_context(num_tokens: int, context_len: int) -> attnd.StepMetadata:
    """A step of one request over a context that is one page, named again and again. Stores nothing."""
    page_tables = torch.zeros(1, context_len // PAGE_SIZE, dtype=torch.int32)
    return attnd.StepMetadata([num_tokens], [context_len], page_tables, [-1] * num_tokens)


def half_health_messages(target: Target) -> None:
    """Without a token: messages that are announced, sent but for a few bytes, and never ended."""
    connection = half_messages.HalfMessages(target.address, NUM_HALF_MESSAGES, HALF_MESSAGE_BYTES)
    connection.send("/grpc.health.v1.Health/Check", seconds=TIMEOUT_S)


def unknown_fields(target: Target) -> None:
    """4 M fields of two bytes, compressed to 8 KB."""
    data = b"\x78\x01" * (4 << 20)
    with target.channel() as channel:
        call = target.attend(channel, iter([data]), compression=grpc.Compression.Gzip, timeout=TIMEOUT_S)
        for _ in call:
            counts["answers"] += 1


def long_call(target: Target) -> None:
    """256 tokens x 512 heads over 2^20 tokens of context."""
    with target.client() as client, cache_of(client, 1, head_dim=16) as cache:
        q, k = ones(256, 512, 16), ones(256, 1, 16)
        client.prefill(cache, long_context(256, MAX_CONTEXT_LEN), 0, q, k, k)


def wide_scores(target: Target) -> None:
    """377 KB that ask the specification for 12.3 GB of scores."""
    with target.client() as client, cache_of(client, 1, backend="naive") as cache:
        q, k = ones(256, 46), ones(256, 1)
        client.prefill(cache, long_context(256, 1 << 18), 0, q, k, k)


def many_heads(target: Target) -> None:
    """One token of a million heads."""
    with target.client() as client, cache_of(client, 64) as cache, cache.session(plane="inline") as session:
        q, k = ones(1, 1_000_000), ones(1, 1)
        while True:
            session.step(long_context(1, 1024)).attend(0, q, k, k)
            counts["answers"] += 1


def kept_steps(target: Target) -> None:
    """Eight steps of each of eight streams, each with a page table of 8 MB told by some 100 bytes."""
    with target.client() as client, cache_of(client, 1) as cache, target.channel() as channel:
        calls = [target.attend(channel, _steps(cache), timeout=TIMEOUT_S) for _ in range(8)]
        for call in calls:
            for _ in range(8):
                error = attention_pb2.AttendResponse.FromString(next(call)).error
                counts["refused" if error.message else "answers"] += 1
        time.sleep(1)


def _steps(cache: attnd.Cache) -> Iterator[bytes]:
    num_reqs = 4096
    table = torch.zeros(num_reqs, 1, dtype=torch.int32)
    small = attnd.StepMetadata([1] * num_reqs, [0] * num_reqs, table, [-1] * num_reqs, kind="decode")
    yield frames.step_request(small.to_message(1, cache.ref))
    for step_id in range(2, 9):
        step = small.to_message(step_id, cache.ref)
        step.ClearField("page_tables")
        delta = step_pb2.PageTableDelta(base_step_id=step_id - 1, max_pages=MAX_TABLE_ELEMENTS // num_reqs)
        delta.source_rows.CopyFrom(int32_tensor(range(num_reqs), "source_rows"))
        delta.indices.CopyFrom(int32_tensor([], "indices"))
        delta.pages.CopyFrom(int32_tensor([], "pages"))
        step.page_table_delta.CopyFrom(delta)
        yield frames.step_request(step)
    time.sleep(TIMEOUT_S)


def unread_answers(target: Target) -> None:
    """Streams with calls whose answers are large, none of which is read."""
    num_streams, num_calls = 16, 64
    with target.client() as client, cache_of(client, 4) as cache, target.channel() as channel:
        metadata = attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")
        step = frames.step_request(metadata.to_message(1, cache.ref))
        q, k = ones(1, 60_000), ones(1, 1)
        call = requests.attend_call(1, 0, q, k, k, requests.DEFAULT_OPTIONS)

        def messages() -> Iterator[bytes]:
            yield step
            for _ in range(num_calls):
                yield call
            time.sleep(TIMEOUT_S)

        streams = [target.attend(channel, messages(), timeout=TIMEOUT_S) for _ in range(num_streams)]
        time.sleep(TIMEOUT_S)
        for stream in streams:
            stream.cancel()


def unread_chunks(target: Target) -> None:
    """ReadKv of a whole cache, again and again, of which little is read."""
    with target.client() as client, cache_of(client, 4096, head_dim=64) as cache:
        slots = torch.arange(4096 * PAGE_SIZE)
        while True:
            cache.read_kv(0, slots, like=torch.zeros(1))
            counts["answers"] += 1


ATTACKS: dict[str, Callable[[Target], None]] = {
    each.__name__: each
    for each in (
        half_health_messages,
        unknown_fields,
        long_call,
        wide_scores,
        many_heads,
        kept_steps,
        unread_answers,
        unread_chunks,
    )
}


def run(attack: Callable[[Target], None], target: Target) -> None:
    """Repeats an attack, whatever comes of it."""
    while True:
        try:
            attack(target)
            counts["rounds"] += 1
        except (attnd.AttndError, grpc.RpcError, OSError) as error:
            code = error.code().name if isinstance(error, grpc.RpcError) else type(error).__name__
            counts[code] += 1
            time.sleep(PAUSE_S)


def end(*_: object) -> NoReturn:
    """Says what came of it, and ends at once, whatever is under way."""
    print(json.dumps(counts), flush=True)
    signal.raise_signal(signal.SIGKILL)
    raise AssertionError


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attackers", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("address")
    parser.add_argument("attack", choices=ATTACKS)
    parser.add_argument("--token", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, end)
    target = Target(options.address, options.token)
    threading.Thread(target=run, args=(ATTACKS[options.attack], target), daemon=True).start()
    parent = os.getppid()
    print("ready", flush=True)
    # Neither `pause` nor a read: the system may give the signal to another thread, and this one would wait on.
    while os.getppid() == parent:
        time.sleep(0.1)


if __name__ == "__main__":
    main()
