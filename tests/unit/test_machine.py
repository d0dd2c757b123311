"""How many cores and how much memory a process may use, by what control groups say in fake file systems."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from attnd_server import build
from attnd_server.config import ServerConfig
from attnd_server.device import machine
from attnd_server.execution import threads

GIB = 1 << 30
MEMINFO = "MemTotal:       134217728 kB\nMemFree: 5 kB\n"  # 128 GiB


@pytest.fixture(autouse=True)
def _sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)


def system(root: Path, cgroup: str, **files: str) -> Path:
    """A file system; names of files below sys/fs/cgroup have __ for / and ._ for a dot."""
    written = {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup}
    written |= {f"sys/fs/cgroup/{name.replace('__', '/')}": text for name, text in files.items()}
    for name, text in written.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_groups_it_is_the_machine(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/\n")
    assert (machine.num_cores(root), machine.memory_bytes(root)) == (16, 128 * GIB)


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({"memory.max": f"{8 * GIB}\n", "cpu.max": "200000 100000\n"}, 2, 8 * GIB),
        ({"memory.max": "max\n", "cpu.max": "max 100000\n"}, 16, 128 * GIB),
        ({"cpu.max": "50000 100000\n"}, 1, 128 * GIB),
        ({"cpu.max": "150000 100000\n"}, 2, 128 * GIB),
        ({"cpuset.cpus.effective": "0-3,8\n", "cpu.max": "900000 100000\n"}, 5, 128 * GIB),
        ({"cpu.max": "junk\n", "memory.max": "\n", "cpuset.cpus.effective": "\n"}, 16, 128 * GIB),
        ({"cpu.max": "100 0\n", "memory.max": "0\n"}, 16, 128 * GIB),
        # The path of the host, of which a container sees nothing but its own root.
        ({"memory.max": f"{GIB}\n", "pod__memory.max": f"{2 * GIB}\n"}, 16, GIB),
    ],
)
def test_version_2(tmp_path: Path, files: dict[str, str], cores: int, memory: int) -> None:
    root = system(tmp_path, "0::/pod/container\n", **files)
    assert (machine.num_cores(root), machine.memory_bytes(root)) == (cores, memory)


def test_every_group_on_the_way_up_limits(tmp_path: Path) -> None:
    files = {
        "a__memory.max": f"{3 * GIB}",
        "a__b__memory.max": f"{9 * GIB}",
        "a__b__c__memory.max": "max",
        "a__b__c__cpu.max": "800000 100000",
        "a__cpu.max": "300000 100000",
        "other__memory.max": "1",
    }
    root = system(tmp_path, "0::/a/b/c\n", **files)
    assert (machine.num_cores(root), machine.memory_bytes(root)) == (3, 3 * GIB)


def test_version_1(tmp_path: Path) -> None:
    files = {
        "memory__docker__x__memory.limit_in_bytes": f"{4 * GIB}\n",
        "memory__memory.limit_in_bytes": "9223372036854771712\n",
        "cpu,cpuacct__docker__x__cpu.cfs_quota_us": "300000\n",
        "cpu,cpuacct__docker__x__cpu.cfs_period_us": "100000\n",
        "cpu,cpuacct__cpu.cfs_quota_us": "-1\n",
        "cpu,cpuacct__cpu.cfs_period_us": "100000\n",
        "cpuset__docker__x__cpuset.cpus": "0-1\n",
    }
    text = "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n3:cpuset:/docker/x\n2:devices:/\n1:name=systemd:/\n"
    root = system(tmp_path, text, **files)
    assert (machine.num_cores(root), machine.memory_bytes(root)) == (2, 4 * GIB)
    (root / "sys/fs/cgroup/cpuset/docker/x/cpuset.cpus").write_text("0-7\n")
    assert machine.num_cores(root) == 3


def test_version_1_of_memory_beside_version_2(tmp_path: Path) -> None:
    files = {"memory__job__memory.limit_in_bytes": f"{2 * GIB}", "unified__job__cpu.max": "400000 100000"}
    root = system(tmp_path, "3:memory:/job\n0::/job\n", **files)
    assert (machine.num_cores(root), machine.memory_bytes(root)) == (4, 2 * GIB)


def test_no_proc_at_all(tmp_path: Path) -> None:
    assert machine.num_cores(tmp_path) == 16
    assert machine.memory_bytes(tmp_path) > 0


def test_what_the_process_takes(tmp_path: Path) -> None:
    assert 1 << 20 < machine.process_bytes() < machine.memory_bytes()
    assert machine.process_bytes(tmp_path) == 0


def test_the_server_takes_its_defaults_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "memory_bytes", lambda: 8 * GIB)
    monkeypatch.setattr(threads, "num_cores", lambda: 6)
    cpu = build.select_device("cpu")
    assert build.kv_bytes_limit(ServerConfig(), cpu) == 2 * GIB
    assert build.kv_bytes_limit(ServerConfig(kv_bytes=5), cpu) == 5
    assert threads.default_threads(cpu) == 3
