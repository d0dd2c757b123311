"""A layer's tensors to the server's memory, the hand-over, and its output back: in one kernel across two GPUs.

Copies by the driver take microseconds each, and there are four of them for every layer of every token. Here a few
blocks of threads copy q, k and v, rows that lie apart included; the last one to be done tells the server; each waits
for the server's word and copies its part of the output. On one GPU, where no kernel may wait (see `gate_flags`), there
are two kernels around the wait of the stream, the first of which tells the server.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import Any, NamedTuple

from attnd.protocol.cuda.driver import CudaError, Device, driver, kernels
from attnd.protocol.cuda.gate_flags import WAIT

# Bytes that a thread copies at a time; addresses, rows and strides are multiples of it.
VECTOR_BYTES = 16
_THREADS = 256
# Vectors of a thread, roughly. More blocks than these wait for nothing but memory.
_VECTORS_OF_THREAD, _MAX_BLOCKS = 2, 64
_NUM_INPUTS, _NUM_OUTPUTS = 3, 2

# Of one copy: where to and from, vectors in all and in a row, and bytes from one row of the source to the next. The
# target is dense.
_PARAMETERS = """
    .param .u64 to{n}, .param .u64 from{n}, .param .u32 vectors{n}, .param .u32 of_row{n}, .param .u64 stride{n}"""
_COPY = """
    ld.param.u64 %target, [to{n}];
    ld.param.u64 %source, [from{n}];
    ld.param.u32 %vectors, [vectors{n}];
    ld.param.u32 %of_row, [of_row{n}];
    ld.param.u64 %stride, [stride{n}];
    mov.u32 %index, %first;
COPY{n}:
    setp.ge.u32 %decided, %index, %vectors;
    @%decided bra COPIED{n};
    div.u32 %row, %index, %of_row;
    mul.lo.u32 %column, %row, %of_row;
    sub.u32 %column, %index, %column;
    cvt.u64.u32 %wide, %row;
    mad.lo.u64 %address, %wide, %stride, %source;
    mul.wide.u32 %wide, %column, 16;
    add.u64 %address, %address, %wide;
    ld{volatile}.global.v4.u32 {{%x, %y, %z, %w}}, [%address];
    mul.wide.u32 %wide, %index, 16;
    add.u64 %address, %target, %wide;
    st.global.v4.u32 [%address], {{%x, %y, %z, %w}};
    add.u32 %index, %index, %step;
    bra COPY{n};
COPIED{n}:
"""
_REGISTERS = """
    .reg .pred %decided;
    .reg .u32 %thread, %width, %block, %blocks, %first, %step, %index, %vectors, %of_row, %row, %column;
    .reg .u32 %x, %y, %z, %w, %turn, %low, %stop, %count;
    .reg .u64 %target, %source, %stride, %wide, %address;
    .reg .u64 %counter, %arrived, %signal, %flag, %stop_word, %next, %seen;
    mov.u32 %thread, %tid.x;
    mov.u32 %width, %ntid.x;
    mov.u32 %block, %ctaid.x;
    mov.u32 %blocks, %nctaid.x;
    mad.lo.u32 %first, %block, %width, %thread;
    mul.lo.u32 %step, %blocks, %width;
"""
# One thread of each block. It reads the count before it arrives, and the last to arrive writes it, after all have read.
# Arriving hands what its block wrote to the last one, and that hands everything to the whole system with the word: to
# release and to acquire adds up in PTX's memory model.
_HAND_OVER = (
    """
    bar.sync 0;
    setp.ne.u32 %decided, %thread, 0;
    @%decided bra DONE;
    ld.param.u64 %counter, [counter];
    ld.param.u64 %arrived, [arrived];
    ld.param.u64 %signal, [signal];
    ld.param.u64 %flag, [flag];
    ld.param.u64 %stop_word, [stop];
    ld.volatile.global.u64 %next, [%counter];
    add.u64 %next, %next, 1;
    atom.acq_rel.gpu.global.add.u32 %count, [%arrived], 1;
    add.u32 %count, %count, 1;
    setp.ne.u32 %decided, %count, %blocks;
    @%decided bra WAIT;
    st.global.u32 [%arrived], 0;
    st.global.u64 [%counter], %next;
    st.release.sys.global.u64 [%signal], %next;
WAIT:"""
    + WAIT
    + """    bar.sync 0;
"""
)
# Likewise, but the value of the word comes with the launch, and nothing is waited for.
_WRITE = """
    bar.sync 0;
    setp.ne.u32 %decided, %thread, 0;
    @%decided bra DONE;
    ld.param.u64 %counter, [arrived];
    ld.param.u64 %signal, [signal];
    ld.param.u64 %next, [value];
    cvt.u32.u64 %low, %next;
    atom.acq_rel.gpu.global.add.u32 %count, [%counter], 1;
    add.u32 %count, %count, 1;
    setp.ne.u32 %decided, %count, %blocks;
    @%decided bra DONE;
    st.global.u32 [%counter], 0;
    st.release.sys.global.u32 [%signal], %low;
DONE:
"""
_WRITE_WORDS = """
    .param .u64 arrived, .param .u64 signal, .param .u64 value"""
_WORDS = """
    .param .u64 counter, .param .u64 arrived, .param .u64 signal, .param .u64 flag, .param .u64 stop"""


def _kernel(name: str, num_inputs: int, num_outputs: int, writes: bool = False) -> str:
    """Copies, and with outputs the hand-over between them. These are read past the caches: somebody else wrote them.

    If it `writes`, the word comes after the copies.
    """
    numbers = range(num_inputs + num_outputs)
    parameters = [_PARAMETERS.format(n=n) for n in numbers]
    copies = [_COPY.format(n=n, volatile=".volatile" if n >= num_inputs else "") for n in numbers]
    if num_outputs:
        parameters.append(_WORDS)
        copies.insert(num_inputs, _HAND_OVER)
    if writes:
        parameters.append(_WRITE_WORDS)
        copies.append(_WRITE)
    body = "".join(copies)
    return f".visible .entry {name}({','.join(parameters)}\n) {{{_REGISTERS}{body}    ret;\n}}\n"


PTX = (
    ".version 7.0\n.target sm_70\n.address_size 64\n"
    + _kernel("attnd_copy", _NUM_INPUTS, 0)
    + _kernel("attnd_copy_and_write", _NUM_INPUTS, 0, writes=True)
    + _kernel("attnd_hand_over", _NUM_INPUTS, _NUM_OUTPUTS)
)


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
    return kernels(PTX, ("attnd_copy", "attnd_copy_and_write", "attnd_hand_over"))


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
        self._launch = _Launch(on, "attnd_copy", _NUM_INPUTS, 0)

    def copy(self, stream: int, copies: list[Copy]) -> None:
        """Enqueues up to three copies."""
        self._launch(stream, copies + [_NOTHING] * (_NUM_INPUTS - len(copies)))


class CopyAndWrite:
    """Copies, and a word of 32 bits that tells somebody else when they are there."""

    def __init__(self, on: Device, arrived: int) -> None:
        """`arrived` is the address of 4 bytes of the GPU, 0 between launches; the GPU is the thread's current one."""
        self._launch = _Launch(on, "attnd_copy_and_write", _NUM_INPUTS, 3)
        self._arrived = arrived

    def run(self, stream: int, copies: list[Copy], address: int, value: int) -> None:
        """Enqueues up to three copies, then `value` at `address`."""
        self._launch(stream, copies + [_NOTHING] * (_NUM_INPUTS - len(copies)), self._arrived, address, value)


class HandOver:
    """Copies, hand-over and copies in one kernel."""

    def __init__(self, on: Device, counter: int, arrived: int, signal: int, flag: int, stop: int) -> None:
        """Addresses as of `GateFlags`; `arrived` is that of 4 bytes beside the counter, 0 between launches."""
        self._words = counter, arrived, signal, flag, stop
        self._launch = _Launch(on, "attnd_hand_over", _NUM_INPUTS + _NUM_OUTPUTS, len(self._words))

    def run(self, stream: int, inputs: list[Copy], outputs: list[Copy]) -> None:
        """Enqueues up to three copies to the server, a hand-over, and up to two copies back."""
        copies = inputs + [_NOTHING] * (_NUM_INPUTS - len(inputs))
        self._launch(stream, copies + outputs + [_NOTHING] * (_NUM_OUTPUTS - len(outputs)), *self._words)
