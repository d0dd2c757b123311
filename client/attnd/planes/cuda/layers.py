"""A worker's tensors on a cuda plane: to the server's memory and back, in the order of the worker's own stream."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from attnd.planes.cuda.tensors import check_capture, copy_in
from attnd.protocol.cuda.copies import Copier, Copy, CopyAndWrite, HandOver, Post
from attnd.protocol.cuda.device_bytes import CUDA, DeviceBytes
from attnd.protocol.cuda.driver import Device, call
from attnd.protocol.cuda.gate_flags import WORD_BYTES, Counter, GateFlags
from attnd.protocol.cuda.host_flags import HostFlags, HostWords
from attnd.protocol.cuda.layout import Place
from attnd.protocol.cuda.memory import DeviceMemory
from attnd.protocol.cuda.resident import WAKE, ResidentLayout
from attnd.protocol.tensors import DTYPE_NAMES


class PlaneLayers:
    """What a plane has of the worker's GPU.

    Attributes:
        num_bytes: of the region.
        gpu: the worker's.
    """

    def __init__(
        self, gpu: Device, memory: list[DeviceMemory], flags: HostFlags | GateFlags, words: HostWords | None
    ) -> None:
        """Owns all of it; the GPU is the thread's current one. See `CudaPlane`."""
        self.num_bytes = min(each.num_bytes for each in memory)
        self.gpu = gpu
        self._memory, self._flags, self._words = memory, flags, words
        self._bytes: dict[int, Any] = {}  # torch's view of the memory, by its index
        self._kernel: HandOver | None = None
        if isinstance(flags, GateFlags):
            self._kernel = HandOver(gpu, *flags.addresses)
        else:
            self._copier, self._counter = Copier(gpu), Counter(gpu)
            self._writer = CopyAndWrite(gpu, self._counter.address)

    def free(self) -> None:
        """Frees it, once; nothing of it may be queued, and the GPU is current."""
        self._bytes.clear()
        self._flags.close()
        if self._kernel is None:
            self._counter.close()
        for each in self._memory:
            each.close()
        if self._words is not None:
            self._words.close()

    def hand_over(
        self, stream: int, layer: int, is_last: bool, inputs: list[tuple[Place, Any]], outputs: list[tuple[Place, Any]]
    ) -> None:
        """Enqueues one layer: tensors to the region, their hand-over, and the server's tensors back. Raises CudaError.

        Args:
            stream: of the worker's GPU, which is the current one.
            layer: of the step.
            is_last: whether it is the step's last.
            inputs: places, and torch tensors that go there.
            outputs: places, and dense torch tensors that come from there.
        """
        there, by_driver = [], []
        for place, tensor in inputs:
            copy = copy_in(self._address(place), tensor)
            if copy is None or not copy.is_possible:
                by_driver.append((place, tensor.contiguous()))
            else:
                there.append(copy)
        for place, tensor in by_driver:
            self._copy(self._address(place), tensor.data_ptr(), place.num_bytes, stream)
        back, by_driver = [], []
        for place, tensor in outputs:
            copy = Copy(tensor.data_ptr(), self._address(place), 1, place.num_bytes, place.num_bytes)
            if copy.is_possible:
                back.append(copy)
            else:
                by_driver.append((place, tensor))
        if self._kernel is not None:
            self._kernel.run(stream, there, back)
        else:
            assert isinstance(self._flags, HostFlags)
            self._writer.run(stream, there, *self._flags.signal_of(layer))
            self._flags.wait(stream, layer, is_last)
            if back:
                self._copier.copy(stream, back)
        for place, tensor in by_driver:
            self._copy(tensor.data_ptr(), self._address(place), place.num_bytes, stream)

    @property
    def has_resident_steps(self) -> bool:
        """Whether the server takes any from this worker."""
        return self._words is not None

    def resident(self, counter: Counter, where: ResidentLayout) -> Post:
        """What tells the server of resident steps, counted at `counter`, where it takes any.

        The worker's GPU is the current one.
        """
        assert self._words is not None
        word, wake = self._memory[0].address + where.word, self._words.address + WAKE
        return Post(self.gpu, counter.address, counter.address + WORD_BYTES, word, wake)

    def address(self, offset: int, *, is_result: bool = False) -> int:
        """Of a byte of the region, or of the memory of results, for the worker's GPU."""
        return self._memory[-1 if is_result else 0].address + offset

    def tensor(self, place: Place) -> Any:
        """A place of the region or of the memory of results, as a tensor of torch's on the worker's GPU.

        Of no use once the plane was closed.
        """
        torch, index = sys.modules["torch"], -1 if place.is_result else 0
        memory = self._memory[index]
        if index not in self._bytes:
            described = DeviceBytes(memory.address, memory.num_bytes, (CUDA, self.gpu.index))
            self._bytes[index] = torch.utils.dlpack.from_dlpack(described)
        part = self._bytes[index][place.offset : place.offset + place.num_bytes]
        return part.view(getattr(torch, DTYPE_NAMES[place.dtype])).view(place.shape)

    def synchronize(self) -> None:
        """Waits until all that was enqueued on torch's current stream of the worker's GPU is done."""
        sys.modules["torch"].cuda.current_stream(self.torch_device).synchronize()

    def _address(self, place: Place) -> int:
        return self.address(place.offset, is_result=place.is_result)

    def _copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        if num_bytes:
            call("cuMemcpyAsync", target, source, num_bytes, stream)

    @cached_property
    def torch_device(self) -> Any:
        """Where the worker's tensors are."""
        return sys.modules["torch"].device("cuda", self.gpu.index)

    @property
    def takes_turns(self) -> bool:
        """Whether worker and server take turns on one GPU, for want of CUDA's Multi-Process Service."""
        return self._kernel is None and not self.gpu.has_mps

    def current_stream(self) -> int | None:
        """Torch's current stream, if it is of the worker's GPU; None: another GPU is the thread's current one."""
        cuda = sys.modules["torch"].cuda
        return cuda.current_stream().cuda_stream if cuda.current_device() == self.gpu.index else None

    @property
    def is_capturing(self) -> bool:
        """Whether what is enqueued on torch's current stream goes into a CUDA graph."""
        return bool(sys.modules["torch"].cuda.is_current_stream_capturing())

    @contextmanager
    def stream(self) -> Iterator[int]:
        """As `current_stream`, whatever GPU is current before. Raises as `check_capture` does."""
        cuda = sys.modules["torch"].cuda
        check_capture(cuda, self.gpu.index)
        with cuda.device(self.gpu.index):
            yield cuda.current_stream().cuda_stream
