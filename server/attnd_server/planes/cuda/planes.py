"""The cuda planes of a server, and what they need of its GPU.

A session's steps run on a stream of its own, of which the driver lets no other stream wait. While it waits for its
worker, nobody may ask the driver for what waits for the whole GPU, or they wait too. So what sessions need of that kind
is made ahead, when the server starts: streams and counters, which the next session takes over, kernels, what libraries
make at their first use, local memory, and a second context for kernels that cannot wait. A session's memory is made for
it and never another's, because its worker may keep it mapped: only virtual memory management makes and frees it, which
waits for nobody's work. The host's words are taken from the GPU in a quiet moment.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from attnd.errors import Exhausted, Unsupported
from attnd_server.device.faults import is_device_fault
from attnd_server.device.first_uses import use_libraries
from attnd_server.device.quiet import quiet_gpu
from attnd_server.planes.cuda.gpu_channel import CudaChannel
from attnd_server.planes.cuda.leases import SharedWords, StreamLease
from attnd_server.planes.worker import Worker

if TYPE_CHECKING:
    from attnd.protocol.cuda.driver import Device

log = logging.getLogger(__name__)

# Planes of workers that share the server's GPU by CUDA's Multi-Process Service. Streams of both sides wait in the few
# hardware queues that there are: 8 sessions at work got on, and 16 had not ended after a minute (one H200).
MOST_ON_ONE_GPU = 8
# What torch's allocators are given to keep at the start, so that steps find memory there: bytes and number of blocks.
_PINNED_BLOCKS = tuple((1 << bits, 8) for bits in range(9, 21))
_DEVICE_BLOCKS = ((1 << 20, 16), (64 << 20, 1))


class CudaPlanes:
    """The cuda planes of a server. Any thread may use it.

    Attributes:
        gpu_uuid: of the server's GPU.
        num_bytes: of each region, as the driver gives it.
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
        from attnd.protocol.cuda import memory as cuda_memory
        from attnd_server.device.kernels.local_memory import LEAST_BYTES, local_memory
        from attnd_server.device.kernels.second_context import second_context
        from attnd_server.planes.cuda.resident import gates as resident_gates
        from attnd_server.planes.cuda.resident.books import BookPages
        from attnd_server.planes.cuda.streams import independent_streams

        torch.cuda.init()
        found = cuda_driver.device_of(str(torch.cuda.get_device_properties(device).uuid))
        refusal = "the driver does not show the server's GPU" if found is None else found.refusal()
        if found is None or refusal is not None:
            raise Unsupported(refusal or "", field="plane")
        self._device, self._quiet = found, quiet_gpu(device)
        self.gpu_uuid = found.uuid
        self.num_bytes = cuda_memory.size_on(found, num_bytes)
        _let_torch_keep_memory(device)
        use_libraries(device)
        self._leases: queue.SimpleQueue[StreamLease] = queue.SimpleQueue()
        with found.current():
            local_memory(found.index).reserve(LEAST_BYTES)
            try:
                second_context(found.index)
            except cuda_driver.CudaError as error:
                log.warning("kernels will wait for steps on cuda planes, as there is no second context: %s", error)
            cuda_gates.prepare(found)
            cuda_copies.prepare(found)
            resident_gates.prepare(found)
            with self._quiet.waits():
                copies, *streams = independent_streams(found, device, 1 + max_planes)
            for stream, books in zip(streams, BookPages(max_planes).books, strict=True):
                self._leases.put(StreamLease(found, stream, books, copies))

    def open(self, worker: Worker) -> CudaChannel:
        """Memory, words and a stream for a session. No more than `max_planes` at once.

        Args:
            worker: whose session it is.

        Raises:
            Exhausted: the GPU's memory is full.
        """
        from attnd.protocol.cuda.driver import CudaError

        self._device.make_current()
        lease = self._leases.get()
        try:
            words = SharedWords()
            try:
                takes_turns, for_results = self.takes_turns(worker), self._for_results(worker)
                return CudaChannel(self._device, lease, words, self.num_bytes, takes_turns, for_results)
            except BaseException:
                self._when_quiet(words.close)
                raise
        except BaseException as error:
            self._leases.put(lease)
            if isinstance(error, CudaError):
                raise Exhausted(f"no memory for a cuda plane's region of {self.num_bytes} bytes: {error}") from None
            raise

    def takes_turns(self, worker: Worker) -> bool:
        """Whether the two sides have one GPU, on which only one of them runs at a time, as far as they have told."""
        has_mps = worker.has_mps and self._device.has_mps
        return worker.gpu_uuid == self.gpu_uuid and not has_mps

    def most_beside(self, worker: Worker) -> int | None:
        """Planes of workers with its GPU that may be open at once; None: there is no such limit."""
        shares = worker.gpu_uuid == self.gpu_uuid and not self.takes_turns(worker)
        return MOST_ON_ONE_GPU if shares else None

    def results_num_bytes(self, worker: Worker) -> int:
        """Bytes of the memory for results that a session gets on its worker's GPU; 0: they lie in the region."""
        return 0 if self._for_results(worker) is None else self.num_bytes

    def _for_results(self, worker: Worker) -> Device | None:
        """The worker's GPU if memory can be made there that this GPU writes to, so that the worker reads its own.

        To wait for the other GPU's word and to fetch its output takes microseconds; to send both takes fewer.
        """
        from attnd.protocol.cuda import driver as cuda_driver

        if worker.gpu_uuid == self.gpu_uuid:
            return None
        found = cuda_driver.device_of(worker.gpu_uuid)
        if found is None or not self._device.reaches(found) or found.refusal() is not None:
            return None
        return found

    def close(self, channel: CudaChannel) -> None:
        """Takes back what `open` gave; what is enqueued and waits for the worker is let go."""
        self._device.make_current()
        try:
            channel.drain()
            channel.free()
        finally:
            self._when_quiet(channel.free_words)
            self._leases.put(channel.lease)

    def _when_quiet(self, work: Callable[[], None]) -> None:
        """Does what waits for everything on the GPU, once nothing there waits for a worker."""

        def work_there() -> None:
            self._device.make_current()
            work()

        self._quiet.later(work_there)


def cuda_planes(device: torch.device, num_bytes: int, max_planes: int) -> CudaPlanes | str:
    """The cuda planes of a server with a socket, or why there are none, for people."""
    try:
        return CudaPlanes(device, num_bytes, max_planes)
    except Unsupported as error:
        return str(error)
    except RuntimeError as error:  # of the driver
        if is_device_fault(error):
            raise
        log.warning("there are no cuda planes: %s", error)
        return f"the driver failed: {error}"


def _let_torch_keep_memory(device: torch.device) -> None:
    """Blocks that torch keeps once they are free: its next ones of such sizes do not come from the driver."""
    pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size, num in _PINNED_BLOCKS for _ in range(num)]
    held = [torch.empty(size, dtype=torch.uint8, device=device) for size, num in _DEVICE_BLOCKS for _ in range(num)]
    del pinned, held
