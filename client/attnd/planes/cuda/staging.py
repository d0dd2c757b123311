"""Metadata of resident steps on its way from the host to the worker's GPU."""

from __future__ import annotations

import sys
from typing import Any

from attnd.planes.cuda.decode_numbers import DecodeNumbers
from attnd.protocol.cuda.resident import CONTEXT_LENS, NUM_REQS, STORED_LENS, VALID_LENS, VERSION

# Steps whose metadata may be on its way.
_NUM_BUFFERS = 2


class Staging:
    """Copies metadata to tensors of the GPU, in the order of torch's current stream, from pinned memory.

    What is the same object as before is not written, or not copied, once more.
    """

    def __init__(self, lens: Any, tables: Any) -> None:
        """To int32 tensors `[LENS_ROWS, max_reqs]` and `[max_reqs, max_pages]`."""
        self._lens, self._tables = lens, tables
        self._sent: Any = None  # page tables that are there
        self._buffers = [_Buffer(lens, tables) for _ in range(_NUM_BUFFERS)]

    def send(self, numbers: DecodeNumbers) -> None:
        """Enqueues the copies of a step's metadata. Waits for those of the step before the last."""
        self._buffers.reverse()
        buffer, num_reqs = self._buffers[0], numbers.num_reqs
        if buffer.event is not None:
            buffer.event.synchronize()
        buffer.write_lens(numbers)
        self._lens.copy_(buffer.lens, non_blocking=True)
        if numbers.page_tables is not self._sent:
            num_pages = min(numbers.page_tables.shape[1], buffer.tables.shape[1])
            buffer.tables[:num_reqs, :num_pages] = numbers.page_tables[:, :num_pages]
            self._tables[:num_reqs].copy_(buffer.tables[:num_reqs], non_blocking=True)
            self._sent = numbers.page_tables
        if buffer.event is not None:
            buffer.event.record()


class _Buffer:
    """Pinned memory for one step's metadata.

    Attributes:
        event: of its last copy; None: without a GPU.
    """

    def __init__(self, lens: Any, tables: Any) -> None:
        """As large as these."""
        torch, on_gpu = sys.modules["torch"], lens.device.type == "cuda"
        self.lens, self.tables = (
            torch.zeros(each.shape, dtype=torch.int32, pin_memory=on_gpu) for each in (lens, tables)
        )
        self.lens[NUM_REQS, 1] = VERSION
        self.event = torch.cuda.Event() if on_gpu else None
        self._valid: Any = None  # lengths that are there
        self._stored: Any = None

    def write_lens(self, numbers: DecodeNumbers) -> None:
        """Those of a step."""
        num_reqs = numbers.num_reqs
        self.lens[CONTEXT_LENS, :num_reqs] = numbers.context_lens
        if numbers.valid_lens is not self._valid:
            self._valid = numbers.valid_lens
            self.lens[VALID_LENS, :num_reqs] = numbers.valid_lens
            self.lens[NUM_REQS, 0] = num_reqs  # who has other requests has another tensor
        if numbers.stored_lens is not self._stored:
            self._stored = numbers.stored_lens
            self.lens[STORED_LENS, :num_reqs] = numbers.stored_lens
