"""Page tables of a stream's steps, told by what they differ in from those of a step before.

From one step to the next a table gains a page here and there, while its size follows the context. Rows are compared as
bytes, so that equal ones cost one comparison each, however long they are; no numpy is needed.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from operator import ne

from attnd.protocol.packing import int32_tensor
from attnd.protocol.tensors import Array
from attnd.v1 import step_pb2

# Tables of so many last steps are kept: at most 8, for as long a server keeps them. Two steps in flight need three.
KEPT_TABLES = 4
# Most elements that change in a row which goes on as it was: a step adds a page or two.
_FEW_CHANGES = 2
# Elements of two rows that are compared at once.
_CHUNK = 64
_ITEM = 4  # bytes of an element, int32
_NO_PAGE = b"\xff" * _ITEM  # -1
# Roughly the bytes of a delta's message beside source_rows, and those of one change.
_FIXED_BYTES, _BYTES_PER_CHANGE = 64, 2 * _ITEM


@dataclass(eq=False)
class PageTable:
    """The page table of one step, as it travels.

    Attributes:
        step_id: of the step.
        num_reqs: rows.
        max_pages: columns.
        data: int32 `[num_reqs, max_pages]`.
    """

    step_id: int
    num_reqs: int
    max_pages: int
    data: bytes

    def row(self, row: int, max_pages: int) -> bytes:
        """A row, cut or filled with -1 to `max_pages`; row -1 has no pages."""
        kept = min(self.max_pages, max_pages) if row >= 0 else 0
        start = row * self.max_pages * _ITEM
        pages = self.data[start : start + kept * _ITEM]
        return pages if kept == max_pages else pages + _NO_PAGE * (max_pages - kept)

    @cached_property
    def rows(self) -> tuple[bytes, ...]:
        """Every row, whole."""
        return struct.unpack(f"{self.max_pages * _ITEM}s" * self.num_reqs, self.data)

    @cached_property
    def first_pages(self) -> set[int]:
        """The first page of every row."""
        return set(memoryview(self.data).cast("i")[:: self.max_pages].tolist()) if self.data else set()

    @cached_property
    def rows_by_page(self) -> dict[bytes, int]:
        """The row whose last page it is, by page; also by first pages, which several rows may share."""
        rows = [self.row(row, self.max_pages).rstrip(b"\xff") for row in range(self.num_reqs)]
        by_page = {row[:_ITEM]: index for index, row in enumerate(rows)}
        by_page.update((row[-_ITEM:], index) for index, row in enumerate(rows))
        return by_page


@dataclass(eq=False)
class _SentStep:
    """The page tables of one step.

    Attributes:
        step_id: of the step.
        tables: by layer group, those that it gave.
        takes_deltas: whether the server has them and said that they may be built upon.
    """

    step_id: int
    tables: dict[int, PageTable]
    takes_deltas: bool = False


class SentPageTables:
    """What the server knows of a stream's page tables, and what it has yet to be told."""

    def __init__(self) -> None:
        """Nothing is known: the first table goes in full."""
        self._steps: deque[_SentStep] = deque(maxlen=KEPT_TABLES)

    def delta(self, step_id: int, table: Array, group: int = 0) -> step_pb2.PageTableDelta | None:
        """Notes the table that a step sends next, and says how to tell it by one that the server has.

        Args:
            step_id: the step's.
            table: int32 `[num_reqs, max_pages]`.
            group: index of the layer group that it is of.

        Returns:
            The delta, or None where the table itself is shorter or the server has none like it.
        """
        if len(table.shape) != 2 or min(table.shape) < 0 or table.num_bytes != table.data.nbytes:
            return None  # for the server to refuse
        new = PageTable(step_id, *table.shape, bytes(table.data))
        known = [step.tables[group] for step in reversed(self._steps) if step.takes_deltas and group in step.tables]
        delta = _shortest(new, known)
        if not self._steps or self._steps[-1].step_id != step_id:
            self._steps.append(_SentStep(step_id, {}))
        self._steps[-1].tables[group] = new
        return delta

    def accept(self, step_id: int) -> None:
        """The server took the step, and the next 8 may build upon its tables."""
        for step in self._steps:
            step.takes_deltas |= step.step_id == step_id

    def forget(self) -> None:
        """The server may know nothing: a new stream, or a step that it refused."""
        self._steps.clear()


def _shortest(new: PageTable, bases: list[PageTable]) -> step_pb2.PageTableDelta | None:
    """Against the first base that hardly differs; else against the likeliest, if that is shorter than the table."""
    most = (len(new.data) - _FIXED_BYTES - _ITEM * new.num_reqs) // _BYTES_PER_CHANGE
    if most < 0 or not bases:
        return None
    for base in bases:
        delta = _difference(base, new, min(most, _FEW_CHANGES * new.num_reqs))
        if delta is not None:
            return delta
    likeliest = max(bases, key=lambda base: len(base.first_pages & new.first_pages))
    if 2 * len(likeliest.first_pages & new.first_pages) < len(new.first_pages):
        return None  # most rows are new, and a change takes the bytes of two elements: spare the comparison
    return _difference(likeliest, new, most)


def _difference(base: PageTable, new: PageTable, most_changes: int) -> step_pb2.PageTableDelta | None:
    """How to make `new` of `base`, or None if more than `most_changes` elements change."""
    if base.data == new.data and base.num_reqs == new.num_reqs:
        new.data = base.data  # held once
        return _message(base, new, range(new.num_reqs), [], [])
    if (in_place := _changed_in_place(base, new, most_changes)) is not None:
        return in_place
    source_rows: list[int] = []
    indices: list[int] = []
    pages: list[int] = []
    source = -1
    for request in range(new.num_reqs):
        row = new.row(request, new.max_pages)
        source = source + 1 if source + 1 < base.num_reqs else -1
        if row != base.row(source, new.max_pages):
            source, columns = _source(base, row, request, source)
            if len(indices) + len(columns) > most_changes:
                return None
            elements = memoryview(row).cast("i")
            pages += [elements[column] for column in columns]
            indices += [request * new.max_pages + column for column in columns]
        source_rows.append(source)
    return _message(base, new, source_rows, indices, pages)


def _changed_in_place(base: PageTable, new: PageTable, most_changes: int) -> step_pb2.PageTableDelta | None:
    """As `_difference`, where each row goes on as it was: only those that changed are looked at. None: they do not."""
    if (base.num_reqs, base.max_pages) != (new.num_reqs, new.max_pages):
        return None
    indices: list[int] = []
    pages: list[int] = []
    for request in compress(range(new.num_reqs), map(ne, base.rows, new.rows)):
        columns = list(_changes(base.rows[request], new.rows[request]))
        if len(columns) > _FEW_CHANGES or len(indices) + len(columns) > most_changes:
            return None
        elements = memoryview(new.rows[request]).cast("i")
        pages += [elements[column] for column in columns]
        indices += [request * new.max_pages + column for column in columns]
    return _message(base, new, range(new.num_reqs), indices, pages)


def _source(base: PageTable, row: bytes, request: int, following: int) -> tuple[int, list[int]]:
    """The base's row that `row` most likely continues, or -1, and the columns in which it differs.

    Args:
        base: the table before.
        row: the row.
        request: its index.
        following: the row after that which the request before continues: where requests were dropped or added, the
            others move together.
    """
    max_pages = len(row) // _ITEM
    best: tuple[int, list[int]] | None = None
    for source in _candidates(base, row, request, following):
        columns = list(_changes(base.row(source, max_pages), row))
        if best is None or len(columns) < len(best[1]):
            best = source, columns
        if len(columns) <= _FEW_CHANGES:
            break
    assert best is not None  # -1 is always a candidate
    return best


def _candidates(base: PageTable, row: bytes, request: int, following: int) -> Iterator[int]:
    """Rows of the base that `row` may continue, the likeliest first; none twice."""
    tried = {-1}
    for source in (request, following):
        if source < base.num_reqs and source not in tried:
            tried.add(source)
            yield source
    pages = row.rstrip(b"\xff")
    for page in (pages[-_ITEM:], pages[-2 * _ITEM : -_ITEM], pages[:_ITEM]):
        source = base.rows_by_page.get(page, -1)
        if source not in tried:
            tried.add(source)
            yield source
    yield -1


def _changes(old: bytes, new: bytes) -> Iterator[int]:
    """The elements in which two rows of one length differ."""
    if old == new:
        return
    step = _CHUNK * _ITEM
    for start in range(0, len(new), step):
        before, after = old[start : start + step], new[start : start + step]
        if before != after:
            first = start // _ITEM
            pairs = zip(memoryview(before).cast("i"), memoryview(after).cast("i"), strict=True)
            yield from [first + index for index, (a, b) in enumerate(pairs) if a != b]


def _message(
    base: PageTable, new: PageTable, source_rows: range | list[int], indices: list[int], pages: list[int]
) -> step_pb2.PageTableDelta:
    field = "page_table_delta"
    return step_pb2.PageTableDelta(
        base_step_id=base.step_id,
        source_rows=int32_tensor(source_rows, field),
        max_pages=new.max_pages,
        indices=int32_tensor(indices, field),
        pages=int32_tensor(pages, field),
    )
