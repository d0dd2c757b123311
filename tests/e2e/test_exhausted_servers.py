"""A server without descriptors for planes or memory for caches, and a plane whose client reads nothing.

Of connections and streams: see test_hostile_clients.py.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import attnd
from attnd_server.planes import connection as plane_connection
from tests.raw_shm import AGAIN, RawClient
from tests.servers import ServerProcess, wait_for

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
Q, K, V = torch.ones(1, 2, 16), torch.ones(1, 2, 16), torch.ones(1, 2, 16)
# Address space for everything but the cache that is refused. A thread takes 8 MiB for its stack and 64 MiB for malloc,
# and for each core one may start: of gRPC, or of OpenMP, which ends the process if the system refuses it.
ROOM = (64 << 20) + (os.cpu_count() or 1) * (72 << 20)
# A cache that takes far more: its K alone four times as much, in two layers of 4 KiB a page. Its V as much again.
LARGE = {**GEOMETRY, "head_dim": 128, "num_pages": 4 * ROOM // (2 * 4 << 10)}
LARGE_BYTES = 8 * ROOM
DECODE = attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("exhausted")
    options = ("--device", "cpu", "--socket-dir", str(folder / "sockets"), "--region-bytes", str(1 << 20))
    with ServerProcess(folder / "log", *options, "--kv-bytes", str(2 * LARGE_BYTES)) as process:
        yield process
        log = process.log
    assert "internal error" not in log, log


def attend(session: attnd.Session) -> None:
    assert torch.equal(session.step(DECODE).attend(0, Q, K, V), V)


def num_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_a_server_without_descriptors_refuses_planes_and_serves_who_is_there(alone: ServerProcess) -> None:
    with attnd.connect(alone.address, plane="shm", timeout_s=10) as client, client.create_cache(**GEOMETRY) as cache:
        first = cache.session()
        attend(first)
        limit = resource.prlimit(alone.pid, resource.RLIMIT_NOFILE)
        before = num_descriptors(alone.pid)
        resource.prlimit(alone.pid, resource.RLIMIT_NOFILE, (before + 1, limit[1]))
        refused = 0
        for _ in range(4):
            with cache.session() as session:
                session.timeout_s = 3
                try:
                    attend(session)
                except (attnd.Disconnected, attnd.Exhausted, attnd.Unsupported):
                    refused += 1
        assert refused
        attend(first)
        with cache.session(plane="inline") as inline:  # the connection is there
            attend(inline)
        resource.prlimit(alone.pid, resource.RLIMIT_NOFILE, limit)
        with cache.session() as session:
            attend(session)
        first.close()
        wait_for(lambda: num_descriptors(alone.pid) <= before, "descriptors were leaked")


def test_a_cache_for_which_the_system_has_no_memory_is_refused(alone: ServerProcess) -> None:
    with attnd.connect(alone.address, plane="inline") as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            attend(session)
            unlimited = resource.prlimit(alone.pid, resource.RLIMIT_AS)
            with open(f"/proc/{alone.pid}/statm") as statm:
                used = int(statm.read().split()[0]) * resource.getpagesize()
            resource.prlimit(alone.pid, resource.RLIMIT_AS, (used + ROOM, unlimited[1]))
            refusal = rf"num_pages is {LARGE['num_pages']}.*cpu cannot allocate"
            with pytest.raises(attnd.Exhausted, match=refusal):
                client.create_cache(**LARGE)
            attend(session)
            resource.prlimit(alone.pid, resource.RLIMIT_AS, unlimited)
            client.create_cache(**LARGE).delete()
            attend(session)


def test_a_plane_whose_answers_are_not_read_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit.test_shm_server import serving

    monkeypatch.setattr(plane_connection, "SEND_S", 0.3)
    with serving(tmp_path) as (server, client), client.create_cache(**GEOMETRY) as cache:
        raw = RawClient(client, cache)
        with pytest.raises(OSError, match=r"[Bb]roken pipe|reset"):  # noqa: PT012  # which of them is the system's
            for _ in range(10_000):
                raw.socket.sendall(1000 * AGAIN)
        raw.close()
        wait_for(lambda: not server._connections, "the plane of a client that reads nothing goes on")
        with cache.session() as session:
            attend(session)
