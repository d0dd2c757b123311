"""Slots and pages: which are written, and that nothing is written which the same step reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from attnd.v1 import cache_pb2, tensor_pb2
from attnd_server.attention.backends.window import first_visible_positions
from attnd_server.attention.config import AttentionConfig
from attnd_server.service.validation.arrays import (
    INT32,
    INT32_OR_INT64,
    Integers,
    check_range,
    refuse,
    refuse_first,
    required,
    view,
)

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

# Table entries looked at together: bounds the memory of a step whose every entry names a page that it stores into.
_CHUNK = 1 << 20


def slots(message: tensor_pb2.Tensor, config: AttentionConfig, field: str, *, unique: bool) -> torch.Tensor:
    """Slots to store into (`unique`: none twice) or to read.

    Args:
        message: int32 or int64 `[num_tokens]`.
        config: the cache.
        field: the name to use in errors.
        unique: refuse a slot that comes twice.

    Returns:
        int64 `[num_tokens]`, a copy; each `0 <= slot < config.num_slots`.

    Raises:
        InvalidRequest: the array is not of that type and shape, or a slot breaks the rules.
    """
    values = view(message, field, INT32_OR_INT64, ("num_tokens",))
    _check_count(len(values), config.num_slots, field, "slots")
    values = values.astype(np.int64)
    check_range(values, 0, config.num_slots - 1, field, f"the cache has slots 0..{config.num_slots - 1}")
    if unique:
        check_unique(values, np.sort(values), field)
    return torch.from_numpy(values)


def _check_count(count: int, most: int, field: str, things: str) -> None:
    """Refuses more than the cache has, before they are looked at: the work follows the cache, which is paid for."""
    if count > most:
        refuse(field, f"{field} has {count} elements, but must have at most {most}: the cache has {most} {things}")


def check_unique(values: Integers, ordered: Integers, field: str) -> None:
    """Refuses a value of `ordered`, the sorted values that count of `values`, that comes twice."""
    repeated = ordered[1:] == ordered[:-1]
    if repeated.any():
        first, second = np.flatnonzero(values == ordered[repeated.argmax()])[:2]
        refuse(field, f"{field}[{second}] is {values[second]}, but must differ from {field}[{first}]")


def copy_pages(message: cache_pb2.CopyPagesRequest, config: AttentionConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages to read and pages to write, int64 `[num_copies]` each, copies.

    Raises:
        InvalidRequest: an array is not int32 of one length, a page is not of the cache, or a target comes twice or is
            a source as well.
    """
    sources = view(required(message, "source_pages"), "source_pages", INT32, ("num_copies",))
    _check_count(len(sources), config.num_pages, "source_pages", "pages")
    targets = view(required(message, "target_pages"), "target_pages", INT32, sources.shape)
    for field, pages in (("source_pages", sources), ("target_pages", targets)):
        check_range(pages, 0, config.num_pages - 1, field, f"the cache has pages 0..{config.num_pages - 1}")
    check_unique(targets, np.sort(targets), "target_pages")
    read_too = np.isin(targets, sources)
    if read_too.any():
        refuse_first(read_too, targets, "target_pages", "must not be one of source_pages")
    return torch.from_numpy(sources.astype(np.int64)), torch.from_numpy(targets.astype(np.int64))


class Read(NamedTuple):
    """What a step reads as context.

    Position j of request r if `j < context_lens[r]`, its page id is not -1, it is not in
    `[hole_starts[r], hole_ends[r])`, and the window does not hide it.

    Attributes:
        page_tables: `[num_reqs, max_pages]`, -1 is no page; in range, and covers the context.
        context_lens: `[num_reqs]`, 0 of requests that have no new tokens: they read nothing.
        hole_starts: `[num_reqs]`.
        hole_ends: `[num_reqs]`, at least hole_starts.
        window: of all calls, in tokens; 0: nothing is hidden.
    """

    page_tables: Int32s
    context_lens: Int64s
    hole_starts: Int64s
    hole_ends: Int64s
    window: int


def check_stores(slot_mapping: Int64s, read: Read | None, config: AttentionConfig, *, may_read: bool) -> bool:
    """Refuses a step that stores one slot twice, or stores into a slot that it reads as context unless it may.

    The cost does not follow the context: pages that are stored into are marked, the table is looked up in the marks,
    and only entries that hit are compared with the stored slots.

    Args:
        slot_mapping: `[num_tokens]`, -1 is not stored; in range.
        read: what the step reads; None: nothing.
        config: the cache.
        may_read: whether the step may read what it stores.

    Returns:
        Whether it does.

    Raises:
        InvalidRequest: as said.
    """
    stored = np.sort(slot_mapping[slot_mapping >= 0])
    check_unique(slot_mapping, stored, "slot_mapping")
    if read is None or not stored.size:
        return False
    for requests, starts, ends in _read_intervals(stored // config.page_size, read, config):
        is_read = starts < ends  # few, unless the step is to be refused: the others are in a hole or past the context
        requests, starts, ends = requests[is_read], starts[is_read], ends[is_read]
        first = stored.searchsorted(starts)
        conflict = first < stored.searchsorted(ends)
        if conflict.any():
            if may_read:
                return True
            hit = conflict.argmax()
            slot = stored[first[hit]]
            index = np.flatnonzero(slot_mapping == slot)[0]
            reader = f"request {requests[hit]} of the step"
            refuse("slot_mapping", f"slot_mapping[{index}] is {slot}, but must not be a slot that {reader} reads")
    return False


def _read_intervals(
    stored_pages: Int64s, read: Read, config: AttentionConfig
) -> Iterator[tuple[Int64s, Int64s, Int64s]]:
    """The slots that are read in pages of `stored_pages`, as arrays of request, first slot and end.

    An interval that ends before it starts is empty.
    """
    page_size, page_tables = config.page_size, read.page_tables
    num_columns = -(-int(read.context_lens.max()) // page_size)
    marks = np.zeros(config.num_pages + 1, dtype=np.bool_)  # the last one is for page id -1 and stays false
    marks[stored_pages] = True
    hits = marks[page_tables[:, :num_columns]].ravel().nonzero()[0]
    visible = None
    if read.window:
        visible = first_visible_positions(torch.from_numpy(read.context_lens), read.window).numpy()
    for begin in range(0, len(hits), _CHUNK):
        requests, columns = np.divmod(hits[begin : begin + _CHUNK], num_columns)
        # Positions that are read: [starts, ends) without the hole. A page past its request's context, or before its
        # window, ends before it starts: empty.
        page_starts = columns * page_size
        ends = np.minimum(page_starts + page_size, read.context_lens[requests])
        starts = page_starts if visible is None else np.maximum(page_starts, visible[requests])
        slots_from_positions = page_tables[requests, columns].astype(np.int64) * page_size - page_starts
        before_hole = np.minimum(ends, read.hole_starts[requests])
        after_hole = np.maximum(starts, read.hole_ends[requests])
        yield requests, starts + slots_from_positions, before_hole + slots_from_positions
        yield requests, after_hole + slots_from_positions, ends + slots_from_positions
