"""A device that has failed: which errors mean that, and what the server does then.

After an illegal memory access, a kernel that was aborted or memory that cannot be corrected, every call of CUDA in the
process fails until it ends, and what lies in the device's memory cannot be trusted. So nothing is answered from it any
more: whoever waits or asks is told that the server is away, health checks say that it does not serve, and the process
ends with an exit code of its own, for whoever supervises it to start another. Clients then learn from the new epoch
that their KV has gone.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator

import torch

from attnd.errors import Disconnected

log = logging.getLogger(__name__)

# Of a process whose device has failed: sysexits' EX_TEMPFAIL, to be tried again. No other end of the server has it.
EXIT_CODE = 75
# Seconds from the fault to the process' end: to tell those who wait, and health checks.
EXIT_AFTER_S = 1.0

# How errors of CUDA begin: torch's, Triton's, the driver's by name, and those of NVIDIA's libraries.
_OF_CUDA = re.compile(r"CUDA (?:driver )?error|Triton Error \[CUDA\]|CUDA_ERROR_|(?:CUBLAS|CUDNN|CUSPARSE)_STATUS_")
# Those that concern one call alone, and leave the device as it was: by the text of the runtime or the driver's name.
_OF_ONE_CALL = re.compile(
    r"out of memory|OUT_OF_MEMORY|ALLOC_FAILED|STATUS_NOT_INITIALIZED"  # no memory; cuBLAS says the last of its own
    r"|not supported|NOT_SUPPORTED|ARCH_MISMATCH|invalid argument|invalid configuration|INVALID_VALUE|BAD_PARAM"
    r"|too many resources requested|LAUNCH_OUT_OF_RESOURCES|LAUNCH_INCOMPATIBLE"
    r"|invalid resource handle|INVALID_HANDLE|invalid device (?:ordinal|function|symbol)|INVALID_DEVICE\b"
    r"|captur|CAPTURE|device not ready|NOT_READY|not permitted|NOT_PERMITTED"
    r"|no kernel image|NO_BINARY_FOR_GPU|image is invalid|INVALID_IMAGE|INVALID_PTX|symbol not found|NOT_FOUND"
    r"|already (?:mapped|registered)|ALREADY_MAPPED|ALREADY_REGISTERED|NOT_REGISTERED|NOT_MAPPED|(?i:peer.access)"
)

Listener = Callable[[str], None]
"""Told once, with the fault in one line, on whichever thread saw it. Must not block or raise."""


def is_device_fault(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that the device has failed.

    An error of CUDA that is not known to concern one call alone does: it is better to start again than to go on with a
    device that may be broken.
    """
    return any(_is_fault(each) for each in _chain(error))


def _is_fault(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    accelerator_error = getattr(torch, "AcceleratorError", None)  # torch before 2.8 has a RuntimeError alone
    line = _first_line(error)  # torch adds advice, which names other faults
    is_of_cuda = _OF_CUDA.search(line) or (accelerator_error is not None and isinstance(error, accelerator_error))
    return bool(is_of_cuda) and not _OF_ONE_CALL.search(line)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it came from or was raised while handling."""
    seen: set[int] = set()
    rest = [error]
    while rest:
        each = rest.pop()
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            rest += [cause for cause in (each.__cause__, each.__context__) if cause is not None]


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0]


class DeviceFaults:
    """Whether a device has failed. Any thread may use it.

    Attributes:
        reason: the fault in one line; "" as long as there is none.
    """

    def __init__(self, device: torch.device) -> None:
        """The device is sound."""
        self.reason = ""
        self._device = device
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()

    def listen(self, listener: Listener) -> None:
        """Has `listener` told of the fault, at once if there was one."""
        with self._lock:
            self._listeners.append(listener)
            reason = self.reason
        if reason:
            listener(reason)

    def look_at(self, error: BaseException) -> bool:
        """Whether an error says that the device has failed; if so, nothing is served from now on."""
        fault = next((each for each in _chain(error) if _is_fault(each)), None)
        if fault is None:
            return False
        self.fail(_first_line(fault), error)
        return True

    def fail(self, reason: str, error: BaseException | None = None) -> None:
        """The device has failed, whoever says so."""
        with self._lock:
            if self.reason:
                return
            self.reason = reason
            listeners = list(self._listeners)
        log.critical("the device failed", extra={"device": str(self._device), "reason": reason}, exc_info=error)
        for listener in listeners:
            listener(reason)

    def refusal(self) -> Disconnected:
        """What everybody is told once the device has failed."""
        return Disconnected(
            f"{self._device} failed, and the server ends: {self.reason}; its caches are lost, and another server must "
            "be started"
        )

    def refuse(self) -> None:
        """Raises Disconnected once the device has failed."""
        if self.reason:
            raise self.refusal()


def watch(faults: DeviceFaults, busy_s: Callable[[], float], limit_s: float, period_s: float = 1.0) -> None:
    """Has a device count as failed once it has been busy with one thing for too long: a kernel that never ends.

    Args:
        faults: of the device.
        busy_s: seconds for which it has been; 0: it is idle.
        limit_s: most seconds.
        period_s: seconds between two looks.
    """

    def run() -> None:
        while not faults.reason:
            time.sleep(period_s)
            if busy_s() > limit_s:
                faults.fail(f"a piece of work has not ended within {limit_s:g} s")

    threading.Thread(target=run, name="device-watch", daemon=True).start()


def end_process(reason: str) -> None:
    """Ends the process in a moment, whatever it does: with a broken device, nothing can be closed in good order."""

    def end() -> None:
        time.sleep(EXIT_AFTER_S)
        os._exit(EXIT_CODE)

    threading.Thread(target=end, name="device-fault", daemon=True).start()
