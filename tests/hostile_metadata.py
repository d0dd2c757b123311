"""Metadata of resident steps as workers write it that mean no good: many blocks at once, from a generator of numbers.

A block is what lies in the region when a step is counted: lengths and page tables. Each begins as a right one, with
rubbish wherever nobody is to look, and most are then spoilt in one way or two. What is right must be accepted, and
that is all that is known here: whether what is spoilt is still right, the rules decide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from attnd.protocol.cuda.resident import CONTEXT_LENS, LENS_ROWS, NUM_REQS, STORED_LENS, VALID_LENS, VERSION
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.resident import ResidentSizes
from attnd_server.config import ServerConfig

Ints = npt.NDArray[Any]
Random = np.random.Generator

INT32_MIN, INT32_MAX = -(1 << 31), (1 << 31) - 1
EXTREMES = [INT32_MIN, INT32_MIN + 1, -(1 << 16), -2, -1, 0, 1, 1 << 16, 1 << 30, INT32_MAX - 1, INT32_MAX]

# Most requests, pages, new tokens, page size, pages of the cache, longest context, window, block size. Between them:
# contexts that the limit bounds and that the table does, tables that take several programs, requests and tokens that
# are no power of two, more new tokens than a page has or than the last kernel takes at once, windows, all masks.
CLASSES = (
    ResidentSizes(8, 8, 1, 4, 24, 64, 0, 1),
    ResidentSizes(4, 12, 3, 2, 40, 20, 0, 1),
    ResidentSizes(8, 8, 4, 4, 40, 27, 0, 4),
    ResidentSizes(4, 260, 2, 1, 96, 1000, 0, 1),
    ResidentSizes(8, 16, 5, 4, 64, 64, 6, 1),
    ResidentSizes(4, 136, 8, 2, 64, 272, 33, 0),
    ResidentSizes(36, 4, 32, 16, 120, 64, 0, 32),
    ResidentSizes(64, 8, 1, 16, 128, 100, 0, 1),
    ResidentSizes(12, 8, 2, 8, 40, 60, 5, 2),
)


def config_of(sizes: ResidentSizes) -> AttentionConfig:
    """A layer group that such steps may be of."""
    return AttentionConfig(
        num_layers=1,
        num_kv_heads=1,
        head_dim=16,
        page_size=sizes.page_size,
        num_pages=sizes.num_pages,
        window=sizes.window,
    )


def limits_of(sizes: ResidentSizes) -> ServerConfig:
    """Those of a server that gives the class its longest context."""
    return ServerConfig(max_context_len=sizes.max_context_len)


class Blocks(NamedTuple):
    """So many blocks.

    Attributes:
        lens: int32 `[num_blocks, LENS_ROWS, max_reqs]`.
        tables: int32 `[num_blocks, max_reqs, max_pages]`.
    """

    lens: Ints
    tables: Ints


def right_blocks(sizes: ResidentSizes, random: Random, count: int) -> Blocks:
    """Blocks that break no rule: contexts share pages, and what is stored has pages of its own."""
    max_reqs, max_pages, query_len, page_size, num_pages, max_context_len, window, _ = sizes
    shape = (count, max_reqs)
    lens = random.choice(EXTREMES, (count, LENS_ROWS, max_reqs)).astype(np.int32)
    num_reqs = random.choice([1, max_reqs, *random.integers(1, max_reqs + 1, 6)], count)
    lens[:, NUM_REQS, 0], lens[:, NUM_REQS, 1] = num_reqs, VERSION
    stored = np.where(random.random(shape) < 0.5, query_len, random.integers(0, query_len + 1, shape))
    # Short ones and long ones, up to the very last slot.
    share = random.random(shape) ** random.choice([0.1, 1, 4], (count, 1))
    context = (share * (min(max_context_len, max_pages * page_size) + 1)).astype(np.int64)
    context = np.minimum(context, max_pages * page_size - stored)
    is_padded = random.random(shape) < 0.1
    context[is_padded], stored[is_padded] = -query_len, 0
    # Some have right lengths behind the last request too, so that their number alone may be wrong.
    is_there = (np.arange(max_reqs) < num_reqs[:, None]) | (random.random((count, 1)) < 0.5)
    for row, values in (
        (CONTEXT_LENS, context),
        (VALID_LENS, random.integers(0, query_len + 1, shape)),
        (STORED_LENS, stored),
    ):
        lens[:, row] = np.where(is_there, values, lens[:, row])

    # The pages of a request that begins to store at its first page's last slot.
    num_own = (query_len + page_size - 2) // page_size + 1
    order = np.argsort(random.random((count, num_pages)), axis=1)
    own, shared = order[:, : max_reqs * num_own].reshape(*shape, num_own), order[:, max_reqs * num_own :]
    columns = np.arange(max_pages)
    context, stored = context[..., None], stored[..., None]
    first, end = np.maximum(context, 0) // page_size, -(-(context + stored) // page_size)
    tables = random.choice([*EXTREMES, num_pages, num_pages - 1], (*shape, max_pages))
    first_seen = np.maximum(context - window + 1, 0) if window else np.zeros_like(context)
    is_read = (columns * page_size < context) & ((columns + 1) * page_size > first_seen)
    picked = random.integers(0, shared.shape[1], tables.shape)
    # Some rows have pages behind their tokens too: a length that is wrong is then all that is wrong.
    is_full = random.random((*shape, 1)) < 0.5
    tables = np.where(is_read | is_full, shared[np.arange(count)[:, None, None], picked], tables)
    is_own = (stored > 0) & (columns >= first) & (columns < end)
    places = np.clip(columns - first, 0, num_own - 1)
    tables = np.where(is_own, np.take_along_axis(own, places, axis=2), tables)
    return Blocks(lens, tables.astype(np.int32))


class Spoilt(NamedTuple):
    """Blocks that are about to be spoilt, each at one of its requests.

    Attributes:
        sizes: of the class.
        random: a generator.
        lens: as of `Blocks`, a copy; written.
        tables: likewise.
        at: of each block its number here.
        request: of each block the request.
        other: another one, if it has one.
    """

    sizes: ResidentSizes
    random: Random
    lens: Ints
    tables: Ints
    at: Ints
    request: Ints
    other: Ints

    def any_of(self, choices: list[int]) -> Ints:
        """One for each block."""
        values: Ints = self.random.choice(choices, len(self.at))
        return values

    def set(self, row: int, values: Ints) -> None:
        """A length of the requests."""
        self.lens[self.at, row, self.request] = values

    def column(self, request: Ints) -> Ints:
        """One that holds a token of the request, as far as there is one."""
        context, stored = (self.lens[self.at, row, request].astype(np.int64) for row in (CONTEXT_LENS, STORED_LENS))
        used = np.clip(-(-(context + stored) // self.sizes.page_size), 1, self.sizes.max_pages)
        columns: Ints = self.random.integers(0, used)
        return columns

    def first_stored(self, request: Ints) -> Ints:
        """The column of the first token that is stored."""
        context: Ints = self.lens[self.at, CONTEXT_LENS, request].astype(np.int64)
        return (context // self.sizes.page_size).clip(0, self.sizes.max_pages - 1)


def _page_ids(to: Spoilt) -> None:
    num_pages = to.sizes.num_pages
    ids = [*EXTREMES, num_pages, num_pages + 1, num_pages * to.sizes.page_size]
    to.tables[to.at, to.request, to.column(to.request)] = to.any_of(ids)


def _context_lens(to: Spoilt) -> None:
    query_len, most = to.sizes.query_len, to.sizes.max_context_len
    covered = to.sizes.max_pages * to.sizes.page_size
    edges = [most - 1, most, most + 1, covered - query_len, covered - 1, covered, covered + 1]
    edges += [-query_len - 1, -query_len, 1 - query_len, INT32_MAX - query_len]
    to.set(CONTEXT_LENS, to.any_of([*edges, *edges, *EXTREMES]))


def _valid_lens(to: Spoilt) -> None:
    to.set(VALID_LENS, to.any_of([to.sizes.query_len, to.sizes.query_len + 1, *EXTREMES]))


def _stored_lens(to: Spoilt) -> None:
    to.set(STORED_LENS, to.any_of([to.sizes.query_len, to.sizes.query_len + 1, *EXTREMES]))


def _sums(to: Spoilt) -> None:
    """No sum of two fits 32 bits."""
    for row in (CONTEXT_LENS, VALID_LENS, STORED_LENS):
        to.set(row, to.any_of([INT32_MIN, INT32_MAX - to.sizes.query_len, INT32_MAX - 1, INT32_MAX, 1 << 30]))


def _pages_twice(to: Spoilt) -> None:
    """A request has a page twice: its slots come twice, or are its own context, if it stores there."""
    source = np.where(to.random.random(len(to.at)) < 0.5, to.first_stored(to.request), to.column(to.request))
    to.tables[to.at, to.request, to.column(to.request)] = to.tables[to.at, to.request, source]


def _twins(to: Spoilt) -> None:
    """A request has the pages of another, and stores where it does, or a few tokens beside."""
    sizes = to.sizes
    shift = to.random.integers(-sizes.page_size, sizes.page_size + 1, len(to.at))
    context = to.lens[to.at, CONTEXT_LENS, to.request].astype(np.int64) + shift
    stored = to.random.integers(0, sizes.query_len + 1, len(to.at))
    longest = np.minimum(sizes.max_pages * sizes.page_size - stored, sizes.max_context_len)
    to.lens[to.at, CONTEXT_LENS, to.other] = np.clip(context, 0, longest)
    to.lens[to.at, STORED_LENS, to.other] = stored
    to.tables[to.at, to.other] = to.tables[to.at, to.request]


def _read_by_another(to: Spoilt) -> None:
    """A request has in its table the page that another stores into."""
    page = to.tables[to.at, to.request, to.first_stored(to.request)]
    to.tables[to.at, to.other, to.column(to.other)] = page


def _padding(to: Spoilt) -> None:
    query_len = to.sizes.query_len
    to.set(CONTEXT_LENS, np.full(len(to.at), -query_len))
    to.set(VALID_LENS, to.any_of([-1, 0, query_len, query_len + 1]))
    to.set(STORED_LENS, to.any_of([0, 0, 0, 1, query_len]))


def _num_reqs(to: Spoilt) -> None:
    max_reqs = to.sizes.max_reqs
    to.lens[:, NUM_REQS, 0] = to.any_of([*EXTREMES, max_reqs - 1, max_reqs, *[max_reqs + 1] * 3])


def _versions(to: Spoilt) -> None:
    to.lens[:, NUM_REQS, 1] = to.any_of([VERSION - 1, VERSION + 1, VERSION << 16, *EXTREMES])


def _rubbish(to: Spoilt) -> None:
    to.lens[:] = to.random.choice([*EXTREMES, 2, 3], to.lens.shape)
    to.tables[:] = to.random.integers(INT32_MIN, INT32_MAX, to.tables.shape, endpoint=True)
    to.lens[:, NUM_REQS, 1] = VERSION
    to.lens[:, NUM_REQS, 0] = to.any_of([1, 2, to.sizes.max_reqs])


def _crowd(to: Spoilt) -> None:
    """Every entry is any page of the cache, or one of few."""
    most = to.any_of([2, to.sizes.num_pages // 2, to.sizes.num_pages])
    to.tables[:] = to.random.integers(0, most[:, None, None], to.tables.shape)


WAYS: dict[str, Callable[[Spoilt], None]] = {
    "right": lambda to: None,
    "page ids": _page_ids,
    "context lengths": _context_lens,
    "valid lengths": _valid_lens,
    "stored lengths": _stored_lens,
    "sums beyond 32 bits": _sums,
    "a page twice in a request": _pages_twice,
    "twins": _twins,
    "a stored page in another's context": _read_by_another,
    "padding": _padding,
    "numbers of requests": _num_reqs,
    "versions": _versions,
    "rubbish": _rubbish,
    "a crowd": _crowd,
}
NAMES = tuple(WAYS)
RIGHT = NAMES.index("right")
# Of all blocks that are left right, and of the others that are spoilt twice.
SHARE_RIGHT, SHARE_TWICE = 0.3, 0.15


def hostile_blocks(sizes: ResidentSizes, random: Random, count: int) -> tuple[Blocks, Blocks, Ints]:
    """Right blocks, the same ones spoilt, and in which way each is, a place in `NAMES`."""
    right = right_blocks(sizes, random, count)
    spoilt = Blocks(right.lens.copy(), right.tables.copy())
    ways = random.integers(1, len(NAMES), count)
    ways[random.random(count) < SHARE_RIGHT] = RIGHT
    again = np.where((ways != RIGHT) & (random.random(count) < SHARE_TWICE), random.integers(1, len(NAMES), count), 0)
    for chosen in (ways, again):
        for way, spoil in enumerate(WAYS.values()):
            if way != RIGHT and (of := np.flatnonzero(chosen == way)).size:
                _spoil(sizes, random, spoilt, of, spoil)
    return right, spoilt, ways


def _spoil(sizes: ResidentSizes, random: Random, blocks: Blocks, of: Ints, spoil: Callable[[Spoilt], None]) -> None:
    num_reqs = np.clip(blocks.lens[of, NUM_REQS, 0], 1, sizes.max_reqs)
    request = random.integers(0, num_reqs)
    other = (request + random.integers(1, np.maximum(num_reqs, 2))) % num_reqs
    to = Spoilt(sizes, random, blocks.lens[of], blocks.tables[of], np.arange(len(of)), request, other)
    spoil(to)
    blocks.lens[of], blocks.tables[of] = to.lens, to.tables
