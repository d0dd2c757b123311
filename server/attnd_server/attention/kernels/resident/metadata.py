"""Takes, checks and accepts the metadata of a resident step, which a worker wrote into memory that it still maps.

The first kernel reads the worker's memory, once, by volatile loads, and copies what is in use to private memory. The
others look at the copy alone, so that whatever the worker writes meanwhile is of no use to it. What the worker says of
a request is its context, how many of its new tokens count, how many of the first ones are stored, and its pages: slots
follow from these. The rules are those of `service/validation`, for what is in use: lengths in range, page ids of this
cache, no slot stored twice, none that is read as context.

To see a slot that is given twice without an order between programs, each token writes its number into the tag of its
slot, the least wins, and a token whose slot has another's number is a duplicate. A tag carries the number of its check,
so that it means nothing afterwards and nobody clears it. Pages that are stored into carry it as well, and only context
in such pages is compared by slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from attnd.protocol.cuda.resident import LENS_ROWS, VERSION
from attnd_server.attention.kernels.decode_items import STEP_HEADER
from attnd_server.attention.kernels.items import PREFETCHED
from attnd_server.attention.kernels.launch_shapes import HOPPER_KEYS
from attnd_server.attention.kernels.resident.state import CAME, CHECK, IS_WRONG, NUM_REQS, NUM_WORDS, REFUSED, STEP
from attnd_server.attention.metadata import REQUEST_COLUMNS
from attnd_server.attention.resident import ResidentSizes
from attnd_server.device.kernels.launch import launch_kernel

# Bits of a token's number in a tag, and the greatest number of a check: a million of them a second for 69 years. A tag
# has what is left to it, so that later checks win; one more is that of no check, which slots begin with.
TOKEN_BITS = 22
MOST_CHECKS = (1 << 41) - 2

_VERSION = tl.constexpr(VERSION)
_TOKEN_BITS = tl.constexpr(TOKEN_BITS)
_MOST_CHECKS = tl.constexpr(MOST_CHECKS)
_LENS_ROWS = tl.constexpr(LENS_ROWS)
_HEADER = tl.constexpr(STEP_HEADER)
_NUM_COLUMNS = tl.constexpr(len(REQUEST_COLUMNS))
_CAME = tl.constexpr(CAME)
_CHECK = tl.constexpr(CHECK)
_IS_WRONG = tl.constexpr(IS_WRONG)
_REFUSED = tl.constexpr(REFUSED)
_STEP = tl.constexpr(STEP)
_NUM_REQS = tl.constexpr(NUM_REQS)
# None is compiled for: a class would wait for kernels of its own.
_NUMBERS = [
    "max_reqs", "max_pages", "query_len", "page_size", "num_pages", "max_context_len", "window", "block_size",
]  # fmt: skip
# Columns of a page table that a program looks at, and tokens that the last kernel takes at once.
_COLUMNS = tl.constexpr(128)
_TOKENS = tl.constexpr(1024)
# Keys past a context whose page ids kernels may look at.
_PAST = tl.constexpr(HOPPER_KEYS)
_PREFETCHED = tl.constexpr(PREFETCHED)


class Buffers(NamedTuple):
    """Private memory of a class.

    Attributes:
        state: int64 `[NUM_WORDS]`, see `state.py`.
        lens: int32 `[LENS_ROWS, max_reqs]`, the copy of the worker's.
        page_tables: int32, `[max_reqs, max_pages]` and what kernels look at past the last, likewise.
        step: int32, what `decode_items` takes.
        slots: int64 `[max_reqs * query_len]`, of each new token; -1 is not stored.
        tags: int64 `[num_slots]` of the cache.
        marks: int64 `[num_pages]`.
        written: uint8 `[num_pages]`, 1 once something was stored in a page.
    """

    state: torch.Tensor
    lens: torch.Tensor
    page_tables: torch.Tensor
    step: torch.Tensor
    slots: torch.Tensor
    tags: torch.Tensor
    marks: torch.Tensor
    written: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(each.nbytes for each in self)


def make_buffers(sizes: ResidentSizes, step: torch.Tensor, page_tables: torch.Tensor) -> Buffers:
    """Buffers before the first step, beside those of the plan, on its device."""
    device, num_slots = step.device, sizes.num_pages * sizes.page_size
    return Buffers(
        state=torch.zeros(NUM_WORDS, dtype=torch.int64, device=device),
        lens=torch.zeros(LENS_ROWS, sizes.max_reqs, dtype=torch.int32, device=device),
        page_tables=page_tables,
        step=step,
        slots=torch.full((sizes.max_reqs * sizes.query_len,), -1, dtype=torch.int64, device=device),
        tags=torch.full((num_slots,), (1 << 63) - 1, dtype=torch.int64, device=device),
        marks=torch.full((sizes.num_pages,), -1, dtype=torch.int64, device=device),
        written=torch.zeros(sizes.num_pages, dtype=torch.uint8, device=device),
    )


@triton.jit
def _is_to_be_checked(state):
    """Whether a step came. Not while a refusal stands: the host may be looking at the copy of that step."""
    return (tl.load(state + _CAME) != 0) & (tl.load(state + _REFUSED) == 0)


@triton.jit(do_not_specialize=_NUMBERS)
def _copy_kernel(lens, page_tables, state, from_lens, from_tables, max_reqs, max_pages, query_len, page_size):
    """Grid: (max_reqs, pieces of `_COLUMNS` columns)."""
    if _is_to_be_checked(state):
        request = tl.program_id(0)
        num_reqs = tl.load(from_lens, volatile=True)
        context_len = tl.load(from_lens + max_reqs + request, volatile=True).to(tl.int64)
        if tl.program_id(1) == 0:
            for row in tl.static_range(_LENS_ROWS):
                place = row * max_reqs + request
                tl.store(lens + place, tl.load(from_lens + place, volatile=True))
        columns = tl.program_id(1) * _COLUMNS + tl.arange(0, _COLUMNS)
        # Any number may stand there: it says how much is copied, and nothing else.
        num_used = tl.cdiv(tl.maximum(context_len, 0) + query_len, page_size)
        is_used = (request < num_reqs) & (columns < num_used) & (columns < max_pages)
        places = request.to(tl.int64) * max_pages + columns
        tl.store(page_tables + places, tl.load(from_tables + places, mask=is_used, volatile=True), mask=is_used)


@triton.jit
def _request(lens, request, max_reqs, max_pages, query_len, page_size, max_context_len):
    """A request's numbers, int64: whether it is there, whether they are wrong, context, valid and stored tokens.

    The numbers of a request that is not there, or is wrong, are 0.
    """
    num_reqs = tl.load(lens)
    is_right = (tl.load(lens + 1) == _VERSION) & (num_reqs >= 1) & (num_reqs <= max_reqs)
    context_len = tl.load(lens + max_reqs + request).to(tl.int64)
    num_valid = tl.load(lens + 2 * max_reqs + request).to(tl.int64)
    num_stored = tl.load(lens + 3 * max_reqs + request).to(tl.int64)
    # A row that only pads the batch: its context takes its tokens back.
    is_padded = context_len == -query_len
    covered = max_pages.to(tl.int64) * page_size
    is_wrong = (num_valid < 0) | (num_valid > query_len) | (num_stored < 0) | (num_stored > query_len)
    is_wrong |= is_padded & (num_stored != 0)
    is_wrong |= (~is_padded) & ((context_len < 0) | (context_len > max_context_len) | (context_len > covered))
    is_wrong |= (~is_padded) & (num_stored > 0) & (context_len + num_stored > covered)
    is_there = is_right & (request < num_reqs)
    is_wrong = (~is_right) | (is_there & is_wrong)
    counts = is_there & (~is_wrong)
    context_len = tl.where(counts & (~is_padded), context_len, 0)
    num_valid = tl.where(counts & (~is_padded), num_valid, 0)
    return counts, is_wrong, context_len, num_valid, tl.where(counts, num_stored, 0)


@triton.jit(do_not_specialize=_NUMBERS)
def _tag_kernel(
    slots, tags, marks, state, lens, page_tables,
    max_reqs, max_pages, query_len, page_size, num_pages, max_context_len, TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid: max_reqs. TOKENS: no fewer than query_len."""
    if _is_to_be_checked(state):
        request = tl.program_id(0)
        check = tl.load(state + _CHECK)
        _, is_wrong, context_len, _, num_stored = _request(
            lens, request, max_reqs, max_pages, query_len, page_size, max_context_len
        )
        tokens = tl.arange(0, TOKENS)
        is_stored = tokens < num_stored
        positions = context_len + tokens
        columns = positions // page_size
        row = page_tables + request.to(tl.int64) * max_pages
        pages = tl.load(row + columns, mask=is_stored, other=0).to(tl.int64)
        is_page = (pages >= 0) & (pages < num_pages)
        is_wrong |= tl.max((is_stored & (~is_page)).to(tl.int32), 0) != 0
        is_stored &= is_page
        places = request * query_len + tokens
        found = pages * page_size + (positions - columns * page_size)
        tl.atomic_min(tags + found, ((-check + _MOST_CHECKS) << _TOKEN_BITS) | places, mask=is_stored)
        tl.store(marks + pages, tl.zeros([TOKENS], tl.int64) + check, mask=is_stored)
        tl.store(slots + places, tl.where(is_stored, found, -1), mask=tokens < query_len)
        if is_wrong:
            tl.store(state + _IS_WRONG, 1)


@triton.jit(do_not_specialize=_NUMBERS)
def _check_kernel(
    page_tables, state, slots, tags, marks, lens,
    max_reqs, max_pages, query_len, page_size, num_pages, max_context_len, window, TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid: (max_reqs, pieces of `_COLUMNS` columns). Ids that nobody needs but kernels look at are 0 if wrong."""
    if _is_to_be_checked(state):
        request = tl.program_id(0)
        check = tl.load(state + _CHECK)
        counts, _, context_len, _, num_stored = _request(
            lens, request, max_reqs, max_pages, query_len, page_size, max_context_len
        )
        first_seen = tl.where(window > 0, tl.maximum(context_len - window + 1, 0), 0)
        columns = tl.program_id(1) * _COLUMNS + tl.arange(0, _COLUMNS)
        starts = columns.to(tl.int64) * page_size
        is_looked_at = counts & (columns < max_pages) & (starts < context_len + _PAST + _PREFETCHED * page_size)
        is_read = is_looked_at & (starts < context_len) & (starts + page_size > first_seen)
        places = request.to(tl.int64) * max_pages + columns
        pages = tl.load(page_tables + places, mask=is_looked_at, other=0).to(tl.int64)
        is_page = (pages >= 0) & (pages < num_pages)
        wrong = is_read & (~is_page)
        is_unused = is_looked_at & ((starts >= context_len + num_stored) | (starts + page_size <= first_seen))
        tl.store(page_tables + places, tl.zeros([_COLUMNS], tl.int32), mask=is_unused & (~is_page))
        is_hit = is_read & is_page
        is_hit &= tl.load(marks + pages, mask=is_hit, other=-1) == check
        if tl.max(is_hit.to(tl.int32), 0) != 0:
            for offset in tl.range(0, page_size):
                positions = starts + offset
                is_seen = is_hit & (positions >= first_seen) & (positions < context_len)
                tag = tl.load(tags + pages * page_size + offset, mask=is_seen, other=0)
                wrong |= is_seen & ((tag >> _TOKEN_BITS) == -check + _MOST_CHECKS)
        is_wrong = tl.max(wrong.to(tl.int32), 0) != 0
        if tl.program_id(1) == 0:
            tokens = tl.arange(0, TOKENS)
            numbers = request * query_len + tokens
            found = tl.load(slots + numbers, mask=counts & (tokens < query_len), other=-1)
            own = ((-check + _MOST_CHECKS) << _TOKEN_BITS) | numbers
            others = (found >= 0) & (tl.load(tags + found, mask=found >= 0, other=0) != own)
            is_wrong |= tl.max(others.to(tl.int32), 0) != 0
        if is_wrong:
            tl.store(state + _IS_WRONG, 1)


@triton.jit(do_not_specialize=_NUMBERS)
def _accept_kernel(
    step, slots, written, state, lens,
    max_reqs, max_pages, query_len, page_size, max_context_len, block_size, REQS: tl.constexpr,
):  # fmt: skip
    """Grid: 1. REQS: no fewer than max_reqs. A step without requests is what is launched for one that is refused."""
    came = tl.load(state + _CAME) != 0
    refused = tl.load(state + _REFUSED)
    is_wrong = tl.load(state + _IS_WRONG) != 0
    is_accepted = came & (refused == 0) & (~is_wrong)
    if came & (refused == 0) & is_wrong:
        tl.store(state + _REFUSED, tl.load(state + _STEP))
    num_reqs = tl.where(is_accepted, tl.load(lens), 0)
    requests = tl.arange(0, REQS)
    is_there = requests < num_reqs
    context_lens = tl.load(lens + max_reqs + requests, mask=is_there, other=0)
    num_valid = tl.load(lens + 2 * max_reqs + requests, mask=is_there, other=0)
    is_padded = context_lens == -query_len
    tl.store(step, num_reqs)
    tl.store(step + 1, max_pages)
    columns = step + _HEADER + requests
    tl.store(columns, tl.where(is_padded, 0, num_valid), mask=is_there)
    tl.store(columns + num_reqs, tl.where(is_padded, 0, context_lens), mask=is_there)
    tl.store(columns + 2 * num_reqs, tl.zeros([REQS], tl.int32) + block_size, mask=is_there)
    for column in tl.static_range(3, _NUM_COLUMNS):
        tl.store(columns + column * num_reqs, tl.zeros([REQS], tl.int32), mask=is_there)
    for first in tl.range(0, max_reqs * query_len, _TOKENS):
        tokens = first + tl.arange(0, _TOKENS)
        exists = tokens < max_reqs * query_len
        if is_accepted:
            found = tl.load(slots + tokens, mask=exists, other=-1)
            tl.store(written + found // page_size, tl.full([_TOKENS], 1, tl.uint8), mask=found >= 0)
        else:
            tl.store(slots + tokens, tl.full([_TOKENS], -1, tl.int64), mask=exists)
    tl.store(state + _NUM_REQS, num_reqs.to(tl.int64))
    tl.store(state + _IS_WRONG, 0)
    tl.store(state + _CHECK, tl.load(state + _CHECK) + 1)


def take_step(sizes: ResidentSizes, buffers: Buffers, from_lens: torch.Tensor, from_tables: torch.Tensor) -> None:
    """Takes, checks and accepts the step that came, or makes an empty one if none did or it is refused.

    Only launches, with the same arguments for every step: a CUDA graph can keep them.

    Args:
        sizes: of the class.
        buffers: written; of a step that is refused, `lens` and the pages in use stay for whoever asks why.
        from_lens: int32 `[LENS_ROWS, max_reqs]` of the worker's memory.
        from_tables: int32 `[max_reqs, max_pages]`, likewise.
    """
    max_reqs, max_pages, query_len, page_size, num_pages, max_context_len, window, block_size = sizes
    state, lens, page_tables, step, slots, tags, marks, written = buffers
    pieces = triton.cdiv(max_pages, _COLUMNS.value)
    tokens = triton.next_power_of_2(query_len)
    with torch.cuda.device_of(lens):
        launch_kernel(
            _copy_kernel, (max_reqs, pieces),
            lens, page_tables, state, from_lens, from_tables, max_reqs, max_pages, query_len, page_size,
        )  # fmt: skip
        launch_kernel(
            _tag_kernel, (max_reqs,),
            slots, tags, marks, state, lens, page_tables,
            max_reqs, max_pages, query_len, page_size, num_pages, max_context_len, TOKENS=tokens, num_warps=1,
        )  # fmt: skip
        launch_kernel(
            _check_kernel, (max_reqs, pieces),
            page_tables, state, slots, tags, marks, lens,
            max_reqs, max_pages, query_len, page_size, num_pages, max_context_len, window, TOKENS=tokens,
        )  # fmt: skip
        launch_kernel(
            _accept_kernel, (1,),
            step, slots, written, state, lens,
            max_reqs, max_pages, query_len, page_size, max_context_len, block_size,
            REQS=triton.next_power_of_2(max_reqs),
        )  # fmt: skip
