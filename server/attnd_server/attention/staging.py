"""Tensors side by side on the host and again on the device, so that one copy takes all of them over."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.metadata import AttentionOptions
from attnd_server.device.pinned_tensor import as_device_sees

# Bytes: where a buffer's tensors start, as the device's own allocations do at the least.
_ALIGNMENT = 256
# Bytes that kernels copy at a time.
_WORD = 4


class Field(NamedTuple):
    """A tensor of a buffer: its type, and the shape of a row."""

    dtype: torch.dtype
    row: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.dtype.itemsize * math.prod(self.row)


class Head(NamedTuple):
    """The first rows of a buffer.

    Attributes:
        tensors: on the host, only these rows.
        on_host: one piece of memory with all of them; of the last tensor these rows alone.
        on_device: likewise, there.
    """

    tensors: list[torch.Tensor]
    on_host: torch.Tensor
    on_device: torch.Tensor

    def fill(self, first: int, tensors: Sequence[torch.Tensor]) -> None:
        """Puts tensors of the host, of the same types and shapes, into those on the host from index `first` on.

        By one thread and without torch, whose copies of these few kilobytes take longer, and wake its threads for more.
        """
        for target, source in zip(self.tensors[first:], tensors, strict=True):
            if source.is_contiguous():
                ctypes.memmove(target.data_ptr(), source.data_ptr(), target.nbytes)
            else:
                target.copy_(source)


class Buffer:
    """Tensors of `num_rows` rows side by side on the device, and again on the host.

    Attributes:
        device: the tensors there.
        host: those here, in pinned memory if the device is a GPU.
    """

    def __init__(self, num_rows: int, fields: list[Field], device: torch.device) -> None:
        offsets, end = offsets_of(num_rows, fields)
        num_bytes = -(-end // _WORD) * _WORD
        self._on_device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._on_host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._last_offset, self._last_row_bytes = offsets[-1], fields[-1].row_bytes
        self._fetched = as_device_sees(self._on_host, device) if device.type == "cuda" else self._on_host
        self.device, self.host = (
            [
                memory[offset : offset + num_rows * field.row_bytes].view(field.dtype).view(num_rows, *field.row)
                for field, offset in zip(fields, offsets, strict=True)
            ]
            for memory in (self._on_device, self._on_host)
        )

    def fetch(self) -> None:
        """Brings all of it to the device by a kernel, which a CUDA graph can have among others."""
        torch.bitwise_or(self._fetched.view(torch.int32), 0, out=self._on_device.view(torch.int32))

    def send(self) -> None:
        """Brings all of it to the host, likewise."""
        torch.bitwise_or(self._on_device.view(torch.int32), 0, out=self._fetched.view(torch.int32))

    def head(self, num_rows: int) -> Head:
        """The first rows, which are views."""
        end = self._last_offset + num_rows * self._last_row_bytes
        return Head([tensor[:num_rows] for tensor in self.host], self._on_host[:end], self._on_device[:end])


def offsets_of(num_rows: int, fields: list[Field]) -> tuple[list[int], int]:
    """Where each tensor of a buffer starts, and where the last ends."""
    offsets, end = [], 0
    for field in fields:
        offsets.append(end)
        end += -(-num_rows * field.row_bytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def call_fields(config: AttentionConfig, options: AttentionOptions) -> tuple[list[Field], list[Field]]:
    """The inputs (slots, k, v, q) and the results (lse if there is one, output) of a call.

    The biggest is last, of which only the rows in use are copied.
    """
    heads, kv_heads = options.num_heads, config.num_kv_heads
    slots = Field(torch.int64, ())
    k, v = Field(config.dtype, (kv_heads, config.head_dim)), Field(config.dtype, (kv_heads, config.head_dim_v))
    q, output = Field(config.dtype, (heads, config.head_dim)), Field(config.dtype, (heads, config.head_dim_v))
    lse = Field(torch.float32, (heads,))
    return [slots, k, v, q], [lse, output] if options.return_lse else [output]
