"""A step that is too large for one message or region, as several that mean the same.

Each part has a range of the step's tokens. A request that fits is never cut. One that is too long itself is cut between
two tokens of which the first needs nothing of the second: later parts read the earlier ones' K and V from their pages.
So the parts of a layer must be attended in order. With FP8 pages later parts see rounded K and V, as after any prefill
in chunks.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from attnd.errors import Exhausted, InvalidRequest, Unsupported
from attnd.protocol.integers import elements_of
from attnd.protocol.packing import ints
from attnd.protocol.step_metadata import StepMetadata
from attnd.protocol.steps.batch_lens import query_lens_of
from attnd.protocol.steps.page_tables import page_tables_array


class Most(NamedTuple):
    """What one step may have.

    Attributes:
        tokens: new tokens.
        reqs: requests.
        elements: of the page table, requests times pages.
    """

    tokens: int
    reqs: int
    elements: int


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a step.

    Attributes:
        rows: its tokens among those of the step.
        metadata: as a step of its own.
    """

    rows: slice
    metadata: StepMetadata


@dataclasses.dataclass
class _Request:
    """A request of a step, or `tokens` of one that is cut; fields as of `StepMetadata`."""

    number: int
    tokens: range
    context_len: int
    valid_len: int
    mask: str
    pages: list[int]
    prefix_len: int
    padded_prefix_len: int


def split(metadata: StepMetadata, most: Most, page_size: int) -> list[Part]:
    """The parts of a step, in the order in which they are to be attended; one if it need not be split.

    Raises:
        InvalidRequest: it stores a slot twice, or one that it reads as context; or a request that must be cut does not
            store its tokens where its page table has them.
        Unsupported: a request is too long, and no cut keeps its meaning.
        Exhausted: not even one token fits.
    """
    given = metadata.lens
    lens = query_lens_of(given)
    tables = [metadata.page_tables] if metadata.groups is None else [group.page_tables for group in metadata.groups]
    num_columns = max(page_tables_array(table, "page_tables").shape[-1] for table in tables if table is not None)
    if sum(lens) <= most.tokens and len(lens) <= most.reqs and len(lens) * num_columns <= most.elements:
        return [Part(slice(0, sum(lens)), metadata)]
    if most.tokens < 1:
        raise Exhausted(
            "a step has one token at least, but a message, or the plane's region, has no room for one token"
        )
    _check_can_split(metadata, most)
    contexts = elements_of(given.context_lens, "context_lens")
    of_lens = dataclasses.replace(metadata, query_lens=lens, context_lens=contexts, cu_seqlens_q=None, seq_lens=None)
    return _Splitting(of_lens, lens, most, page_size).parts()


def _check_can_split(metadata: StepMetadata, most: Most) -> None:
    given = {"store_first": metadata.store_first, "window": metadata.window != 0}
    given |= {field: getattr(metadata, field) is not None for field in ("attend_new", "first_position", "groups")}
    for field, is_given in given.items():
        if is_given:
            size = f"{most.tokens} tokens, {most.reqs} requests or {most.elements} elements of its page table"
            raise Unsupported(f"{field} is given, but must be absent in a step of more than {size}", field=field)


class _Splitting:
    """One step that is split."""

    def __init__(self, metadata: StepMetadata, lens: list[int], most: Most, page_size: int) -> None:
        self._metadata = metadata
        self._most = most
        self._page_size = page_size
        self._slots = None if metadata.slot_mapping is None else ints(metadata.slot_mapping, "slot_mapping")
        self._requests = self._read(lens)

    def parts(self) -> list[Part]:
        self._check_stores()
        most_reqs = max(1, min(self._most.reqs, self._most.elements // max(1, len(self._requests[0].pages))))
        taken: list[_Request] = []
        parts: list[Part] = []

        def room() -> int:
            return self._most.tokens - sum(len(each.tokens) for each in taken) if len(taken) < most_reqs else -1

        def end_part() -> None:
            if any(len(each.tokens) for each in taken):
                parts.append(self._part(taken))
            taken.clear()

        for request in self._requests:
            if len(request.tokens) > room():
                end_part()
            first = 0
            while len(request.tokens) - first > room():
                cut = self._last_cut(request, first)
                taken.append(self._piece(request, first, cut))
                end_part()
                first = cut
            taken.append(self._piece(request, first, len(request.tokens)))
        end_part()
        return parts

    def _read(self, lens: list[int]) -> list[_Request]:
        """The requests. Raises InvalidRequest for what has not one element for each."""
        metadata, count = self._metadata, len(lens)
        tables = page_tables_array(metadata.page_tables, "page_tables")
        columns = tables.shape[-1]
        pages = tables.data.cast("i").tolist() if tables.data.nbytes else []
        zeros = [0] * count
        valid = lens if metadata.valid_lens is None else ints(metadata.valid_lens, "valid_lens")
        prefix = zeros if metadata.prefix_lens is None else ints(metadata.prefix_lens, "prefix_lens")
        padded = zeros
        if metadata.padded_prefix_lens is not None:
            padded = ints(metadata.padded_prefix_lens, "padded_prefix_lens")
        masks = [metadata.mask] * count if isinstance(metadata.mask, str) else list(metadata.mask)
        contexts = ints(metadata.context_lens, "context_lens")
        given = {
            "context_lens": len(contexts),
            "valid_lens": len(valid),
            "prefix_lens": len(prefix),
            "padded_prefix_lens": len(padded),
            "mask": len(masks),
            "page_tables": tables.shape[0],
        }
        for field, number in given.items():
            if number != count:
                rule = f"must have {count}, one a request"
                raise InvalidRequest(f"{field} has {number} elements, but {rule}", field=field)
        if self._slots is not None and len(self._slots) != sum(lens):
            rule = f"must have {sum(lens)}, one a token"
            raise InvalidRequest(f"slot_mapping has {len(self._slots)} elements, but {rule}", field="slot_mapping")
        requests, start = [], 0
        for number, length in enumerate(lens):
            row = pages[number * columns : (number + 1) * columns]
            tokens = range(start, start + length)
            rest = contexts[number], valid[number], masks[number], row, prefix[number], padded[number]
            requests.append(_Request(number, tokens, *rest))
            start += length
        return requests

    def _check_stores(self) -> None:
        """What the server checks within a step holds between its parts too."""
        taken: dict[int, int] = {}
        for index, slot in enumerate(self._slots or ()):
            if slot >= 0 and taken.setdefault(slot, index) != index:
                rule = f"must differ from slot_mapping[{taken[slot]}]"
                raise InvalidRequest(f"slot_mapping[{index}] is {slot}, but {rule}", field="slot_mapping")
        if self._metadata.store_only or not taken:
            return
        size = self._page_size
        pages = {slot // size for slot in taken}
        for request in self._requests:
            hole = self._hole(request)
            for column in range(-(-request.context_len // size)):
                if column >= len(request.pages) or request.pages[column] not in pages:
                    continue
                for position in range(column * size, min((column + 1) * size, request.context_len)):
                    slot = request.pages[column] * size + position % size
                    if slot in taken and position not in hole:
                        reader = f"request {request.number} of the step"
                        rule = f"must not be a slot that {reader} reads"
                        raise InvalidRequest(f"slot_mapping[{taken[slot]}] is {slot}, but {rule}", field="slot_mapping")

    def _hole(self, request: _Request) -> range:
        """Cached positions that the request does not see."""
        if not self._metadata.mask_prefix_hole:
            return range(0)
        return range(request.prefix_len, min(request.padded_prefix_len, request.context_len))

    def _last_cut(self, request: _Request, first: int) -> int:
        """The last token before which a request may be cut for a part that begins with its token `first`."""
        metadata, context_len = self._metadata, request.context_len
        end = first + self._most.tokens
        cuts = [end]
        if not (metadata.cache_only or metadata.store_only) and request.mask != "causal":
            cuts = []
            if request.mask != "bidirectional" and metadata.block_size > 0:
                in_blocks = (context_len + end) // metadata.block_size * metadata.block_size - context_len
                cuts = [in_blocks]
            if request.mask == "prefix_full":
                bounds = [request.prefix_len - context_len, request.padded_prefix_len - context_len]
                cuts = [cut for cut in cuts if cut >= bounds[1]] + [bound for bound in bounds if bound <= end]
                if metadata.mask_prefix_hole and request.padded_prefix_len > context_len:
                    cuts = []  # one pair of numbers says both what is hidden and what is seen
        cut = max((cut for cut in cuts if cut > first), default=0)
        if not cut:
            raise Unsupported(
                f"request {request.number} has {len(request.tokens)} new tokens with mask {request.mask}, of which a "
                f"call can carry {self._most.tokens}, but no cut there keeps what they see; the server's "
                "--max-step-tokens, --max-message-bytes, --region-bytes and --cuda-region-bytes give more",
                field="query_lens",
            )
        self._check_in_place(request, cut)
        return cut

    def _check_in_place(self, request: _Request, cut: int) -> None:
        """That the tokens before a cut lie where those after it read them."""
        if self._metadata.cache_only or self._metadata.store_only:
            return
        size = self._page_size
        for token in range(min(cut, request.valid_len)):
            position = request.context_len + token
            page = request.pages[position // size] if position // size < len(request.pages) else -1
            slot = -1 if self._slots is None else self._slots[request.tokens[token]]
            if page < 0 or slot != page * size + position % size:
                raise InvalidRequest(
                    f"slot_mapping[{request.tokens[token]}] is {slot}, but must be the slot of position {position} in "
                    f"request {request.number}'s page table: a step of more than {self._most.tokens} tokens is split, "
                    "and later tokens read earlier ones from there",
                    field="slot_mapping",
                )

    def _piece(self, request: _Request, first: int, end: int) -> _Request:
        """A request's tokens `[first, end)`, as a request whose context has those before."""
        metadata, valid_len = self._metadata, request.valid_len
        piece = dataclasses.replace(
            request,
            tokens=request.tokens[first:end],
            valid_len=max(0, min(valid_len, end) - first),
        )
        if metadata.store_only:
            return piece
        hole = self._hole(request)
        if metadata.cache_only:
            # Positions count for windows and ALiBi. What stands at those of earlier parts is hidden.
            piece.context_len = request.context_len + first
            if first and hole and hole.stop < request.context_len:
                raise Unsupported(
                    f"request {request.number} must be cut, and its prefix hole [{hole.start}, {hole.stop}) ends "
                    "inside its context, but a cache-only request has one hole, which the cut needs",
                    field="prefix_lens",
                )
            start = hole.start if hole else request.context_len
            hole = range(start, piece.context_len) if first else hole
            missing = -(-piece.context_len // self._page_size) - len(request.pages)
            piece.pages = request.pages + [-1] * max(0, missing)
            piece.mask = "causal"  # new tokens are not seen
            piece.prefix_len, piece.padded_prefix_len = (hole.start, hole.stop) if hole else (0, 0)
            return piece
        piece.context_len += min(first, valid_len)
        if metadata.mask_prefix_hole and request.mask != "prefix_full":
            # Tokens of the parts before are cached now, and are not hidden.
            piece.prefix_len, piece.padded_prefix_len = (hole.start, hole.stop) if hole else (0, 0)
        return piece

    def _part(self, requests: list[_Request]) -> Part:
        metadata = self._metadata
        lens = [len(each.tokens) for each in requests]
        masks = [each.mask for each in requests]
        columns = max(len(each.pages) for each in requests)
        rows = slice(requests[0].tokens.start, requests[-1].tokens.stop)
        needs_prefix = metadata.mask_prefix_hole or metadata.cache_only or "prefix_full" in masks
        valid_lens = [each.valid_len for each in requests]
        return Part(
            rows,
            dataclasses.replace(
                metadata,
                query_lens=lens,
                context_lens=[each.context_len for each in requests],
                page_tables=[each.pages + [-1] * (columns - len(each.pages)) for each in requests],
                slot_mapping=None if self._slots is None else self._slots[rows],
                kind=metadata.kind if len(set(lens)) == 1 else "prefill",
                mask=masks[0] if len(set(masks)) == 1 else masks,
                valid_lens=None if valid_lens == lens else valid_lens,
                prefix_lens=[each.prefix_len for each in requests] if needs_prefix else None,
                padded_prefix_lens=[each.padded_prefix_len for each in requests] if needs_prefix else None,
                mask_prefix_hole=metadata.mask_prefix_hole or metadata.cache_only,
            ),
        )
