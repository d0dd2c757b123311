"""A bare doorbell echo: what the same bytes cost through shared memory when nobody looks at them.

`DoorbellEcho` starts `python -m benchmarks.doorbell_echo`, which inherits one end of a socket and the memory. A call
copies its bytes into the memory and sends 20 bytes; the echo copies as many of them as come back beside them, and sends
32; the caller copies these out. Both sleep in the kernel until something comes, as attnd's shm plane does.
"""

from __future__ import annotations

import mmap
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType, TracebackType

from attnd.protocol.shm.sockets import map_memory, sealed_memory
from attnd.tuning import tune_process
from benchmarks.servers import environment

NUM_BYTES = 256 << 20
# As attnd's: numbers of a call, and of its reply.
_REQUEST, _REPLY = struct.Struct("<IIQI"), struct.Struct("<IIQIIII")
_MIDDLE = NUM_BYTES // 2


class DoorbellEcho:
    """The echo's process, and the way to it. Use it as a context manager."""

    def __init__(
        self,
        module: str = "benchmarks.doorbell_echo",
        *arguments: str,
        defaults: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """The process will run `python -m module *arguments SOCKET MEMORY`, the last two being descriptors.

        Args:
            module: that serves.
            arguments: its command line.
            defaults: of its environment.
        """
        self._command = [sys.executable, "-m", module, *arguments]
        self._environment = environment(defaults)

    def __enter__(self) -> DoorbellEcho:
        """Starts the process."""
        descriptor = sealed_memory(NUM_BYTES)
        self._socket, theirs = socket.socketpair()
        with theirs:
            inherited = (theirs.fileno(), descriptor)
            self._process = subprocess.Popen(
                [*self._command, *map(str, inherited)],
                env=self._environment,
                pass_fds=inherited,
                start_new_session=True,
            )
        self._memory = memoryview(map_memory(descriptor, NUM_BYTES))
        return self

    def call(self, arrays: list[memoryview], num_reply_bytes: int) -> bytes:
        """Sends `arrays` and receives the first `num_reply_bytes` of them; no more than half of the memory each."""
        end = 0
        for array in arrays:
            self._memory[end : end + array.nbytes] = array
            end += array.nbytes
        self._socket.sendall(_REQUEST.pack(0, num_reply_bytes, 0, 0))
        if len(self._socket.recv(_REPLY.size)) != _REPLY.size:
            raise ConnectionResetError("the echo hung up")
        return bytes(self._memory[_MIDDLE : _MIDDLE + num_reply_bytes])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The end of the socket ends the process."""
        self._socket.close()
        self._process.wait()


def serve(connection: socket.socket, memory: mmap.mmap, work: Callable[[], None] = lambda: None) -> None:
    """Answers until the other end hangs up, after `work`."""
    view = memoryview(memory)
    while request := connection.recv(_REQUEST.size):
        _, num_bytes, _, _ = _REQUEST.unpack(request)
        work()
        view[_MIDDLE : _MIDDLE + num_bytes] = view[:num_bytes]
        connection.sendall(_REPLY.pack(0, num_bytes, 0, 0, 0, 0, 0))


if __name__ == "__main__":
    tune_process()
    serve(socket.socket(fileno=int(sys.argv[1])), map_memory(int(sys.argv[2]), NUM_BYTES))
