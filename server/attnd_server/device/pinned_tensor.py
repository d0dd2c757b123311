"""Values that a stream takes from the host when it gets there."""

from __future__ import annotations

import torch

from attnd.protocol.cuda.device_bytes import CUDA, DeviceBytes


class PinnedTensor:
    """Values on their way to a tensor of the device, through pinned memory of the host.

    A kernel fetches them, and not a copy of the driver's: these share a few hardware queues, where one that comes after
    a wait for a worker would hold up everybody's.
    """

    def __init__(self, target: torch.Tensor) -> None:
        """Zeros, not sent.

        Args:
            target: one-dimensional and dense, where values go.
        """
        on_gpu = target.device.type == "cuda"
        self._target = target
        self.host = torch.zeros(target.shape, dtype=target.dtype, pin_memory=on_gpu)
        self._fetched = as_device_sees(self.host, target.device) if on_gpu else self.host
        self._sent = torch.cuda.Event() if on_gpu else None

    def wait(self) -> None:
        """Waits until the device has what was sent last: `host` may be written to."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, num_elements: int) -> None:
        """Starts to send so many of the first elements of `host`, in the order of the current stream."""
        torch.add(self._fetched[:num_elements], 0, out=self._target[:num_elements])
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(self._target.device))


def as_device_sees(pinned: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pinned memory at the same address for kernels; whoever uses it keeps `pinned`."""
    index = torch.cuda.current_device() if device.index is None else device.index
    seen = torch.utils.dlpack.from_dlpack(DeviceBytes(pinned.data_ptr(), pinned.nbytes, (CUDA, index)))
    return seen.view(pinned.dtype).view(pinned.shape)
