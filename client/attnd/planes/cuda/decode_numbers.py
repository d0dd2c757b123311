"""Which steps may be resident ones, and what the server's GPU is told of them."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from attnd.protocol.integers import integers
from attnd.protocol.step_metadata import MASKS, StepMetadata
from attnd.protocol.steps.page_tables import page_tables_array
from attnd.protocol.tensors import DTYPE_NAMES, Array


class DecodeNumbers(NamedTuple):
    """A decode step as its metadata tells it, on the host.

    Attributes:
        query_len: new tokens of each request.
        context_lens: int64 `[num_reqs]`; minus `query_len` for a row that only pads the batch.
        valid_lens: int64 `[num_reqs]`, new tokens that count.
        stored_lens: int64 `[num_reqs]`, new tokens that are stored, the first so many.
        page_tables: int32 `[num_reqs, ...]`; the same object as in the step before if it is the same table.
        num_pages: columns of it that count.
    """

    query_len: int
    context_lens: Any
    valid_lens: Any
    stored_lens: Any
    page_tables: Any
    num_pages: int

    @property
    def num_reqs(self) -> int:
        """Requests of the step."""
        return int(self.context_lens.shape[0])

    @property
    def num_tokens(self) -> int:
        """New tokens of all requests."""
        return self.num_reqs * self.query_len


class _Tables(NamedTuple):
    """Page tables that were looked at.

    Attributes:
        shape: of them.
        data: their bytes.
        pages: int32 `[num_reqs, num_columns]`.
        num_there: int64 `[num_reqs]`, columns before the first page that is absent.
        is_whole: whether no page is.
    """

    shape: tuple[int, ...]
    data: bytes
    pages: Any
    num_there: Any
    is_whole: bool


# What a step must not say: fields that are None, and such that are 0 or False.
_ABSENT = ("groups", "prefix_lens", "padded_prefix_lens", "attend_new", "first_position")
_OFF = ("mask_prefix_hole", "cache_only", "store_only", "store_first", "window")
# Batch sizes whose lengths are kept.
_MAX_WHOLE = 64
_MASKS = tuple(mask for mask in MASKS if mask != "prefix_full")


class DecodeReader:
    """Reads the metadata of one cache's decode steps. Remembers what the next may have in common with the last."""

    def __init__(self, page_size: int, num_pages: int) -> None:
        """Of the cache."""
        self._page_size, self._num_pages = page_size, num_pages
        self._bounds: tuple[bytes, int] = (b"", 0)  # cu_seqlens_q, and the query length that it says
        self._tables: _Tables | None = None
        self._whole: dict[tuple[int, int], Any] = {}  # by requests and query length, so many query lengths

    def read(self, metadata: StepMetadata) -> DecodeNumbers | str:
        """What a step tells, or why it goes by message, for people.

        What breaks a rule that the GPU does not check is left to the server as well.

        Raises:
            InvalidRequest: a field holds what the wire cannot carry.
        """
        if metadata.kind != "decode":
            return f"kind is {metadata.kind!r}"
        if metadata.mask not in _MASKS:
            return f"mask is {metadata.mask!r}"
        said = [name for name in _ABSENT if getattr(metadata, name) is not None]
        said += [name for name in _OFF if getattr(metadata, name)]
        if said:
            return f"it says {said[0]}"
        torch, lens = sys.modules["torch"], metadata.lens
        query_len = self._query_len(torch, lens.cu_seqlens_q)
        if not query_len:
            return "requests differ in new tokens, or have none"
        contexts, num_reqs = _tensor(torch, lens.context_lens), lens.num_tokens // query_len
        whole = self._whole_lens(torch, num_reqs, query_len)
        valid = whole if metadata.valid_lens is None else _numbers(torch, metadata, "valid_lens")
        tables = self._tables_of(torch, page_tables_array(metadata.page_tables, "page_tables"))
        if isinstance(tables, str):
            return tables
        if not contexts.shape == valid.shape == (num_reqs,) == tables.shape[:1]:
            return "its fields are of different lengths"
        slots = None if metadata.slot_mapping is None else _numbers(torch, metadata, "slot_mapping")
        if slots is not None and query_len == 1 and (num_pages := self._if_plain(torch, contexts, slots, tables)):
            return DecodeNumbers(query_len, contexts, valid, whole, tables.pages, num_pages)
        stored = self._stored_lens(torch, slots, contexts, tables.pages, query_len)
        if isinstance(stored, str):
            return stored
        needed = (contexts.clamp(min=0) + (stored + (self._page_size - 1))) // self._page_size
        if bool((needed > tables.num_there).any()):
            is_short = bool((needed > tables.shape[1]).any())
            return "page_tables is too short" if is_short else "page_tables has absent pages within a context"
        return DecodeNumbers(query_len, contexts, valid, stored, tables.pages, int(needed.max()))

    def _whole_lens(self, torch: Any, num_reqs: int, query_len: int) -> Any:
        key = num_reqs, query_len
        if key not in self._whole:
            if len(self._whole) > _MAX_WHOLE:
                self._whole.clear()
            self._whole[key] = torch.full((num_reqs,), query_len)
        return self._whole[key]

    def _if_plain(self, torch: Any, contexts: Any, slots: Any, tables: _Tables) -> int:
        """Columns that a step needs which stores a new token of each request behind its context; 0: it is another.

        Most steps are such, and each operation here is time that both GPUs wait for.
        """
        least, most = (int(each) for each in torch.aminmax(contexts))
        num_pages = most // self._page_size + 1
        if least < 0 or num_pages > tables.shape[1] or slots.shape != contexts.shape:
            return 0
        columns = contexts // self._page_size
        pages = tables.pages.gather(1, columns[:, None])[:, 0]
        if not torch.equal(slots, torch.add(contexts, pages - columns, alpha=self._page_size)):
            return 0
        is_there = tables.is_whole or bool((columns < tables.num_there).all())
        return num_pages if is_there else 0

    def _query_len(self, torch: Any, bounds: Array) -> int:
        """New tokens of each request; 0: they differ."""
        if self._bounds[0] != bounds.data:
            starts = _tensor(torch, bounds)
            num_reqs = starts.shape[0] - 1
            query_len = int(starts[-1]) // num_reqs if num_reqs else 0
            is_so = query_len and torch.equal(starts, torch.arange(0, (num_reqs + 1) * query_len, query_len))
            self._bounds = bytes(bounds.data), query_len if is_so else 0
        return self._bounds[1]

    def _tables_of(self, torch: Any, array: Array) -> _Tables | str:
        known = self._tables
        if known is not None and known.shape == array.shape and known.data == array.data:
            return known
        if len(array.shape) != 2:
            return "page_tables is no matrix"
        pages = _tensor(torch, array).to(torch.int32)
        least, most = (int(each) for each in torch.aminmax(pages)) if pages.numel() else (0, 0)
        if not -1 <= least <= most < self._num_pages:
            return "page_tables has pages that the cache has not"
        num_there = torch.full(array.shape[:1], array.shape[1])
        if least < 0:
            num_there = (pages >= 0).to(torch.int64).cumprod(1).sum(1)
        self._tables = _Tables(array.shape, bytes(array.data), pages, num_there, is_whole=least >= 0)
        return self._tables

    def _stored_lens(self, torch: Any, slots: Any, contexts: Any, tables: Any, query_len: int) -> Any:
        """How many of each request's new tokens are stored, if those are the first, each at its own position."""
        num_reqs, num_tokens, page_size = contexts.shape[0], contexts.shape[0] * query_len, self._page_size
        if slots is None:
            return torch.zeros(num_reqs, dtype=torch.int64)
        if slots.shape[0] < num_tokens or (slots.shape[0] > num_tokens and bool((slots[num_tokens:] != -1).any())):
            return "slot_mapping is not of its tokens"
        if not tables.shape[1]:
            return "page_tables is too short"
        slots, positions = slots[:num_tokens].view(num_reqs, query_len), contexts[:, None]
        if query_len > 1:
            positions = positions + torch.arange(query_len)
        columns = positions // page_size
        pages = tables.gather(1, columns.clamp(0, tables.shape[1] - 1)).to(torch.int64)
        expected = pages * page_size + (positions - columns * page_size)
        is_right = (slots == expected) & (pages >= 0) & (columns >= 0) & (columns < tables.shape[1])
        is_stored = slots >= 0
        stored = is_stored.sum(1)
        if not torch.equal(is_stored, torch.arange(query_len) < stored[:, None]):
            return "slot_mapping stores others than the first new tokens of a request"
        if not bool((is_right | (slots == -1)).all()):
            return "slot_mapping is not where page_tables puts the tokens"
        return stored


def _numbers(torch: Any, metadata: StepMetadata, field: str) -> Any:
    return _tensor(torch, integers(getattr(metadata, field), field, is_wide=True))


def _tensor(torch: Any, array: Array) -> Any:
    """As int64, of the same shape."""
    data = bytearray(array.data) if array.data.readonly else array.data
    if not data:
        return torch.zeros(array.shape, dtype=torch.int64)
    return torch.frombuffer(data, dtype=getattr(torch, DTYPE_NAMES[array.dtype])).view(array.shape).to(torch.int64)
