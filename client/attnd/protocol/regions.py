"""Host memory that client and server both map, in which tensors lie instead of in messages.

The other side may write to it at any time. So nothing is checked here and read again there: what a message says of a
tensor travels beside the region, and only elements, of which every value is one, lie in it.
"""

from __future__ import annotations

import math
import mmap
from typing import TYPE_CHECKING

from attnd.errors import InvalidRequest
from attnd.protocol.loose import Sendable, copy_elements
from attnd.protocol.tensors import DTYPE_NAMES, ITEM_SIZES, Array
from attnd.v1 import tensor_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

# Bytes: offsets are multiples of it (see tensor.proto).
ALIGNMENT = 64
# No tensor of the contract has more, and the product of a few extents is soon made.
MAX_DIMENSIONS = 8


def aligned(offset: int) -> int:
    """The least offset not before `offset` where a tensor may start."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


class Region:
    """The memory of one plane.

    It is unmapped when it has been closed or is gone, and the last array in it has gone too.

    Attributes:
        id: as messages name it.
        num_bytes: its size.
    """

    def __init__(self, region_id: int, memory: mmap.mmap) -> None:
        """Views `memory`."""
        self.id = region_id
        self.num_bytes = len(memory)
        self._bytes = memoryview(memory)

    @property
    def memory(self) -> memoryview:
        """All of its bytes."""
        return self._bytes

    def close(self) -> None:
        """Lets go of the memory, whoever still holds this object: from now on nothing lies here."""
        self.num_bytes = 0
        self._bytes = memoryview(b"")

    def array(self, message: tensor_pb2.Tensor, field: str) -> Array:
        """The tensor that `message` says lies here, as a view. Its elements may change at any time.

        Raises:
            InvalidRequest: it cannot lie here.
        """
        dtype, shape, place = message.dtype, tuple(message.shape), message.region
        if dtype not in ITEM_SIZES:
            names = ", ".join(DTYPE_NAMES.values())
            raise InvalidRequest(f"{field} has dtype {dtype or 'unspecified'}, but must be one of {names}", field=field)
        if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0:
            rule = f"at most {MAX_DIMENSIONS} extents, none negative"
            raise InvalidRequest(f"{field} has {len(shape)} extents, but must have {rule}", field=field)
        num_bytes = math.prod(shape) * ITEM_SIZES[dtype]
        return Array(dtype, shape, self.view(place, num_bytes, field))

    def view(self, place: tensor_pb2.Region, num_bytes: int, field: str) -> memoryview:
        """The bytes at `place`.

        Raises:
            InvalidRequest: not this region, not aligned, or beyond its end.
        """
        if place.id != self.id:
            raise InvalidRequest(f"{field} lies in region {place.id}, but this plane has region {self.id}", field=field)
        if place.offset % ALIGNMENT:
            raise InvalidRequest(
                f"{field} has offset {place.offset}, but must have a multiple of {ALIGNMENT}", field=field
            )
        if place.offset + num_bytes > self.num_bytes:
            raise InvalidRequest(
                f"{field} has offset {place.offset} and needs {num_bytes} bytes, but the plane's region ends at byte "
                f"{self.num_bytes}; the server's --region-bytes gives more",
                field=field,
            )
        return self._bytes[place.offset : place.offset + num_bytes]

    def places(
        self, arrays: Sequence[Sendable], start: int, field: str
    ) -> tuple[list[tensor_pb2.Tensor], list[memoryview]]:
        """Where arrays would lie, one behind the other.

        Args:
            arrays: of which dtype and shape count.
            start: offset of the first.
            field: the name to use in errors.

        Returns:
            What says where each lies, and these places.

        Raises:
            InvalidRequest: they do not fit.
        """
        messages, end = [], start
        for array in arrays:
            place = tensor_pb2.Region(id=self.id, offset=end)
            dtype = tensor_pb2.Dtype.ValueType(array.dtype)
            messages.append(tensor_pb2.Tensor(dtype=dtype, shape=array.shape, region=place))
            end = aligned(end + array.num_bytes)
        pairs = zip(messages, arrays, strict=True)
        return messages, [self.view(message.region, array.num_bytes, field) for message, array in pairs]

    def placed(
        self, arrays: Sequence[Sendable], start: int, field: str
    ) -> tuple[list[tensor_pb2.Tensor], list[memoryview]]:
        """Copies arrays to here, as `places` has them. Nothing is copied if they do not fit."""
        messages, views = self.places(arrays, start, field)
        for view, array in zip(views, arrays, strict=True):
            copy_elements(array, view)
        return messages, views
