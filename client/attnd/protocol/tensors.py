"""Arrays at the border: torch tensors, numpy arrays and plain buffers in, the same kind out.

torch is a peer, never required: it is looked up only when a caller passes a torch tensor.
"""

from __future__ import annotations

import ctypes
import math
import sys
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from attnd.errors import InvalidRequest
from attnd.protocol.alignment import ALIGNMENT, aligned
from attnd.v1 import tensor_pb2

if TYPE_CHECKING:
    import torch

# The wire's dtype by the name that torch and numpy share, and the size of an element in bytes.
DTYPES: dict[str, tensor_pb2.Dtype.ValueType] = {
    "float32": tensor_pb2.DTYPE_FLOAT32,
    "float16": tensor_pb2.DTYPE_FLOAT16,
    "bfloat16": tensor_pb2.DTYPE_BFLOAT16,
    "int32": tensor_pb2.DTYPE_INT32,
    "int64": tensor_pb2.DTYPE_INT64,
}
# Types of pages; float8_e4m3fn never travels.
KV_DTYPES: dict[str, tensor_pb2.Dtype.ValueType] = {
    "float32": tensor_pb2.DTYPE_FLOAT32,
    "float16": tensor_pb2.DTYPE_FLOAT16,
    "bfloat16": tensor_pb2.DTYPE_BFLOAT16,
    "float8_e4m3fn": tensor_pb2.DTYPE_FLOAT8_E4M3FN,
}
DTYPE_NAMES: dict[int, str] = {dtype: name for name, dtype in DTYPES.items()}
ITEM_SIZES: dict[int, int] = {
    tensor_pb2.DTYPE_FLOAT32: 4,
    tensor_pb2.DTYPE_FLOAT16: 2,
    tensor_pb2.DTYPE_BFLOAT16: 2,
    tensor_pb2.DTYPE_INT32: 4,
    tensor_pb2.DTYPE_INT64: 8,
}
# struct's letter for each dtype that the buffer protocol can name (all but bfloat16).
_FORMATS: dict[str, tensor_pb2.Dtype.ValueType] = {
    "f": tensor_pb2.DTYPE_FLOAT32,
    "e": tensor_pb2.DTYPE_FLOAT16,
    "i": tensor_pb2.DTYPE_INT32,
    "l": tensor_pb2.DTYPE_INT64,
    "q": tensor_pb2.DTYPE_INT64,
}


class Array(NamedTuple):
    """A dense row-major array whose elements lie in a buffer.

    Attributes:
        dtype: the wire's `Dtype`.
        shape: extent of each dimension.
        data: the elements, `prod(shape) * item size` contiguous bytes.
    """

    dtype: int
    shape: tuple[int, ...]
    data: memoryview

    @property
    def num_bytes(self) -> int:
        """Bytes that dtype and shape ask for."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def dtype_of(
    name: object, field: str = "dtype", dtypes: dict[str, tensor_pb2.Dtype.ValueType] = DTYPES
) -> tensor_pb2.Dtype.ValueType:
    """The wire's dtype of "float32", `torch.float32` or a wire dtype.

    Args:
        name: of the dtype.
        field: the name to use in errors.
        dtypes: what `field` takes, by name.

    Raises:
        InvalidRequest: no such dtype.
    """
    if isinstance(name, int) and name in dtypes.values():
        return tensor_pb2.Dtype.ValueType(name)
    try:
        return dtypes[str(name).removeprefix("torch.")]
    except KeyError:
        raise InvalidRequest(f"{field} is {name}, but must be one of {', '.join(dtypes)}", field=field) from None


def _torch() -> Any:
    """Torch if the process has it already, else None."""
    return sys.modules.get("torch")


def to_array(value: Any, field: str) -> Array:
    """Views `value` as an Array, without a copy where it is dense and on the host; one whose rows lie apart is copied.

    Args:
        value: a torch tensor (any device), an Array, or an object with the buffer protocol, such as a numpy array.
        field: the name to use in errors.

    Raises:
        InvalidRequest: not an array, or of a type that the wire does not have.
    """
    if isinstance(value, Array):
        return value
    torch = _torch()
    if torch is not None and isinstance(value, torch.Tensor):
        return torch_array(value, field)
    try:
        view = memoryview(value)
    except TypeError:
        raise InvalidRequest(
            f"{field} is a {type(value).__name__}, but must be an array or a tensor", field=field
        ) from None
    dtype = dtype_of_buffer(view, field)
    if not view.nbytes:
        return Array(dtype, view.shape or (), memoryview(b""))
    return Array(dtype, view.shape or (), view.cast("B") if view.c_contiguous else memoryview(view.tobytes()))


def dtype_of_buffer(view: memoryview, field: str) -> tensor_pb2.Dtype.ValueType:
    """The wire's dtype of a buffer's elements. Raises InvalidRequest: the wire does not have it."""
    dtype = _FORMATS.get(view.format.lstrip("<="))
    if dtype is None:
        raise InvalidRequest(f"{field} has format {view.format!r}, but must be one of {', '.join(DTYPES)}", field=field)
    return dtype


@cache
def torch_dtype(dtype: int) -> torch.dtype:
    """Torch's type for the wire's."""
    return getattr(_torch(), DTYPE_NAMES[dtype])  # type: ignore[no-any-return]


@cache
def _torch_dtypes() -> dict[Any, tensor_pb2.Dtype.ValueType]:
    return {getattr(_torch(), name): dtype for name, dtype in DTYPES.items()}


def without_elements(value: torch.Tensor, field: str) -> Array:
    """The type and shape of a tensor. Raises InvalidRequest: the wire does not have the type."""
    dtype = _torch_dtypes().get(value.dtype)
    if dtype is None:
        raise InvalidRequest(f"{field} has dtype {value.dtype}, but must be one of {', '.join(DTYPES)}", field=field)
    return Array(dtype, tuple(value.shape), memoryview(b""))


def torch_array(value: torch.Tensor, field: str) -> Array:
    """As `to_array`, of a torch tensor."""
    empty = without_elements(value, field)
    if value.is_meta:
        raise InvalidRequest(f"{field} has device meta, but must have elements", field=field)
    host = value if value.is_cpu and value.is_contiguous() else value.detach().cpu().contiguous()
    size = host.nbytes
    if size == 0:
        return empty
    buffer = (ctypes.c_char * size).from_address(host.data_ptr())
    buffer.owner = host  # type: ignore[attr-defined]  # keeps the tensor alive as long as the view
    return Array(empty.dtype, empty.shape, memoryview(buffer).cast("B"))


def from_array(array: Any, like: Any) -> Any:
    """`array` as the kind of thing that `like` is: a torch tensor on its device, a numpy array, or the Array itself.

    Tensors and numpy arrays are aligned, copied if need be: the caller multiplies them. A tensor of torch stays one:
    whoever made it knew what was wanted.
    """
    torch = _torch()
    if not isinstance(array, Array):
        return array
    if torch is not None and isinstance(like, torch.Tensor):
        return aligned(torch_tensor(array).to(like.device))
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(like, numpy.ndarray):
        values = numpy_array(array)
        if values.ctypes.data % ALIGNMENT == 0:
            return values
        copy = empty_like(like, array.dtype, array.shape)
        copy[...] = values
        return copy
    return array


def empty_like(like: Any, dtype: int, shape: tuple[int, ...]) -> Any:
    """A new tensor on the device of `like`, or a numpy array if that is one; aligned, with any elements.

    Args:
        like: a torch tensor, or a numpy array.
        dtype: the wire's.
        shape: of the result.
    """
    torch = _torch()
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.empty(shape, dtype=torch_dtype(dtype), device=like.device)
    numpy = sys.modules["numpy"]
    num_bytes = math.prod(shape) * ITEM_SIZES[dtype]
    room = numpy.empty(num_bytes + ALIGNMENT, numpy.uint8)  # numpy itself aligns to 16 bytes only
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + num_bytes].view(DTYPE_NAMES[dtype]).reshape(shape)


def is_tensor(value: Any) -> bool:
    """Whether it is a torch tensor or a numpy array."""
    torch, numpy = _torch(), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor):
        return True
    return numpy is not None and isinstance(value, numpy.ndarray)


def copy_array(array: Array, target: Any) -> None:
    """Copies an array to a torch tensor on any device, or a numpy array, of its type and shape and any strides."""
    torch = _torch()
    if torch is not None and isinstance(target, torch.Tensor):
        target.copy_(torch_tensor(array))
    else:
        target[...] = numpy_array(array)


def numpy_array(array: Array) -> Any:
    """A numpy array over the array's own bytes, without a copy."""
    return sys.modules["numpy"].frombuffer(array.data, DTYPE_NAMES[array.dtype]).reshape(array.shape)


def torch_tensor(array: Array) -> torch.Tensor:
    """A tensor over the array's own bytes, on the host, without a copy. Do not write to it if the bytes are shared."""
    _expect_read_only_buffers()
    module = _torch()
    dtype = torch_dtype(array.dtype)
    tensor: torch.Tensor
    if array.data.nbytes:
        tensor = module.frombuffer(array.data, dtype=dtype).view(array.shape)
    else:
        tensor = module.empty(array.shape, dtype=dtype)
    return tensor


@cache
def _expect_read_only_buffers() -> None:
    """Received bytes are read-only, about which torch warns once in a process: let it, now and unseen."""
    torch = _torch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)
