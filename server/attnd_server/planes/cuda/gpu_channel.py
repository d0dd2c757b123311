"""The channel of a session on a GPU: memory that its worker maps too, a leased stream, and words between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch

from attnd.errors import Unsupported
from attnd.protocol.cuda.device_bytes import CUDA, DeviceBytes
from attnd.protocol.cuda.layout import TO_SERVER, TO_WORKER, Place
from attnd.protocol.cuda.resident import REFUSED, WAKE
from attnd.protocol.tensors import DTYPE_NAMES
from attnd_server.device.cuda_graph import captured, captured_for
from attnd_server.planes.cuda.channel import Flags, Resident
from attnd_server.planes.cuda.leases import SharedWords, StreamLease

if TYPE_CHECKING:
    from attnd.protocol.cuda.copies import CopyAndWrite
    from attnd.protocol.cuda.driver import Device

# How often a stream that must not wait any more is let go, in seconds.
_STOP_PERIOD_S = 0.001


class CudaChannel:
    """Implements `Channel` on a GPU. Made by `CudaPlanes.open`."""

    capture: Callable[[Callable[[], None]], Callable[[], None]] | None
    capture_for: Callable[[Callable[[], None]], Callable[[], None]] | None

    def __init__(
        self,
        device: Device,
        lease: StreamLease,
        words: SharedWords,
        num_bytes: int,
        takes_turns: bool,
        for_results: Device | None,
    ) -> None:
        """Takes the memory; owns `words` once it is made. The device must be the thread's current one.

        Args:
            device: the server's GPU.
            lease: of the stream, for as long as the session lives.
            words: of the host.
            num_bytes: of the region.
            takes_turns: whether the worker has the same GPU, and only one of the two sides runs there at a time.
            for_results: the worker's GPU, which gets memory for results; None: they lie in the region.

        Raises:
            CudaError: there is not so much.
        """
        from attnd.protocol.cuda.copies import CopyAndWrite
        from attnd.protocol.cuda.gate_flags import GateFlags
        from attnd.protocol.cuda.host_flags import HostFlags
        from attnd.protocol.cuda.memory import DeviceMemory

        self.lease = lease
        self.handle = lease.stream.handle
        self._gpu, self._device = device, torch.device("cuda", device.index)
        self._torch_stream = torch.cuda.ExternalStream(self.handle, device=self._device)
        self.capture = partial(captured, stream=self._torch_stream)
        self.capture_for = partial(captured_for, stream=self._torch_stream)
        self._words = words
        self._memory: list[DeviceMemory] = []
        self.flags: Flags
        try:
            self._memory.append(DeviceMemory.created(device, num_bytes, lease.stream))
            if for_results is not None:
                self._memory.append(DeviceMemory.created(for_results, num_bytes, lease.stream, user=device))
            # Whoever had the lease before left a count, from which kernels that count arrivals would never get on.
            lease.counter.reset(self.handle)
            if takes_turns:
                write = partial(_written, CopyAndWrite(device, lease.counter.address))
                self.flags = HostFlags(words.words, signal=TO_WORKER // 4, flag=TO_SERVER // 4, writer=write)
            else:
                to_worker, to_server = self._memory[-1].address + TO_WORKER, self._memory[0].address + TO_SERVER
                self.flags = GateFlags(device, to_worker, to_server, lease.counter)
        except BaseException:
            for memory in self._memory:
                memory.close()
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

    def alone(self) -> AbstractContextManager[object]:
        """Makes the stream the calling thread's current one, whatever was enqueued elsewhere."""
        return torch.cuda.stream(self._torch_stream)

    def host_copy(self, tensor: torch.Tensor) -> npt.NDArray[Any]:
        """A copy on the host; see `Channel.host_copy`. On a stream behind which nobody's wait lies."""
        with torch.cuda.stream(torch.cuda.ExternalStream(self.lease.copies.handle, device=self._device)):
            copied: npt.NDArray[Any] = tensor.cpu().numpy()
            return copied

    def resident(self, state: torch.Tensor, word: int) -> Resident:
        """What resident steps need of it; see `Channel.resident`."""
        from attnd.protocol.cuda.gate_flags import GateFlags
        from attnd_server.planes.cuda.resident.gates import ResidentGates

        if not isinstance(self.flags, GateFlags):
            raise Unsupported("worker and server take turns on one GPU, where a launch that waits would hold it up")
        counter, _, signal, flag, stop = self.flags.addresses
        gates = ResidentGates(
            self._gpu,
            state=state.data_ptr(),
            books=self.lease.books.address,
            word=self._memory[0].address + word,
            counter=counter,
            signal=signal,
            flag=flag,
            stop=stop,
            told=self._memory[-1].address + REFUSED,
        )
        return Resident(gates, self.lease.books, lambda: self._words.words.read(WAKE // 4))

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
        while not self.lease.stream.is_idle():
            self.flags.stop()
            time.sleep(_STOP_PERIOD_S)

    def free(self) -> None:
        """Frees the memory of a channel that is drained, all but the host's words. The device is current."""
        self._bytes = []
        for memory in self._memory:
            memory.close()

    def free_words(self) -> None:
        """Frees the host's words afterwards. Waits for everything on the GPU, which is current."""
        self.flags.close()
        self._words.close()


def _written(writer: CopyAndWrite, stream: int, address: int, value: int) -> None:
    """Writes a word after what was enqueued on a stream."""
    writer.run(stream, [], address, value)
