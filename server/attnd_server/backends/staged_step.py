"""A decode step on its way to the device: what `decode_items` reads of it, in pinned memory of the host."""

from __future__ import annotations

from typing import NamedTuple

import torch

from attnd_server.backends.triton_schedule import Ints
from attnd_server.kernels.decode_items import STEP_HEADER
from attnd_server.metadata import REQUEST_COLUMNS


class StepParts(NamedTuple):
    """Where the parts of a step lie.

    Attributes:
        columns: see `AttentionMetadata.columns`.
        page_tables: `[num_reqs, num_pages]`.
        source: all of the step.
        target: where it goes on the device.
    """

    columns: Ints
    page_tables: Ints
    source: torch.Tensor
    target: torch.Tensor


class StagedStep:
    """Room for one step.

    Args:
        target: int32, where steps go.
        tables: its element where the page tables begin.
    """

    def __init__(self, target: torch.Tensor, tables: int) -> None:
        on_gpu = target.device.type == "cuda"
        self._target, self._tables = target, tables
        self._source = torch.zeros(target.shape, dtype=torch.int32, pin_memory=on_gpu)
        self._array: Ints = self._source.numpy()
        self._sent = torch.cuda.Event() if on_gpu else None
        self._shape: tuple[int, int] | None = None
        self._parts = self.parts(0, 0)

    def parts(self, num_reqs: int, num_pages: int) -> StepParts:
        """The parts of a step of so many requests, with so many pages in the page tables. The last are kept."""
        if self._shape != (num_reqs, num_pages):
            self._array[:2] = num_reqs, num_pages
            columns = STEP_HEADER + len(REQUEST_COLUMNS) * num_reqs
            end = self._tables + num_reqs * num_pages
            self._parts = StepParts(
                columns=self._array[STEP_HEADER:columns].reshape(len(REQUEST_COLUMNS), num_reqs),
                page_tables=self._array[self._tables : end].reshape(num_reqs, num_pages),
                source=self._source[:end],
                target=self._target[:end],
            )
            self._shape = num_reqs, num_pages
        return self._parts

    def wait(self) -> None:
        """Waits until the device has what was sent last."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self, parts: StepParts) -> None:
        """Starts the copy."""
        parts.target.copy_(parts.source, non_blocking=True)
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(self._target.device))
