"""Calls that repeat others in all but the layer, of several shm sessions, on a device that reaches their regions."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import attnd
from attnd.protocol.regions import Region
from attnd.protocol.tensors import DTYPES, Array, torch_tensor
from attnd_server.attention.config import AttentionBackend
from attnd_server.device.copy_timer import Copies
from attnd_server.execution.batch import SharedLaunches
from attnd_server.execution.joined.graphs import JoinedGraphs
from attnd_server.execution.joined.repeat import Repeat
from attnd_server.execution.runner import Runner
from attnd_server.execution.step import Call, attend
from attnd_server.identity import TokenPrincipal
from attnd_server.observe.calls import CallObserver
from attnd_server.observe.counts import Metrics
from attnd_server.planes.server import PlaneServer
from attnd_server.planes.shm.loop_clients import LoopClient, LoopClients
from attnd_server.service.repeated_lane import RepeatedLane
from attnd_server.service.replies import NOTHING, RegionReplies
from tests.unit.test_shm_server import serving

GEOMETRY: dict[str, Any] = {
    "num_layers": 6,
    "num_kv_heads": 2,
    "head_dim": 16,
    "num_pages": 16,
    "dtype": "float32",
    "backend": "naive",
}
COPIES = Copies(3, 4)
NUM_SESSIONS, NUM_STEPS = 4, 10


class FakeGraph:
    """Attends each call as if it were alone, and puts the output where it belongs. Notes what came together."""

    backend = AttentionBackend.NAIVE

    def __init__(self, runner: Runner) -> None:
        self._ops = runner.ops
        self.together: list[int] = []

    def attend_repeats(self, repeats: Sequence[Repeat]) -> Copies:
        self.together.append(len(repeats))
        for each in repeats:
            call = each.of.call._replace(layer=each.layer)
            result = attend(call, self._ops)
            assert result.output is not None
            assert call.into is not None
            call.into[0].copy_(result.output)
            if result.store is not None:
                result.store()
        return COPIES


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[PlaneServer, attnd.Client, FakeGraph]]:
    made = RegionReplies.__init__

    def reached(self: RegionReplies, region: Region, reach: range = range(0)) -> None:
        made(self, region, range(1, 1 << 62))

    def into(self: RegionReplies, call: Call, rows: tuple[int, ...], reply: Any) -> Any:
        """As where the device is a GPU."""
        shape = (*rows, call.step.group.config.head_dim_v)
        (view,) = self._memory.places([Array(DTYPES["float32"], shape, NOTHING)], reply.offset, "reply")[1]
        return torch_tensor(Array(DTYPES["float32"], shape, view)), None

    wait = LoopClients.wait

    def wait_for_others(self: LoopClients, ready: dict[LoopClient, None]) -> dict[LoopClient, None]:
        """So that requests come together here, where all clients share an interpreter with the server."""
        ready = wait(self, ready)
        time.sleep(0.005)
        return wait(self, ready) if ready else ready

    monkeypatch.setattr(LoopClients, "wait", wait_for_others)
    monkeypatch.setattr(RegionReplies, "__init__", reached)
    monkeypatch.setattr(RegionReplies, "_into", into)
    with serving(tmp_path) as (server, client):
        graph = FakeGraph(server._service.executor.runner)
        monkeypatch.setattr(JoinedGraphs, "find", lambda *_: graph)
        monkeypatch.setattr(SharedLaunches, "attend_alone", lambda *_: None)
        # What is together and no repeat runs alone here.
        monkeypatch.setattr(Runner, "others_for", lambda *_: [])
        yield server, client, graph


class Worker:
    """Decodes one token more a step, and knows what must come of it."""

    def __init__(self, client: attnd.Client, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.cache = client.create_cache(**GEOMETRY)
        self.session = self.cache.session()
        self.stored: list[list[torch.Tensor]] = [[] for _ in range(GEOMETRY["num_layers"])]
        self.num_right = 0

    def step(self) -> None:
        length = len(self.stored[0])
        table = [list(range(GEOMETRY["num_pages"]))]
        opened = self.session.step(attnd.StepMetadata([1], [length], table, [length], kind="decode"))
        for layer, stored in enumerate(self.stored):
            q, k, v = (torch.randn(1, heads, 16, generator=self.random) for heads in (4, 2, 2))
            stored.append(torch.stack([k[0], v[0]]))
            keys, values = (part.repeat_interleave(2, 1).transpose(0, 1) for part in torch.stack(stored, 1))
            expected = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), keys, values)
            torch.testing.assert_close(opened.attend(layer, q, k, v), expected.transpose(0, 1), atol=1e-5, rtol=1e-5)
            self.num_right += 1

    def run(self) -> None:
        for _ in range(NUM_STEPS):
            self.step()


def run_all(workers: list[Worker]) -> None:
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [worker.num_right for worker in workers] == [NUM_STEPS * GEOMETRY["num_layers"]] * len(workers)


def test_repeats_of_several_sessions_run_together_and_each_gets_its_own(
    served: tuple[PlaneServer, attnd.Client, FakeGraph],
) -> None:
    server, client, graph = served
    metrics, runner = Metrics(), server._service.executor.runner
    runner._observer = runner.repeats._observer = CallObserver(metrics, None)
    workers = [Worker(client, seed) for seed in range(NUM_SESSIONS)]
    run_all(workers)
    assert graph.together
    assert 2 <= min(graph.together) <= max(graph.together) <= NUM_SESSIONS
    (tally,) = metrics.calls.values()
    num_calls = NUM_SESSIONS * NUM_STEPS * GEOMETRY["num_layers"]
    assert sum(tally.kernel_us.counts) == num_calls
    assert tally.received_bytes == num_calls * (4 + 2 + 2) * 16 * 4
    assert tally.sent_bytes == num_calls * 4 * 16 * 4
    assert tally.copy_in_us.sum == COPIES.in_us * sum(graph.together)
    assert all(worker.session.timings().num_calls == NUM_STEPS * GEOMETRY["num_layers"] for worker in workers)


def test_sessions_of_one_cache_never_share_a_launch(served: tuple[PlaneServer, attnd.Client, FakeGraph]) -> None:
    _, client, graph = served
    one = Worker(client, 1)
    other = Worker(client, 2)
    other.session = one.cache.session()
    # Both write the same slots of the same cache: outputs mean nothing, but none may run beside the other.
    errors: list[BaseException] = []

    def run(worker: Worker) -> None:
        for step in range(NUM_STEPS):
            opened = worker.session.step(attnd.StepMetadata([1], [step], [list(range(16))], [step], kind="decode"))
            for layer in range(GEOMETRY["num_layers"]):
                try:
                    opened.attend(layer, *(torch.ones(1, heads, 16) for heads in (4, 2, 2)))
                except BaseException as error:
                    errors.append(error)

    threads = [threading.Thread(target=run, args=(worker,)) for worker in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert graph.together == []


def test_what_a_repeat_may_not_be_is_told_as_ever(served: tuple[PlaneServer, attnd.Client, FakeGraph]) -> None:
    _, client, graph = served
    workers = [Worker(client, seed) for seed in range(2)]
    run_all(workers)
    num_together = len(graph.together)
    assert num_together
    opened = workers[0].session.step(attnd.StepMetadata([1], [0], [[0]], [0], kind="decode"))
    call = [torch.ones(1, heads, 16) for heads in (4, 2, 2)]
    opened.attend(0, *call)
    with pytest.raises(attnd.InvalidRequest, match=r"layer is 6, but the cache has layers 0\.\.5"):
        opened.attend(6, *call)
    opened.attend(1, *call)
    workers[0].cache.delete()
    with pytest.raises(attnd.AttndError):
        opened.attend(2, *call)
    workers[1].step()


def test_a_device_that_others_have_leaves_repeats_to_the_queue(
    served: tuple[PlaneServer, attnd.Client, FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client, graph = served
    monkeypatch.setattr(server._service.executor, "_take_idle_device", lambda: False)
    run_all([Worker(client, seed) for seed in range(2)])
    assert graph.together == []


def test_nothing_is_begun_on_a_device_that_has_failed(
    served: tuple[PlaneServer, attnd.Client, FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client, graph = served
    monkeypatch.setattr(server._service.executor.runner.repeats, "_faults", SimpleNamespace(reason="it is gone"))
    run_all([Worker(client, seed) for seed in range(2)])
    assert graph.together == []


def test_a_failed_launch_is_run_again_one_by_one(
    served: tuple[PlaneServer, attnd.Client, FakeGraph],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, client, graph = served
    num_failed = 0

    def fail(repeats: Sequence[Repeat]) -> Copies:
        nonlocal num_failed
        num_failed += 1
        raise ZeroDivisionError

    monkeypatch.setattr(graph, "attend_repeats", fail)
    run_all([Worker(client, seed) for seed in range(3)])
    assert num_failed
    assert "repeated calls cannot run together" in caplog.text


def test_another_backend_is_never_said_to_be_the_last(
    served: tuple[PlaneServer, attnd.Client, FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client, graph = served
    monkeypatch.setattr(graph, "backend", AttentionBackend.SDPA)
    run_all([Worker(client, seed) for seed in range(2)])
    assert graph.together == []


def test_a_repeat_is_told_by_its_lane_step_and_layer_alone() -> None:
    tokens: Any = SimpleNamespace(known={b"key": "alice"})
    principal, called, renewed = TokenPrincipal("alice", tokens, b"key"), list[int](), list[bool]()
    cache = SimpleNamespace(renew=lambda: renewed.append(True))
    group = SimpleNamespace(layer_numbers=(1, 3, 5))  # of a cache with several layer groups
    of: Any = SimpleNamespace(call=SimpleNamespace(step=SimpleNamespace(id=7, group=group, cache=cache)))
    lane = RepeatedLane(of, 2, principal, called.append)
    assert lane.repeat(3, 7, 2) == Repeat(of, 1)
    for layer, step_id, number in ((2, 7, 2), (6, 7, 2), (3, 8, 2), (3, 7, 0)):
        assert lane.repeat(layer, step_id, number) is None
    lane.answered(3)
    assert (called, renewed) == ([3], [True])
    tokens.known = {}
    assert lane.repeat(3, 7, 2) is None
