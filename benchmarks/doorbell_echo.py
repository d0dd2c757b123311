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
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType

from attnd.protocol.shm.sockets import map_memory, sealed_memory
from attnd.tuning import tune_process
from benchmarks.servers import environment

NUM_BYTES = 256 << 20
# As attnd's: numbers of a call, and of its reply.
_REQUEST, _REPLY = struct.Struct("<IIQI"), struct.Struct("<IIQIIII")


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
        return ask(self._socket, self._memory, arrays, num_reply_bytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The end of the socket ends the process."""
        self._socket.close()
        self._process.wait()


def ask(
    connection: socket.socket, memory: memoryview, arrays: Sequence[memoryview | bytes], num_reply_bytes: int
) -> bytes:
    """A call over a socket and memory; see `DoorbellEcho.call`."""
    end, middle = 0, len(memory) // 2
    for array in arrays:
        size = memoryview(array).nbytes
        memory[end : end + size] = array
        end += size
    connection.sendall(_REQUEST.pack(0, num_reply_bytes, 0, 0))
    if len(connection.recv(_REPLY.size)) != _REPLY.size:
        raise ConnectionResetError("the echo hung up")
    return bytes(memory[middle : middle + num_reply_bytes])


def answer(connection: socket.socket, memory: memoryview, work: Callable[[], None]) -> bool:
    """Answers a call after `work`. False: the other end has hung up."""
    request = connection.recv(_REQUEST.size)
    if not request:
        return False
    _, num_bytes, _, _ = _REQUEST.unpack(request)
    work()
    middle = len(memory) // 2
    memory[middle : middle + num_bytes] = memory[:num_bytes]
    connection.sendall(_REPLY.pack(0, num_bytes, 0, 0, 0, 0, 0))
    return True


def serve(connection: socket.socket, memory: mmap.mmap, work: Callable[[], None] = lambda: None) -> None:
    """Answers until the other end hangs up, after `work`."""
    view = memoryview(memory)
    while answer(connection, view, work):
        pass


if __name__ == "__main__":
    tune_process()
    serve(socket.socket(fileno=int(sys.argv[1])), map_memory(int(sys.argv[2]), NUM_BYTES))
