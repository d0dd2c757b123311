"""Which tokens of a padded batch are real, and the pages they lie in: the bookkeeping of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from attnd.errors import Exhausted, InvalidRequest
from attnd.integrations.transformers.parts import Part, parts_of
from attnd.pages import PagedSequence, PagePool


class _Begun(NamedTuple):
    """A pass under way, and what takes it back.

    Attributes:
        rows: before it.
        lengths: tokens of each row before it.
        num_new: its columns.
        mask: of all columns with it, or None.
    """

    rows: list[PagedSequence]
    lengths: list[int]
    num_new: int
    mask: torch.Tensor | None


class PaddedBatch:
    """Rows of one length, padding included, whose real tokens lie in pages. Padding has no page.

    A pass is begun by `extend`, and counts when `commit` was called. Until then `take_back` undoes it, wherever it was
    stopped. What would need another page's content undone cannot be taken back: if it is stopped in the middle, the
    batch is broken until `clear`, and says so.

    Attributes:
        num_columns: tokens of each row, padding included, without a pass under way.
    """

    def __init__(self, pool: PagePool) -> None:
        """No rows yet: the first `extend` says how many there are."""
        self.pool = pool
        self.num_columns = 0
        self._rows: list[PagedSequence] = []
        self._mask: torch.Tensor | None = None  # bool [num_rows, num_columns] on the host; None: all are real
        self._begun: _Begun | None = None
        self._broken = ""

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return len(self._rows)

    @property
    def is_under_way(self) -> bool:
        """Whether a pass was begun, and neither committed nor taken back."""
        return self._begun is not None

    def clear(self, pool: PagePool | None = None) -> None:
        """Forgets all rows. Their pages are free, or all those of `pool` are, which takes the place of theirs."""
        if pool is None:
            for row in self._rows:
                row.free()
        self.pool = pool or self.pool
        self.num_columns = 0
        self._rows, self._mask, self._begun, self._broken = [], None, None, ""

    def extend(
        self, batch_size: int, num_new: int, mask: torch.Tensor | None, blocks: torch.Tensor | None = None
    ) -> list[Part]:
        """Begins a pass that adds `num_new` columns.

        Args:
            batch_size: rows of the pass; the same until `select` or `clear`.
            num_new: tokens of each row, padding included.
            mask: bool `[batch_size, num_columns + num_new]` on the host, true for real tokens; None: all new ones are
                real. Tokens at the end of a row that were real when they came, and are not any more, are forgotten.
            blocks: int64 `[batch_size, num_new]` on the host, the last new token that each one sees, counted in
                columns; None: each sees itself and those before it.

        Returns:
            What the server is to attend, in order.

        Raises:
            InvalidRequest: rows or mask do not go with what is there. Nothing was changed.
            Exhausted: the pages do not suffice. Nothing was changed.
        """
        self.check()
        if self._rows and len(self._rows) != batch_size:
            rule = "reset it, or select rows, before another batch"
            raise InvalidRequest(f"batch size is {batch_size}, but the cache holds {len(self._rows)} rows: {rule}")
        rows = self._rows or [PagedSequence(self.pool) for _ in range(batch_size)]
        if mask is None and self._mask is not None:
            mask = torch.cat([self._mask, torch.ones((batch_size, num_new), dtype=torch.bool)], 1)
        kept, counts = self._count(rows, num_new, mask)
        self._check_room(rows, kept, counts)
        self._forget(rows, kept, mask)
        lengths = [row.length for row in rows]
        self._begun = _Begun(self._rows, lengths, num_new, mask)  # first: whatever stops the rest is taken back
        self._rows = rows
        slots = [row.extend(count) for row, count in zip(rows, counts, strict=True)]
        new = None if mask is None else mask[:, self.num_columns :]
        return parts_of(rows, lengths, slots, num_new, new, blocks)

    def commit(self) -> None:
        """The pass under way counts."""
        begun, self._begun = self._begun, None
        if begun is not None:
            self.num_columns += begun.num_new
            self._mask = begun.mask

    def take_back(self) -> bool:
        """The pass under way never was; False: there is none. May be stopped, and done again."""
        begun = self._begun
        if begun is None:
            return False
        for row, length in zip(self._rows, begun.lengths, strict=True):
            if row.length > length or len(row.pages) > -(-length // self.pool.page_size):
                row.truncate(length)  # a page that has room belongs to its row alone, so nothing is copied
        self._rows = begun.rows
        self._begun = None
        return True

    def fails(self, what: str) -> None:
        """From here to `works`, whatever stops us leaves rows behind that mean nothing; `what` was done."""
        self._broken = what

    def works(self) -> None:
        """What `fails` told of was done to its end."""
        self._broken = ""

    def check(self) -> None:
        """Raises InvalidRequest if the rows mean nothing."""
        if self._broken:
            raise InvalidRequest(f"{self._broken} was stopped in the middle, but the cache needs all of it: reset() it")

    def select(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Makes row `indices[i]` row i; a row may come several times, or not at all. Call `works` after the copies.

        Returns:
            `(source, target)` of the pages to copy. All copies can be made at once.

        Raises:
            InvalidRequest: there is no such row.
            Exhausted: the pages do not suffice. The rows are lost then: `clear`.
        """
        self.check()
        if list(indices) == list(range(len(self._rows))):
            return []
        if wrong := [index for index in indices if not 0 <= index < len(self._rows)]:
            raise InvalidRequest(f"row is {wrong[0]}, but the cache holds rows 0..{len(self._rows) - 1}")
        self.fails("selecting rows")
        for index in set(range(len(self._rows))).difference(indices):
            self._rows[index].free()
        copies: list[tuple[int, int]] = []
        rows: list[PagedSequence] = []
        taken: set[int] = set()
        for index in indices:
            row = self._rows[index]
            if index in taken:  # full pages are shared, only a partly filled last one is copied
                row, copy = row.fork()
                copies += copy
            taken.add(index)
            rows.append(row)
        self._rows = rows
        self._mask = None if self._mask is None else self._mask[list(indices)]
        return copies

    def crop(self, num_columns: int) -> list[tuple[int, int]]:
        """Keeps the first `num_columns` tokens of each row, padding included. Call `works` after the copies.

        Returns:
            `(source, target)` of the pages to copy, usually none.

        Raises:
            InvalidRequest: there are not so many.
        """
        self.check()
        if not 0 <= num_columns <= self.num_columns:
            raise InvalidRequest(f"length is {num_columns}, but must be 0..{self.num_columns}, what the cache holds")
        lengths = self._lengths(num_columns)
        self.fails("cropping")
        self._mask = None if self._mask is None else self._mask[:, :num_columns]
        self.num_columns = num_columns
        return [copy for row, length in zip(self._rows, lengths, strict=True) for copy in row.truncate(length)]

    def fork(self) -> tuple[PaddedBatch, list[tuple[int, int]]]:
        """Another batch of the same rows: full pages are shared, partly filled ones are copied.

        Returns:
            The batch, and `(source, target)` of the pages to copy; it is broken until `works` is called.

        Raises:
            Exhausted: the pages do not suffice. Nothing was changed.
        """
        self.check()
        other = PaddedBatch(self.pool)
        copies: list[tuple[int, int]] = []
        try:
            for row in self._rows:
                fork, copy = row.fork()
                other._rows.append(fork)
                copies += copy
        except BaseException:
            other.clear()
            raise
        other.num_columns, other._mask = self.num_columns, self._mask
        other.fails("forking")
        return other, copies

    def mask(self, num_columns: int) -> torch.Tensor:
        """Bool `[num_rows, num_columns]` of the first columns, a pass under way included: which tokens are real."""
        mask = self._begun.mask if self._begun is not None else self._mask
        if mask is None:
            return torch.ones((self.num_rows, num_columns), dtype=torch.bool)
        return mask[:, :num_columns]

    def again(self, first: int, end: int) -> list[Part]:
        """The columns `[first, end)` as if they were new, to be stored where they lie. Changes nothing.

        Of a page that several rows share one of them stores.
        """
        mask = self.mask(end)
        starts: list[int] = mask[:, :first].sum(1).tolist()
        counts: list[int] = mask[:, first:].sum(1).tolist()
        taken: set[int] = set()
        slots: list[list[int]] = []
        for row, start, count in zip(self._rows, starts, counts, strict=True):
            own = row.slots(start, start + count)
            slots.append([-1 if slot in taken else slot for slot in own])
            taken.update(own)
        return parts_of(self._rows, starts, slots, end - first, mask[:, first:], None)

    def _lengths(self, num_columns: int) -> list[int]:
        """Real tokens of each row among its first columns."""
        if self._mask is not None:
            lengths: list[int] = self._mask[:, :num_columns].sum(1).tolist()
            return lengths
        return [max(0, row.length - (self.num_columns - num_columns)) for row in self._rows]

    def _count(
        self, rows: Sequence[PagedSequence], num_new: int, mask: torch.Tensor | None
    ) -> tuple[list[int], list[int]]:
        """Of each row, how many of its tokens stay, and how many come."""
        if mask is None:
            return [row.length for row in rows], [num_new] * len(rows)
        shape = (len(rows), self.num_columns + num_new)
        if mask.shape != shape:
            rule = f"the cache's {self.num_columns} tokens and {num_new} new ones"
            raise InvalidRequest(
                f"attention_mask has shape {list(mask.shape)}, but must have {list(shape)}: {rule}",
                field="attention_mask",
            )
        counts: list[int] = mask[:, self.num_columns :].sum(1).tolist()
        kept: list[int] = mask[:, : self.num_columns].sum(1).tolist()
        old = mask[:, : self.num_columns]
        if not (torch.equal(old, self._mask) if self._mask is not None else bool(old.all())):
            for number, (row, length) in enumerate(zip(rows, kept, strict=True)):
                self._check_kept(number, row, length, old[number])
        return kept, counts

    def _check_kept(self, number: int, row: PagedSequence, length: int, now: torch.Tensor) -> None:
        """Raises InvalidRequest unless a row's tokens that are real now are the first of those that were."""
        was = torch.ones_like(now) if self._mask is None else self._mask[number]
        if not torch.equal(now, was & (was.cumsum(0) <= length)):
            rule = f"must have {row.length}, those that were real when they came, or the first of them"
            raise InvalidRequest(
                f"attention_mask[{number}] has {length} real tokens in the cache, but {rule}", field="attention_mask"
            )
        full, rest = divmod(length, self.pool.page_size)
        if rest and length < row.length and self.pool.references(row.pages[full]) > 1:
            rule = "must have all of them, because another row or a fork has the page of the last one too: crop first"
            raise InvalidRequest(
                f"attention_mask[{number}] has {length} of {row.length} real tokens in the cache, but {rule}",
                field="attention_mask",
            )

    def _forget(self, rows: Sequence[PagedSequence], kept: Sequence[int], mask: torch.Tensor | None) -> None:
        """Drops tokens that the mask hides from now on, at the end of their rows. For good: others take their slots."""
        if all(row.length == length for row, length in zip(rows, kept, strict=True)):
            return
        self.fails("forgetting masked tokens")
        for row, length in zip(rows, kept, strict=True):
            row.truncate(length)  # `_check_kept` has seen that nothing is copied
        self._mask = None if mask is None else mask[:, : self.num_columns]
        self.works()

    def _check_room(self, rows: Sequence[PagedSequence], kept: Sequence[int], counts: Sequence[int]) -> None:
        size = self.pool.page_size
        totals = [length + count for length, count in zip(kept, counts, strict=True)]
        needed = sum(max(0, -(-total // size) - len(row.pages)) for row, total in zip(rows, totals, strict=True))
        if needed > self.pool.num_free:
            raise Exhausted(
                f"max_tokens gives {self.pool.num_pages} pages of {size} tokens, {self.pool.num_free} of them free, "
                f"but must leave {needed} free for {len(rows)} rows of up to {max(totals)} tokens",
                field="max_tokens",
            )
