"""A layer's tensors to the server's memory, the hand-over, and its output back: in one kernel, by gates.

Copies by the driver take microseconds each, and there are four of them for every layer of every token. Here a few
blocks of threads copy q, k and v, rows that lie apart included; the last one to be done tells the server; each waits
for the server's word and copies its part of the output. Where two processes take turns on a GPU, no kernel may wait
(see `gate_flags`): there are two around the wait of the stream, the first of which tells the server.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import Any, NamedTuple

from attnd.protocol.cuda.copy_kernels import NUM_INPUTS, NUM_OUTPUTS, PTX
from attnd.protocol.cuda.driver import CudaError, Device, driver, kernels

# Bytes that a thread copies at a time; addresses, rows and strides are multiples of it.
VECTOR_BYTES = 16
_THREADS = 256
# Vectors of a thread, roughly. More blocks than these wait for nothing but memory.
_VECTORS_OF_THREAD, _MAX_BLOCKS = 2, 64


class Copy(NamedTuple):
    """Rows to be copied side by side.

    Attributes:
        target: address.
        source: address of the first row.
        num_rows: rows.
        row_bytes: of each.
        stride_bytes: from one row of the source to the next.
    """

    target: int
    source: int
    num_rows: int
    row_bytes: int
    stride_bytes: int

    @property
    def is_possible(self) -> bool:
        """Whether the kernels can copy it."""
        return not (self.target | self.source | self.row_bytes | self.stride_bytes) % VECTOR_BYTES


_NOTHING = Copy(0, 0, 0, VECTOR_BYTES, 0)
_COPY_FIELDS = "QQIIQ"


@cache
def _functions(on: Device) -> dict[str, Any]:
    """The kernels on a GPU, the thread's current one, until the process ends."""
    return kernels(PTX, ("attnd_copy", "attnd_copy_and_write", "attnd_post", "attnd_hand_over"))


def prepare(on: Device) -> None:
    """Loads the kernels, for which the driver may wait for all that runs on the GPU, the thread's current one."""
    _functions(on)


class _Launch:
    """A kernel and the place of its arguments, which the driver reads when it is launched."""

    def __init__(self, on: Device, name: str, num_copies: int, num_words: int) -> None:
        self._function = _functions(on)[name]
        self._format = struct.Struct("<" + _COPY_FIELDS * num_copies + "Q" * num_words)
        self._buffer = ctypes.create_string_buffer(self._format.size)
        offsets, end = [], 0
        for letter in _COPY_FIELDS * num_copies + "Q" * num_words:
            offsets.append(end)
            end += struct.calcsize("<" + letter)
        base = ctypes.addressof(self._buffer)
        self._pointers = (ctypes.c_void_p * len(offsets))(*[base + offset for offset in offsets])
        self._arguments = ctypes.addressof(self._pointers)
        self._launch = driver().cuLaunchKernel

    def __call__(self, stream: int, copies: list[Copy], *words: int) -> None:
        values: list[int] = []
        most = 0
        for target, source, num_rows, row_bytes, stride_bytes in copies:
            of_row = row_bytes // VECTOR_BYTES
            values += (target, source, num_rows * of_row, of_row, stride_bytes)
            most += num_rows * of_row
        self._format.pack_into(self._buffer, 0, *values, *words)
        blocks = max(1, min(_MAX_BLOCKS, -(-most // (_THREADS * _VECTORS_OF_THREAD))))
        (result,) = self._launch(self._function, blocks, 1, 1, _THREADS, 1, 1, 0, stream, self._arguments, 0)
        if result:
            raise CudaError("cuLaunchKernel", result.name)


class Copier:
    """Copies on one GPU."""

    def __init__(self, on: Device) -> None:
        """The GPU must be the thread's current one."""
        self._launch = _Launch(on, "attnd_copy", NUM_INPUTS, 0)

    def copy(self, stream: int, copies: list[Copy]) -> None:
        """Enqueues up to three copies."""
        self._launch(stream, copies + [_NOTHING] * (NUM_INPUTS - len(copies)))


class CopyAndWrite:
    """Copies, and a word of 32 bits that tells somebody else when they are there."""

    def __init__(self, on: Device, arrived: int) -> None:
        """`arrived` is the address of 4 bytes of the GPU, 0 between launches; the GPU is the thread's current one."""
        self._launch = _Launch(on, "attnd_copy_and_write", NUM_INPUTS, 3)
        self._arrived = arrived

    def run(self, stream: int, copies: list[Copy], address: int, value: int) -> None:
        """Enqueues up to three copies, then `value` at `address`."""
        self._launch(stream, copies + [_NOTHING] * (NUM_INPUTS - len(copies)), self._arrived, address, value)


class Post:
    """Copies, and then a word of 64 bits that is counted up: a resident step's metadata, and the step."""

    def __init__(self, on: Device, counter: int, arrived: int, signal: int, wake: int) -> None:
        """The GPU must be the thread's current one.

        Args:
            on: the GPU.
            counter: address of 8 bytes of it, where steps are counted.
            arrived: address of 4 bytes of it, 0 between launches.
            signal: address of the word that the other side waits for.
            wake: address, for GPUs, of a word of the host's that gets the same number.
        """
        self._launch = _Launch(on, "attnd_post", NUM_INPUTS, 4)
        self._words = counter, arrived, signal, wake

    def run(self, stream: int, copies: list[Copy]) -> None:
        """Enqueues up to three copies, and the count."""
        self._launch(stream, copies + [_NOTHING] * (NUM_INPUTS - len(copies)), *self._words)


class HandOver:
    """Copies, hand-over and copies in one kernel."""

    def __init__(self, on: Device, counter: int, arrived: int, signal: int, flag: int, stop: int) -> None:
        """Addresses as of `GateFlags`; `arrived` is that of 8 bytes beside the counter, 0 between launches."""
        self._words = counter, arrived, signal, flag, stop
        self._launch = _Launch(on, "attnd_hand_over", NUM_INPUTS + NUM_OUTPUTS, len(self._words))

    def run(self, stream: int, inputs: list[Copy], outputs: list[Copy]) -> None:
        """Enqueues up to three copies to the server, a hand-over, and up to two copies back."""
        copies = inputs + [_NOTHING] * (NUM_INPUTS - len(inputs))
        self._launch(stream, copies + outputs + [_NOTHING] * (NUM_OUTPUTS - len(outputs)), *self._words)
