"""What a server promises of steps and caches, kept for resident steps: snapshots, counts, tokens, leases, its end."""

from __future__ import annotations

import queue
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch

import attnd
from attnd.planes.cuda.resident import ResidentSteps
from attnd.v1 import cache_pb2, plane_pb2, status_pb2
from attnd_server.identity.tokens import add_token
from tests.gpu import devices
from tests.gpu.test_resident_steps import (
    DEVICE,
    GEOMETRY,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    PAGE,
    TABLES,
    slots,
    steps_of,
    tokens,
)
from tests.scrape import Scrape
from tests.servers import ServerProcess, wait_for

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(devices.reason_against()), reason=devices.reason_against())]

NUM_SLOTS = GEOMETRY["num_pages"] * PAGE
# Seconds: longer than anything here should take; for a process that begins; and for what is to be known at once.
PATIENCE_S, START_S, SOON_S = 60.0, 180.0, 10.0
# Seconds of a drain, and how much longer the process may take.
DRAIN_S, ENDS_S = 2, 5
# Seconds of a lease that only resident steps renew.
LEASE_S = 2.0

Call = list[torch.Tensor]
Kept = list[tuple[torch.Tensor, torch.Tensor]]


def serving(folder: Path, *more: str, port: int = 0) -> ServerProcess:
    options = ("--device", "cuda:0", "--socket-dir", str(folder / "sockets"), "--kv-bytes", "4GiB")
    return ServerProcess(folder / "log", *options, *more, port=port)


def connected(server: ServerProcess, **more: Any) -> attnd.Client:
    return attnd.connect(server.address, timeout_s=PATIENCE_S, connect_timeout_s=PATIENCE_S, **more)


def is_sound(server: ServerProcess) -> bool:
    return "internal error" not in server.log and "Traceback" not in server.log


@pytest.fixture(autouse=True)
def _workers_gpu() -> Iterator[None]:
    """The worker's GPU is the current one; the server has the other."""
    with torch.cuda.device(DEVICE):
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("promises"), "--metrics", "0") as process:
        yield process
        assert is_sound(process), process.log


@pytest.fixture
def client(server: ServerProcess) -> Iterator[attnd.Client]:
    with connected(server) as client:
        wait_for(lambda: not client.list_caches(), "caches of earlier tests are left")
        yield client


def begun(steps: ResidentSteps, context_lens: list[int], calls: list[Call], *, stored: int = 1) -> list[torch.Tensor]:
    """Enqueues a step; its outputs."""
    n = len(context_lens)
    steps.context_lens[:n].copy_(torch.tensor(context_lens))
    steps.stored_lens[:n].fill_(stored)
    return again(steps, calls)


def again(steps: ResidentSteps, calls: list[Call]) -> list[torch.Tensor]:
    """Enqueues a step with the lengths that there are; its outputs. Nothing of it waits."""
    steps.begin(len(calls[0][0]))
    return [steps.attend(layer, *call) for layer, call in enumerate(calls)]


def new_calls(num_tokens: int) -> list[Call]:
    return [tokens(num_tokens) for _ in range(LAYERS)]


def check(outputs: list[torch.Tensor], calls: list[Call]) -> None:
    """Of steps without a context: each token sees only itself."""
    for layer, (output, (_, _, v)) in enumerate(zip(outputs, calls, strict=True)):
        assert torch.equal(output, v.repeat_interleave(HEADS // KV_HEADS, dim=1)), f"layer {layer}"


def right_step(steps: ResidentSteps, num_reqs: int = 2) -> None:
    """A step without a context, and its outputs."""
    calls = new_calls(num_reqs)
    outputs = begun(steps, [0] * num_reqs, calls)
    steps.finish()
    check(outputs, calls)


def nothing_kept() -> Kept:
    shape = (NUM_SLOTS, KV_HEADS, HEAD_DIM)
    return [(torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16)) for _ in range(LAYERS)]


def store(steps: ResidentSteps, context_lens: list[int], kept: Kept) -> None:
    """A step that stores a token of each request, which `kept` gets, too."""
    calls = new_calls(len(context_lens))
    begun(steps, context_lens, calls)
    steps.finish()
    at = slots(context_lens, 1, [1] * len(context_lens))
    for (kept_k, kept_v), (_, k, v) in zip(kept, calls, strict=True):
        kept_k[at], kept_v[at] = k.cpu(), v.cpu()


def assert_kept(cache: attnd.Cache, kept: Kept) -> None:
    like = torch.empty(0, dtype=torch.bfloat16)
    for layer, expected in enumerate(kept):
        found = cache.read_kv(layer, range(NUM_SLOTS), like)
        assert all(torch.equal(*each) for each in zip(found, expected, strict=True)), f"layer {layer}"


def pages_of(context_lens: list[int]) -> set[int]:
    return {slot // PAGE for slot in slots(context_lens, 1, [1] * len(context_lens))}


def status_of(client: attnd.Client) -> tuple[int, status_pb2.ServedCounts]:
    """Bytes that all caches take, and what everybody was served: without tokens all are one principal."""
    status = client.status()
    return status.devices[0].num_bytes_used, status.principals[0].served


# ---- snapshots


def snapshotting(folder: Path, port: int = 0) -> ServerProcess:
    options = ("--snapshot-dir", str(folder / "snapshots"), "--restore", "--drain-s", "1")
    return serving(folder, *options, port=port)


@pytest.mark.parametrize("is_open", [True, False], ids=["open", "closed"])
def test_a_snapshot_has_what_only_resident_steps_have_stored(tmp_path: Path, is_open: bool) -> None:
    """Nobody asks which pages were written before the server ends: not even a renewal does."""
    with snapshotting(tmp_path) as first, connected(first) as client:
        cache = client.create_cache(**GEOMETRY, renew=False, name="kept")
        session = cache.session(plane="cuda")
        steps, kept, written = steps_of(session), nothing_kept(), set[int]()
        lengths = [0, PAGE - 2, 3 * PAGE]

        def advance(num_steps: int) -> None:
            nonlocal lengths
            for _ in range(num_steps):
                store(steps, lengths, kept)
                written.update(pages_of(lengths))
                lengths = [length + 1 for length in lengths]

        advance(20)
        assert_kept(cache, kept)
        advance(20)  # after the last that the server was asked for
        probe = new_calls(3)
        expected = begun(steps, lengths, probe, stored=0)
        steps.finish()
        time.sleep(0.2)  # idle
        if not is_open:
            session.close()
        first.terminate()
        assert first.wait(PATIENCE_S) == 0, first.log
        assert first.log.count("snapshot written") == 1
        assert "cache lost" not in first.log
        session.close()  # before there is another server, which has planes of the same ids

        with snapshotting(tmp_path, first.port) as second:
            info = cache.adopt()
            assert (info.name, info.num_pages_written) == ("kept", len(written))
            assert cache.written_pages() == sorted(written)
            assert_kept(cache, kept)
            with cache.session(plane="cuda") as next_session:
                more = steps_of(next_session)
                outputs = begun(more, lengths, probe, stored=0)
                more.finish()
                assert all(map(torch.equal, outputs, expected))
                steps = more
                advance(1)
            assert_kept(cache, kept)
            cache.delete()
        assert is_sound(second), second.log


def test_a_restored_cache_that_resident_steps_have_changed_is_not_adopted_again(tmp_path: Path) -> None:
    with snapshotting(tmp_path) as first, connected(first) as client:
        cache = client.create_cache(**GEOMETRY, renew=False)
        kept = nothing_kept()
        with cache.session(plane="cuda") as session:
            steps = steps_of(session)
            for position in range(PAGE // 2):
                store(steps, [position], kept)
        first.terminate()
        assert first.wait(PATIENCE_S) == 0, first.log
        earlier = cache.ref

        with snapshotting(tmp_path, first.port) as second:

            def adopt_as_before() -> list[int]:
                return client.open_cache(earlier.id, epoch=earlier.epoch).written_pages()

            had, new = int(TABLES[0, 0]), int(TABLES[0, 1])
            cache.adopt()
            assert cache.ref.epoch != earlier.epoch
            assert adopt_as_before() == [had]
            with cache.session(plane="cuda") as session:
                steps = steps_of(session)
                begun(steps, [PAGE // 2], new_calls(1), stored=0)  # it is only read
                steps.finish()
                assert adopt_as_before() == [had]
                store(steps, [PAGE], kept)  # the next page, which the snapshot has not
                assert adopt_as_before() == sorted([had, new])
                store(steps, [PAGE // 2], kept)
                with pytest.raises(attnd.EpochMismatch, match="stored into pages that it had"):
                    adopt_as_before()
                store(steps, [PAGE + 1], kept)
            with pytest.raises(attnd.EpochMismatch, match="stored into pages that it had"):
                adopt_as_before()
            assert cache.written_pages() == sorted([had, new])  # under the epoch of now it is as good as ever
            assert_kept(cache, kept)
            cache.delete()
        assert is_sound(second), second.log


# ---- counts


def test_resident_steps_count_as_others_do(client: attnd.Client, server: ServerProcess) -> None:
    found = re.search(r"metrics on (http://\S+)$", server.banner)
    assert found is not None, server.banner
    url, (_, served) = found[1], status_of(client)
    before = Scrape.of(url)

    def told(name: str, **labels: str) -> float:
        return Scrape.of(url).value(name, plane="cuda", **labels) - before.value(name, plane="cuda", **labels)

    lengths, num_steps, written = [0, PAGE, 2 * PAGE - 2, 5], 30, set[int]()
    n = len(lengths)
    with client.create_cache(**GEOMETRY, renew=False) as cache:
        with cache.session(plane="cuda") as session:
            steps = steps_of(session)
            assert (cache.info().num_pages_written, cache.written_pages()) == (0, [])
            for number in range(num_steps):
                begun(steps, lengths, new_calls(n))
                steps.finish()
                written |= pages_of(lengths)
                lengths = [length + 1 for length in lengths]
                if number % 7 == 0:
                    assert cache.info().num_pages_written == len(written)
                if number % 5 == 0:
                    assert cache.written_pages() == sorted(written)
            assert [info.num_pages_written for info in client.list_caches()] == [len(written)]
            assert cache.written_pages() == sorted(written)
            assert Scrape.of(url).value("attnd_pages_in_use") == len(written)
            assert Scrape.of(url).value("attnd_graph_memory_bytes") > 0
            num_calls = num_steps * LAYERS
            wait_for(lambda: told("attnd_calls_total") >= num_calls, "steps are not counted")
            assert told("attnd_calls_total", backend="triton_grouped") == told("attnd_calls_total") == num_calls
            of_head = num_calls * n * HEAD_DIM * torch.bfloat16.itemsize
            assert told("attnd_call_received_bytes_total") == of_head * (HEADS + 2 * KV_HEADS)
            assert told("attnd_call_sent_bytes_total") == of_head * HEADS
            for phase in ("queue", "kernel"):
                assert told("attnd_call_phase_seconds_count", phase=phase) == num_calls
            assert told("attnd_call_phase_seconds_sum", phase="kernel") > 0
            (row,) = [each for each in client.status().sessions if each.plane == plane_pb2.PLANE_CUDA]
            assert (row.served.steps, row.served.tokens, row.served.calls) == (num_steps, num_steps * n, num_calls)
            assert session.timings().resident == num_steps
        _, now = status_of(client)  # of a session that has ended, too
        assert (now.steps - served.steps, now.tokens - served.tokens) == (num_steps, num_steps * n)
        assert now.calls - served.calls == num_calls
        assert Scrape.of(url).value("attnd_graph_memory_bytes") == 0


# ---- tokens


class Loop(threading.Thread):
    """Runs resident steps of a session on a stream of its own, and looks at every output, until it fails or is stopped.

    Attributes:
        num_done: steps that were right.
        error: why it ended; None: it was stopped.
        ended_at: when, `time.monotonic`.
    """

    def __init__(self, session: attnd.CudaSession) -> None:
        super().__init__(daemon=True)
        self.num_done = 0
        self.error: BaseException | None = None
        self.ended_at = 0.0
        self.stopped = threading.Event()
        self._session = session
        self.start()

    def run(self) -> None:
        with torch.cuda.device(DEVICE), torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            try:
                steps = steps_of(self._session)
                while not self.stopped.is_set():
                    right_step(steps)
                    self.num_done += 1
            except BaseException as error:
                self.error = error
            self.ended_at = time.monotonic()

    def goes_on(self) -> None:
        """Waits for some more steps."""
        seen = self.num_done
        wait_for(lambda: self.num_done > seen + 10 or self.error is not None, "no more steps are done", START_S)
        assert self.error is None, repr(self.error)


def test_a_token_that_is_removed_ends_its_resident_steps_alone(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    given = {name: add_token(str(path), name) for name in ("alice", "bob")}
    with serving(tmp_path, "--tokens", str(path), "--drain-s", "1") as server:
        alice, bob = (connected(server, credentials=attnd.Credentials(each, tls=False)) for each in given.values())
        with alice, bob, bob.create_cache(**GEOMETRY) as his_cache, his_cache.session(plane="cuda") as his:
            hers = alice.create_cache(**GEOMETRY, renew=False).session(plane="cuda")
            loops = Loop(hers), Loop(his)
            try:
                for loop in loops:
                    loop.goes_on()
                lines = path.read_text().splitlines(keepends=True)
                path.write_text("".join(line for line in lines if not line.startswith("alice ")))
                removed_at = time.monotonic()
                loops[0].join(SOON_S)
                assert not loops[0].is_alive(), "the session goes on"
                # A wrong output before the error is an AssertionError.
                assert isinstance(loops[0].error, attnd.Unauthenticated), repr(loops[0].error)
                assert "no longer known here" in str(loops[0].error)
                assert loops[0].ended_at < removed_at + 5
                loops[1].goes_on()
                hers.close()
                loops[1].goes_on()
                with pytest.raises(attnd.Unauthenticated):
                    hers.resident(HEADS, max_reqs=2, max_pages=2)
            finally:
                for loop in loops:
                    loop.stopped.set()
                for loop in loops:
                    loop.join(PATIENCE_S)
            assert loops[1].error is None, repr(loops[1].error)
        assert is_sound(server), server.log


# ---- ends of servers and caches, seen by a process that loops

# Every step has other numbers, so that what lay in the shared memory before is no right output.
WORKER = """
import sys, time, torch, attnd
address, mode, num_pages = sys.argv[1], sys.argv[2], int(sys.argv[3])
heads, kv_heads, layers, n = 8, 2, 3, 4
torch.cuda.set_device(torch.cuda.device_count() - 1)
client = attnd.connect(address, timeout_s=60)
cache = client.create_cache(
    num_layers=layers, num_kv_heads=kv_heads, head_dim=64, dtype="bfloat16", num_pages=num_pages, ttl_s=10
)
session = cache.session(plane="cuda")
steps = session.resident(heads, max_reqs=n, max_pages=8)
steps.page_tables.copy_(torch.arange(8 * n).view(n, 8))
values = [torch.randint(128, (n, kv_heads, 64), device="cuda").bfloat16() for _ in range(layers)]
q = torch.randn(n, heads, 64, dtype=torch.bfloat16, device="cuda")
k = torch.randn(n, kv_heads, 64, dtype=torch.bfloat16, device="cuda")
number, wrong = (torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(2))

def step():
    number.add_(1)
    steps.begin(n)
    for layer in range(layers):
        v = values[layer] + number % 64
        output = steps.attend(layer, q, k, v)
        wrong.add_((output != v.unsqueeze(2).expand(-1, -1, heads // kv_heads, -1).flatten(1, 2)).any())

with torch.cuda.stream(torch.cuda.Stream()):
    step()
    steps.finish()
    assert not wrong.item()
    run = step
    if mode == "graph":
        graph = torch.cuda.CUDAGraph()
        with devices.capturing(graph, torch.cuda.current_stream()):
            step()
        run = graph.replay
    print("ready", cache.ref.id.hex(), cache.ref.epoch, flush=True)
    told_at = 0.0
    try:
        while True:
            for _ in range(20 if mode == "graph" else 1):
                run()
            steps.finish()
            if wrong.item():
                print("wrong", steps.num_done, flush=True)
                sys.exit(1)
            if time.monotonic() > told_at + 0.05:
                told_at = time.monotonic()
                print("done", steps.num_done, flush=True)
    except attnd.AttndError as error:
        print("failed", type(error).__name__, error, flush=True)
session.close()
client.close()
print("closed", flush=True)
"""


class Worker:
    """A process with a cache whose resident steps come one after the other: by "steps" or by a replayed "graph"."""

    def __init__(self, address: str, mode: str, num_pages: int = 64) -> None:
        command = [sys.executable, "-c", WORKER, address, mode, str(num_pages)]
        environment = ServerProcess.environment()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def next(self, kind: str, timeout_s: float = START_S) -> list[str]:
        """The words of its next line of a kind, but the first."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"the worker did not say {kind} within {timeout_s:g} s") from None
            first, *words = line.split() or [""]
            if first == kind:
                return words
            assert first in ("ready", "done"), f"the worker said {line or 'nothing more'!r}, and not {kind}"

    def failed(self, timeout_s: float) -> tuple[str, str]:
        """Name and message of the error that ends it, in so many seconds from now; then it has closed all and ended."""
        name, *message = self.next("failed", timeout_s)
        self.next("closed", PATIENCE_S)
        assert self._process.wait(PATIENCE_S) == 0
        return name, " ".join(message)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.mark.parametrize("mode", ["steps", "graph"])
def test_a_drain_does_not_wait_for_workers_that_loop(tmp_path: Path, mode: str) -> None:
    with serving(tmp_path, "--drain-s", str(DRAIN_S)) as server, Worker(server.address, mode) as worker:
        worker.next("done")
        server.terminate()
        assert server.wait(DRAIN_S + ENDS_S) == 0, server.log
        name, message = worker.failed(SOON_S)
        assert name == "Disconnected", message
    assert "stopped" in server.log
    assert is_sound(server), server.log


@pytest.mark.parametrize("number", range(3))
def test_a_server_that_is_killed_lets_a_looping_graph_go(tmp_path: Path, number: int) -> None:
    with serving(tmp_path) as server, Worker(server.address, "graph") as worker:
        worker.next("done")
        time.sleep(0.3 * number)
        server.kill()
        name, message = worker.failed(SOON_S)
        assert name == "Disconnected", message
        assert "no connection to the server" in message


@pytest.mark.parametrize("mode", ["steps", "graph"])
def test_a_cache_that_another_client_deletes_ends_the_loop_at_once(
    client: attnd.Client, server: ServerProcess, mode: str
) -> None:
    empty, _ = status_of(client)
    with Worker(server.address, mode, num_pages=1 << 16) as worker:  # 1.5 GiB, and so to be seen in the GPU's memory
        cache_id, epoch = worker.next("ready")
        worker.next("done")
        ref = cache_pb2.CacheRef(id=bytes.fromhex(cache_id), epoch=int(epoch))
        full, _ = status_of(client)
        num_bytes = sum(info.num_bytes for info in client.list_caches())
        assert num_bytes > 1 << 30
        assert full >= empty + num_bytes
        free_bytes = torch.cuda.mem_get_info(0)[0]
        request = cache_pb2.DeleteCacheRequest(cache=ref).SerializeToString()
        started = time.monotonic()
        client.transport.unary("DeleteCache", request, PATIENCE_S)
        assert time.monotonic() - started < 2
        assert status_of(client)[0] == empty
        assert client.list_caches() == []
        name, message = worker.failed(SOON_S)
        assert name == "CacheLost", message
        wait_for(
            lambda: torch.cuda.mem_get_info(0)[0] > free_bytes + num_bytes * 0.9,
            "the pages' memory is not the GPU's again",
            SOON_S,
        )
    with client.create_cache(**GEOMETRY) as cache, cache.session(plane="cuda") as session:
        right_step(steps_of(session))


# ---- leases and pauses


def test_replayed_steps_alone_keep_a_lease(client: attnd.Client, server: ServerProcess) -> None:
    """The worker's client asks the server for nothing, not even to renew; `client`'s questions renew nothing."""
    with client.create_cache(**GEOMETRY) as cache, cache.session(plane="cuda") as session:
        right_step(steps_of(session))  # what is to be compiled takes longer than the lease
    name = "renewed by steps"
    empty, _ = status_of(client)

    def is_there() -> bool:
        return name in [info.name for info in client.list_caches()]

    with connected(server) as worker:
        cache = worker.create_cache(**{**GEOMETRY, "ttl_s": LEASE_S}, renew=False, name=name)
        session = cache.session(plane="cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            steps, calls = steps_of(session), new_calls(2)
            graph = torch.cuda.CUDAGraph()
            with devices.capturing(graph, stream):
                outputs = again(steps, calls)
            count, looked_at, ends_at = 0, 0.0, time.monotonic() + 3 * LEASE_S
            while time.monotonic() < ends_at:
                graph.replay()
                stream.synchronize()  # torch's: nobody is asked
                count += 1
                time.sleep(0.005)
                if time.monotonic() > looked_at + 0.5:
                    looked_at = time.monotonic()
                    assert is_there(), f"it went after {count} steps"
            # Few of them, with pauses in which the session is parked.
            for _ in range(3):
                time.sleep(LEASE_S / 2)
                graph.replay()
                stream.synchronize()
                count += 1
            assert is_there()
            steps.finish()
            assert steps.num_done == count
            check(outputs, calls)
        worker.close()
        wait_for(lambda: not is_there(), "the lease does not end", LEASE_S + SOON_S)
        assert status_of(client)[0] == empty


def test_a_session_that_idles_goes_on(client: attnd.Client) -> None:
    """Around the 20 ms after which its launches are revoked, and long after."""
    pauses = random.Random(5)
    with client.create_cache(**GEOMETRY) as cache, cache.session(plane="cuda") as session:
        steps = steps_of(session)
        right_step(steps)
        count = 1
        for pause_s in [1.0, *(pauses.uniform(0, 0.06) for _ in range(20)), 1.0]:
            time.sleep(pause_s)
            # One step or several at once, which are finished together.
            called = [new_calls(2) for _ in range(pauses.randint(1, 3))]
            outputs = [again(steps, calls) for calls in called]
            started = time.monotonic()
            steps.finish()
            assert time.monotonic() - started < 1, f"after {pause_s * 1e3:.1f} ms"
            for each, calls in zip(outputs, called, strict=True):
                check(each, calls)
            count += len(called)
        assert steps.num_done == count
