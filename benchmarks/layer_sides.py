"""Both sides of a cuda plane in one process: a worker's GPU, a server's, and the memory and words between them.

The pieces are the product's own. A dry run has the same interface on a processor, where tensors are copied and nobody
waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

from attnd.planes.cuda.tensors import copy_in
from attnd.protocol.cuda.layout import TO_SERVER, TO_WORKER, Geometry, Place, StepLayout, step_layout
from attnd.protocol.tensors import DTYPE_NAMES, DTYPES

REGION_BYTES = 128 << 20
STALLED_S = 30.0
"""After which a side that waits is let go: a fault is an error then, and no machine that hangs."""
_HEAD_START_CYCLES = 20_000_000

Run = Callable[[], None]
Work = Callable[[int], None]


class Tensors(NamedTuple):
    """A layer's tensors on one side, `[num_reqs, heads, head_dim]`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Sides(Protocol):
    """Two sides. What is captured is enqueued by calling it.

    Attributes:
        inputs: q, k and v where the server finds them.
        remote_output: where the server writes its output for the worker.
        server_device: of the server's tensors.
    """

    inputs: Tensors
    remote_output: torch.Tensor
    server_device: torch.device

    def server(self, num_layers: int, hands_over: bool, work: Work) -> Run:
        """The server's layers: it waits for the worker, works, and tells it; or works alone."""

    def worker(self, tensors: Tensors, outputs: list[torch.Tensor], returns: bool) -> Run:
        """The worker's layers, one for each output: the tensors go there, and with `returns` an output comes back."""

    def times_us(self, server: Run | None, worker: Run | None, count: int) -> list[float]:
        """Microseconds of each of `count` runs, all of which are enqueued before the first is over."""

    def close(self) -> None:
        """Frees what they have."""


def layout_of(num_reqs: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> StepLayout:
    """Where the tensors of a layer lie in a region."""
    number = DTYPES[str(dtype).removeprefix("torch.")]
    return step_layout(num_reqs, num_heads, Geometry(num_kv_heads, head_dim, head_dim, number), REGION_BYTES)


def viewed(memory: torch.Tensor, place: Place) -> torch.Tensor:
    """A tensor of bytes that lie somewhere."""
    dtype = getattr(torch, DTYPE_NAMES[place.dtype])
    return memory[place.offset : place.offset + place.num_bytes].view(dtype).view(place.shape)


class OneProcessor:
    """For the dry run."""

    def __init__(self, layout: StepLayout) -> None:
        region, results = (torch.zeros(REGION_BYTES, dtype=torch.uint8) for _ in range(2))
        self.inputs = Tensors(*(viewed(region, place) for place in layout[:3]))
        self.remote_output = viewed(results, layout.output)
        self.server_device = torch.device("cpu")
        self._work: Work = lambda layer: None

    def server(self, num_layers: int, hands_over: bool, work: Work) -> Run:
        """Works when the worker hands over, or at once."""

        def run() -> None:
            self._work = work  # of the worker's hand-overs that follow
            for layer in range(0 if hands_over else num_layers):
                work(layer)

        return run

    def worker(self, tensors: Tensors, outputs: list[torch.Tensor], returns: bool) -> Run:
        """Copies, has the server work, and copies."""

        def run() -> None:
            for layer, output in enumerate(outputs):
                for there, here in zip(self.inputs, tensors, strict=True):
                    there.copy_(here)
                self._work(layer)
                if returns:
                    output.copy_(self.remote_output)

        return run

    def times_us(self, server: Run | None, worker: Run | None, count: int) -> list[float]:
        """One after the other."""
        times = []
        for _ in range(count):
            started = time.perf_counter()
            for run in (server, worker):
                if run is not None:
                    run()
            times.append((time.perf_counter() - started) * 1e6)
        return times

    def close(self) -> None:
        """Nothing."""


class TwoGpus:
    """GPU 0 is the worker's, GPU 1 the server's: each is only used while it is this thread's current one."""

    def __init__(self, layout: StepLayout) -> None:
        from attnd.protocol.cuda.copies import HandOver
        from attnd.protocol.cuda.device_bytes import CUDA, DeviceBytes
        from attnd.protocol.cuda.driver import device
        from attnd.protocol.cuda.gate_flags import GateFlags
        from attnd.protocol.cuda.memory import DeviceMemory

        self.server_device, self._worker_device = torch.device("cuda", 1), torch.device("cuda", 0)
        for each in (self.server_device, self._worker_device):
            torch.zeros(1, device=each)  # makes the contexts
        self._gpus = {each: device(each.index) for each in (self.server_device, self._worker_device)}
        worker, server = self._gpus[self._worker_device], self._gpus[self.server_device]
        self._layout = layout
        self._streams = {each: torch.cuda.Stream(each) for each in self._gpus}
        with self._current(self.server_device):
            region = DeviceMemory.created(server, REGION_BYTES)
            results = DeviceMemory.created(worker, REGION_BYTES, user=server)
            self._server_flags = GateFlags(server, results.address + TO_WORKER, region.address + TO_SERVER)
        with self._current(self._worker_device):
            mapped_region = DeviceMemory.imported(worker, region.exported(), region.num_bytes)
            mapped_results = DeviceMemory.imported(worker, results.exported(), results.num_bytes)
            flags = GateFlags(worker, mapped_region.address + TO_SERVER, mapped_results.address + TO_WORKER)
            self._hand_over = HandOver(worker, *flags.addresses)
        self._worker_flags, self._mapped_region, self._mapped_results = flags, mapped_region, mapped_results
        self._held = region, results
        with self._current(self.server_device):
            # torch's import takes our word for the device, also of the results, which lie on the worker's.
            as_servers = [
                torch.utils.dlpack.from_dlpack(DeviceBytes(each.address, each.num_bytes, (CUDA, 1)))
                for each in (region, results)
            ]
        self.inputs = Tensors(*(viewed(as_servers[0], place) for place in layout[:3]))
        self.remote_output = viewed(as_servers[1], layout.output)

    @contextmanager
    def _current(self, device: torch.device) -> Iterator[None]:
        """For torch and for the driver."""
        with torch.cuda.device(device), self._gpus[device].current():
            yield

    def _captured(self, device: torch.device, run: Run) -> Run:
        """A graph of what `run` enqueues, which is enqueued on the device's stream."""
        from attnd_server.device.cuda_graph import captured

        stream = self._streams[device]
        replay = captured(run, stream)

        def enqueue() -> None:
            with torch.cuda.stream(stream):
                replay()

        return enqueue

    def server(self, num_layers: int, hands_over: bool, work: Work) -> Run:
        """As a server's step graph."""
        flags, handle = self._server_flags, self._streams[self.server_device].cuda_stream

        def layers() -> None:
            for layer in range(num_layers):
                is_last = layer == num_layers - 1
                if hands_over:
                    flags.wait(handle, layer, is_last)
                work(layer)
                if hands_over:
                    flags.signal(handle, layer, is_last)

        with self._current(self.server_device):
            work(0)  # a kernel that is not on the device yet cannot be captured; and none may be loaded behind a wait
            torch.cuda.synchronize(self.server_device)
            return self._captured(self.server_device, layers)

    def worker(self, tensors: Tensors, outputs: list[torch.Tensor], returns: bool) -> Run:
        """As a worker's session hands over, without the check of the tensors."""
        from attnd.protocol.cuda.copies import Copy

        place, handle = self._layout.output, self._streams[self._worker_device].cuda_stream
        inputs = []
        for there, here in zip(self._layout[:3], tensors, strict=True):
            copy = copy_in(self._mapped_region.address + there.offset, here)
            assert copy is not None  # the tensors are dense
            inputs.append(copy)
        source = self._mapped_results.address + place.offset

        def layers() -> None:
            for output in outputs:
                back = [Copy(output.data_ptr(), source, 1, place.num_bytes, place.num_bytes)] if returns else []
                self._hand_over.run(handle, inputs, back)

        with self._current(self._worker_device):
            return self._captured(self._worker_device, layers)

    def times_us(self, server: Run | None, worker: Run | None, count: int) -> list[float]:
        """On the worker's stream where there is a hand-over, else on the server's. Raises RuntimeError: it stalled."""
        timed = self._streams[self.server_device if worker is None else self._worker_device]
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
        self._synchronize()
        with self._released_in_time():
            with torch.cuda.stream(timed):
                torch.cuda._sleep(_HEAD_START_CYCLES)  # meanwhile all is enqueued: no run waits for a launch
            for start, end in events:
                if server is not None and worker is not None:
                    server()
                start.record(timed)
                (worker or server or (lambda: None))()
                end.record(timed)
            self._synchronize()
        if self._server_flags.is_stopped:
            raise RuntimeError(f"a side waited for the other for {STALLED_S:g} s")
        return [start.elapsed_time(end) * 1e3 for start, end in events]

    def _synchronize(self) -> None:
        for each in self._gpus:
            torch.cuda.synchronize(each)

    def close(self) -> None:
        """Frees flags and memory; the tensors there mean nothing any more."""
        self._synchronize()
        with self._current(self._worker_device):
            self._worker_flags.close()
            self._mapped_region.close()
            self._mapped_results.close()
        with self._current(self.server_device):
            self._server_flags.close()
            for memory in self._held:
                memory.close()

    @contextmanager
    def _released_in_time(self) -> Iterator[None]:
        """Lets go of everything that waits once the time is over."""
        done = threading.Event()

        def watch() -> None:
            if not done.wait(STALLED_S):
                while not done.wait(0.001):
                    self._server_flags.stop()
                    self._worker_flags.stop()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
