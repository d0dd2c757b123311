"""A bare echo of a cuda plane's flags: what the same bytes and hand-overs cost where nothing is computed between them.

`FlagEcho` starts `python -m benchmarks.flag_echo` on the server's GPU. It makes the memory and the words that a server
makes for a session, and for each step launches the waits and signals of all layers as one CUDA graph, as a server does,
but nothing else. The caller's side is that of the plane, as one CUDA graph too.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from types import TracebackType

import torch

from attnd.planes.cuda.opening import imported_memory, worker_gpu, workers_flags
from attnd.planes.cuda.plane import CudaPlane
from attnd.protocol.cuda.layout import WORDS_BYTES, Geometry, StepLayout, step_layout
from attnd.protocol.shm.sockets import map_memory
from attnd.protocol.tensors import DTYPES
from attnd_server.planes.worker import Worker
from benchmarks.graph_timing import synchronize
from benchmarks.servers import environment
from benchmarks.workload import DecodeStep

# Bytes of the memory, as a server has by default.
NUM_BYTES = 64 << 20


class FlagEcho:
    """The echo's process, and the way to it. Use it as a context manager."""

    def __init__(self, step: DecodeStep, device: torch.device, server_device: torch.device) -> None:
        """Echoes what the layers of `step` hand over, from `device` to `server_device` and back."""
        self._device, self._server_device = device, server_device
        self._layers = [tuple(tensor.to(device) for tensor in layer) for layer in step.layers]
        heads, dtype = step.heads, DTYPES[str(step.dtype).removeprefix("torch.")]
        geometry = Geometry(heads.num_kv_heads, heads.head_dim, heads.head_dim, dtype)
        self._layout = step_layout(step.num_reqs, heads.num_heads, geometry, NUM_BYTES)
        self._output = torch.empty_like(self._layers[0][0])
        self._graph = torch.cuda.CUDAGraph()

    def __enter__(self) -> FlagEcho:
        """Starts the process, and captures this side of a step."""
        gpu = worker_gpu()
        self._socket, theirs = socket.socketpair()
        with theirs:
            server_device = torch.device("cuda", self._server_device.index or 0)
            arguments = (theirs.fileno(), server_device, gpu.uuid, int(gpu.has_mps), len(self._layers))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.flag_echo", *map(str, arguments)],
                env=environment(),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        told, descriptors, _, _ = socket.recv_fds(self._socket, 1, 3)
        if not told:
            raise ConnectionResetError("the echo hung up")
        words, *descriptors = descriptors
        memory = imported_memory(gpu, descriptors, [NUM_BYTES] * len(descriptors))
        takes_turns = len(memory) == 1 and not gpu.has_mps
        flags = workers_flags(gpu, memory, map_memory(words, WORDS_BYTES), takes_turns=takes_turns)
        # Nobody speaks at this socket: the echo has no steps to answer.
        self._silent, ours = socket.socketpair()
        self._plane = CudaPlane(ours, gpu, memory, flags, "the echo")
        self._capture(self._layout)
        return self

    def _capture(self, layout: StepLayout) -> None:
        last = len(self._layers) - 1
        with torch.cuda.graph(self._graph, stream=torch.cuda.Stream(self._device)), self._plane.stream() as stream:
            for layer, tensors in enumerate(self._layers):
                inputs = list(zip(layout[:3], tensors, strict=True))
                self._plane.hand_over(stream, layer, layer == last, inputs, [(layout.output, self._output)])

    def start(self) -> None:
        """Hands over all layers of a step."""
        self._socket.sendall(b"s")
        self._graph.replay()

    def finish(self) -> None:
        """Waits for the step, before the next is started."""
        if not self._socket.recv(1):
            raise ConnectionResetError("the echo hung up")
        synchronize(self._device)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The end of the socket ends the process."""
        self._plane.close()
        self._silent.close()
        self._socket.close()
        self._process.wait()


def serve(connection: socket.socket, device: torch.device, worker: Worker, num_layers: int) -> None:
    """Answers steps until the other end hangs up."""
    from attnd_server.planes.cuda.planes import CudaPlanes

    torch.cuda.set_device(device)
    planes = CudaPlanes(device, NUM_BYTES, max_planes=1)
    channel = planes.open(worker)
    socket.send_fds(connection, [b"m"], channel.descriptors())

    def layers() -> None:
        for layer in range(num_layers):
            channel.flags.wait(channel.handle, layer, layer == num_layers - 1)
            channel.flags.signal(channel.handle, layer, layer == num_layers - 1)

    assert channel.capture is not None
    replay = channel.capture(layers)
    while _is_told(connection):
        with channel.current():
            replay()
        channel.mark()()
        connection.sendall(b"d")
    channel.drain()


def _is_told(connection: socket.socket) -> bool:
    """Whether another step follows; waits for it."""
    try:
        return bool(connection.recv(1))
    except ConnectionResetError:  # its last answer was not read
        return False


if __name__ == "__main__":
    _worker = Worker(sys.argv[3], bool(int(sys.argv[4])))
    serve(socket.socket(fileno=int(sys.argv[1])), torch.device(sys.argv[2]), _worker, int(sys.argv[5]))
