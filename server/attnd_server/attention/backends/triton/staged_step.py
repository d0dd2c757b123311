"""A decode step on its way to the device: what `decode_items` reads of it, in pinned memory of the host."""

from __future__ import annotations

from typing import NamedTuple

import torch

from attnd_server.attention.backends.triton.work import Ints
from attnd_server.attention.kernels.decode_items import STEP_HEADER
from attnd_server.attention.metadata import REQUEST_COLUMNS
from attnd_server.device.pinned_tensor import PinnedTensor


class StepParts(NamedTuple):
    """Where the parts of a step lie.

    Attributes:
        columns: see `AttentionMetadata.columns`.
        page_tables: `[num_reqs, num_pages]`.
        num_elements: of the whole step, from its first element on.
    """

    columns: Ints
    page_tables: Ints
    num_elements: int


class StagedStep:
    """Room for one step.

    Args:
        target: int32, where steps go.
        tables: its element where the page tables begin.
    """

    def __init__(self, target: torch.Tensor, tables: int) -> None:
        self._tables = tables
        self._staged = PinnedTensor(target)
        self._array: Ints = self._staged.host.numpy()
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
                num_elements=end,
            )
            self._shape = num_reqs, num_pages
        return self._parts

    def wait(self) -> None:
        """Waits until the device has what was sent last."""
        self._staged.wait()

    def send(self, parts: StepParts) -> None:
        """Starts the copy."""
        self._staged.send(parts.num_elements)
