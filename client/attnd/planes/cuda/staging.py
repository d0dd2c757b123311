"""Metadata of resident steps on its way from the host to the worker's GPU."""

from __future__ import annotations

import sys
from typing import Any

from attnd.planes.cuda.decode_numbers import DecodeNumbers
from attnd.protocol.cuda.resident import CONTEXT_LENS, NUM_REQS, STORED_LENS, VALID_LENS, VERSION

# Steps whose metadata may be on its way.
_NUM_BUFFERS = 2


class Staging:
    """Copies metadata to tensors of the GPU, in the order of torch's current stream, from pinned memory."""

    def __init__(self, lens: Any, tables: Any) -> None:
        """To int32 tensors `[LENS_ROWS, max_reqs]` and `[max_reqs, max_pages]`."""
        torch, self._targets = sys.modules["torch"], (lens, tables)
        self._sent: Any = None  # page tables that are there
        on_gpu = lens.device.type == "cuda"
        self._buffers = [
            (*(torch.zeros(each.shape, dtype=torch.int32, pin_memory=on_gpu) for each in self._targets), event)
            for event in (torch.cuda.Event() if on_gpu else None for _ in range(_NUM_BUFFERS))
        ]

    def send(self, numbers: DecodeNumbers) -> None:
        """Enqueues the copies of a step's metadata. Waits for those of the step before the last."""
        self._buffers.reverse()
        lens, tables, event = self._buffers[0]
        if event is not None:
            event.synchronize()
        num_reqs = numbers.num_reqs
        lens[NUM_REQS, 0], lens[NUM_REQS, 1] = num_reqs, VERSION
        for row, values in (
            (CONTEXT_LENS, numbers.context_lens),
            (VALID_LENS, numbers.valid_lens),
            (STORED_LENS, numbers.stored_lens),
        ):
            lens[row, :num_reqs] = values
        to_lens, to_tables = self._targets
        to_lens.copy_(lens, non_blocking=True)
        if numbers.page_tables is not self._sent:
            num_pages = min(numbers.page_tables.shape[1], tables.shape[1])
            tables[:num_reqs, :num_pages] = numbers.page_tables[:, :num_pages]
            to_tables[:num_reqs].copy_(tables[:num_reqs], non_blocking=True)
            self._sent = numbers.page_tables
        if event is not None:
            event.record()
