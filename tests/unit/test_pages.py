"""The page allocator: its rules one by one, then random histories against a simulated cache."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from attnd.errors import Exhausted, InvalidRequest
from attnd.pages import PagedSequence, PagePool, page_tables

PAGE_SIZE = 4


def test_alloc_takes_all_or_nothing() -> None:
    pool = PagePool(5, PAGE_SIZE)
    pages = pool.alloc(3)
    assert len(set(pages)) == 3
    with pytest.raises(Exhausted, match="num_pages is 3, but of 5 pages 3 are used and 2 free"):
        pool.alloc(3)
    assert (pool.num_free, pool.num_used) == (2, 3)
    assert set(pool.alloc(2)) | set(pages) == set(range(5))
    assert pool.alloc(0) == []


def test_a_shared_page_is_freed_by_its_last_holder() -> None:
    pool = PagePool(2, PAGE_SIZE)
    (page,) = pool.alloc(1)
    pool.share([page])
    pool.free([page])
    assert (pool.references(page), pool.num_free) == (1, 1)
    pool.free([page])
    assert (pool.references(page), pool.num_free) == (0, 2)


@pytest.mark.parametrize("pages", [[0, 1], [0, 0], [7], [-1]], ids=["free", "twice", "too_big", "negative"])
def test_a_refused_free_changes_nothing(pages: list[int]) -> None:
    pool = PagePool(3, PAGE_SIZE)
    assert pool.alloc(1) == [0]
    with pytest.raises(InvalidRequest) as caught:
        pool.free(pages)
    assert caught.value.field == "pages"
    assert (pool.references(0), pool.num_used) == (1, 1)
    pool.check()


@pytest.mark.parametrize("pages", [[0, 2], [0, 3]], ids=["free", "too_big"])
def test_a_refused_share_changes_nothing(pages: list[int]) -> None:
    pool = PagePool(3, PAGE_SIZE)
    pool.alloc(1)
    with pytest.raises(InvalidRequest):
        pool.share(pages)
    assert pool.references(0) == 1


def test_sizes_must_be_positive() -> None:
    with pytest.raises(InvalidRequest, match="num_pages is 0, but must be at least 1"):
        PagePool(0, 16)
    with pytest.raises(InvalidRequest, match="page_size is 0, but must be at least 1"):
        PagePool(1, 0)
    with pytest.raises(InvalidRequest, match="num_pages is -1, but must be at least 0"):
        PagePool(1, 1).alloc(-1)


def test_check_finds_a_page_that_is_both_free_and_held() -> None:
    pool = PagePool(3, PAGE_SIZE)
    pool.check()
    pool._references[1] = 1
    with pytest.raises(RuntimeError, match=r"pages \[0, 1, 2\] are listed as free, but pages \[0, 2\]"):
        pool.check()


def test_extend_gives_slots_and_takes_pages_as_needed() -> None:
    pool = PagePool(4, PAGE_SIZE)
    sequence = PagedSequence(pool)
    assert sequence.extend(3) == [0, 1, 2]
    assert sequence.extend(0) == []
    assert sequence.extend(2) == [3, 4]
    assert (sequence.pages, sequence.length, pool.num_used) == ([0, 1], 5, 2)
    with pytest.raises(Exhausted):
        sequence.extend(12)
    assert (sequence.pages, sequence.length, pool.num_used) == ([0, 1], 5, 2)
    with pytest.raises(InvalidRequest, match="num_tokens is -1, but must be at least 0"):
        sequence.extend(-1)


def test_fork_shares_full_pages_and_copies_the_last() -> None:
    pool = PagePool(8, PAGE_SIZE)
    parent = PagedSequence(pool)
    parent.extend(6)
    child, copies = parent.fork()
    assert (child.pages, child.length) == ([0, 2], 6)
    assert copies == [(1, 2)]
    assert child.extend(1) == [2 * PAGE_SIZE + 2]
    parent.free()
    assert (parent.pages, parent.length) == ([], 0)
    assert pool.num_used == 2
    child.free()
    assert pool.num_used == 0


def test_fork_of_full_pages_copies_nothing() -> None:
    pool = PagePool(2, PAGE_SIZE)
    parent = PagedSequence(pool)
    parent.extend(2 * PAGE_SIZE)
    child, copies = parent.fork()
    assert copies == []
    assert child.pages == parent.pages
    assert pool.num_used == 2


def test_a_fork_without_room_changes_nothing() -> None:
    pool = PagePool(2, PAGE_SIZE)
    parent = PagedSequence(pool)
    parent.extend(6)
    with pytest.raises(Exhausted):
        parent.fork()
    assert [pool.references(page) for page in parent.pages] == [1, 1]


def test_truncating_into_a_shared_page_replaces_it() -> None:
    pool = PagePool(4, PAGE_SIZE)
    parent = PagedSequence(pool)
    parent.extend(2 * PAGE_SIZE)
    child, _ = parent.fork()
    assert child.truncate(5) == [(1, 2)]
    assert (child.pages, child.length) == ([0, 2], 5)
    assert parent.pages == [0, 1]
    assert child.truncate(PAGE_SIZE) == []
    assert child.pages == [0]
    for length in (-1, PAGE_SIZE + 1):
        with pytest.raises(InvalidRequest, match=f"length is {length}, but must be 0..4"):
            child.truncate(length)


def test_page_tables_are_padded() -> None:
    pool = PagePool(4, PAGE_SIZE)
    short, long, empty = (PagedSequence(pool) for _ in range(3))
    short.extend(1)
    long.extend(9)
    assert page_tables([short, long, empty]) == [[0, -1, -1], [1, 2, 3], [-1, -1, -1]]
    assert page_tables([]) == []


class Histories(RuleBasedStateMachine):
    """Sequences that grow, shrink, fork and go, over a simulated cache: none ever sees another's token."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12, PAGE_SIZE)
        self.cache: dict[int, int] = {}  # slot -> token
        self.tokens: dict[PagedSequence, list[int]] = {}  # what each sequence must hold
        self.next_token = 0

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        for source, target in copies:
            for offset in range(PAGE_SIZE):
                self.cache[target * PAGE_SIZE + offset] = self.cache.get(source * PAGE_SIZE + offset, -1)

    @rule(target=sequences)
    def start(self) -> PagedSequence:
        sequence = PagedSequence(self.pool)
        self.tokens[sequence] = []
        return sequence

    @rule(sequence=sequences, num_tokens=st.integers(0, 10))
    def extend(self, sequence: PagedSequence, num_tokens: int) -> None:
        room = len(sequence.pages) * PAGE_SIZE - sequence.length
        fits = -(-(num_tokens - room) // PAGE_SIZE) <= self.pool.num_free
        if not fits:
            with pytest.raises(Exhausted):
                sequence.extend(num_tokens)
            return
        for slot in sequence.extend(num_tokens):
            self.cache[slot] = self.next_token
            self.tokens[sequence].append(self.next_token)
            self.next_token += 1

    @rule(sequence=sequences, kept=st.floats(0, 1))
    def truncate(self, sequence: PagedSequence, kept: float) -> None:
        length = int(sequence.length * kept)
        try:
            self._copy(sequence.truncate(length))
        except Exhausted:
            assert self.pool.num_free == 0
        else:
            del self.tokens[sequence][length:]

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: PagedSequence):
        try:
            child, copies = sequence.fork()
        except Exhausted:
            assert self.pool.num_free == 0
            return multiple()
        self._copy(copies)
        self.tokens[child] = list(self.tokens[sequence])
        return child

    @rule(sequence=consumes(sequences))
    def free(self, sequence: PagedSequence) -> None:
        sequence.free()
        del self.tokens[sequence]

    @invariant()
    def every_sequence_holds_its_tokens(self) -> None:
        for sequence, tokens in self.tokens.items():
            assert sequence.length == len(tokens)
            assert [self.cache[slot] for slot in sequence.slots(0, sequence.length)] == tokens

    @invariant()
    def the_pool_counts_right(self) -> None:
        self.pool.check()
        held = [page for sequence in self.tokens for page in sequence.pages]
        assert self.pool.num_used == len(set(held))
        assert all(self.pool.references(page) == held.count(page) for page in held)


Histories.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestHistories = Histories.TestCase
