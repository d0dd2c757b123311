"""Local memory: what the threads of kernels have for their stacks and for registers that were spilled.

The driver gives every thread that the GPU can run as much as the kernel needs that needs most, and takes no memory
back: bytes a thread, times 2,048 threads, times multiprocessors. Before the first launch of a kernel that needs more it
waits for all that the context has on the GPU. So memory is made to grow ahead, when nothing waits there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

from attnd.protocol.cuda.driver import Stream, call, device, kernels

# Bytes of a thread that kernels have from the start: libraries' too, whose needs nobody asks for.
LEAST_BYTES = 1024
# A kernel of one thread that needs so many bytes, and touches them as far as the compiler knows. `unused` is 0.
_PTX = """.version 7.0
.target sm_70
.address_size 64
.visible .entry attnd_local_memory(.param .u64 unused) {
    .local .align 16 .b8 memory[%d];
    .reg .u64 %%unused, %%memory, %%written, %%read;
    .reg .u32 %%thread, %%block, %%value;
    .reg .pred %%is_used;
    ld.param.u64 %%unused, [unused];
    mov.u32 %%thread, %%tid.x;
    mov.u32 %%block, %%ctaid.x;
    mov.u64 %%memory, memory;
    mad.wide.u32 %%written, %%thread, 4, %%memory;
    mad.wide.u32 %%read, %%block, 4, %%memory;
    st.local.u32 [%%written], %%thread;
    ld.local.u32 %%value, [%%read];
    setp.ne.u64 %%is_used, %%unused, 0;
    @%%is_used st.global.u32 [%%unused], %%value;
    ret;
}
"""


class LocalMemory:
    """That of one context.

    Attributes:
        num_bytes: that each thread has, as far as was asked for.
    """

    def __init__(self, index: int) -> None:
        """Of a context on the GPU of that index in this process."""
        self._index = index
        self.num_bytes = 0

    def reserve(self, num_bytes: int) -> None:
        """Has each thread get so many bytes at least. The context is current, and nothing waits in it."""
        if num_bytes <= self.num_bytes:
            return
        num_bytes = -(-num_bytes // 16) * 16
        user_of(self._index, num_bytes)()
        self.num_bytes = num_bytes


def user_of(index: int, num_bytes: int) -> Callable[[], None]:
    """Loads a kernel that needs so many bytes; returns what launches it and waits until it is over.

    Args:
        index: of the GPU in this process, whose context is current.
        num_bytes: a multiple of 16.
    """
    (kernel,) = kernels(_PTX % num_bytes, ("attnd_local_memory",)).values()

    def use() -> None:
        value = ctypes.c_uint64(0)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(value))
        stream = Stream(device(index))
        try:
            call("cuLaunchKernel", kernel, 1, 1, 1, 1, 1, 1, 0, stream.handle, ctypes.addressof(arguments), 0)
            stream.synchronize()
        finally:
            stream.close()

    return use


@cache
def local_memory(index: int) -> LocalMemory:
    """That of the primary context on a GPU of this process."""
    return LocalMemory(index)
