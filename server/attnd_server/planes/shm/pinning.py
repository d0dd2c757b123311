"""Regions as pinned memory: a GPU copies from them by itself, at its full speed, while the processor goes on."""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from attnd_server.device.quiet import QuietGpu

log = logging.getLogger(__name__)

# Bytes of all regions together that may be pinned: they are in memory from then on, written to or not.
MAX_PINNED_BYTES = 8 << 30
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every user of CUDA in the process
_CudaCall = Callable[[Any], int]  # of the runtime, gives its error


class Registrar(Protocol):
    """Makes memory pinned, and ordinary again."""

    def register(self, address: int, num_bytes: int) -> None:
        """Pins memory. Raises RuntimeError if it cannot."""

    def unregister(self, address: int) -> None:
        """Waits for everything on the GPU, and makes memory ordinary again. Raises RuntimeError if it cannot."""


class CudaRegistrar:
    """Implements `Registrar` for a GPU."""

    def __init__(self, device: torch.device) -> None:
        """Of `device`."""
        self._device = device

    def register(self, address: int, num_bytes: int) -> None:
        """Pins memory."""
        _apart(self._check, lambda cudart: cudart.cudaHostRegister(address, num_bytes, _PORTABLE))

    def unregister(self, address: int) -> None:
        """Makes it ordinary again."""
        # Calls wait for their results, but one that failed may have left a copy on its way.
        torch.cuda.default_stream(self._device).synchronize()
        _apart(self._check, lambda cudart: cudart.cudaHostUnregister(address))

    def _check(self, call: _CudaCall) -> None:
        with torch.cuda.device(self._device):
            cudart = torch.cuda.cudart()
            if code := int(call(cudart)):
                raise RuntimeError(f"CUDA error {code}: {cudart.cudaGetErrorString(cudart.cudaError(code))}")


def registrar_for(device: torch.device) -> Registrar | None:
    """What pins memory for `device`; None: nothing needs to."""
    return CudaRegistrar(device) if device.type == "cuda" else None


def reach_of(memory: mmap.mmap, device: torch.device) -> range:
    """The addresses of memory that is pinned, if kernels find it at the same ones; else none."""
    if device.type != "cuda":
        return range(0)
    from attnd.errors import Unsupported
    from attnd.protocol.cuda import driver

    try:
        attribute = "CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM"
        has_same = driver.device(device.index or 0).attribute(attribute)
    except (Unsupported, driver.CudaError):
        return range(0)
    address = _address(memory)
    return range(address, address + len(memory)) if has_same else range(0)


class Pinning:
    """The regions that are pinned. Any thread may use it."""

    def __init__(
        self, registrar: Registrar | None, quiet: QuietGpu | None = None, max_bytes: int = MAX_PINNED_BYTES
    ) -> None:
        """Nothing is pinned yet.

        Args:
            registrar: that pins; None: nothing does.
            quiet: of the GPU; None: one of its own, which is always quiet.
            max_bytes: that are pinned at once.
        """
        self._registrar = registrar
        self._quiet = quiet or QuietGpu()
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._has_told = False
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes that are pinned, those of sessions that have ended and still are among them."""
        return self._num_bytes

    @contextmanager
    def pinned(self, memory: mmap.mmap) -> Iterator[bool]:
        """Has `memory` pinned until the end of the block if that can be, and says whether it is.

        It stays pinned, and mapped, beyond that end until nothing waits in the GPU for a worker: at once in most cases.
        """
        registrar, address, num_bytes = self._registrar, _address(memory), len(memory)
        if registrar is None or not self._register(registrar, address, num_bytes):
            yield False
            return
        try:
            yield True
        finally:
            self._unregister(registrar, memory)

    def _register(self, registrar: Registrar, address: int, num_bytes: int) -> bool:
        with self._lock:
            if self._num_bytes + num_bytes > self._max_bytes:
                self._tell(f"{self._num_bytes} bytes are, of at most {self._max_bytes}")
                return False
            self._num_bytes += num_bytes
        try:
            registrar.register(address, num_bytes)
        except RuntimeError as error:
            with self._lock:
                self._num_bytes -= num_bytes
                self._tell(str(error))
            return False
        return True

    def _unregister(self, registrar: Registrar, memory: mmap.mmap) -> None:
        def unregister() -> None:  # holds the memory, which must still be there
            try:
                registrar.unregister(_address(memory))
            except RuntimeError as error:  # of a GPU that is lost, most likely, which calls tell better
                log.warning("a region stays pinned: %s", error)
            with self._lock:
                self._num_bytes -= len(memory)

        with self._quiet.moment(0) as is_quiet:
            if is_quiet:
                unregister()
        if not is_quiet:
            self._quiet.later(unregister)

    def _tell(self, reason: str) -> None:
        if not self._has_told:
            self._has_told = True
            log.warning("the region of a session cannot be pinned, so its copies to the GPU are slower: %s", reason)


def _address(memory: mmap.mmap) -> int:
    # The view goes when this returns: as long as one exists, memory cannot be unmapped.
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _apart(check: Callable[[_CudaCall], None], call: _CudaCall) -> None:
    """Runs a call of CUDA on a thread of its own, and raises what it raises.

    What CUDA refuses stays the thread's last error, and on a thread that launches kernels it would be taken for theirs.
    """
    errors: list[RuntimeError] = []

    def run() -> None:
        try:
            check(call)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="pinning", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
