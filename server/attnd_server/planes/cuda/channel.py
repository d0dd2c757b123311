"""What a cuda plane has on the server: memory of the GPU that its worker maps too, a stream, and words between them.

A session's steps run on a stream of its own, of which the driver lets no other stream wait. While it waits for its
worker, nobody may ask the driver for what waits for the whole GPU, or they wait too. So what sessions need of that kind
is made ahead, when the server starts: streams and counters, which the next session takes over, kernels, and pages of
the host's words. A session's memory is made for it and never another's, because its worker may keep it mapped: only
virtual memory management makes it, which waits for nobody's work, and a thread of its own frees it.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from attnd.errors import Exhausted, Unsupported
from attnd.protocol.cuda.device_bytes import CUDA, DeviceBytes
from attnd.protocol.cuda.layout import TO_SERVER, TO_WORKER, WORDS_BYTES, Place
from attnd.protocol.shm import sockets
from attnd.protocol.tensors import DTYPE_NAMES
from attnd_server.device.cuda_graph import captured

if TYPE_CHECKING:
    from attnd.protocol.cuda.copies import CopyAndWrite
    from attnd.protocol.cuda.driver import Device, Stream
    from attnd.protocol.cuda.gate_flags import Counter
    from attnd.protocol.cuda.host_flags import HostWords

log = logging.getLogger(__name__)

# How often a stream that must not wait any more is let go, in seconds.
_STOP_PERIOD_S = 0.001
# What torch's allocators are given to keep at the start, so that steps find memory there: bytes and number of blocks.
_PINNED_BLOCKS = tuple((1 << bits, 8) for bits in range(9, 21))
_DEVICE_BLOCKS = ((1 << 20, 16), (64 << 20, 1))


class Flags(Protocol):
    """One side of the hand-overs: `HostFlags` or `GateFlags`."""

    is_stopped: bool

    def close(self) -> None:
        """Frees what this side has of its own."""

    def wait(self, stream: int, layer: int, is_last: bool) -> None:
        """Lets `stream` wait until the worker has handed over a layer."""

    def signal(self, stream: int, layer: int, is_last: bool) -> None:
        """Tells the worker that what `stream` did so far is done."""

    def stop(self) -> None:
        """Lets everything that waits go on. To be called again until the stream is idle."""


class Channel(Protocol):
    """What a session computes on.

    Attributes:
        num_bytes: of the region.
        flags: of this side.
        handle: the stream, for the flags.
        capture: runs launches on the stream in a way that only records them, and returns what launches them all at
            once; None: there is no such thing.
    """

    num_bytes: int
    flags: Flags
    handle: int
    capture: Callable[[Callable[[], None]], Callable[[], None]] | None

    def tensor(self, place: Place) -> torch.Tensor:
        """A tensor that the worker has, too."""

    def current(self) -> AbstractContextManager[object]:
        """Makes the stream the calling thread's current one, after all that was enqueued on the one before."""

    def mark(self) -> Callable[[], None]:
        """What waits until all that was enqueued up to now is done."""

    def drain(self) -> None:
        """Lets go of what waits for the worker, until the stream is idle."""


class StreamLease:
    """What sessions have one after the other.

    Attributes:
        stream: idle between sessions.
        counter: of the gates.
    """

    def __init__(self, device: Device, stream: Stream) -> None:
        """The device must be the thread's current one."""
        from attnd.protocol.cuda import gate_flags as cuda_gates

        self.stream = stream
        self.counter: Counter = cuda_gates.Counter(device)


class SharedWords:
    """A page of words of the host, mapped here, and its descriptor for the worker.

    Attributes:
        words: here.
        descriptor: for the worker; -1 once it was taken.
    """

    def __init__(self) -> None:
        """Makes the page."""
        from attnd.protocol.cuda import host_flags as cuda_words

        self.descriptor = sockets.sealed_memory(WORDS_BYTES)
        try:
            self.words: HostWords = cuda_words.HostWords(sockets.map_memory(os.dup(self.descriptor), WORDS_BYTES))
        except BaseException:
            os.close(self.descriptor)
            raise

    def taken(self) -> int:
        """The descriptor, which is the caller's from now on. Once."""
        descriptor, self.descriptor = self.descriptor, -1
        return descriptor

    def close(self) -> None:
        """Nobody's stream may wait for a word."""
        self.words.close()
        if self.descriptor >= 0:
            os.close(self.taken())


class CudaChannel:
    """Implements `Channel` on a GPU. Made by `CudaPlanes.open`."""

    capture: Callable[[Callable[[], None]], Callable[[], None]] | None

    def __init__(
        self,
        device: Device,
        slot: StreamLease,
        words: SharedWords,
        num_bytes: int,
        on_same_gpu: bool,
        worker: Device | None,
    ) -> None:
        """Takes the memory, and owns `words`, whatever happens. The device must be the thread's current one.

        Args:
            device: the server's GPU.
            slot: of the lane.
            words: of the host.
            num_bytes: of the region.
            on_same_gpu: whether the worker has the same GPU.
            worker: the worker's GPU, which gets memory for results; None: they lie in the region.

        Raises:
            CudaError: there is not so much.
        """
        from attnd.protocol.cuda.copies import CopyAndWrite
        from attnd.protocol.cuda.gate_flags import GateFlags
        from attnd.protocol.cuda.host_flags import HostFlags
        from attnd.protocol.cuda.memory import DeviceMemory

        self.slot = slot
        self.handle = slot.stream.handle
        self._device = torch.device("cuda", device.index)
        self._torch_stream = torch.cuda.ExternalStream(self.handle, device=self._device)
        self.capture = partial(captured, stream=self._torch_stream)
        self._words = words
        self._memory: list[DeviceMemory] = []
        self.flags: Flags
        try:
            self._memory.append(DeviceMemory.created(device, num_bytes, slot.stream))
            if worker is not None:
                self._memory.append(DeviceMemory.created(worker, num_bytes, slot.stream, user=device))
            if on_same_gpu:
                write = partial(_written, CopyAndWrite(device, slot.counter.address))
                self.flags = HostFlags(words.words, signal=TO_WORKER // 4, flag=TO_SERVER // 4, writer=write)
            else:
                slot.counter.reset(self.handle)
                to_worker, to_server = self._memory[-1].address + TO_WORKER, self._memory[0].address + TO_SERVER
                self.flags = GateFlags(device, to_worker, to_server, slot.counter)
        except BaseException:
            for memory in self._memory:
                memory.close()
            words.close()
            raise
        self.num_bytes = min(memory.num_bytes for memory in self._memory)
        # torch's own DLPack import, because it takes our word for the device: also of what lies on the worker's.
        self._bytes = [
            torch.utils.dlpack.from_dlpack(DeviceBytes(memory.address, memory.num_bytes, (CUDA, device.index)))
            for memory in self._memory
        ]

    def descriptors(self) -> list[int]:
        """Of the host's words, the region, and the memory of results if there is one; the caller closes them. Once."""
        return [self._words.taken(), *(memory.exported() for memory in self._memory)]

    def tensor(self, place: Place) -> torch.Tensor:
        """A tensor of the region, or of the memory of results."""
        memory = self._bytes[-1 if place.is_result else 0]
        dtype = getattr(torch, DTYPE_NAMES[place.dtype])
        return memory[place.offset : place.offset + place.num_bytes].view(dtype).view(place.shape)

    def current(self) -> AbstractContextManager[object]:
        """Makes the stream the calling thread's current one, after all that was enqueued on the one before."""
        self._torch_stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._torch_stream)

    def mark(self) -> Callable[[], None]:
        """What waits until all that was enqueued up to now is done. The waiting thread sleeps."""
        event = torch.cuda.Event(blocking=True)
        event.record(self._torch_stream)
        return event.synchronize

    def drain(self) -> None:
        """Lets go of what waits for the worker, until the stream is idle."""
        while not self.slot.stream.is_idle():
            self.flags.stop()
            time.sleep(_STOP_PERIOD_S)

    def free(self) -> None:
        """Frees the memory of a lane that is drained. May wait for everybody's steps. The device is current."""
        self._bytes = []
        self.flags.close()
        self._words.close()
        for memory in self._memory:
            memory.close()


def _written(writer: CopyAndWrite, stream: int, address: int, value: int) -> None:
    """Writes a word after what was enqueued on a stream."""
    writer.run(stream, [], address, value)


class CudaPlanes:
    """The cuda planes of a server. Any thread may use it.

    Attributes:
        gpu_uuid: of the server's GPU.
        num_bytes: of each region.
    """

    def __init__(self, device: torch.device, num_bytes: int, max_planes: int) -> None:
        """Looks whether there can be any, and makes what they need.

        Args:
            device: the server's.
            num_bytes: of each region.
            max_planes: that are open at once.

        Raises:
            Unsupported: not on this device, or not with what is installed; the message says why.
            CudaError: the driver refused something.
        """
        if device.type != "cuda":
            raise Unsupported(f"the server's device is {device}, and it needs a GPU", field="plane")
        from attnd.protocol.cuda import copies as cuda_copies
        from attnd.protocol.cuda import driver as cuda_driver
        from attnd.protocol.cuda import gate_flags as cuda_gates
        from attnd_server.planes.cuda.streams import independent_streams

        torch.cuda.init()
        found = cuda_driver.device_of(str(torch.cuda.get_device_properties(device).uuid))
        refusal = "the driver does not show the server's GPU" if found is None else found.refusal()
        if found is None or refusal is not None:
            raise Unsupported(refusal or "", field="plane")
        self._device = found
        self.gpu_uuid = found.uuid
        self.num_bytes = num_bytes
        _let_torch_keep_memory(device)
        self._slots: queue.SimpleQueue[StreamLease] = queue.SimpleQueue()
        self._words: queue.SimpleQueue[SharedWords] = queue.SimpleQueue()
        with found.current():
            cuda_gates.prepare(found)
            cuda_copies.prepare(found)
            for stream in independent_streams(found, device, max_planes):
                self._slots.put(StreamLease(found, stream))
                self._words.put(SharedWords())
        # What may wait for everybody's steps: nobody waits for it.
        self._slow_work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._do_slow_work, name="cuda-planes", daemon=True).start()

    def open(self, worker_gpu: str) -> CudaChannel:
        """Memory, words and a stream for a session. No more than `max_planes` at once.

        Args:
            worker_gpu: UUID of the worker's GPU.

        Raises:
            Exhausted: the GPU's memory is full.
        """
        from attnd.protocol.cuda.driver import CudaError

        self._device.make_current()
        slot = self._slots.get()
        try:
            try:
                words = self._words.get_nowait()
            except queue.Empty:  # sessions came faster than words
                words = SharedWords()
            self._slow_work.put(lambda: self._words.put(SharedWords()))
            on_same_gpu, worker = worker_gpu == self.gpu_uuid, self._memory_of(worker_gpu)
            return CudaChannel(self._device, slot, words, self.num_bytes, on_same_gpu, worker)
        except BaseException as error:
            self._slots.put(slot)
            if isinstance(error, CudaError):
                raise Exhausted(f"no memory for a cuda plane's region of {self.num_bytes} bytes: {error}") from None
            raise

    def results_num_bytes(self, worker_gpu: str) -> int:
        """Bytes of the memory for results that a session gets on its worker's GPU; 0: they lie in the region."""
        return 0 if self._memory_of(worker_gpu) is None else self.num_bytes

    def _memory_of(self, worker_gpu: str) -> Device | None:
        """The worker's GPU if memory can be made there that this GPU writes to, so that the worker reads its own.

        To wait for the other GPU's word and to fetch its output takes microseconds; to send both takes fewer.
        """
        from attnd.protocol.cuda import driver as cuda_driver

        if worker_gpu == self.gpu_uuid:
            return None
        worker = cuda_driver.device_of(worker_gpu)
        if worker is None or not self._device.reaches(worker) or worker.refusal() is not None:
            return None
        return worker

    def close(self, lane: CudaChannel) -> None:
        """Takes back what `open` gave; what is enqueued and waits for the worker is let go."""
        self._device.make_current()
        try:
            lane.drain()
        finally:
            self._slow_work.put(lane.free)
            self._slots.put(lane.slot)

    def _do_slow_work(self) -> None:
        self._device.make_current()
        while True:
            work = self._slow_work.get()
            try:
                work()
            except Exception:
                log.exception("a cuda plane's memory cannot be made or freed")
            del work  # holds the lane


def _let_torch_keep_memory(device: torch.device) -> None:
    """Blocks that torch keeps once they are free: its next ones of such sizes do not come from the driver."""
    pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size, num in _PINNED_BLOCKS for _ in range(num)]
    held = [torch.empty(size, dtype=torch.uint8, device=device) for size, num in _DEVICE_BLOCKS for _ in range(num)]
    del pinned, held
