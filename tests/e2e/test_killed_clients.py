"""Clients that are killed at every point of a step: nobody else is harmed, and nothing stays behind."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attnd
from tests import dying
from tests.servers import ServerProcess, mapped, wait_for
from tests.soak.resources import resources

# Points of a step at which a client is killed: lines of the client's code, evenly over all that a step runs.
NUM_POINTS = 6
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.dying", "tests.soak.load"])


@pytest.fixture(scope="module")
def killed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("killed")
    options = ("--device", "cpu", "--socket-dir", str(folder / "sockets"), "--region-bytes", str(1 << 20))
    with ServerProcess(folder / "log", *options) as process:
        yield process
        log = process.log
    assert "internal error" not in log, log
    assert "Traceback" not in log, log


class Bystander:
    """Somebody else's client: what it stored stays, and its steps are answered."""

    def __init__(self, client: attnd.Client) -> None:
        self.client = client
        self.cache = client.create_cache(**dying.GEOMETRY, name="bystander")
        self.session = self.cache.session()
        self._slots = list(range(32))
        self.stored = []
        for layer in range(2):
            k, v = np.random.default_rng(layer).standard_normal((2, 32, 2, 16), np.float32)
            self.cache.store_kv(layer, self._slots, k, v)
            self.stored.append((k, v))

    def check(self) -> None:
        step = self.session.step(attnd.StepMetadata([1], [0], [[0]]))
        assert (step.attend(0, dying.one(), dying.one(), dying.one()) == 1).all()
        for layer, stored in enumerate(self.stored):
            read = self.cache.read_kv(layer, self._slots, like=np.zeros(1, np.float32))
            assert all(map(np.array_equal, read, stored))


def run(target: Callable[..., None], *arguments: Any) -> int:
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode is not None, "the client hangs"
    code = process.exitcode
    process.close()
    return code


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_a_client_killed_at_every_point_of_a_step_harms_nobody(killed_server: ServerProcess, plane: str) -> None:
    count: Synchronized[int] = CONTEXT.Value("q", 0)
    assert run(dying.die_in_a_step, killed_server.address, plane, 0, count) == 0
    num_lines = count.value
    assert num_lines > 100
    with attnd.connect(killed_server.address, plane="inline") as client:
        bystander = Bystander(client)
        bystander.check()
        wait_for(lambda: mapped(killed_server.pid) == 0, "the server kept a region")
        folder = Path(killed_server.log_path).parent / "sockets"
        before = resources(killed_server.pid, folder)
        codes = []
        for point in range(NUM_POINTS):
            at_line = 1 + point * (num_lines - 1) // NUM_POINTS
            codes.append(run(dying.die_in_a_step, killed_server.address, plane, at_line, count))
            bystander.check()
        # Answers that come together save some lines, so that the last point may not be reached.
        assert set(codes[: NUM_POINTS * 3 // 4]) == {-signal.SIGKILL}
        assert set(codes) <= {-signal.SIGKILL, 0}
        wait_for(lambda: len(client.list_caches()) == 1, "the server kept a dead client's cache")
        wait_for(
            lambda: resources(killed_server.pid, folder).descriptors <= before.descriptors, "descriptors were leaked"
        )
        assert mapped(killed_server.pid) == 0
        bystander.check()
        bystander.session.close()
        bystander.cache.delete()


def test_a_client_killed_while_it_stores_leaves_its_stream_and_no_more(killed_server: ServerProcess) -> None:
    with attnd.connect(killed_server.address, plane="inline") as client:
        bystander = Bystander(client)
        assert run(dying.die_while_storing, killed_server.address) == -signal.SIGKILL
        bystander.check()
        wait_for(lambda: len(client.list_caches()) == 1, "the server kept a dead client's cache")
        bystander.session.close()
        bystander.cache.delete()
