"""The items that the device lays out for a decode step are those of the host: in the interpreter, or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")  # the columns of an item are its constants

from attnd_server.attention.backends.triton.hopper_parts import is_chunked, is_even, most_parts
from attnd_server.attention.backends.triton.hopper_schedule import hopper_schedule
from attnd_server.attention.backends.triton.work import Rows, Work, request_table
from attnd_server.attention.kernels import items as columns
from attnd_server.attention.kernels.items import ITEM_FIELDS, MERGE_FIELDS
from attnd_server.attention.kernels.launch_shapes import HOPPER_DECODE_ROWS, HOPPER_KEYS, HOPPER_ROWS
from attnd_server.attention.kv_split import KVSplitConfig
from attnd_server.attention.metadata import AttentionMetadata
from tests import interpreter

pytestmark = pytest.mark.skipif(interpreter.reason_against() is not None, reason=str(interpreter.reason_against()))

PAGE_SIZE = 16
# What the device's buffers hold before: no item and no place looks like it.
GARBAGE = -12345
LENGTHS = st.one_of(
    st.sampled_from([0, 1, 127, 128, 129, 2048, 2049, 4096, 4097, 16384, 16385, 33000, 65537, 140_000]),
    st.integers(0, 600),
    st.integers(0, 40_000),
)


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[str]:
    with interpreter.interpreter() as device:
        yield device


@dataclass(frozen=True)
class Step:
    """A decode step, the shape that it is one of, and how it is cut."""

    context_lens: tuple[int, ...]
    query_len: int = 1
    spare_slots: int = 0
    kv_split: KVSplitConfig = field(default_factory=KVSplitConfig)
    window: int = 0
    group: int = 4
    num_groups: int = 2
    num_multiprocessors: int = 132
    seed: int = 0

    @property
    def rows(self) -> Rows:
        rows = min(max(16, 1 << (self.query_len * self.group - 1).bit_length()), HOPPER_ROWS)
        rows = rows if rows <= HOPPER_DECODE_ROWS else HOPPER_ROWS
        return Rows(self.group, self.num_groups, rows, HOPPER_KEYS, self.num_multiprocessors)

    def metadata(self) -> AttentionMetadata:
        numbers = np.random.default_rng(self.seed)
        num_reqs = len(self.context_lens)
        num_pages = -(-max(self.context_lens, default=0) // PAGE_SIZE)

        def column(low: int, high: int) -> torch.Tensor:
            return torch.from_numpy(numbers.integers(low, high, num_reqs, endpoint=True))

        return AttentionMetadata(
            is_decode=True,
            num_tokens=num_reqs * self.query_len,
            cu_seqlens_q=torch.arange(num_reqs + 1) * self.query_len,
            context_lens=torch.tensor(self.context_lens, dtype=torch.int64),
            page_tables=torch.zeros(num_reqs, max(1, num_pages), dtype=torch.int64),
            slot_mapping=None,
            valid_lens=column(0, self.query_len),
            block_sizes=column(0, 3),
            prefix_lens=column(0, 5),
            padded_prefix_lens=column(5, 9),
            hole_starts=column(0, 5),
            hole_ends=column(5, 9),
        )

    def on_host(self) -> Work:
        metadata = self.metadata()
        table = request_table(metadata, metadata.page_tables.numpy(), PAGE_SIZE)
        return hopper_schedule(table, self.kv_split, self.window, self.rows)

    @property
    def num_slots(self) -> int:
        return len(self.context_lens) + self.spare_slots

    @property
    def num_parts(self) -> int:
        """Parts that there is room for."""
        longest = max(self.context_lens, default=0)
        return most_parts(self.num_slots, self.query_len, longest, self.kv_split, self.window, self.rows)

    @property
    def capacity(self) -> int:
        """Items that there is room for."""
        return self.num_parts * -(-self.query_len * self.group // self.rows.rows)

    @property
    def num_looked_at(self) -> int:
        """Items whose row some program looks at first."""
        num_programs = min(self.num_multiprocessors, self.capacity * self.num_groups)
        return -(-num_programs // self.num_groups)

    def on_device(self, device: str) -> tuple[np.ndarray, np.ndarray]:
        """All rows of items and merges."""
        # Only here: whether kernels are interpreted is decided when they load.
        from attnd_server.attention.kernels.decode_items import STEP_HEADER, decode_items

        metadata = self.metadata()
        header = torch.tensor([metadata.num_reqs, metadata.page_tables.shape[1], 0, 0])
        assert len(header) == STEP_HEADER
        block = torch.cat([header, torch.from_numpy(metadata.columns).flatten()])
        items = torch.full((self.capacity, ITEM_FIELDS), GARBAGE, dtype=torch.int32, device=device)
        merges = torch.full((self.num_slots, MERGE_FIELDS), GARBAGE, dtype=torch.int32, device=device)
        decode_items(
            items,
            merges,
            block.to(device, torch.int32),
            query_len=self.query_len,
            group=self.group,
            num_groups=self.num_groups,
            rows=self.rows.rows,
            num_multiprocessors=self.num_multiprocessors,
            num_looked_at=self.num_looked_at,
            kv_split=self.kv_split,
            is_chunked=is_chunked(self.kv_split, self.rows),
            is_even=is_even(self.kv_split, self.query_len),
            window=self.window,
        )
        return items.cpu().numpy(), merges.cpu().numpy()


@st.composite
def steps(draw: Any) -> Step:
    query_len = draw(st.sampled_from([1, 1, 1, 2, 5, 32, 33, 200]))
    chunk_size = draw(st.sampled_from([0, 0, 16, 128, 1024]))
    max_splits = draw(st.sampled_from([1, 3, 5, 32, 128]))
    return Step(
        context_lens=tuple(draw(st.lists(LENGTHS, min_size=1, max_size=6))),
        query_len=query_len,
        spare_slots=draw(st.integers(0, 3)),
        kv_split=KVSplitConfig(chunk_size, max_splits, draw(st.sampled_from([None, False, True]))),
        window=draw(st.sampled_from([0, 0, 1, 2, 100, 128, 129, 1000, 5000])),
        group=draw(st.integers(1, 8)),
        num_groups=draw(st.sampled_from([1, 2, 8])),
        num_multiprocessors=draw(st.sampled_from([4, 132])),
        seed=draw(st.integers(0, 100)),
    )


def without_places(items: np.ndarray) -> list[list[int]]:
    """Items in some order, without the places of their partial results."""
    items = items.copy()
    items[:, columns.PARTIAL_ROW.value] = 0
    return sorted(items.tolist())


def check(step: Step, device: str) -> None:
    work = step.on_host()
    rows, merges = step.on_device(device)
    num_items = len(work.items)
    assert num_items <= step.capacity
    items, rest = rows[:num_items], rows[num_items:]
    assert without_places(items) == without_places(work.items)
    # Whoever looks past the last item learns that there is none, and nothing else is written there.
    looked_at = max(0, step.num_looked_at - num_items)
    assert (rest[:looked_at, columns.NUM_ITEMS.value] == num_items).all()
    rest[:looked_at, columns.NUM_ITEMS.value] = GARBAGE
    assert (rest == GARBAGE).all()
    check_order(items)
    check_merges(step, items, merges)


def check_order(items: np.ndarray) -> None:
    """The first parts of requests, which are the whole length of a part, come by length."""
    is_first = items[:, columns.FIRST_CHUNK.value] == 0
    end = np.minimum(items[:, columns.END_KEY.value], items[:, columns.CONTEXT_LEN.value])
    first_key = items[:, columns.FIRST_KEY.value]
    num_tiles = np.maximum(1, -(-end // HOPPER_KEYS) - first_key // HOPPER_KEYS)[is_first].tolist()
    assert num_tiles == sorted(num_tiles, reverse=True)


def check_merges(step: Step, items: np.ndarray, merges: np.ndarray) -> None:
    """Parts write to rows of their own, which are within bounds, and where the request's merge looks for them."""
    places: list[int] = []
    valid_lens = step.metadata().valid_lens.tolist() + [0] * step.spare_slots
    for slot, (q_row, num_new, partial_row, num_parts, num_valid) in enumerate(merges.tolist()):
        assert num_valid == valid_lens[slot]
        assert q_row == slot * step.query_len
        mine = items[(items[:, columns.Q_ROW.value] == q_row) & (items[:, columns.FIRST_ROW.value] == 0)]
        assert num_parts == len(mine)
        assert num_new == (step.query_len if num_parts > 1 else 0)
        if num_parts > 1:
            mine = mine[np.argsort(mine[:, columns.FIRST_CHUNK.value])]
            expected = [partial_row + part * step.query_len for part in range(num_parts)]
            assert mine[:, columns.PARTIAL_ROW.value].tolist() == expected
            places += range(partial_row, partial_row + num_parts * step.query_len)
    assert sorted(places) == list(range(len(places)))
    assert len(places) <= step.num_parts * step.query_len


BLOCKS = Step((8192, 300, 0, 5000), query_len=32, num_groups=8, spare_slots=2)


@settings(max_examples=35, deadline=None, derandomize=True)
@given(step=steps())
@example(step=Step((0,), spare_slots=4))
@example(step=Step((8192, 8192, 1, 40_000), spare_slots=1))
@example(step=BLOCKS)
@example(step=replace(BLOCKS, kv_split=KVSplitConfig(batch_invariant=True)))
@example(step=replace(BLOCKS, window=700))
def test_items_are_those_of_the_host(device: str, step: Step) -> None:
    check(step, device)


def test_more_requests_than_are_compared_at_once(device: str) -> None:
    lengths = np.random.default_rng(1).integers(0, 3000, 70)
    check(Step(tuple(lengths.tolist()), query_len=32, num_groups=1, num_multiprocessors=16), device)


def test_a_step_without_requests(device: str) -> None:
    step = Step((), spare_slots=3)
    rows, merges = step.on_device(device)
    assert not rows[: step.num_looked_at, columns.NUM_ITEMS.value].any()
    assert not merges[:, 1].any()


@pytest.mark.parametrize("window", [0, 1, 2, 100, 128, 129, 200])
@pytest.mark.parametrize("kv_split", [KVSplitConfig(), KVSplitConfig(128, 8), KVSplitConfig(batch_invariant=True)])
def test_no_step_needs_more_parts_than_there_is_room_for(window: int, kv_split: KVSplitConfig) -> None:
    for query_len in (1, 40):
        shape = Step((5000,), query_len=query_len, window=window, kv_split=kv_split)
        most = shape.num_parts
        found = [
            len(np.unique(replace(shape, context_lens=(length,)).on_host().items[:, columns.FIRST_CHUNK.value]))
            for length in [*range(0, 5000, 37), *range(128, 5000, 128), *range(129, 5000, 128), 5000]
        ]
        assert max(found) <= most
        assert max(found) == most or is_even(kv_split, query_len)  # which cuts by more than one length
