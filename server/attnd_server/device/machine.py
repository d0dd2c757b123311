"""How many cores and how much memory this process may use, which is what its control groups leave it, and does use.

A container sees the whole machine in /proc, and is killed for taking more than its share.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

# Limits beyond it are none: cgroup v1 says "no limit" with a number near 2^63.
_NO_LIMIT = 1 << 60


def num_cores(root: Path = Path("/")) -> int:
    """Cores that this process may keep busy, at least 1.

    Args:
        root: of the file system, for tests.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    shares = [quota for folder, version in _groups(root, "cpu") if (quota := _quota(folder, version)) is not None]
    sets = [size for folder, version in _groups(root, "cpuset") if (size := _set_size(folder, version))]
    return max(1, min([cores, *sets, *(int(share + 0.999) for share in shares)]))


def memory_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process and what shares its control groups may have.

    Args:
        root: of the file system, for tests.
    """
    names = {1: "memory.limit_in_bytes", 2: "memory.max"}
    limits = [_number(folder / names[version]) for folder, version in _groups(root, "memory")]
    found = [limit for limit in [_total(root), *limits] if limit is not None and 0 < limit < _NO_LIMIT]
    return min(found, default=1 << 30)


def process_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process takes; 0: the system does not say, or has no descriptor for one more file.

    Args:
        root: of the file system, for tests.
    """
    pages = _text(root / "proc/self/statm").split()
    return int(pages[1]) * resource.getpagesize() if pages else 0


def _total(root: Path) -> int | None:
    """The machine's memory."""
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) << 10
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """This process' control group and those around it, each with the version of its files: all of them limit it.

    In a container the path in /proc/self/cgroup may be the host's: what is not there is passed over, up to the mount.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "-", "/")
        if not controllers:
            mounts = [(root / "sys/fs/cgroup", 2), (root / "sys/fs/cgroup/unified", 2)]
        elif controller in controllers.split(","):
            mounts = [(root / "sys/fs/cgroup" / name, 1) for name in (controllers, controller)]
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for mount, version in mounts:
            for depth in range(len(parts), -1, -1):
                yield mount.joinpath(*parts[:depth]), version


def _quota(folder: Path, version: int) -> float | None:
    """Cores' worth of time that a group has; None: as much as there is."""
    if version == 2:
        quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
    else:
        quota, period = (_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if not quota.isdecimal() or not period.isdecimal() or not int(period):
        return None
    return int(quota) / int(period)


def _set_size(folder: Path, version: int) -> int:
    """Cores that a group may run on; 0: it does not say."""
    names = ("cpuset.cpus.effective",) if version == 2 else ("cpuset.effective_cpus", "cpuset.cpus")
    text = next(filter(None, (_text(folder / name).strip() for name in names)), "")
    number = 0
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            number += int(last or first) - int(first) + 1
    return number


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
