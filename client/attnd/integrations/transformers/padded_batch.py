"""Which tokens of a padded batch are real, and the pages they lie in: the bookkeeping of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from attnd.errors import Exhausted, InvalidRequest
from attnd.pages import PagedSequence, PagePool, page_tables
from attnd.protocol.step_metadata import StepMetadata

# A step with at most so many new tokens in each row is a decode step: servers may prepare these, one per length.
MAX_DECODE_TOKENS = 32


class NewTokens(NamedTuple):
    """What one forward pass adds.

    Attributes:
        metadata: the step of its real tokens; None if there are none.
        positions: int64 `[num_tokens]`, where the real tokens lie among the `batch_size * num_new` of the pass; None if
            all are real.
    """

    metadata: StepMetadata | None
    positions: torch.Tensor | None


class PaddedBatch:
    """Rows of one length, padding included, whose real tokens lie in pages. Padding has no page.

    Attributes:
        num_columns: tokens of each row so far, padding included.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        """No rows yet: the first `extend` says how many there are."""
        self.pool = PagePool(num_pages, page_size)
        self.clear()

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return len(self._rows)

    def clear(self) -> None:
        """Forgets all rows; every page is free, whatever happened before."""
        self.pool = PagePool(self.pool.num_pages, self.pool.page_size)
        self.num_columns = 0
        self._rows: list[PagedSequence] = []
        self._mask: torch.Tensor | None = None

    def extend(self, batch_size: int, num_new: int, mask: torch.Tensor | None) -> NewTokens:
        """Adds `num_new` columns.

        Args:
            batch_size: rows of the pass; the same until `select` or `clear`.
            num_new: tokens of each row, padding included.
            mask: bool `[batch_size, num_columns + num_new]`, true for real tokens; None: all new ones are real.

        Raises:
            InvalidRequest: rows or mask do not go with what is there. Nothing was changed.
            Exhausted: the pages do not suffice. Nothing was changed.
        """
        if self._rows and len(self._rows) != batch_size:
            rule = "reset it, or select rows, before another batch"
            raise InvalidRequest(f"batch size is {batch_size}, but the cache holds {len(self._rows)} rows: {rule}")
        rows = self._rows or [PagedSequence(self.pool) for _ in range(batch_size)]
        counts, positions = self._count(rows, num_new, mask)
        self._check_room(rows, counts)
        context_lens = [row.length for row, count in zip(rows, counts, strict=True) if count]
        slots: list[int] = []
        for row, count in zip(rows, counts, strict=True):
            slots += row.extend(count)
        self._rows, self._mask = rows, mask
        self.num_columns += num_new
        if not slots:
            return NewTokens(None, positions)
        return NewTokens(_step(rows, counts, context_lens, slots), positions)

    def select(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """Makes row `indices[i]` row i; a row may come several times, or not at all.

        Returns:
            `(source, target)` of the pages to copy. All copies can be made at once.

        Raises:
            InvalidRequest: there is no such row.
            Exhausted: the pages do not suffice. The rows are lost then: `clear`.
        """
        if list(indices) == list(range(len(self._rows))):
            return []
        if wrong := [index for index in indices if not 0 <= index < len(self._rows)]:
            raise InvalidRequest(f"row is {wrong[0]}, but the cache holds rows 0..{len(self._rows) - 1}")
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
        """Keeps the first `num_columns` tokens of each row, padding included.

        Returns:
            `(source, target)` of the pages to copy, usually none.

        Raises:
            InvalidRequest: there are not so many.
        """
        if not 0 <= num_columns <= self.num_columns:
            raise InvalidRequest(f"length is {num_columns}, but must be 0..{self.num_columns}, what the cache holds")
        if self._mask is not None:
            self._mask = self._mask[:, :num_columns]
            lengths = self._mask.sum(1).tolist()
        else:
            lengths = [max(0, row.length - (self.num_columns - num_columns)) for row in self._rows]
        self.num_columns = num_columns
        return [copy for row, length in zip(self._rows, lengths, strict=True) for copy in row.truncate(length)]

    def mask(self, num_columns: int) -> torch.Tensor:
        """Bool `[num_rows, num_columns]` of the first columns: which tokens are real."""
        if self._mask is None:
            return torch.ones((self.num_rows, num_columns), dtype=torch.bool)
        return self._mask[:, :num_columns]

    def again(self, first: int, end: int) -> NewTokens:
        """The columns `[first, end)` as if they were new, to be stored where they lie. Changes nothing.

        Of a page that several rows share one of them stores.
        """
        mask = self.mask(end)
        context_lens: list[int] = mask[:, :first].sum(1).tolist()
        counts: list[int] = mask[:, first:].sum(1).tolist()
        taken: set[int] = set()
        slots: list[int] = []
        for row, context_len, count in zip(self._rows, context_lens, counts, strict=True):
            own = row.slots(context_len, context_len + count)
            slots += [-1 if slot in taken else slot for slot in own]
            taken.update(own)
        positions = None if sum(counts) == mask[:, first:].numel() else mask[:, first:].flatten().nonzero().squeeze(1)
        if not slots:
            return NewTokens(None, positions)
        context_lens = [length for length, count in zip(context_lens, counts, strict=True) if count]
        return NewTokens(_step(self._rows, counts, context_lens, slots), positions)

    def _count(
        self, rows: Sequence[PagedSequence], num_new: int, mask: torch.Tensor | None
    ) -> tuple[list[int], torch.Tensor | None]:
        """Real new tokens of each row, and where these lie among all new tokens."""
        if mask is None:
            return [num_new] * len(rows), None
        shape = (len(rows), self.num_columns + num_new)
        if mask.shape != shape:
            rule = f"the cache's {self.num_columns} tokens and {num_new} new ones"
            raise InvalidRequest(
                f"attention_mask has shape {list(mask.shape)}, but must have {list(shape)}: {rule}",
                field="attention_mask",
            )
        new = mask[:, self.num_columns :]
        counts: list[int] = new.sum(1).tolist()
        for number, (row, count, total) in enumerate(zip(rows, counts, mask.sum(1).tolist(), strict=True)):
            if row.length + count != total:
                rule = f"must have {row.length}, those that were real when they came"
                raise InvalidRequest(
                    f"attention_mask[{number}] has {total - count} real tokens in the cache, but {rule}",
                    field="attention_mask",
                )
        if all(count == num_new for count in counts):
            return counts, None
        return counts, new.flatten().nonzero().squeeze(1)

    def _check_room(self, rows: Sequence[PagedSequence], counts: Sequence[int]) -> None:
        size = self.pool.page_size
        needed = sum(-(-(row.length + count) // size) - len(row.pages) for row, count in zip(rows, counts, strict=True))
        if needed > self.pool.num_free:
            longest = max(row.length + count for row, count in zip(rows, counts, strict=True))
            raise Exhausted(
                f"max_tokens gives {self.pool.num_pages} pages of {size} tokens, {self.pool.num_free} of them free, "
                f"but must leave {needed} free for {len(rows)} rows of up to {longest} tokens",
                field="max_tokens",
            )


def _step(
    rows: Sequence[PagedSequence], counts: Sequence[int], context_lens: list[int], slots: list[int]
) -> StepMetadata:
    """The step of the rows that have new tokens."""
    query_lens = [count for count in counts if count]
    is_decode = query_lens[0] <= MAX_DECODE_TOKENS and query_lens.count(query_lens[0]) == len(query_lens)
    return StepMetadata(
        query_lens=query_lens,
        context_lens=context_lens,
        page_tables=page_tables([row for row, count in zip(rows, counts, strict=True) if count]),
        slot_mapping=slots,
        kind="decode" if is_decode else "prefill",
    )
