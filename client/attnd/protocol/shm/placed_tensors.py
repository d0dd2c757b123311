"""The tensors of calls and replies where they lie in a region, and how those of calls like them get there and back.

torch is a peer, never required: tensors of torch are copied by their addresses, which takes half the time of making a
view of each. What they must have in common with those that lie there was looked at once, when these came. Tensors of a
GPU are copied by the GPU, straight from and to the region.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from attnd.protocol.loose import Sendable, copy_elements
from attnd.protocol.regions import Region
from attnd.protocol.tensors import Array, torch_dtype, torch_tensor

if TYPE_CHECKING:
    import torch

INPUTS, RESULTS = ("q", "k", "v"), ("output", "lse")


class _Place(NamedTuple):
    """Where a tensor lies; an address is good as long as the region is mapped."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    address: int
    num_bytes: int


class PlacedTensors:
    """The tensors of a call, or of its reply, that lie in a region.

    Attributes:
        arrays: views of them, by name.
    """

    def __init__(self, arrays: Mapping[str, Array], names: Sequence[str]) -> None:
        """`arrays`, of which there are at most those of `names`, lie in a region, or came in a message.

        The region stays mapped as long as this object has them.
        """
        self.arrays = arrays
        # What came in a message cannot be written over, and is not said to be like another.
        is_placed = not any(array.data.readonly and array.data.nbytes for array in arrays.values())
        self._torch = sys.modules.get("torch") if is_placed else None
        self._places = {} if self._torch is None else {name: _place(array) for name, array in arrays.items()}
        self._in_order = [self._places.get(name) for name in names]
        self._on_host: dict[int, torch.Tensor] = {}  # tensors over the places, by address; made for GPUs alone

    def fill(self, arrays: Mapping[str, Sendable]) -> None:
        """Copies other arrays of the same `key_of` to here."""
        for name, array in arrays.items():
            copy_elements(array, self.arrays[name].data)

    def fill_with_torch(self, *tensors: Any) -> bool:
        """Copies tensors of torch to here, in the order of `names`, if they are like those that lie here.

        Args:
            tensors: None for one that there is not.

        Returns:
            False if any is something else: then none was copied.
        """
        if self._torch is None:
            return False
        type_of_tensor, pairs = self._torch.Tensor, list(zip(tensors, self._in_order, strict=True))
        for tensor, place in pairs:
            if tensor is None or place is None:
                if tensor is not place:
                    return False
            elif not (
                type(tensor) is type_of_tensor
                and tensor.shape == place.shape
                and tensor.dtype is place.dtype
                and tensor.is_cpu
            ):
                return False
        for tensor, place in pairs:
            if place is None:
                continue
            if not tensor.is_contiguous():
                self._host_tensor(place).copy_(tensor.detach())
            elif place.address != (source := tensor.data_ptr()):
                ctypes.memmove(place.address, source, place.num_bytes)
        return True

    def fill_from_gpu(self, *tensors: Any) -> bool:
        """As `fill_with_torch`, with tensors that are all on one GPU. Waits until they are here."""
        if self._torch is None:
            return False
        pairs = list(zip(tensors, self._in_order, strict=True))
        for tensor, place in pairs:
            if tensor is None or place is None:
                if tensor is not place:
                    return False
            elif tensor.shape != place.shape or tensor.dtype is not place.dtype:
                return False
        for tensor, place in pairs:
            if place is not None and place.num_bytes:
                self._host_tensor(place).copy_(tensor.detach(), non_blocking=True)
        (device,) = {tensor.device for tensor in tensors if tensor is not None}
        self._torch.cuda.current_stream(device).synchronize()
        return True

    @property
    def are_placed(self) -> bool:
        """Whether they lie in a region, in a process with torch."""
        return self._torch is not None

    def _host_tensor(self, place: _Place) -> torch.Tensor:
        """The tensor that lies at a place."""
        tensor = self._on_host.get(place.address)
        if tensor is None:
            array = next(each for name, each in self.arrays.items() if self._places[name] is place)
            tensor = self._on_host[place.address] = torch_tensor(array)
        return tensor

    def copies(self) -> dict[str, torch.Tensor]:
        """Copies of all, by name, on the host: what lies here will change. For those that are placed."""
        tensors = {}
        for name, (shape, dtype, address, num_bytes) in self._places.items():
            tensor = tensors[name] = self._torch.empty(shape, dtype=dtype)  # type: ignore[union-attr]
            ctypes.memmove(tensor.data_ptr(), address, num_bytes)
        return tensors

    def copy_to(self, name: str, target: torch.Tensor, *, waits: bool = True) -> None:
        """Copies one to a tensor of its shape, wherever that is; a GPU may not have done so if it `waits` not."""
        place = self._places[name]
        if target.is_cpu and target.is_contiguous():
            ctypes.memmove(target.data_ptr(), place.address, place.num_bytes)
        elif place.num_bytes:
            target.copy_(self._host_tensor(place), non_blocking=not waits)


def place(
    region: Region,
    arrays: Mapping[str, Sendable],
    start: int,
    field: str,
    message: Any,
    names: Sequence[str],
    *,
    copies: bool = True,
) -> PlacedTensors:
    """Places arrays in a region, one behind the other, and says in a message where each lies.

    Args:
        region: where to.
        arrays: by their fields in `message`.
        start: offset of the first.
        field: the name to use in errors.
        message: of a call or a reply.
        names: see `PlacedTensors`.
        copies: whether their elements go there too; else they have none, and the places are to be filled.

    Raises:
        InvalidRequest: they do not fit; nothing was copied then.
    """
    placing = region.placed if copies else region.places
    tensors, views = placing(list(arrays.values()), start, field)
    placed = {}
    for (name, array), tensor, view in zip(arrays.items(), tensors, views, strict=True):
        getattr(message, name).CopyFrom(tensor)
        placed[name] = Array(array.dtype, array.shape, view)
    return PlacedTensors(placed, names)


def gpu_of(*tensors: Any) -> torch.device | None:
    """The GPU of CUDA's on which all of them are tensors of torch; None: some are elsewhere, or something else.

    Args:
        tensors: None for one that there is not.
    """
    torch = sys.modules.get("torch")
    given = [tensor for tensor in tensors if tensor is not None]
    if torch is None or not all(isinstance(tensor, torch.Tensor) and tensor.is_cuda for tensor in given):
        return None
    devices = {tensor.device for tensor in given}
    return devices.pop() if len(devices) == 1 else None


def key_of(arrays: Mapping[str, Sendable]) -> object:
    """Equal for calls whose tensors can lie in the same places."""
    return tuple((name, array.dtype, array.shape) for name, array in arrays.items())


def _place(array: Array) -> _Place:
    num_bytes = array.data.nbytes
    address = ctypes.addressof(ctypes.c_char.from_buffer(array.data)) if num_bytes else 0
    return _Place(array.shape, torch_dtype(array.dtype), address, num_bytes)
