"""The GPU's side: the check's kernels, on private memory that has a canary around every buffer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from attnd.protocol.cuda.resident import LENS_ROWS
from attnd_server.attention.kernels.resident import state as words
from attnd_server.attention.metadata import REQUEST_COLUMNS
from attnd_server.attention.resident import ResidentSizes
from tests.hostile_metadata import Ints
from tests.soak.resident_metadata.verdicts import CANARY, CANARY_BYTES, STEP_HEADER, Layout, Run

# What private memory holds that a step has yet to write: no page, and numbers that no step has.
NO_PAGE, STALE = 1 << 29, 77
# Private buffers as they lie in the arena: first those that a step writes anew.
_ANEW = ("lens", "page_tables", "step", "slots", "written")
_KEPT = ("state", "tags", "marks")
# Blocks from which on a graph of all of them is launched; one by one they are easier to debug.
_GRAPH = 32
# How often each number of a block is rewritten: a few microseconds, while which it is copied.
_ROUNDS = 64
_WIDTH = 256


@triton.jit
def _rewrite_kernel(region, mine, theirs, size, rounds, WIDTH: tl.constexpr):  # noqa: N803
    """Makes each number now the one and now the other, each in its own time. Grid: pieces of WIDTH."""
    places = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    is_inside = places < size
    first = tl.load(mine + places, mask=is_inside)
    second = tl.load(theirs + places, mask=is_inside)
    for number in tl.range(0, rounds):
        is_first = ((places * 40503 + number * 30011) >> 7) & 1 == 0
        tl.atomic_xchg(region + places, tl.where(is_first, first, second), mask=is_inside, sem="relaxed")


class Rig:
    """Takes blocks of one class, one after the other, and keeps all private memory as it was after each.

    Args:
        sizes: of the class.
        num_blocks: that are taken before anybody looks.
        device: torch's name of it; on a processor Triton must interpret.
        take: instead of `take_step`.
    """

    def __init__(
        self, sizes: ResidentSizes, num_blocks: int, device: str, take: Callable[..., None] | None = None
    ) -> None:
        # Where Triton interprets, it must when these are imported.
        from attnd_server.attention.kernels.resident.metadata import Buffers, make_buffers, take_step

        self._sizes, self._num_blocks, self._take = sizes, num_blocks, take or take_step
        made = make_buffers(
            sizes,
            torch.full((STEP_HEADER + len(REQUEST_COLUMNS) * sizes.max_reqs,), STALE, dtype=torch.int32, device=device),
            torch.full((sizes.max_reqs * sizes.max_pages,), NO_PAGE, dtype=torch.int32, device=device),
        )._asdict()
        assert sorted(made) == sorted(_ANEW + _KEPT)
        self.layout, self._num_anew = _laid_out(made)
        self._arena = torch.full((self.layout.num_bytes,), CANARY, dtype=torch.uint8, device=device)
        views = self._views()
        for name, view in views.items():
            view.copy_(made[name])
        self._buffers = Buffers(**views)
        # Slots that a step does not write are no harm to the machine, and found out.
        views["lens"].fill_(STALE), views["slots"].fill_(sizes.num_pages * sizes.page_size - 1)
        views["state"][words.CAME] = 1
        self._stale = self._arena[: self._num_anew].clone()
        numbers = sizes.max_reqs * (LENS_ROWS + sizes.max_pages)
        self._mine, self._theirs = torch.zeros(2, num_blocks, numbers, dtype=torch.int32, device=device)
        self._region = torch.zeros(numbers, dtype=torch.int32, device=device)
        self._arenas = torch.zeros(num_blocks, self.layout.num_bytes, dtype=torch.uint8, device=device)
        self._num_taken = 0
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self._side = torch.cuda.Stream(device) if self._arena.is_cuda else None

    def run(self, batch: int, mine: Ints, theirs: Ints | None) -> Run:
        """Takes a batch.

        Args:
            batch: its number.
            mine: int32 `[num_blocks, numbers]`, the blocks.
            theirs: what a worker writes over each block and back while it is taken; None: it writes no more.
        """
        is_rewritten = theirs is not None
        self._mine.copy_(torch.from_numpy(mine))
        if theirs is not None:
            self._theirs.copy_(torch.from_numpy(theirs))
        graph = self._graph(is_rewritten) if self._arena.is_cuda and self._num_blocks >= _GRAPH else None
        num_before, self._num_taken = self._num_taken, self._num_taken + self._num_blocks
        if graph is None:
            self._take_all(is_rewritten)
        else:
            graph.replay()
        return Run(batch, self.layout, num_before, self._arenas.cpu().numpy().copy())

    def _views(self) -> dict[str, torch.Tensor]:
        """The buffers."""
        views = {}
        for name, (first, dtype, shape) in self.layout.fields.items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            views[name] = self._arena[first : first + size].view(getattr(torch, dtype)).view(shape)
        return views

    def _graph(self, is_rewritten: bool) -> torch.cuda.CUDAGraph:
        if is_rewritten not in self._graphs:
            # Once as it is: a kernel that is not on the device yet cannot be captured.
            self._take_one(0, is_rewritten)
            self._num_taken += 1
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._take_all(is_rewritten)
            self._graphs[is_rewritten] = graph
        return self._graphs[is_rewritten]

    def _take_all(self, is_rewritten: bool) -> None:
        for index in range(self._num_blocks):
            self._take_one(index, is_rewritten)

    def _take_one(self, index: int, is_rewritten: bool) -> None:
        # Every other one finds what the one before has left, as steps do.
        if index % 2:
            self._buffers.written.zero_()
        else:
            self._arena[: self._num_anew].copy_(self._stale)
        # As the gates do: a client that has raised a refusal resumes, and counts the next step.
        self._buffers.state[words.REFUSED].zero_()
        self._buffers.state[words.STEP].add_(1)
        if is_rewritten:
            self._region.copy_(self._mine[index])
            with self._rewriting(index):
                self._take(self._sizes, self._buffers, *self._block(self._region))
        else:
            self._take(self._sizes, self._buffers, *self._block(self._mine[index]))
        self._arenas[index].copy_(self._arena)

    def _block(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengths and page tables."""
        lens = LENS_ROWS * self._sizes.max_reqs
        return numbers[:lens].view(LENS_ROWS, -1), numbers[lens:].view(self._sizes.max_reqs, -1)

    @contextmanager
    def _rewriting(self, index: int) -> Iterator[None]:
        """Somebody writes the other block over the region and back, as long as the context lasts or longer."""
        if self._side is None:
            with _rewriting_thread(*(each.numpy() for each in (self._region, self._mine[index], self._theirs[index]))):
                yield
            return
        stream, size = torch.cuda.current_stream(self._arena.device), len(self._region)
        self._side.wait_stream(stream)
        with torch.cuda.stream(self._side):
            _rewrite_kernel[triton.cdiv(size, _WIDTH),](
                self._region, self._mine[index], self._theirs[index], size, _ROUNDS, WIDTH=_WIDTH
            )
        yield
        stream.wait_stream(self._side)


@contextmanager
def _rewriting_thread(region: Ints, mine: Ints, theirs: Ints) -> Iterator[None]:
    is_over, random = threading.Event(), np.random.default_rng(0)

    def rewrite() -> None:
        while not is_over.is_set():
            np.copyto(region, np.where(random.random(len(mine)) < 0.5, mine, theirs))

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _laid_out(buffers: dict[str, Any]) -> tuple[Layout, int]:
    """Where they lie in the arena, and how many bytes of it a step writes anew."""
    fields, end, num_anew = {}, 0, 0
    for name in _ANEW + _KEPT:
        # A canary begins at the very byte where a buffer ends, and the next buffer where allocations begin.
        first = (end + 2 * CANARY_BYTES - 1) // CANARY_BYTES * CANARY_BYTES
        each = buffers[name]
        fields[name] = first, str(each.dtype).removeprefix("torch."), tuple(each.shape)
        end = first + each.nbytes
        num_anew = end if name in _ANEW else num_anew
    return Layout((end + 2 * CANARY_BYTES - 1) // CANARY_BYTES * CANARY_BYTES, fields), num_anew
