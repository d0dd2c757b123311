"""A session that waits in the GPU holds nobody up: which calls of CUDA would, and all that others do meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import attnd
from tests.attention import dense_attention
from tests.servers import ROOT, ServerProcess, wait_for

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU = torch.device("cuda", 0)
# Seconds for what others do while a session waits, of the 60 that a step may take; and for what compiles a kernel.
OTHERS_S, COMPILES_S = 10.0, 20.0
PAGE, HEADS, KV_HEADS, LAYERS = 16, 8, 2, 2


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What benchmarks/whole_gpu.py found, in a process with the settings of `attnd serve`."""
    folder = tmp_path_factory.mktemp("whole_gpu")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("CUDA_MODULE_LOADING", None)
    command = [sys.executable, "-m", "benchmarks.whole_gpu", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    rows: list[dict[str, Any]] = json.loads((folder / "whole-gpu.json").read_text())["rows"]
    return rows


def test_what_a_server_calls_while_a_stream_waits_returns_at_once(table: list[dict[str, Any]]) -> None:
    avoided = {row["call"] for row in table if row["is_known"] == "yes" and row["waits"] == "yes"}
    waiting = {row["call"]: row["waits"] for row in table if row["waits"] and row["call"] not in avoided}
    assert waiting == {}
    assert len(table) > len(avoided)


def test_what_it_avoids_still_waits(table: list[dict[str, Any]]) -> None:
    """Where a newer driver does not wait any more, the server need not avoid it: see docs/planes.md."""
    assert [row["call"] for row in table if row["is_known"] != "yes"] == []


def on_a_thread(work: Callable[[], Any], timeout_s: float) -> Any:
    """What comes of some work, which must end in time though something waits in the GPU meanwhile."""
    outcome: list[Any] = []

    def run() -> None:
        torch.cuda.set_device(GPU)
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    assert outcome, f"not over after {timeout_s:g} s"
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


@pytest.mark.parametrize("kind", ["words", "spinning"])
def test_a_kernel_in_the_second_context_is_right_until_it_is_loaded_where_it_belongs(kind: str) -> None:
    from attnd_server.device.cuda_graph import captured
    from attnd_server.device.kernels.loading import KernelLoader, StandIn, num_standing_in
    from attnd_server.device.kernels.second_context import second_context
    from attnd_server.device.quiet import quiet_gpu
    from benchmarks.gpu_calls import Gate, compiled, launched

    torch.cuda.set_device(GPU)
    target, stream = torch.zeros(128, dtype=torch.int32, device=GPU), torch.cuda.Stream(GPU)
    (kernel, number), (other, other_number) = compiled(target), compiled(target)
    captured(lambda: target.add_(0), stream)()  # what torch loads for it
    target.zero_()
    torch.cuda.synchronize()
    second_context(GPU.index)
    gate, told = Gate(kind), list[Any]()
    loader = KernelLoader(GPU, lambda *loaded: told.append(loaded))
    let_go = threading.Timer(60, gate.open)
    let_go.start()
    graphs = []

    def load_launch_and_capture() -> None:
        for each, added in ((kernel, number), (other, other_number)):
            before = target.cpu()
            stand_in = loader.load(each)
            assert isinstance(stand_in, StandIn)
            launched(stand_in, target, added)
            assert torch.equal(target.cpu(), before + added)
            before = target.cpu()
            graphs.append(captured(partial(launched, stand_in, target, added), stream))
            assert torch.equal(target.cpu(), before)
            for _ in range(3):
                graphs[-1]()
            assert torch.equal(target.cpu(), before + 3 * added)
            with torch.cuda.stream(stream):
                launched(stand_in, target, added)
            stream.synchronize()
            assert torch.equal(target.cpu(), before + 4 * added)

    try:
        with quiet_gpu(GPU).waits():
            gate.hold()
            on_a_thread(load_launch_and_capture, 2 * OTHERS_S)
            assert gate.is_holding()
            assert num_standing_in(GPU) == 2
            gate.release()
    finally:
        gate.open()
        let_go.cancel()
    wait_for(lambda: len(told) == 2, "the kernels are not loaded where they belong")
    assert num_standing_in(GPU) == 0
    before = target.cpu()
    for (stand_in, loaded), added in zip(told, (number, other_number), strict=True):
        launched(stand_in, target, added)
        launched(loaded, target, added)
    for graph in graphs:
        graph()
    assert torch.equal(target.cpu(), before + 3 * (number + other_number))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerProcess]:
    """One that, if it is still there after the test, says what each of its threads was at."""
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    options = ("--device", "cuda:0", "--socket-dir", str(tmp_path / "sockets"), "--kv-bytes", "4GiB")
    snapshots = ("--snapshot-dir", str(tmp_path / "snapshots"), "--drain-s", "1")
    with ServerProcess(tmp_path / "log", *options, *snapshots) as process:
        yield process
        try:
            process.signal(signal.SIGABRT)  # nothing, if it has ended
            process.wait(OTHERS_S)
        finally:
            print(process.log)


def geometry(head_dim: int) -> dict[str, Any]:
    shape = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": head_dim, "num_pages": 16}
    return {**shape, "page_size": PAGE, "dtype": torch.bfloat16, "ttl_s": 600}


def metadata(context_len: int, num_new: int) -> attnd.StepMetadata:
    slots = list(range(context_len, context_len + num_new))
    kind = "decode" if num_new == 1 else "prefill"
    return attnd.StepMetadata([num_new], [context_len], [list(range(8))], slots, kind=kind)


def tokens(num_tokens: int, head_dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(num_tokens, HEADS, head_dim, dtype=torch.bfloat16, device=device)
    k, v = (torch.randn(num_tokens, KV_HEADS, head_dim, dtype=torch.bfloat16, device=device) for _ in "kv")
    return q, k, v


class Tenant:
    """A cache with a prompt of 20 tokens and one that follows, on a plane; every output is held against float64."""

    def __init__(self, client: attnd.Client, head_dim: int, plane: str) -> None:
        self.cache = client.create_cache(**geometry(head_dim))
        self.plane, self._head_dim = plane, head_dim

    def run(self) -> None:
        device = "cuda:0" if self.plane == "cuda" else "cpu"
        histories: list[tuple[torch.Tensor, torch.Tensor]] = []
        with self.cache.session(plane=self.plane) as session:
            for context_len, num_new in ((0, 20), (20, 1), (21, 1), (22, 1)):
                calls = [tokens(num_new, self._head_dim, device) for _ in range(LAYERS)]
                heads = {"num_heads": HEADS} if self.plane == "cuda" else {}
                step = session.step(metadata(context_len, num_new), **heads)
                outputs = [step.attend(layer, *call) for layer, call in enumerate(calls)]
                if self.plane == "cuda":
                    step.finish()
                for layer, (q, k, v) in enumerate(calls):
                    if not context_len:
                        histories.append((k, v))
                    else:
                        histories[layer] = tuple(map(torch.cat, zip(histories[layer], (k, v), strict=True)))
                    expected = dense_attention(q, *histories[layer])
                    torch.testing.assert_close(outputs[layer], expected, rtol=2e-2, atol=2e-2)
            assert session.plane == self.plane


class Waiting:
    """A session whose step waits in the GPU for its first layer."""

    def __init__(self, client: attnd.Client) -> None:
        self._cache = client.create_cache(**geometry(64))
        self._session = self._cache.session(plane="cuda")
        self._num_tokens = 0
        self._step: Any = None
        for _ in range(3):  # one layer by layer, one that is captured and one that is replayed
            self.begin()
            self.end()

    def begin(self) -> None:
        self._calls = [tokens(1, 64, "cuda:0") for _ in range(LAYERS)]
        torch.cuda.synchronize()  # of this process, in which nothing waits
        self._step = self._session.step(metadata(self._num_tokens, 1), num_heads=HEADS)
        self._num_tokens += 1

    def end(self) -> None:
        """Hands all layers over, which the server must still be waiting for."""
        for layer, call in enumerate(self._calls):
            output = self._step.attend(layer, *call)
            if self._num_tokens == 1:
                assert torch.equal(output, call[2].repeat_interleave(HEADS // KV_HEADS, 1))
            assert output.isfinite().all()
        self._step.finish()


def test_everything_that_others_ask_for_ends_while_a_session_waits(server: ServerProcess, tmp_path: Path) -> None:
    with attnd.connect(server.address, plane="cuda") as one, attnd.connect(server.address) as other:
        waiting = Waiting(one)
        waiting.begin()
        caches = []
        # Head dims of which the server has run nothing yet.
        for head_dim, plane in ((80, "inline"), (96, "shm"), (112, "cuda")):
            tenant = on_a_thread(partial(Tenant, other, head_dim, plane), OTHERS_S)
            on_a_thread(tenant.run, COMPILES_S)
            caches.append(tenant.cache)
        captured = on_a_thread(partial(Tenant, other, 128, "inline"), OTHERS_S).cache
        warmed = on_a_thread(partial(captured.warm_up, num_heads=HEADS, max_reqs=4), COMPILES_S)
        assert warmed.num_graphs
        on_a_thread(caches[1].delete, OTHERS_S)
        waiting.end()  # it has been waiting all the time
        # Once more, with what is there by now, and many at once.
        waiting.begin()
        with ThreadPoolExecutor(3) as pool:
            planes = ("shm", "cuda", "inline")
            runs = [pool.submit(Tenant(other, 80, plane).run) for plane in planes]
            for run in runs:
                run.result(OTHERS_S)
        on_a_thread(caches[2].delete, OTHERS_S)
        waiting.end()
        waiting.begin()
        server.terminate()
        assert server.wait(OTHERS_S + 1) == 0  # the drain gives the step a second
    assert list((tmp_path / "snapshots").iterdir())
    assert "cache lost" not in server.log
