"""What a server process holds of the system."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.descriptors import open_links


@dataclass(frozen=True)
class Resources:
    """Of one process, at one time.

    Attributes:
        descriptors: open ones.
        threads: running ones.
        regions: mappings and descriptors of shared regions.
        sockets: files in its socket folder.
        rss_mib: resident memory.
    """

    descriptors: int
    threads: int
    regions: int
    sockets: int
    rss_mib: float


def resources(pid: int, socket_folder: Path) -> Resources:
    """What a process holds now."""
    process = Path(f"/proc/{pid}")
    links = open_links(pid)
    regions = (process / "maps").read_text().count("memfd:attnd") + sum("memfd:attnd" in link for link in links)
    threads = len(list((process / "task").iterdir()))
    sockets = len(list(socket_folder.iterdir())) if socket_folder.exists() else 0
    return Resources(len(links), threads, regions, sockets, rss_mib(pid))


def rss_mib(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def lowest(samples: list[tuple[float, float]], seconds: float) -> list[tuple[float, float]]:
    """Of `(seconds, value)`, in order, the one with the lowest value in each stretch of so many seconds.

    What an attack has taken for a moment is not in them, what is never given back is.
    """
    found: dict[int, tuple[float, float]] = {}
    for sample in samples:
        stretch = int((sample[0] - samples[0][0]) / seconds)
        found[stretch] = min(found.get(stretch, sample), sample, key=lambda each: each[1])
    return list(found.values())


def slope_per_minute(samples: list[tuple[float, float]]) -> float:
    """Least squares through `(seconds, value)`: by how much the value grows in a minute; 0 of fewer than three."""
    if len(samples) < 3:
        return 0.0
    times, values = np.array(samples).T
    return float(np.polyfit(times - times[0], values, 1)[0] * 60)
