"""Builds a service from its parts, for a server on sockets or in this process."""

from __future__ import annotations

import pkgutil
from functools import partial

import torch

from attnd.errors import InvalidRequest
from attnd_server.attention import kernels
from attnd_server.attention.backends.triton.attention import availability
from attnd_server.config import ServerConfig
from attnd_server.device.faults import DeviceFaults
from attnd_server.device.kernels.compiler import ProcessCompiler
from attnd_server.device.kernels.folder import KernelFolder
from attnd_server.device.kernels.library import KernelLibrary
from attnd_server.device.kernels.loading import KernelLoader
from attnd_server.device.machine import memory_bytes
from attnd_server.execution.executor import Executor
from attnd_server.kv.caches import CacheTable
from attnd_server.observe.calls import CallObserver
from attnd_server.observe.counts import Metrics
from attnd_server.observe.traces import SpanSink, Traces
from attnd_server.observe.verify import Verifier
from attnd_server.planes.negotiation import Planes
from attnd_server.service.needed_kernels import NeededKernels
from attnd_server.service.service import AttentionService


def select_device(name: str) -> torch.device:
    """The device of "auto", "cpu", "cuda" or "cuda:1".

    Raises:
        InvalidRequest: there is no such device here.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    try:
        number = int(name.partition(":")[2] or 0)
    except ValueError:
        number = -1
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name.partition(":")[0] not in ("auto", "cuda") or not 0 <= number < found:
        here = f"cuda:0..{found - 1} are here" if found else "torch finds no GPU here"
        raise InvalidRequest(f"device is {name}, but must be auto, cpu or a GPU: {here}", field="device")
    return torch.device("cuda", number)


def kv_bytes_limit(config: ServerConfig, device: torch.device) -> int:
    """Bytes that caches may take: as configured, else 80% of the GPU's free or 25% of the processor's memory."""
    if config.kv_bytes:
        return config.kv_bytes
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.8)
    return memory_bytes() // 4


def kernel_library(device: torch.device, config: ServerConfig) -> KernelLibrary | None:
    """The library of a device's kernels, from which they come from now on; None: no kernels of ours run there.

    Raises:
        OSError: the folder of the configuration cannot be used for compiled kernels.
    """
    if device.type != "cuda" or availability(device) is not None:
        return None
    from triton import knobs
    from triton.runtime.driver import driver

    if knobs.runtime.interpret:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    folder = KernelFolder.open(config.kernel_cache, f"sm_{major}{minor}")
    folder.install()  # before Triton has a driver: it builds what it calls that by, too
    with torch.cuda.device(device):
        target = driver.active.get_current_target()
    compiler = ProcessCompiler(target, kernel_modules(has_hopper=target.arch == 90), folder)
    library = KernelLibrary(device, compiler, partial(KernelLoader, device))
    library.install()
    return library


def kernel_modules(has_hopper: bool) -> list[str]:
    """The modules that have kernels; those of Hopper need its language."""
    found = pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.", onerror=lambda name: None)
    return [each.name for each in found if not each.ispkg and (has_hopper or ".hopper." not in each.name)]


def needed_kernels(library: KernelLibrary, device: torch.device) -> NeededKernels:
    """Has the kernels that a new cache's calls can need brought to the device."""
    from attnd_server.attention.backends.triton.needed import needed_launches  # with triton

    is_hopper = torch.cuda.get_device_capability(device)[0] == 9
    return NeededKernels(library, lambda config: needed_launches(config, is_hopper, device))


def build_service(
    config: ServerConfig,
    metrics: Metrics | None = None,
    planes: Planes | None = None,
    spans: SpanSink | None = None,
) -> AttentionService:
    """The executor, the cache table and the service over them.

    Args:
        config: of all of them.
        metrics: in which they count; None: they do not.
        planes: that the service offers; None: the inline one alone.
        spans: gets the steps that are traced; None: a collector, if the configuration says that any are.

    Raises:
        OSError: see `kernel_library`.
        RuntimeError: what sends traces to a collector is missing.
    """
    if config.traces and spans is None:
        from attnd_server.observe.traces.export import Exporter  # with libraries that only this needs

        spans = Exporter(config)
    traces = None if spans is None else Traces(config, spans)
    device = select_device(config.device)
    caches = CacheTable(config, device, kv_bytes_limit(config, device))
    faults, verifier = DeviceFaults(device), None
    if config.verify:
        verifier = Verifier(config.verify, device, faults, refuses=config.verify_action == "refuse")
    observer = None if metrics is None and verifier is None else CallObserver(metrics, verifier)
    library = kernel_library(device, config)
    if library is not None:
        caches.created = needed_kernels(library, device).ask
    executor = Executor(device, caches, config, faults=faults, kernels=library, observer=observer)
    return AttentionService(config, executor, caches, planes or Planes(), metrics, verifier, traces)
