"""Page tables told by what changed: the server makes of a delta the table that the client was given."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnd import Array, StepMetadata
from attnd.protocol.page_table_deltas import KEPT_TABLES, SentPageTables
from attnd.protocol.steps.page_tables import page_tables_array
from attnd.v1 import cache_pb2, step_pb2, tensor_pb2
from attnd_server.config import ServerConfig
from attnd_server.service import validation
from attnd_server.service.session import MAX_OPEN_STEPS
from tests.unit.plain import elements
from tests.unit.wire_messages import config_of

NUM_PAGES = 1 << 16
CONFIG = config_of(NUM_PAGES)
REF = cache_pb2.CacheRef(id=b"0" * 16)


class Stream:
    """Both ends of a stream: what the client sends of each step, and what the server makes of it."""

    def __init__(self, answers: bool = True) -> None:
        self.sent_tables = SentPageTables()
        self.open_steps: dict = {}
        self._answers = answers
        self._last_id = 0

    def send(self, tables) -> step_pb2.Step:
        """Opens a step, and sees that its page tables arrive as they are."""
        tables = np.ascontiguousarray(tables, np.int32)
        self._last_id += 1
        metadata = StepMetadata([1] * len(tables), [0] * len(tables), tables, None)
        message = metadata.to_message(self._last_id, REF, self.sent_tables)
        assert message.HasField("page_table_delta") != message.HasField("page_tables")
        received = validation.step(message, CONFIG, ServerConfig(), self.open_steps)
        np.testing.assert_array_equal(received.page_tables.numpy(), tables)
        self.open_steps[self._last_id] = (received,)  # of its one layer group
        if len(self.open_steps) > MAX_OPEN_STEPS:
            del self.open_steps[min(self.open_steps)]
        if self._answers:
            self.sent_tables.accept(self._last_id)
        return message

    def changes(self, tables) -> tuple[int, list[int], dict[int, int]]:
        """Opens a step by a delta: its base, its source rows, and the elements that it sets."""
        message = self.send(tables)
        assert message.HasField("page_table_delta")
        delta = message.page_table_delta
        assert delta.ByteSize() < 4 * np.asarray(tables).size
        indices, pages = elements(delta.indices), elements(delta.pages)
        return delta.base_step_id, elements(delta.source_rows), dict(zip(indices, pages, strict=True))


def rows(num_reqs: int, num_pages: int, max_pages: int, first: int = 0) -> np.ndarray:
    """Requests with `num_pages` pages each, no page in two."""
    tables = np.full((num_reqs, max_pages), -1, np.int32)
    tables[:, :num_pages] = first + np.arange(num_reqs * num_pages).reshape(num_reqs, num_pages)
    return tables


def test_the_first_table_goes_in_full_and_the_same_again_as_nothing():
    stream = Stream()
    tables = rows(3, 40, 64)
    assert stream.send(tables).HasField("page_tables")
    assert stream.changes(tables) == (1, [0, 1, 2], {})
    assert stream.changes(tables) == (2, [0, 1, 2], {})


def test_a_new_page_is_one_change():
    stream = Stream()
    tables = rows(3, 40, 64)
    stream.send(tables)
    tables[1, 40] = 999
    assert stream.changes(tables) == (1, [0, 1, 2], {64 + 40: 999})


def test_a_few_pages_of_many_requests_leave_the_others_unsent():
    stream = Stream()
    tables = rows(200, 40, 64)
    stream.send(tables)
    changed = {request * 64 + column: 50_000 + request for request in (0, 7, 198, 199) for column in (0, 40)}
    tables.reshape(-1)[list(changed)] = list(changed.values())
    assert stream.changes(tables) == (1, list(range(200)), changed)
    tables[5, :3] = 60_000  # more than goes on as it was, but no other row is nearer
    assert stream.changes(tables) == (2, list(range(200)), {5 * 64 + column: 60_000 for column in range(3)})


def test_rows_that_are_cut_or_filled_to_another_length_are_not_sent_again():
    stream = Stream()
    stream.send(rows(3, 40, 40))
    wider = rows(3, 40, 41)[:, :41]
    wider[2, 40] = 999
    assert stream.changes(wider) == (1, [0, 1, 2], {2 * 41 + 40: 999})
    assert stream.changes(wider[:, :30]) == (2, [0, 1, 2], {})


def test_requests_that_end_leave_the_others_unsent():
    stream = Stream()
    tables = rows(6, 40, 64)
    stream.send(tables)
    assert stream.changes(tables[[0, 2, 3, 5]]) == (1, [0, 2, 3, 5], {})


def test_requests_that_change_places_are_not_sent_again():
    stream = Stream()
    tables = rows(6, 40, 64)
    tables[:, :20] = tables[0, :20]  # one prompt before them all
    stream.send(tables)
    order = [5, 1, 0, 3, 4, 2]
    moved = tables[order]
    moved[0, 40] = 999
    assert stream.changes(moved) == (1, order, {40: 999})


def test_a_new_request_between_others_costs_its_own_pages():
    stream = Stream()
    tables = rows(6, 40, 64)
    stream.send(tables)
    new = rows(1, 7, 64, first=5_000)
    admitted = np.concatenate([tables[:2], new, tables[2:]])
    base, sources, changes = stream.changes(admitted)
    assert (base, sources) == (1, [0, 1, -1, 2, 3, 4, 5])
    assert changes == {2 * 64 + column: 5_000 + column for column in range(7)}


def test_a_fork_continues_the_row_that_it_shares():
    stream = Stream()
    tables = rows(2, 40, 64)
    stream.send(tables)
    forked = tables[[0, 0, 1]]
    forked[1, 39] = 999
    assert stream.changes(forked) == (1, [0, 0, 1], {64 + 39: 999})


def test_rows_without_pages_come_from_nowhere():
    stream = Stream()
    stream.send(rows(2, 40, 64))
    more = np.concatenate([rows(2, 40, 64), np.full((2, 64), -1, np.int32)])
    assert stream.changes(more) == (1, [0, 1, -1, -1], {})


def test_more_rows_than_the_base_has_come_from_nowhere():
    stream = Stream()
    stream.send(rows(2, 0, 0))
    assert stream.changes(np.full((4, 64), -1, np.int32)) == (1, [0, 1, -1, 0], {})


def test_each_of_two_batches_in_turn_builds_upon_its_own_last_step():
    stream = Stream()
    one, other = rows(4, 40, 64), rows(4, 40, 64, first=10_000)
    one[:, 0] = other[:, 0] = 0  # though they begin alike
    stream.send(one)
    stream.send(other)
    for round_ in range(5):
        one[round_ % 4, 40 + round_] = 20_000 + round_
        other[round_ % 4, 40 + round_] = 30_000 + round_
        assert stream.changes(one)[0] == 2 * round_ + 1
        assert stream.changes(other)[0] == 2 * round_ + 2


def test_only_a_step_that_was_answered_is_built_upon():
    stream = Stream(answers=False)
    tables = rows(3, 40, 64)
    for _ in range(3):
        assert stream.send(tables).HasField("page_tables")
    stream.sent_tables.accept(2)
    assert stream.changes(tables)[0] == 2
    stream.sent_tables.accept(99)
    assert stream.changes(tables)[0] == 2


def test_a_step_too_long_ago_is_not_built_upon():
    assert KEPT_TABLES <= MAX_OPEN_STEPS  # the server has each, whatever became of those after it
    stream = Stream(answers=False)
    tables = rows(3, 40, 64)
    stream.send(tables)
    stream.sent_tables.accept(1)
    for _ in range(KEPT_TABLES):
        assert stream.changes(tables)[0] == 1
    assert stream.send(tables).HasField("page_tables")


def test_after_forgetting_the_table_goes_in_full():
    stream = Stream()
    tables = rows(3, 40, 64)
    stream.send(tables)
    stream.sent_tables.forget()
    assert stream.send(tables).HasField("page_tables")
    assert stream.changes(tables)[0] == 2


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (rows(1, 3, 4), rows(1, 3, 4)),  # the table has fewer bytes than any delta
        (rows(8, 40, 64), rows(8, 40, 64, first=9_000)),  # all is new
        (rows(8, 40, 64)[:, :0], rows(8, 40, 64)),
    ],
    ids=["short", "other_requests", "from_no_pages"],
)
def test_what_is_shorter_in_full_goes_in_full(before, after):
    stream = Stream()
    stream.send(before)
    assert stream.send(after).HasField("page_tables")


def test_lists_and_int64_arrays_take_the_same_way():
    tables = rows(3, 40, 64)
    for given_as in (tables.tolist(), tables.astype(np.int64)):
        sent = SentPageTables()
        for step_id in (1, 2):
            message = StepMetadata([1] * 3, [0] * 3, given_as, None).to_message(step_id, REF, sent)
            sent.accept(step_id)
        assert elements(message.page_table_delta.source_rows) == [0, 1, 2]


@pytest.mark.parametrize("shape", [(64,), (2, 33), (-2, -32), (2, 2, 16)])
def test_a_table_that_is_none_is_left_for_the_server_to_refuse(shape):
    sent = SentPageTables()
    sent.delta(1, page_tables_array(rows(2, 32, 32), "page_tables"))
    sent.accept(1)
    table = Array(tensor_pb2.DTYPE_INT32, shape, memoryview(bytes(256)))
    assert sent.delta(2, table) is None


@st.composite
def next_tables(draw, tables):
    """What may follow a table: requests that end, come, move, fork, grow, shrink or change anywhere; another width."""
    requests = [row[row >= 0].tolist() for row in tables]
    for _ in range(draw(st.integers(0, 3))):
        change = draw(st.sampled_from(["end", "come", "move", "fork", "grow", "shrink", "set"]))
        index = draw(st.integers(0, len(requests) - 1))
        pages = draw(st.lists(st.integers(0, NUM_PAGES - 1), max_size=12))
        if change == "end" and len(requests) > 1:
            del requests[index]
        elif change == "come":
            requests.insert(index, pages)
        elif change == "move":
            requests = draw(st.permutations(requests))
        elif change == "fork":
            requests.insert(index, requests[draw(st.integers(0, len(requests) - 1))])
        elif change == "grow":
            requests[index] = requests[index] + pages
        elif change == "shrink":
            requests[index] = requests[index][: draw(st.integers(0, len(requests[index])))]
        elif change == "set" and requests[index]:
            requests[index] = [*requests[index]]
            requests[index][draw(st.integers(0, len(requests[index]) - 1))] = draw(st.sampled_from([-1, 7]))
    width = max(map(len, requests)) + draw(st.sampled_from([0, 0, 1, 30]))
    following = np.full((len(requests), width), draw(st.sampled_from([-1, -1, -1, 5])), np.int32)
    for row, request in zip(following, requests, strict=True):
        row[: len(request)] = request
    return following


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data(), st.booleans())
def test_whatever_follows_arrives_as_it_is(data, share):
    stream = Stream(answers=False)
    tables = rows(data.draw(st.integers(1, 6)), 30, 40)
    if share:
        tables[:, :10] = 3
    for step_id in range(1, 9):
        stream.send(tables)  # compares
        if data.draw(st.integers(0, 4)):
            stream.sent_tables.accept(step_id - data.draw(st.integers(0, 1)))
        tables = data.draw(next_tables(tables))
