"""Many bare callers of one process that attends for each of their calls: the most that a server could give them.

`python -m benchmarks.many_echoes serve STEP THREADS PATH CALLERS` is that process: `benchmarks.attending_echo` with as
many sockets, and a cache for each. `... call PATH BYTES_IN BYTES_OUT CALLS` is a caller that does as it is told; see
`benchmarks.told_seconds`.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from attnd.protocol.shm.sockets import map_memory, sealed_memory
from attnd.tuning import tune_process
from benchmarks import attending_echo, doorbell_echo
from benchmarks.servers import Child, started
from benchmarks.told_seconds import run_as_told
from benchmarks.workload import NUM_CALLS, DecodeStep

MODULE = "benchmarks.many_echoes"
NUM_BYTES = 16 << 20
READY_TIMEOUT_S = 120.0


@contextmanager
def callers(step: DecodeStep, num_callers: int, num_threads: int) -> Iterator[list[Child]]:
    """The callers of a step's calls, each of which takes seconds and answers as `benchmarks.light_caller` does."""
    q, k, v = step.layers[0]
    num_bytes = [str(number) for number in (q.nbytes + k.nbytes + v.nbytes, q.nbytes, NUM_CALLS)]
    with ExitStack() as stack:
        path = str(Path(stack.enter_context(TemporaryDirectory(prefix="attnd-"))) / "echo")
        serve = ("serve", attending_echo.encoded(step), str(num_threads), path, str(num_callers))
        server = stack.enter_context(started(MODULE, *serve, defaults=attending_echo.DEFAULTS))
        server.read(rb"^ready", READY_TIMEOUT_S)
        children = [stack.enter_context(started(MODULE, "call", path, *num_bytes)) for _ in range(num_callers)]
        for child in children:
            child.read(rb"^ready", READY_TIMEOUT_S)
        yield children


def serve(listener: socket.socket, attends: list[Callable[[], None]]) -> None:
    """Answers whoever has sent something, in turn, after a layer of attention each. Until it is ended.

    Args:
        listener: where callers come.
        attends: attends a layer of the cache of each that comes.
    """
    clients: dict[int, tuple[socket.socket, memoryview, Callable[[], None]]] = {}
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == listener.fileno():
                connection, _ = listener.accept()
                _, (memory,), _, _ = socket.recv_fds(connection, 1, 1)
                clients[connection.fileno()] = connection, memoryview(map_memory(memory, NUM_BYTES)), attends.pop()
                poll.register(connection, select.EPOLLIN)
                continue
            if not doorbell_echo.answer(*clients[descriptor]):
                poll.unregister(descriptor)
                clients.pop(descriptor)[0].close()


def call(path: str, num_bytes_in: int, num_bytes_out: int, num_calls: int) -> None:
    """One caller, until its input ends."""
    descriptor = sealed_memory(NUM_BYTES)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [b"m"], [descriptor])
        view = memoryview(map_memory(descriptor, NUM_BYTES))
        data = bytes(num_bytes_in)

        def step(call_us: list[float]) -> None:
            for _ in range(num_calls):
                before = time.perf_counter()
                doorbell_echo.ask(connection, view, [data], num_bytes_out)
                call_us.append((time.perf_counter() - before) * 1e6)

        step([])
        run_as_told(step)


@torch.inference_mode()
def main(what: str, *arguments: str) -> None:
    """The command line."""
    tune_process()
    if what == "call":
        path, *numbers = arguments
        call(path, *map(int, numbers))
        return
    step, num_threads, path, num_callers = arguments
    torch.set_num_threads(int(num_threads))
    decoded = attending_echo.decoded(step)
    attends = [attending_echo.attending(decoded) for _ in range(int(num_callers))]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(128)
        print("ready", flush=True)
        serve(listener, attends)


if __name__ == "__main__":
    main(*sys.argv[1:])
