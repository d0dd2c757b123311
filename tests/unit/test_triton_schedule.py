"""The work lists of the Triton kernels, by brute force: every row meets every key that it may see, once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")  # the columns of an item are its constants

from attnd_server.attention.backends.triton.hopper_schedule import _to_and_fro, hopper_schedule
from attnd_server.attention.backends.triton.split_schedule import split_schedule
from attnd_server.attention.backends.triton.work import Rows, Work, request_table
from attnd_server.attention.kernels import items as columns
from attnd_server.attention.kernels.cuts import EVERYTHING
from attnd_server.attention.kernels.items import ITEM_FIELDS
from attnd_server.attention.kv_split import KVSplitConfig
from attnd_server.attention.metadata import AttentionMetadata

PAGE_SIZE = 16
# Pages of each request in the page tables.
NUM_COLUMNS = 3
# Hopper's kernels count keys in tiles of 128, cached ones rounded up to pieces of one of these.
TILE, PIECES = 128, (16, 32)


@dataclass(frozen=True)
class Request:
    """What a schedule must know of a request."""

    context_len: int
    num_new: int = 1
    num_valid: int = 1


@dataclass(frozen=True)
class Step:
    """Requests of one launch, and how they are scheduled."""

    requests: tuple[Request, ...]
    kv_split: KVSplitConfig = field(default_factory=KVSplitConfig)
    window: int = 0
    group: int = 4
    num_groups: int = 2
    rows: int = 16
    keys: int = 64
    num_multiprocessors: int = 4

    def table(self) -> Any:
        return request_table(
            metadata_of(self.requests), np.zeros((len(self.requests), NUM_COLUMNS), np.int64), PAGE_SIZE
        )

    def scheduled(self, schedule: Any) -> Work:
        rows = Rows(self.group, self.num_groups, self.rows, self.keys, self.num_multiprocessors)
        return schedule(self.table(), self.kv_split, self.window, rows)


def metadata_of(requests: tuple[Request, ...], **fields: Any) -> AttentionMetadata:
    num_new = [request.num_new for request in requests]
    zeros = torch.zeros(len(requests), dtype=torch.int64)
    given = dict.fromkeys(("prefix_lens", "padded_prefix_lens", "hole_starts", "hole_ends"), zeros) | fields
    return AttentionMetadata(
        is_decode=False,
        num_tokens=sum(num_new),
        cu_seqlens_q=torch.tensor([0, *np.cumsum(num_new).tolist()]),
        context_lens=torch.tensor([request.context_len for request in requests]),
        page_tables=zeros[:, None],
        slot_mapping=None,
        valid_lens=torch.tensor([request.num_valid for request in requests]),
        **{"block_sizes": zeros + 1, **given},
    )


def value(item: Any, column: Any) -> int:
    return int(item[column.value])


def items_of(work: Work, request: int) -> dict[int, list[Any]]:
    """Items of a request by their first row, in order of their keys."""
    tiles: dict[int, list[Any]] = {}
    for item in work.items:
        if value(item, columns.TABLE) == request * NUM_COLUMNS:
            tiles.setdefault(value(item, columns.FIRST_ROW), []).append(item)
    return {first: sorted(items, key=lambda item: value(item, columns.FIRST_CHUNK)) for first, items in tiles.items()}


def rows_of(step: Step, request: Request, first_row: int) -> range:
    """Rows of a tile that are of the request's tokens."""
    return range(first_row, min(first_row + step.rows, request.num_new * step.group))


def seen_keys(step: Step, request: Request, first_row: int) -> set[int]:
    """Cached keys that some row of a tile sees: by the definition of a window, key by key."""
    tokens = {row // step.group for row in rows_of(step, request, first_row) if row // step.group < request.num_valid}
    return {
        key
        for key in range(request.context_len)
        if tokens and (not step.window or request.context_len + min(tokens) - key < step.window)
    }


def check_requests(step: Step, work: Work) -> None:
    """Every item carries its request's columns, and the tiles of rows cover the request's rows once."""
    table = step.table()
    shared = columns.HAS_ABSENT_PAGES.value + 1
    for item in work.items:
        assert item[:shared].tolist() == table[value(item, columns.TABLE) // NUM_COLUMNS, :shared].tolist()
        assert value(item, columns.NUM_ITEMS) == len(work.items)
    for index, request in enumerate(step.requests):
        rows = [row for first_row in items_of(work, index) for row in rows_of(step, request, first_row)]
        assert sorted(rows) == list(range(request.num_new * step.group))
        assert all(first_row % step.rows == 0 for first_row in items_of(work, index))


def check_partial_rows(work: Work, places: Counter[int]) -> None:
    """Rows of partial results are written by one chunk of one request each, and there is room for them."""
    assert all(0 <= place < work.num_partial_rows for place in places)
    assert set(places.values()) <= {1}
    assert len(places) == work.num_partial_rows


def check_split(step: Step) -> None:
    work = step.scheduled(split_schedule)
    check_requests(step, work)
    places: Counter[int] = Counter()
    counters: Counter[int] = Counter()
    for index, request in enumerate(step.requests):
        written = set()
        for first_row, items in items_of(work, index).items():
            keys, chunks, ends = [], [], []
            for item in items:
                first, end = value(item, columns.FIRST_KEY), value(item, columns.END_KEY)
                chunk, chunk_keys = value(item, columns.FIRST_CHUNK), value(item, columns.CHUNK_KEYS)
                assert 0 <= first <= end <= request.context_len
                mine = range(chunk, chunk + max(1, -(-(end - first) // chunk_keys)))
                keys += range(first, end)
                chunks += mine
                ends.append(mine.stop)
                # Where a chunk begins is a matter of its number.
                assert first == value(items[0], columns.FIRST_KEY) + chunk * chunk_keys
                assert value(item, columns.PARTIAL_ROW) == value(items[0], columns.PARTIAL_ROW)
            num_chunks = {value(item, columns.NUM_CHUNKS) for item in items}
            # A chunk is some whole tiles: its end is looked for after each.
            assert all(value(item, columns.CHUNK_KEYS) % step.keys == 0 for item in items)
            assert len(keys) == len(set(keys))
            assert seen_keys(step, request, first_row) <= set(keys)
            assert chunks == list(range(*num_chunks))
            # New tokens are seen with the last chunk.
            assert ends.count(len(chunks)) == 1
            (counter,) = {value(item, columns.COUNTER) for item in items}
            counters[counter] += 1
            if len(chunks) > 1:
                tokens = {row // step.group for row in rows_of(step, request, first_row)}
                partial_row = value(items[0], columns.PARTIAL_ROW)
                written |= {partial_row + chunk * request.num_new + token for chunk in chunks for token in tokens}
        places.update(written)
    check_partial_rows(work, places)
    assert set(counters.values()) <= {1}
    if work.num_partial_rows:
        assert set(counters) == set(range(work.num_counters))
    assert not len(work.merges)


def check_hopper(step: Step) -> None:
    work = step.scheduled(hopper_schedule)
    check_requests(step, work)
    places: Counter[int] = Counter()
    merges = {tuple(merge) for merge in work.merges.tolist()}
    assert len(merges) == len(work.merges)
    for index, request in enumerate(step.requests):
        written, wanted = set(), set()
        for first_row, items in items_of(work, index).items():
            tiles = [(value(item, columns.FIRST_KEY), value(item, columns.END_KEY)) for item in items]
            assert all(first % TILE == end % TILE == 0 and first < end for first, end in tiles)
            for piece in PIECES:
                first_new = -(-request.context_len // piece) * piece
                keys = seen_keys(step, request, first_row) | set(range(first_new, first_new + request.num_valid))
                for key in keys:
                    assert sum(first <= key < end for first, end in tiles) == 1
            num_parts = len(items)
            assert [value(item, columns.FIRST_CHUNK) for item in items] == list(range(num_parts))
            assert {value(item, columns.NUM_CHUNKS) for item in items} == {num_parts}
            # The last has the new tokens alone: those before it end within the context.
            assert all(end <= request.context_len for _, end in tiles[:-1])
            tokens = {row // step.group for row in rows_of(step, request, first_row)}
            if num_parts > 1:
                first_partial_row = value(items[0], columns.PARTIAL_ROW)
                q_row = value(items[0], columns.Q_ROW)
                wanted.add((q_row, request.num_new, first_partial_row, num_parts, request.num_valid))
                for part, item in enumerate(items):
                    assert value(item, columns.PARTIAL_ROW) == first_partial_row + part * request.num_new
                    written |= {value(item, columns.PARTIAL_ROW) + token for token in tokens}
        assert len(wanted) <= 1
        assert wanted <= merges
        merges -= wanted
        places.update(written)
    assert not merges
    check_partial_rows(work, places)
    assert work.num_counters == 0


def cuts(work: Work, request: int, is_hopper: bool) -> dict[int, list[tuple[int, ...]]]:
    """What each part of a request is, whoever computes it: its keys and number, by tile of rows."""
    found: dict[int, list[tuple[int, ...]]] = {}
    for first_row, items in items_of(work, request).items():
        chunks = found.setdefault(first_row, [])
        for item in items:
            first, end = value(item, columns.FIRST_KEY), value(item, columns.END_KEY)
            # Hopper's items have a token in that column, and one part each.
            chunk_keys = EVERYTHING if is_hopper else value(item, columns.CHUNK_KEYS) or EVERYTHING
            chunk, num_chunks = value(item, columns.FIRST_CHUNK), value(item, columns.NUM_CHUNKS)
            for order, start in enumerate(range(first, max(end, first + 1), chunk_keys)):
                chunks.append((chunk + order, num_chunks, start, min(start + chunk_keys, end)))
    return found


def check_alone(step: Step, schedule: Any, requests: list[int]) -> None:
    """Requests are cut as if they were alone on a GPU of another size."""
    work, is_hopper = step.scheduled(schedule), schedule is hopper_schedule
    for index in requests:
        alone = replace(step, requests=(step.requests[index],), num_multiprocessors=step.num_multiprocessors % 7 + 1)
        assert cuts(work, index, is_hopper) == cuts(alone.scheduled(schedule), 0, is_hopper)


LENGTHS = st.one_of(
    st.sampled_from([0, 1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 127, 128, 129, 2048, 2049, 4096]),
    st.integers(0, 600),
    st.integers(0, 5000),
)
KV_SPLITS = st.builds(
    KVSplitConfig,
    chunk_size=st.sampled_from([0, 0, 16, 64, 128, 1024]),
    max_splits=st.sampled_from([1, 2, 3, 5, 128]),
    batch_invariant=st.sampled_from([None, False, True]),
)


@st.composite
def requests(draw: Any, max_new: int = 40) -> Request:
    num_new = draw(st.one_of(st.just(1), st.integers(1, max_new)))
    return Request(draw(LENGTHS), num_new, draw(st.one_of(st.just(num_new), st.integers(0, num_new))))


@st.composite
def steps(draw: Any) -> Step:
    return Step(
        requests=tuple(draw(st.lists(requests(), min_size=1, max_size=4))),
        kv_split=draw(KV_SPLITS),
        window=draw(st.one_of(st.just(0), st.sampled_from([1, 2, 16, 100, 128, 1000]))),
        group=draw(st.sampled_from([1, 3, 4, 8])),
        num_groups=draw(st.sampled_from([1, 2, 8])),
        rows=draw(st.sampled_from([16, 64, 128])),
        num_multiprocessors=draw(st.integers(1, 132)),
    )


ANY_STEP = given(step=steps())
FEW_EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
# More new tokens than a chip needs to be full, beside fewer; a batch long enough for programs of several chunks.
PREFILL = Step((Request(300, 300, 280), Request(1000, 2, 2), Request(0, 257, 257)), rows=128, num_multiprocessors=132)
LONG_BATCH = Step(tuple(Request(length) for length in (3000, 2048, 0, 4096, 9000)), num_multiprocessors=1)
NOBODY_SEES = Step((Request(2500, 3, 0), Request(2500, 3, 1)))


@FEW_EXAMPLES
@ANY_STEP
@example(step=PREFILL)
@example(step=LONG_BATCH)
@example(step=NOBODY_SEES)
def test_split_items_cover_every_visible_key_once(step: Step) -> None:
    check_split(step)


@FEW_EXAMPLES
@ANY_STEP
@example(step=PREFILL)
@example(step=LONG_BATCH)
@example(step=NOBODY_SEES)
def test_hopper_items_cover_every_visible_key_once(step: Step) -> None:
    check_hopper(step)


@FEW_EXAMPLES
@ANY_STEP
@example(step=LONG_BATCH)
def test_split_chunks_depend_on_the_request_alone(step: Step) -> None:
    check_alone(step, split_schedule, list(range(len(step.requests))))


@FEW_EXAMPLES
@ANY_STEP
@example(step=PREFILL)
def test_batch_invariant_hopper_parts_depend_on_the_request_alone(step: Step) -> None:
    step = replace(step, kv_split=replace(step.kv_split, batch_invariant=True))
    check_alone(step, hopper_schedule, list(range(len(step.requests))))


@FEW_EXAMPLES
@ANY_STEP
@example(step=LONG_BATCH)
def test_hopper_parts_of_one_token_depend_on_the_request_alone_by_default(step: Step) -> None:
    step = replace(step, kv_split=replace(step.kv_split, batch_invariant=None))
    check_alone(step, hopper_schedule, [i for i, request in enumerate(step.requests) if request.num_new == 1])


@FEW_EXAMPLES
@ANY_STEP
@example(step=replace(NOBODY_SEES, kv_split=KVSplitConfig(max_splits=2), window=200))
@example(step=replace(PREFILL, kv_split=KVSplitConfig(max_splits=3, batch_invariant=True)))
def test_no_request_has_more_parts_than_allowed(step: Step) -> None:
    for schedule in (split_schedule, hopper_schedule):
        num_parts = step.scheduled(schedule).items[:, columns.NUM_CHUNKS.value]
        assert num_parts.max() <= step.kv_split.max_splits


@pytest.mark.parametrize("num_new", [1, 5, 32, 200])
@pytest.mark.parametrize(("chunk_size", "keys_per_token"), [(0, 64), (16, 1)])
def test_partial_results_stay_few(num_new: int, chunk_size: int, keys_per_token: int) -> None:
    step = Step((Request(30_000, num_new, num_new),), KVSplitConfig(chunk_size, max_splits=1024))
    items = step.scheduled(split_schedule).items
    assert all(value(item, columns.CHUNK_KEYS) >= keys_per_token * num_new for item in items)
    assert value(items[0], columns.NUM_CHUNKS) > 1


def test_programs_of_a_full_chip_take_several_chunks() -> None:
    items = LONG_BATCH.scheduled(split_schedule).items
    length = items[:, columns.END_KEY.value] - items[:, columns.FIRST_KEY.value]
    assert (length > items[:, columns.CHUNK_KEYS.value]).any()
    assert sorted(length, reverse=True) == length.tolist()


def test_hopper_cuts_blocks_for_the_chip_unless_told_not_to() -> None:
    blocks = Step((Request(8192, 32, 32),) * 2, rows=128, num_multiprocessors=132)
    few_programs = replace(blocks, num_multiprocessors=2)
    cut, few = (cuts(each.scheduled(hopper_schedule), 0, True) for each in (blocks, few_programs))
    assert cut != few


def test_each_request_of_a_table_keeps_its_columns() -> None:
    context_lens, num_new, num_valid = (40, 0, 33), (3, 5, 1), (2, 5, 0)
    requests = tuple(map(Request, context_lens, num_new, num_valid))
    fields = {
        "block_sizes": [1, 0, 4], "prefix_lens": [0, 2, 0], "padded_prefix_lens": [0, 4, 0], "hole_starts": [5, 0, 0],
        "hole_ends": [9, 0, 0],
    }  # fmt: skip
    metadata = metadata_of(requests, **{name: torch.tensor(values) for name, values in fields.items()})
    # Pages past a context may be absent: the second request's are, and the third's last.
    pages = np.array([[4, -1, 6], [-1, -1, -1], [1, 2, 3]])
    table = request_table(metadata, pages, PAGE_SIZE)
    assert table.shape == (3, ITEM_FIELDS)
    assert table.dtype == np.int32
    expected = {
        columns.TABLE: [0, 3, 6], columns.Q_ROW: [0, 3, 8], columns.NUM_NEW: num_new, columns.NUM_VALID: num_valid,
        columns.CONTEXT_LEN: context_lens, columns.BLOCK_SIZE: [1, EVERYTHING, 4], columns.PREFIX_LEN: [0, 2, 0],
        columns.PADDED_PREFIX_LEN: [0, 4, 0], columns.HOLE_START: [5, 0, 0], columns.HOLE_END: [9, 0, 0],
        columns.HAS_ABSENT_PAGES: [1, 0, 0],
    }  # fmt: skip
    for column, values in expected.items():
        assert table[:, column.value].tolist() == list(values)


@pytest.mark.parametrize("context_len", [0, 1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 3 * PAGE_SIZE])
def test_pages_count_as_absent_within_the_context_only(context_len: int) -> None:
    for absent in range(4):
        pages = np.array([[-1 if page == absent else page for page in range(4)]])
        table = request_table(metadata_of((Request(context_len),)), pages, PAGE_SIZE)
        assert value(table[0], columns.HAS_ABSENT_PAGES) == (absent * PAGE_SIZE < context_len)


@FEW_EXAMPLES
@given(
    kv_split=KV_SPLITS,
    lengths=st.lists(st.one_of(LENGTHS, st.integers(0, 1 << 29)), min_size=1, max_size=5),
)
def test_chunks_are_powers_of_two_and_no_more_than_allowed(kv_split: KVSplitConfig, lengths: list[int]) -> None:
    chunk_keys = kv_split.chunk_keys(np.array(lengths, np.int32)).tolist()
    for length, chunk in zip(lengths, chunk_keys, strict=True):
        assert chunk >= 16
        assert chunk & (chunk - 1) == 0
        assert chunk >= kv_split.chunk_size
        assert -(-length // chunk) <= kv_split.max_splits
        # No longer than chosen, unless there would be too many.
        if kv_split.chunk_size and -(-length // kv_split.chunk_size) <= kv_split.max_splits:
            assert chunk == kv_split.chunk_size
        assert [chunk] == kv_split.chunk_keys(np.array([length], np.int32)).tolist()


@pytest.mark.parametrize("at_once", [1.0, 2.5, 4.0, 16.5, 200.0])
@pytest.mark.parametrize("num_items", [0, 1, 7, 100])
def test_rounds_go_to_and_fro(num_items: int, at_once: float) -> None:
    order = _to_and_fro(np.arange(num_items), at_once).tolist()
    assert sorted(order) == list(range(num_items))
    rounds = [item // at_once for item in order]
    assert rounds == sorted(rounds)
    for one in set(rounds):
        taken = [item for item in order if item // at_once == one]
        assert taken == sorted(taken, reverse=one % 2 == 1)
