"""The cuda plane through a real server: the bits of the backend in process, graphs, and what killed ones leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import attnd
from attnd.v1 import cache_pb2
from tests.gpu import devices
from tests.servers import ServerProcess

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

PAGE, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 16, 8, 2, 64, 4
PAGES_OF_REQUEST, NUM_REQS = 40, 5
GEOMETRY = {
    "num_layers": LAYERS,
    "num_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "dtype": torch.bfloat16,
    "page_size": PAGE,
    "num_pages": PAGES_OF_REQUEST * NUM_REQS,
    "ttl_s": 600,
}
TABLES = [list(range(PAGES_OF_REQUEST * r, PAGES_OF_REQUEST * (r + 1))) for r in range(NUM_REQS)]

Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


# Logs of the servers of this module that run.
LOGS: list[Path] = []


@pytest.fixture(autouse=True)
def _told() -> Iterator[None]:
    """What a failure shows of the servers beside itself: all that they logged during the test."""
    before = {path: path.stat().st_size for path in LOGS}
    yield
    for path in LOGS:
        with path.open("rb") as log:
            log.seek(before.get(path, 0))
            print(f"--- {path}:", log.read().decode(), sep="\n")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("cuda")
    with serving(folder) as process:
        yield process
        log = process.log
    assert "internal error" not in log, log


def serving(folder: Path, *more: str) -> ServerProcess:
    options = ("--device", "cuda:0", "--socket-dir", str(folder / "sockets"), "--kv-bytes", "4GiB")
    LOGS.append(folder / "log")
    return ServerProcess(folder / "log", *options, *more)


@pytest.fixture(
    params=[
        pytest.param(0, id="one_gpu"),
        pytest.param(
            1, id="two_gpus", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
        ),
    ]
)
def gpu(request: pytest.FixtureRequest) -> Iterator[int]:
    """The worker's GPU; the server has GPU 0."""
    with torch.cuda.device(request.param):
        yield request.param


@pytest.fixture
def client(server: ServerProcess) -> Iterator[attnd.Client]:
    with attnd.connect(server.address, plane="cuda") as connected:
        yield connected


def new_tokens(num_tokens: int, gpu: int) -> Call:
    q = torch.randn(num_tokens, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=f"cuda:{gpu}")
    k, v = (torch.randn(num_tokens, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=q.device) for _ in "kv")
    return q, k, v


def step_of(context_lens: list[int], num_new: list[int]) -> attnd.StepMetadata:
    slots = [
        table[p // PAGE] * PAGE + p % PAGE
        for table, context_len, new in zip(TABLES, context_lens, num_new, strict=False)
        for p in range(context_len, context_len + new)
    ]
    kind = "decode" if len(set(num_new)) == 1 else "prefill"
    return attnd.StepMetadata(num_new, context_lens, TABLES[: len(num_new)], slots, kind=kind)


def calls_of(num_tokens: int, gpu: int) -> list[Call]:
    return [new_tokens(num_tokens, gpu) for _ in range(LAYERS)]


def attend_all(step: attnd.Step, calls: list[Call], options: attnd.AttentionOptions | None = None) -> list[object]:
    more = () if options is None else (options,)
    return [step.attend(layer, *call, *more) for layer, call in enumerate(calls)]


def assert_same(ours: object, theirs: object) -> None:
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, theirs)), strict=True):
        assert torch.equal(one.cpu(), other.cpu())


def one_step(session: attnd.Session, gpu: int, context_len: int = 0) -> None:
    step = session.step(step_of([context_len], [1]), num_heads=HEADS)
    attend_all(step, calls_of(1, gpu))
    step.finish()


@pytest.mark.parametrize(
    "options",
    [attnd.AttentionOptions(), attnd.AttentionOptions(window=33, softcap=20.0, return_lse=True)],
    ids=["plain", "window_softcap_lse"],
)
def test_outputs_are_those_of_the_backend_in_process_bit_for_bit(
    client: attnd.Client, gpu: int, options: attnd.AttentionOptions
) -> None:
    lens = [0] * NUM_REQS
    shapes = [[37, 1, 20, 64, 5]] + [[1] * NUM_REQS] * 20 + [[32] * NUM_REQS, [3, 1, 1, 7, 2]]
    with (
        attnd.connect("inproc://") as local,
        client.create_cache(**GEOMETRY) as ours,
        local.create_cache(**GEOMETRY) as theirs,
        ours.session() as session,
        theirs.session() as reference,
    ):
        for num_new in shapes:
            calls = calls_of(sum(num_new), gpu)
            step = session.step(step_of(lens, num_new), num_heads=HEADS, options=options)
            outputs = attend_all(step, calls)
            step.finish()
            expected = attend_all(reference.step(step_of(lens, num_new)), calls, options)
            for ours_, theirs_ in zip(outputs, expected, strict=True):
                assert_same(ours_, theirs_)
            lens = [length + new for length, new in zip(lens, num_new, strict=True)]
        assert session.plane == "cuda"
        assert session.timings().backend == "triton_grouped"
        like = torch.empty(0, dtype=torch.bfloat16)
        slots = list(range(GEOMETRY["num_pages"] * PAGE))
        for layer in range(LAYERS):
            for one, other in zip(*(cache.read_kv(layer, slots, like) for cache in (ours, theirs)), strict=True):
                assert torch.equal(one, other)


KINDS = {
    # The second request reads a page that the first one fills in the same step.
    "store_first": attnd.StepMetadata([16, 1], [0, 16], [[1, -1], [1, 2]], list(range(16, 33)), store_first=True),
    "store_first_decode": attnd.StepMetadata(
        [1, 1], [20, 15], [[3, 4], [5, 6]], [68, 95], kind="decode", store_first=True
    ),
    "freed_pages": attnd.StepMetadata(
        [1] * 2, [100, 47], [[-1, 10**6, 9, 3, 4, 5, 6], [9, 0, 7, 8, -1, -1, -1]], [144, 143], kind="decode", window=40
    ),
    "owners": attnd.StepMetadata(
        [1, 1, 1], [33, 40, 5], [[0, 1, 2], [3, 4, 5], [6, -1, -1]], [-1, 88, 101], kind="decode",
        attend_new=[0, 1, 0], first_position=[0, 512, 64],
    ),
    "unseen": attnd.StepMetadata([3, 2], [4, 5], [[0], [1]], [4, -1, 5, 21, -1], store_first=True),
    "padded": attnd.StepMetadata([1, 1, 0], [9, -1, 0], [[0], [2], [2]], [9, -1], kind="decode"),
}  # fmt: skip


@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_engines_have_the_bits_of_the_backend_in_process(
    client: attnd.Client, gpu: int, kind: str, kv_dtype: str | None
) -> None:
    metadata, num_slots = KINDS[kind], GEOMETRY["num_pages"] * PAGE
    stored = [torch.randn(num_slots, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in "kv"]
    calls = calls_of(metadata.num_tokens, gpu)
    with (
        attnd.connect("inproc://") as local,
        client.create_cache(**GEOMETRY, kv_dtype=kv_dtype) as ours,
        local.create_cache(**GEOMETRY, kv_dtype=kv_dtype) as theirs,
        ours.session() as session,
    ):
        for cache in (ours, theirs):
            for layer in range(LAYERS):
                cache.store_kv(layer, range(num_slots), *stored)
        step = session.step(metadata, num_heads=HEADS)
        outputs = attend_all(step, calls)
        step.finish()
        expected = attend_all(theirs.session().step(metadata), calls)
        for ours_, theirs_ in zip(outputs, expected, strict=True):
            assert_same(ours_, theirs_)
            assert ours_.isfinite().all()
        for layer in range(LAYERS):
            for one, other in zip(
                *(c.read_kv(layer, range(num_slots), stored[0]) for c in (ours, theirs)), strict=True
            ):
                assert torch.equal(one, other)


def test_steps_that_nobody_waits_for_come_out_right(client: attnd.Client, gpu: int) -> None:
    with (
        attnd.connect("inproc://") as local,
        client.create_cache(**GEOMETRY) as ours,
        local.create_cache(**GEOMETRY) as theirs,
        theirs.session() as reference,
    ):
        done = []
        with ours.session() as session:
            for position in range(50):
                num_reqs = NUM_REQS - position // 3 % 2 * 2  # two graphs in turn, and the same one again at once
                calls = calls_of(num_reqs, gpu)
                metadata = step_of([position] * num_reqs, [1] * num_reqs)
                done.append((metadata, calls, attend_all(session.step(metadata, num_heads=HEADS), calls)))
        for metadata, calls, outputs in done:
            for ours_, theirs_ in zip(outputs, attend_all(reference.step(metadata), calls), strict=True):
                assert_same(ours_, theirs_)


def test_a_step_replayed_from_the_workers_own_graph(client: attnd.Client, gpu: int) -> None:
    """Each layer's input depends on the output before it, as in a model."""
    inputs = calls_of(NUM_REQS, gpu)
    offset = torch.zeros((), dtype=torch.bfloat16, device=f"cuda:{gpu}")

    def model(step: attnd.Step) -> torch.Tensor:
        hidden = torch.zeros_like(inputs[0][0])
        for layer, (q, k, v) in enumerate(inputs):
            hidden = step.attend(layer, q + hidden + offset, k + offset, v) * 2
        return hidden

    with (
        attnd.connect("inproc://") as local,
        client.create_cache(**GEOMETRY) as ours,
        local.create_cache(**GEOMETRY) as theirs,
        ours.session() as session,
        theirs.session() as reference,
    ):

        def steps(position: int) -> tuple[attnd.Step, attnd.Step]:
            metadata = step_of([position] * NUM_REQS, [1] * NUM_REQS)
            return session.step(metadata, num_heads=HEADS), reference.step(metadata)

        ours_step, theirs_step = steps(0)
        assert_same(model(ours_step), model(theirs_step))
        ours_step.finish()
        graph = torch.cuda.CUDAGraph()
        ours_step, theirs_step = steps(1)
        # Of the worker's GPU: torch's own is of the one that was current at the first capture of the process.
        with devices.capturing(graph, torch.cuda.Stream(gpu)):
            hidden = model(ours_step)
        for position in range(1, 60):
            if position > 1:
                ours_step, theirs_step = steps(position)
            offset.fill_(position / 8)
            graph.replay()
            ours_step.finish()
            assert_same(hidden, model(theirs_step))


def test_several_sessions_wait_at_once_and_hold_up_nobody(client: attnd.Client, gpu: int) -> None:
    """Each has a step whose first layer does not come, while others open planes, make caches and are served inline."""
    started = time.monotonic()

    def tell(what: str) -> None:
        """For who looks into a failure."""
        print(f"{time.monotonic() - started:8.3f} s: {what}")

    with client.create_cache(**GEOMETRY) as cache, client.create_cache(**GEOMETRY) as inline_cache:

        def waiting(session: attnd.CudaSession, index: int) -> attnd.CudaStep:
            table = list(range(4 * index, 4 * index + 4))  # pages of its own
            metadata = attnd.StepMetadata([1], [0], [table], [table[0] * PAGE], kind="decode")
            return session.step(metadata, num_heads=HEADS)

        def finish(step: attnd.CudaStep) -> None:
            q, k, v = new_tokens(1, gpu)
            for layer in range(LAYERS):
                assert_same(step.attend(layer, q, k, v), v.repeat_interleave(HEADS // KV_HEADS, dim=1))
            step.finish()

        def serve_inline() -> None:
            with inline_cache.session(plane="inline") as inline:
                for position in range(20):
                    attend_all(inline.step(step_of([position], [1])), calls_of(1, gpu))
            client.create_cache(**GEOMETRY).delete()

        # A kernel's first launch loads it, for which the driver may wait for all that runs: here, before anything does.
        with cache.session() as session:
            finish(waiting(session, 0))
        serve_inline()
        tell("warm")
        started_waiting = time.monotonic()
        sessions: list[attnd.CudaSession] = []
        steps: list[attnd.CudaStep] = []
        failures: dict[str, BaseException] = {}
        try:
            for index in range(16):
                sessions.append(cache.session())
                steps.append(waiting(sessions[-1], index))
                tell(f"{index + 1} wait")
            serve_inline()
            tell("served inline")
            late = cache.session()
            sessions.append(late)
            with pytest.raises(
                attnd.Exhausted, match="16 cuda planes are open, which is the limit: each has a stream that"
            ):
                late.step(step_of([0], [1]), num_heads=HEADS)
            tell("refused the next")
            assert time.monotonic() - started_waiting < 20  # no deadline has passed
        except BaseException as error:  # told with those of the steps
            tell(f"failed: {error!r}")
            failures["the test"] = error
        for index, step in reversed(list(enumerate(steps))):
            try:
                finish(step)
                tell(f"finished {index}")
            except (attnd.AttndError, AssertionError) as error:
                failures[f"step {index}"] = error
        for session in sessions:
            session.close()
        assert not failures, failures


def test_other_work_on_the_same_cache_comes_before_and_after_a_step(client: attnd.Client, gpu: int) -> None:
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        like = torch.empty(0, dtype=torch.bfloat16)
        for position in range(0, 30, 2):
            k, v = (torch.randn(position + 1, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in "kv")
            for layer in range(LAYERS):
                cache.store_kv(layer, range(position + 1), k, v)
            q, new_k, new_v = new_tokens(1, gpu)
            step = session.step(step_of([position + 1], [1]), num_heads=HEADS)
            for layer in range(LAYERS):
                step.attend(layer, q, new_k, new_v)
            step.finish()
            cache.copy_pages([position // PAGE], [PAGES_OF_REQUEST])
            slot = PAGES_OF_REQUEST * PAGE + (position + 1) % PAGE
            for layer in range(LAYERS):
                if (position + 1) // PAGE == position // PAGE:
                    assert torch.equal(cache.read_kv(layer, [slot], like)[0], new_k.cpu())


def test_a_cache_that_is_deleted_in_the_middle_of_a_step(client: attnd.Client, gpu: int) -> None:
    with client.create_cache(**GEOMETRY) as other:
        cache = client.create_cache(**GEOMETRY)
        session = cache.session()
        step = session.step(step_of([0], [1]), num_heads=HEADS)
        calls = calls_of(1, gpu)
        step.attend(0, *calls[0])
        torch.cuda.synchronize(gpu)  # the step is under way, and not only its message
        # As by another worker: this cache's own `delete` ends the session.
        request = cache_pb2.DeleteCacheRequest(cache=cache.ref).SerializeToString()
        client.transport.unary("DeleteCache", request, 30.0)
        with client.create_cache(**GEOMETRY) as next_cache:  # its pages are zeros, whatever the step stores
            for layer in range(1, LAYERS):
                step.attend(layer, *calls[layer])
            with pytest.raises(attnd.CacheLost, match="was deleted, or its lease ended, while a step ran"):
                step.finish()
            for layer in range(LAYERS):
                k, v = next_cache.read_kv(layer, range(64), torch.empty(0, dtype=torch.bfloat16))
                assert not k.any()
                assert not v.any()
        with other.session() as healthy:
            one_step(healthy, gpu)
        session.close()


WORKER = """
    import sys, time, torch, attnd
    address, gpu = sys.argv[1], int(sys.argv[2])
    torch.cuda.set_device(gpu)
    client = attnd.connect(address, plane="cuda")
    cache = client.create_cache(num_layers=4, num_kv_heads=2, head_dim=64, num_pages=8, dtype=torch.bfloat16, ttl_s=5)
    session = cache.session()
    q = torch.ones(1, 8, 64, dtype=torch.bfloat16, device="cuda")
    k = torch.ones(1, 2, 64, dtype=torch.bfloat16, device="cuda")
    step = session.step(attnd.StepMetadata([1], [0], [[0]], [0]), num_heads=8)
    for layer in range(4):
        step.attend(layer, q, k, k)
    step.finish()
    step = session.step(attnd.StepMetadata([1], [1], [[0]], [1]), num_heads=8)
    step.attend(0, q, k, k)
    print("waiting", flush=True)
    time.sleep(600)
"""


def killed_worker(address: str, gpu: int) -> None:
    """A worker that is killed between two layers."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", textwrap.dedent(WORKER), address, str(gpu)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGKILL)


def test_killed_workers_leave_nothing(tmp_path: Path, gpu: int) -> None:
    times = int(os.environ.get("ATTND_TEST_CRASHES", "6"))  # 100 for the record
    with serving(tmp_path, "--max-cuda-planes", "2") as process:
        with attnd.connect(process.address, plane="cuda") as client, client.create_cache(**GEOMETRY) as cache:

            def free_bytes() -> int:
                """After the planes of killed workers have gone, as the limit shows."""
                deadline = time.monotonic() + 20
                while True:
                    sessions = [cache.session(), cache.session()]
                    try:
                        for index, session in enumerate(sessions):
                            one_step(session, gpu, index)
                        break
                    except attnd.Exhausted:
                        assert time.monotonic() < deadline
                        time.sleep(0.05)
                    finally:
                        for session in sessions:
                            session.close()
                return int(torch.cuda.mem_get_info(0)[0])

            killed_worker(process.address, gpu)
            free, descriptors = free_bytes(), num_descriptors(process.pid)
            for _ in range(times):
                killed_worker(process.address, gpu)
            time.sleep(6)  # leases of the killed workers' caches
            deadline = time.monotonic() + 20  # what sessions had is freed a little after they end
            while free_bytes() < free - (32 << 20) or num_descriptors(process.pid) > descriptors + 1:
                told = torch.cuda.mem_get_info(0)[0] - free, num_descriptors(process.pid) - descriptors
                assert time.monotonic() < deadline, told
                time.sleep(0.2)


def num_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_a_killed_server_lets_the_worker_go(tmp_path: Path, gpu: int) -> None:
    if gpu == 0 and devices.has_mps():
        pytest.skip("under MPS a process that is killed leaves the others of its GPU with an error")
    with serving(tmp_path) as process, attnd.connect(process.address, plane="cuda") as client:
        cache = client.create_cache(**GEOMETRY)
        session = cache.session()
        one_step(session, gpu)
        step = session.step(step_of([1], [1]), num_heads=HEADS)
        calls = calls_of(1, gpu)
        step.attend(0, *calls[0])
        torch.cuda.synchronize(gpu)
        process.kill()
        started = time.monotonic()
        with pytest.raises(attnd.Disconnected, match="no connection to the server"):  # noqa: PT012
            for layer in range(1, LAYERS):
                step.attend(layer, *calls[layer])
            step.finish()
        torch.cuda.synchronize(gpu)
        assert time.monotonic() - started < 10
        session.close()


def test_a_frozen_server_is_a_deadline(tmp_path: Path, gpu: int) -> None:
    with serving(tmp_path) as process, attnd.connect(process.address, plane="cuda") as client:
        cache = client.create_cache(**GEOMETRY)
        session = cache.session()
        one_step(session, gpu)
        session.timeout_s = 2
        process.freeze()
        try:
            step = session.step(step_of([1], [1]), num_heads=HEADS)
            calls = calls_of(1, gpu)
            with pytest.raises(attnd.DeadlineExceeded, match="step 2 was not done in time"):  # noqa: PT012
                attend_all(step, calls)
                step.finish()
            torch.cuda.synchronize(gpu)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        session.close()
        with cache.session() as again:
            one_step(again, gpu, 1)


def test_a_step_left_alone_is_let_go_when_its_session_closes(client: attnd.Client, gpu: int) -> None:
    with client.create_cache(**GEOMETRY) as cache:
        for _ in range(20):
            session = cache.session()
            step = session.step(step_of([0], [1]), num_heads=HEADS)
            step.attend(0, *new_tokens(1, gpu))
            session.close()
        with cache.session() as session:
            one_step(session, gpu)


LIES = """
import mmap, sys
word = memoryview(mmap.mmap(int(sys.argv[1]), 4096)).cast("I")
print("lies", flush=True)
while True:
    for _ in range(1000):
        word[0] = 0
"""


def test_a_worker_that_writes_its_word_over_holds_no_stream_of_the_server() -> None:
    """On one GPU both sides have the word: two processes write zeros there, while a hundred layers are let go."""
    from attnd.protocol.cuda.driver import Stream, device
    from attnd.protocol.cuda.host_flags import HostFlags, HostWords
    from attnd.protocol.shm import sockets

    gpu = device(0)
    memory = sockets.sealed_memory(4096)
    with gpu.current():
        words = HostWords(sockets.map_memory(os.dup(memory), 4096))
        stream, flags = Stream(gpu), HostFlags(words, signal=64, flag=0)
        command = [sys.executable, "-c", LIES, str(memory)]
        liars = [subprocess.Popen(command, pass_fds=[memory], stdout=subprocess.PIPE, text=True) for _ in range(2)]
        try:
            for liar in liars:
                assert liar.stdout is not None
                assert liar.stdout.readline() == "lies\n"
            for layer in range(100):
                flags.wait(stream.handle, layer, is_last=layer == 99)
                flags.signal(stream.handle, layer, is_last=layer == 99)
            assert not stream.is_idle()
            deadline = time.monotonic() + 60
            while not stream.is_idle() and time.monotonic() < deadline:
                flags.stop()
                time.sleep(0.001)
            is_idle = stream.is_idle()
        finally:
            for liar in liars:
                liar.kill()
                liar.wait()
                assert liar.stdout is not None
                liar.stdout.close()
        while not stream.is_idle():  # or closing would wait for ever
            flags.stop()
        flags.close()
        stream.close()
        os.close(memory)
    assert is_idle
