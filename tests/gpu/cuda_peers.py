"""Two processes that hand a tensor to and fro through memory of one GPU: this one is the server, a child the worker."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from attnd.protocol.cuda.copies import HandOver
from attnd.protocol.cuda.driver import Device, call, device
from attnd.protocol.cuda.gate_flags import GateFlags
from attnd.protocol.cuda.host_flags import HostFlags, HostWords
from attnd.protocol.cuda.memory import DeviceMemory
from attnd.protocol.shm import sockets

# Seconds after which a side that waits is let go, so that a fault is an assertion and no hang.
TIMEOUT_S = 60.0
WORDS_BYTES = 4096
# Where the words of both sides are: bytes of GPU memory, or words of the host's, each in a line of its own.
TO_SERVER, TO_WORKER = 0, 256
HOST_TO_SERVER, HOST_TO_WORKER = 0, 64


@dataclass(frozen=True)
class Case:
    """What is handed over, and how.

    Attributes:
        flags: "gates" or "host".
        gpu: of the worker; the server has GPU 0.
        num_layers: hand-overs of a step.
        num_steps: steps.
        graph: whether a step is a CUDA graph on both sides.
        num_elements: int64 that go to and fro each time; 0: nothing does.
        own_words: gates: whether each side waits for a word in memory of its own GPU.
    """

    flags: str
    gpu: int
    num_layers: int = 4
    num_steps: int = 250
    graph: bool = False
    num_elements: int = 1 << 14
    own_words: bool = False

    @property
    def num_rounds(self) -> int:
        return self.num_layers * self.num_steps


class Side:
    """One side: its memory, its flags and a stream."""

    def __init__(self, case: Case, gpu: int, region: DeviceMemory, flags: GateFlags | HostFlags) -> None:
        self.case, self.region, self.flags = case, region, flags
        self.stream = torch.cuda.Stream(gpu)
        self.state = torch.zeros(max(1, case.num_elements), dtype=torch.int64, device=f"cuda:{gpu}")
        self.inputs = region.address + WORDS_BYTES
        self.outputs = self.inputs + self.state.nbytes

    def copy(self, target: int, source: int) -> None:
        call("cuMemcpyAsync", target, source, self.state.nbytes, self.stream.cuda_stream)

    def is_last(self, layer: int) -> bool:
        return layer == self.case.num_layers - 1

    def work(self, layer: int) -> None:
        """One layer, on the current stream."""
        raise NotImplementedError

    def run(self) -> float:
        """All steps; returns microseconds of a hand-over to and fro, as the processor sees them."""
        with torch.cuda.stream(self.stream):
            self.step()
            play: Callable[[], Any] = self.step
            if self.case.graph:
                self.stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(capture_error_mode="thread_local")
                self.step()
                graph.capture_end()
                play = graph.replay
            self.stream.synchronize()
            started = time.perf_counter()
            for _ in range(self.case.num_steps - 1):
                play()
            self.stream.synchronize()
        rounds = (self.case.num_steps - 1) * self.case.num_layers
        return (time.perf_counter() - started) * 1e6 / max(1, rounds)

    def step(self) -> None:
        for layer in range(self.case.num_layers):
            self.work(layer)

    def result(self) -> list[int]:
        """Least and greatest element, equal if each was handed over whole."""
        self.stream.synchronize()
        return [int(self.state.min()), int(self.state.max())]


class ServerSide(Side):
    def work(self, layer: int) -> None:
        handle = self.stream.cuda_stream
        self.flags.wait(handle, layer, self.is_last(layer))
        if self.case.num_elements:
            self.copy(self.state.data_ptr(), self.inputs)
            self.state.add_(1)
            self.copy(self.outputs, self.state.data_ptr())
        self.flags.signal(handle, layer, self.is_last(layer))


HandsOver = Callable[[int, int, bool], None]


def workers_hand_over(gpu: Device, flags: GateFlags | HostFlags) -> HandsOver:
    """What a worker enqueues for a layer, without copies: it signals, and waits. Gates do so in one kernel."""
    if isinstance(flags, GateFlags):
        kernel = HandOver(gpu, *flags.addresses)
        return lambda stream, layer, is_last: kernel.run(stream, [], [])

    def signal_and_wait(stream: int, layer: int, is_last: bool) -> None:
        flags.signal(stream, layer, is_last)
        flags.wait(stream, layer, is_last)

    return signal_and_wait


class WorkerSide(Side):
    def __init__(self, case: Case, gpu: Device, region: DeviceMemory, flags: GateFlags | HostFlags) -> None:
        super().__init__(case, case.gpu, region, flags)
        self.hand_over = workers_hand_over(gpu, flags)

    def work(self, layer: int) -> None:
        if self.case.num_elements:
            self.state.add_(1)
            self.copy(self.inputs, self.state.data_ptr())
        self.hand_over(self.stream.cuda_stream, layer, self.is_last(layer))
        if self.case.num_elements:
            self.copy(self.state.data_ptr(), self.outputs)


def send(connection: socket.socket, value: Any, *descriptors: int) -> None:
    socket.send_fds(connection, [json.dumps(value).encode()], list(descriptors))
    for descriptor in descriptors:
        os.close(descriptor)


def receive(connection: socket.socket) -> tuple[Any, list[int]]:
    data, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 4)
    if not data:
        raise EOFError("the other side has gone")
    return json.loads(data), list(descriptors)


@contextmanager
def released_in_time(flags: GateFlags | HostFlags) -> Iterator[None]:
    """Lets go of everything that waits once `TIMEOUT_S` is over."""
    done = threading.Event()

    def watch() -> None:
        if not done.wait(TIMEOUT_S):
            while not done.wait(0.001):
                flags.stop()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def worker_process(connection: socket.socket, case: Case, task: str) -> None:
    """The child. Tasks: "run", "copy" the first half of the region reversed to the second, "wait" for ever."""
    torch.cuda.set_device(case.gpu)
    gpu = device(case.gpu)
    gpu.make_current()
    (num_bytes, num_host_bytes), descriptors = receive(connection)
    started = time.perf_counter()
    region = DeviceMemory.imported(gpu, descriptors[0], num_bytes)
    import_us = (time.perf_counter() - started) * 1e6
    words = HostWords(sockets.map_memory(descriptors[1], num_host_bytes))
    flags: GateFlags | HostFlags
    if case.flags == "gates":
        flag = region.address + TO_WORKER
        if case.own_words:
            own = DeviceMemory.created(gpu, WORDS_BYTES)
            send(connection, own.num_bytes, own.exported())
            flag = own.address
        flags = GateFlags(gpu, region.address + TO_SERVER, flag)
    else:
        flags = HostFlags(words, HOST_TO_SERVER, HOST_TO_WORKER)
    side = WorkerSide(case, gpu, region, flags)
    send(connection, import_us)
    if task == "run":
        receive(connection)
        with released_in_time(flags):
            told = [side.run(), *side.result(), flags.is_stopped]
        send(connection, told)
        receive(connection)
    elif task == "copy":
        receive(connection)
        half = region.num_bytes // 2
        host = torch.empty(half, dtype=torch.uint8)
        call("cuMemcpy", host.data_ptr(), region.address, half)
        reversed_half = host.flip(0).contiguous()
        call("cuMemcpy", region.address + half, reversed_half.data_ptr(), half)
        call("cuCtxSynchronize")
        send(connection, "copied")
        receive(connection)
    else:
        time.sleep(600)


class Peers:
    """The server's side and its child."""

    def __init__(self, case: Case, task: str) -> None:
        gpu = device(0)
        torch.cuda.set_device(0)
        torch.zeros(1, device="cuda:0")
        gpu.make_current()
        self.case = case
        num_bytes = WORDS_BYTES + 2 * 8 * max(1, case.num_elements)
        self.region = DeviceMemory.created(gpu, num_bytes)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection = ours
        ours.settimeout(TIMEOUT_S * 2)
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=worker_process, args=(theirs, case, task), daemon=True)
        self.process.start()
        theirs.close()
        host = sockets.sealed_memory(WORDS_BYTES)
        self.words = words = HostWords(sockets.map_memory(os.dup(host), WORDS_BYTES))
        send(ours, (self.region.num_bytes, WORDS_BYTES), self.region.exported(), host)
        self.flags: GateFlags | HostFlags
        if case.flags == "gates":
            signal = self.region.address + TO_WORKER
            if case.own_words:
                size, (descriptor,) = receive(ours)
                self.workers_words = DeviceMemory.imported(gpu, descriptor, size)
                signal = self.workers_words.address
            self.flags = GateFlags(gpu, signal, self.region.address + TO_SERVER)
        else:
            self.flags = HostFlags(words, HOST_TO_WORKER, HOST_TO_SERVER)
        self.import_us, _ = receive(ours)
        self.side = ServerSide(case, 0, self.region, self.flags)

    def run(self) -> dict[str, Any]:
        """Task "run": both results and the microseconds of a round."""
        send(self.connection, "go")
        with released_in_time(self.flags):
            us = self.side.run()
        (worker_us, least, greatest, stopped), _ = receive(self.connection)
        return {
            **asdict(self.case),
            "server_us": round(us, 2),
            "worker_us": round(worker_us, 2),
            "import_us": round(self.import_us),
            "server": self.side.result(),
            "worker": [least, greatest],
            "stopped": stopped or self.flags.is_stopped,
        }

    def close(self) -> None:
        self.connection.close()
        self.process.join(20)
        self.process.kill()
        self.process.join()
        torch.cuda.synchronize()
        self.flags.close()
        self.words.close()
        self.region.close()

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
