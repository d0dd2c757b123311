"""What the host says of the calls of a joined launch, in memory that the device reads by itself."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from attnd_server.attention.backends.base import DecodeShape
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.metadata import REQUEST_COLUMNS, AttentionMetadata, AttentionOptions
from attnd_server.attention.staging import Field, call_fields, offsets_of
from attnd_server.device.pinned_tensor import as_device_sees
from attnd_server.execution.step import Call

if TYPE_CHECKING:
    from attnd_server.attention.kernels.joined import JoinedCalls


class Rows:
    """Of each request of a step what kernels go by, see `kernels.joined.JoinedCalls.rows`.

    Attributes:
        num_reqs: rows.
        array: of them.
        address: where they lie.
        num_bytes: that they have.
    """

    def __init__(self, array: npt.NDArray[np.int32]) -> None:
        """`array` is `[num_reqs, row_len]`."""
        # Looked up here: it takes numpy longer than a launch may take for a call.
        self.num_reqs, self.array = len(array), array
        self.address, self.num_bytes = array.ctypes.data, array.nbytes


NUM_COLUMNS = len(REQUEST_COLUMNS)
# That of `kernels.joined`, which only loads with Triton; a test compares them.
CALL_FIELDS = 8
_CALL = struct.Struct(f"{CALL_FIELDS}q")


def row_len(query_len: int, max_pages: int) -> int:
    """Elements of a request's row, see `kernels.joined.JoinedCalls.rows`."""
    return NUM_COLUMNS + query_len + max_pages


def rows_of(metadata: AttentionMetadata, query_len: int, num_pages: int, max_pages: int) -> Rows:
    """The rows of a decode step without absent pages, the first `num_pages` columns of its page tables among them."""
    num_reqs = metadata.num_reqs
    rows = np.zeros((num_reqs, row_len(query_len, max_pages)), np.int32)
    rows[:, :NUM_COLUMNS] = metadata.columns.T
    slots = rows[:, NUM_COLUMNS : NUM_COLUMNS + query_len]
    slots[...] = -1 if metadata.slot_mapping is None else metadata.slot_mapping.numpy().reshape(num_reqs, query_len)
    first = NUM_COLUMNS + query_len
    tables = metadata.page_tables.numpy()[:, :num_pages]
    np.maximum(tables, 0, out=rows[:, first : first + tables.shape[1]])  # -1 beyond a context: looked at, never read
    return Rows(rows)


Addresses = tuple[int, int, int, int, int]
"""Of q, k, v, output and lse."""
Output = tuple[torch.Tensor, torch.Tensor | None]
"""Output and lse of a call."""


class Said(NamedTuple):
    """What the device is told of a call.

    Attributes:
        rows: of its step.
        at: where its tensors are, for the device.
        first_page: of the space, page 0 of its layer.
    """

    rows: Rows
    at: Addresses
    first_page: int


class _Placed(NamedTuple):
    """The rows of a step that lie in the host's block, and where."""

    rows: Rows
    first_req: int


class HostCalls:
    """One block of pinned memory: what is said of each call, the rows of its requests, and room for its tensors.

    Tensors lie there whose memory the device cannot read or write by itself, of a call's own requests of the launch.
    """

    def __init__(
        self,
        config: AttentionConfig,
        options: AttentionOptions,
        shape: DecodeShape,
        *,
        max_calls: int,
        max_pages: int,
        device: torch.device,
    ) -> None:
        """Takes the memory.

        Args:
            config: of the space.
            options: of the layers.
            shape: of the launches.
            max_calls: of a launch.
            max_pages: columns of the page tables.
            device: that reads it.
        """
        length = row_len(shape.query_len, max_pages)
        self._query_len, self._row_bytes, self._device = shape.query_len, 4 * length, device
        (_, *inputs), results = call_fields(config, options)
        num_tokens = shape.num_reqs * shape.query_len
        fields = [
            Field(torch.int32, (1,)),
            Field(torch.int64, (max_calls, CALL_FIELDS)),
            Field(torch.uint8, (shape.num_reqs,)),
            Field(torch.int32, (shape.num_reqs, length)),
            *(each._replace(row=(num_tokens, *each.row)) for each in (*inputs, *results)),
        ]
        offsets, num_bytes = offsets_of(1, fields)
        self._memory = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        parts = [
            self._memory[offset : offset + field.row_bytes].view(field.dtype).view(field.row)
            for offset, field in zip(offsets, fields, strict=True)
        ]
        self._said = parts[:4]
        self._num_reqs = self._said[0].numpy()
        _, self._calls_at, call_of_at, rows_at = offsets[:4]
        start = self._memory.data_ptr()
        self._call_of, self._first_row = start + call_of_at, start + rows_at
        self._bytes = memoryview(self._memory.numpy().data)
        self._k, self._v, self._q, *results_here = parts[4:]
        *lse, self._output = results_here
        self._lse = lse[0] if lse else None
        self._placed: list[_Placed] = []

    def as_device_sees(self) -> JoinedCalls:
        """What kernels read. Whoever launches them keeps this object."""
        from attnd_server.attention.kernels.joined import JoinedCalls

        if self._device.type != "cuda":
            return JoinedCalls(*self._said)
        return JoinedCalls(*(as_device_sees(each.view(-1), self._device).view(each.shape) for each in self._said))

    def fill(
        self, calls: Sequence[Call], rows: Sequence[Rows], first_pages: Sequence[int], num_columns: int
    ) -> list[Output]:
        """Says of each call where its requests and its tensors are.

        Args:
            calls: all of them decode, with equally many new tokens of each request.
            rows: of the step of each.
            first_pages: of the space, page 0 of the layer of each.
            num_columns: of the page tables that are to be taken.

        Returns:
            Where output and lse of each will be, on the host.
        """
        first_req, outputs, said = 0, [], []
        for call, own, first_page in zip(calls, rows, first_pages, strict=True):
            if call.at is None or call.is_sampled:
                at, output = self._here(call, first_req, own.num_reqs)
            else:
                assert call.into is not None
                at, output = call.at, call.into
            said.append(Said(own, at, first_page))
            outputs.append(output)
            first_req += own.num_reqs
        self.say(said, num_columns)
        return outputs

    def say(self, calls: Sequence[Said], num_columns: int) -> None:
        """As `fill`, of calls whose tensors need not be brought here."""
        first_req, at = 0, self._calls_at
        for index, (rows, addresses, first_page) in enumerate(calls):
            self._place(index, rows, first_req)
            _CALL.pack_into(self._bytes, at, first_req, *addresses, first_page, num_columns)
            at += _CALL.size
            first_req += rows.num_reqs
        self._num_reqs[0] = first_req

    def _place(self, index: int, rows: Rows, first_req: int) -> None:
        """Puts the rows of a call's step there, unless they lie there since the last launch."""
        placed = self._placed
        if index < len(placed) and placed[index].rows is rows and placed[index].first_req == first_req:
            return
        del placed[index:]  # they are where these go, or come later than before
        ctypes.memset(self._call_of + first_req, index, rows.num_reqs)
        ctypes.memmove(self._first_row + first_req * self._row_bytes, rows.address, rows.num_bytes)
        placed.append(_Placed(rows, first_req))

    def _here(self, call: Call, first_req: int, num_reqs: int) -> tuple[Addresses, Output]:
        """Brings the tensors of a call here. Returns where they and its results are, and these."""
        rows = slice(first_req * self._query_len, (first_req + num_reqs) * self._query_len)
        q, k, v = ((call.q, self._q[rows]), (call.k, self._k[rows]), (call.v, self._v[rows]))
        for tensor, here in (q, k, v):
            assert tensor is not None
            if tensor.is_contiguous():
                ctypes.memmove(here.data_ptr(), tensor.data_ptr(), tensor.nbytes)
            else:
                here.copy_(tensor)
        output, lse = self._output[rows], None if self._lse is None else self._lse[rows]
        at_lse = 0 if lse is None else lse.data_ptr()
        return (q[1].data_ptr(), k[1].data_ptr(), v[1].data_ptr(), output.data_ptr(), at_lse), (output, lse)
