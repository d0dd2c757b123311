"""Builds a service from its parts, for a server on sockets or in this process."""

from __future__ import annotations

import torch

from attnd_server.config import ServerConfig
from attnd_server.device.faults import DeviceFaults
from attnd_server.execution.executor import Executor
from attnd_server.kv.caches import CacheTable
from attnd_server.observe.calls import CallObserver
from attnd_server.observe.counts import Metrics
from attnd_server.observe.verify import Verifier
from attnd_server.planes.negotiation import Planes
from attnd_server.service.service import AttentionService


def select_device(name: str) -> torch.device:
    """The device of "auto", "cpu", "cuda" or "cuda:1"."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def kv_bytes_limit(config: ServerConfig, device: torch.device) -> int:
    """Bytes that caches may take: as configured, else 80% of the GPU's free or 25% of the processor's total memory."""
    if config.kv_bytes:
        return config.kv_bytes
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.8)
    with open("/proc/meminfo") as meminfo:
        return int(meminfo.readline().split()[1]) * 1024 // 4


def build_service(
    config: ServerConfig, metrics: Metrics | None = None, planes: Planes | None = None
) -> AttentionService:
    """The executor, the cache table and the service over them.

    Args:
        config: of all of them.
        metrics: in which they count; None: they do not.
        planes: that the service offers; None: the inline one alone.
    """
    device = select_device(config.device)
    caches = CacheTable(config, device, kv_bytes_limit(config, device))
    faults, verifier = DeviceFaults(device), None
    if config.verify:
        verifier = Verifier(config.verify, device, faults, refuses=config.verify_action == "refuse")
    observer = None if metrics is None and verifier is None else CallObserver(metrics, verifier)
    executor = Executor(device, caches, config, faults=faults, observer=observer)
    return AttentionService(config, executor, caches, planes or Planes(), metrics, verifier)
