"""CUDA's driver, as the package cuda-bindings gives it: what both sides of the cuda plane call, each call checked.

Imported where a plane is opened and nowhere else: neither the client nor the server needs the package otherwise.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any

from attnd.errors import Unsupported
from attnd.extras import where


class CudaError(RuntimeError):
    """A call of CUDA's driver failed.

    Attributes:
        name: of the error, such as "CUDA_ERROR_OUT_OF_MEMORY".
    """

    def __init__(self, function: str, name: str) -> None:
        """Says which call failed and how."""
        super().__init__(f"{function} failed: {name}")
        self.name = name


@cache
def driver() -> Any:
    """The module `cuda.bindings.driver`, with the driver started.

    Raises:
        Unsupported: the package, the driver or a GPU is missing.
    """
    try:
        from cuda.bindings import driver as module
    except ImportError as error:
        rule = f"needs the package cuda-bindings, {where('cuda')}"
        raise Unsupported(f"what shares or maps memory of a GPU {rule} ({error})", field="plane") from None
    try:
        (result,) = module.cuInit(0)
    except RuntimeError as error:  # there is no libcuda
        raise Unsupported(f"this process has no CUDA driver: {error}", field="plane") from None
    if result:
        raise Unsupported(f"this process has no GPU: cuInit failed: {result.name}", field="plane")
    return module


def call(function: str, *arguments: Any) -> Any:
    """Calls a function of the driver.

    Returns:
        Its result; None if it has none, a tuple if it has several.

    Raises:
        CudaError: it failed.
        Unsupported: see `driver`.
    """
    result, *values = getattr(driver(), function)(*arguments)
    if result:
        raise CudaError(function, result.name)
    return values[0] if len(values) == 1 else tuple(values) or None


def kernels(ptx: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Kernels by name, compiled for the thread's current GPU and on it at once.

    Left to itself the driver loads a kernel when it is first launched, and may wait for the whole GPU then: for kernels
    that wait, too.
    """
    module = call("cuModuleLoadData", ptx.encode() + b"\0")
    functions = {name: call("cuModuleGetFunction", module, name.encode()) for name in names}
    for function in functions.values():
        call("cuFuncLoad", function)
    return functions


class Device:
    """A GPU that this process sees, and its primary context, which torch uses too.

    Attributes:
        index: among the GPUs of this process.
        uuid: of the GPU, the same in every process, such as "8f0e3a7c-...".
    """

    def __init__(self, index: int) -> None:
        """Finds it.

        Raises:
            CudaError: there is no such GPU.
        """
        self.index = index
        self._device = call("cuDeviceGet", index)
        self.uuid = str(uuid.UUID(bytes=bytes(call("cuDeviceGetUuid", self._device).bytes)))

    @cached_property
    def _context(self) -> Any:
        """Kept until the process ends. Not of a GPU that is only asked about: a context takes half a gigabyte there."""
        return call("cuDevicePrimaryCtxRetain", self._device)

    def make_current(self) -> None:
        """Makes what the calling thread asks of CUDA go to this GPU, until it says otherwise."""
        call("cuCtxSetCurrent", self._context)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Likewise inside, and as it was afterwards."""
        call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            call("cuCtxPopCurrent")

    def synchronize(self) -> None:
        """Waits until the process' work on this GPU is done."""
        with self.current():
            call("cuCtxSynchronize")

    def attribute(self, name: str) -> int:
        """An attribute by its name without "CU_DEVICE_ATTRIBUTE_"."""
        attribute = getattr(driver().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(call("cuDeviceGetAttribute", attribute, self._device))

    @property
    def has_mps(self) -> bool:
        """Whether kernels of this process run there beside those of others: CUDA's Multi-Process Service."""
        return bool(self.attribute("MPS_ENABLED"))

    def reaches(self, other: Device) -> bool:
        """Whether this GPU can read and write memory of the other."""
        return self.uuid == other.uuid or bool(call("cuDeviceCanAccessPeer", self._device, other._device))

    def refusal(self) -> str | None:
        """Why it cannot share memory by file descriptor, for people; None if it can."""
        needed = ("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED", "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED")
        missing = [name for name in needed if not self.attribute(name)]
        return f"GPU {self.uuid} or its driver lacks {', '.join(missing)}" if missing else None


@cache
def device(index: int) -> Device:
    """The GPU of that index in this process; one object each. Raises CudaError: there is none."""
    return Device(index)


def device_of(gpu_uuid: str) -> Device | None:
    """The GPU of that UUID; None: this process does not see it."""
    for index in range(call("cuDeviceGetCount")):
        if device(index).uuid == gpu_uuid:
            return device(index)
    return None


class Stream:
    """A stream of our own, which waits for no other stream of the process, and for which no other waits.

    Attributes:
        handle: as the driver and torch (`torch.cuda.ExternalStream`) take it.
    """

    def __init__(self, on: Device) -> None:
        """Makes the stream; `on` must be the thread's current GPU."""
        self.device = on
        self._stream = call("cuStreamCreate", int(driver().CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.handle = int(self._stream)

    def synchronize(self) -> None:
        """Waits until all that was enqueued is done."""
        call("cuStreamSynchronize", self._stream)

    def is_idle(self) -> bool:
        """Whether all that was enqueued is done. Raises CudaError if some of it failed."""
        (result,) = driver().cuStreamQuery(self._stream)
        if result and result.name != "CUDA_ERROR_NOT_READY":
            raise CudaError("cuStreamQuery", result.name)
        return not result

    def close(self) -> None:
        """Ends the stream, after what was enqueued."""
        call("cuStreamDestroy", self._stream)
