"""Memory that this process has mapped, as a tensor of any library that speaks DLPack; none is needed to make one."""

from __future__ import annotations

import ctypes
from typing import Any

# DLPack's numbers for devices and types, as its dlpack.h has them.
CPU, CUDA = 1, 2
_UNSIGNED, _BITS, _LANES = 1, 8, 1
_CAPSULE = b"dltensor"


class _Tensor(ctypes.Structure):
    """DLManagedTensor of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


# Whoever takes a tensor looks at its description again when it lets go, which may be after everything here has gone. So
# descriptions stay; there is one for each piece of memory, and regions come to lie where earlier ones lay.
_descriptions: dict[tuple[int, int, int, int], _Tensor] = {}


class DeviceBytes:
    """Bytes at an address, for `from_dlpack`. Nobody frees them through it, and nobody may use them once they are gone.

    The device is what the caller says, also where the memory is another GPU's that this one reaches.
    """

    def __init__(self, address: int, num_bytes: int, device: tuple[int, int]) -> None:
        """Describes memory.

        Args:
            address: of the first byte.
            num_bytes: their number.
            device: DLPack's number of its kind (`CPU`, `CUDA`) and its index.
        """
        self._device = device
        key = address, num_bytes, *device
        if key not in _descriptions:
            shape = ctypes.pointer(ctypes.c_int64(num_bytes))
            _descriptions[key] = _Tensor(address, *device, 1, _UNSIGNED, _BITS, _LANES, shape, None, 0, None, None)
        self._tensor = _descriptions[key]

    def __dlpack_device__(self) -> tuple[int, int]:
        """Kind and index of the device."""
        return self._device

    def __dlpack__(self, **_: Any) -> object:
        """A capsule with the description."""
        new: Any = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        capsule: object = new(ctypes.addressof(self._tensor), _CAPSULE, None)
        return capsule
