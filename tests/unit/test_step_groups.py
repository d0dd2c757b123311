"""Steps of caches with layer groups: tables that are equal go once, others by what changed, each for its own group."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnd import StepGroup, StepMetadata
from attnd.errors import InvalidRequest
from attnd.protocol.page_table_deltas import KEPT_TABLES, SentPageTables
from attnd.v1 import cache_pb2, step_pb2
from tests.unit.plain import elements, with_narrow_slots
from tests.unit.test_step_metadata import KINDS_OF_ARRAYS

REF = cache_pb2.CacheRef(id=b"0" * 16)
LENS, CONTEXTS, SLOTS = [2, 1], [5, 0], [29, -1, 56]
TABLES, OTHERS = [[3, 4, -1], [7, -1, -1]], [[-1, 4, -1], [9, -1, -1]]


def step(*groups: StepGroup, step_id: int = 1, sent: SentPageTables | None = None) -> step_pb2.Step:
    return StepMetadata(LENS, CONTEXTS, groups=groups).to_message(step_id, REF, sent)


def changed(table: np.ndarray, delta: step_pb2.PageTableDelta) -> np.ndarray:
    """What a delta makes of a table."""
    padded = np.full((len(table) + 1, max(delta.max_pages, table.shape[1])), -1)
    padded[:-1, : table.shape[1]] = table
    rows = padded[elements(delta.source_rows)][:, : delta.max_pages].copy()
    rows.reshape(-1)[elements(delta.indices)] = elements(delta.pages)
    return rows


class Stream:
    """A server that takes every step, and knows the tables of its last 8."""

    def __init__(self) -> None:
        self.sent = SentPageTables()
        self.last_id = 0
        self._steps: dict[int, list[np.ndarray]] = {}

    def send(self, *tables, answers: bool = True) -> list[str]:
        """Sends a step, sees that its tables arrive as they are, and says how each travelled."""
        self.last_id += 1
        given = [StepGroup(np.asarray(table, np.int32), None) for table in tables]
        lens = [1] * len(tables[0])
        message = StepMetadata(lens, lens, groups=given).to_message(self.last_id, REF, self.sent)
        arrived: list[np.ndarray] = []
        for index, group in enumerate(message.groups):
            if group.HasField("tables_of"):
                arrived.append(arrived[group.tables_of])
            elif group.HasField("page_table_delta"):
                base = self._steps[group.page_table_delta.base_step_id][index]
                arrived.append(changed(base, group.page_table_delta))
            else:
                arrived.append(np.array(elements(group.page_tables)))
        for table, given_table in zip(arrived, tables, strict=True):
            np.testing.assert_array_equal(table, given_table)
        self._steps[self.last_id] = arrived
        self._steps.pop(self.last_id - 8, None)
        if answers:
            self.sent.accept(self.last_id)
        fields = ("page_tables", "page_table_delta", "tables_of")
        return [next(name for name in fields if group.HasField(name)) for group in message.groups]


def rows(first: int, num_pages: int = 40) -> np.ndarray:
    """Three requests of so many pages, no page in two."""
    tables = np.full((3, 64), -1)
    tables[:, :num_pages] = first + np.arange(3 * num_pages).reshape(3, num_pages)
    return tables


@pytest.mark.parametrize("make", KINDS_OF_ARRAYS.values(), ids=KINDS_OF_ARRAYS)
def test_every_kind_of_array_gives_the_same_message(make) -> None:
    message = step(StepGroup(make(TABLES), make(SLOTS), window=4), StepGroup(make(OTHERS), make([*SLOTS, -1])))
    assert with_narrow_slots(message) == step(StepGroup(TABLES, SLOTS, window=4), StepGroup(OTHERS, SLOTS))
    assert not message.HasField("page_tables")
    assert not message.HasField("slot_mapping")
    first, second = message.groups
    assert (elements(first.page_tables), elements(first.slot_mapping), first.window) == (TABLES, SLOTS, 4)
    assert (elements(second.page_tables), elements(second.slot_mapping), second.window) == (OTHERS, SLOTS, 0)


@pytest.mark.parametrize("make", KINDS_OF_ARRAYS.values(), ids=KINDS_OF_ARRAYS)
def test_equal_tables_are_told_once(make) -> None:
    tables, slots = make(TABLES), make(SLOTS)
    for other in (StepGroup(tables, slots, window=2), StepGroup(make(TABLES), make(SLOTS), window=2)):
        first, second, third = step(StepGroup(tables, slots), other, StepGroup(OTHERS, SLOTS)).groups
        assert (second.tables_of, second.window) == (0, 2)
        assert not second.HasField("page_tables")
        assert not second.HasField("slot_mapping")
        assert not first.HasField("tables_of")
        assert elements(third.page_tables) == OTHERS


def test_only_what_is_equal_in_tables_and_slots_is_told_once() -> None:
    tables = np.array(TABLES, np.int32)
    groups = step(
        StepGroup(tables, SLOTS),
        StepGroup(tables, [29, -1, 57]),
        StepGroup(tables, None),
        StepGroup(tables.reshape(3, 2), SLOTS),
        StepGroup(tables, [29, -1, 57]),
        StepGroup(tables, None),
    ).groups
    assert [group.HasField("tables_of") for group in groups] == [False] * 4 + [True] * 2
    assert [groups[4].tables_of, groups[5].tables_of] == [1, 2]


def test_tables_of_another_group_are_those_of_the_group_that_gives_them() -> None:
    groups = step(
        StepGroup(OTHERS, SLOTS), StepGroup(TABLES, SLOTS), StepGroup(tables_of=1), StepGroup(tables_of=2, window=8)
    ).groups
    assert [group.tables_of for group in groups[2:]] == [1, 1]
    assert groups[3].window == 8
    assert step(StepGroup(TABLES, SLOTS), StepGroup(TABLES, SLOTS), StepGroup(tables_of=1)).groups[2].tables_of == 0


def test_each_group_has_its_own_delta() -> None:
    stream, full, window = Stream(), rows(0), rows(1_000)
    assert stream.send(full, window) == ["page_tables", "page_tables"]
    full[1, 40] = 999
    window[1, 40], window[0, :3] = 998, -1
    assert stream.send(full, window) == ["page_table_delta", "page_table_delta"]
    assert stream.send(full, window) == ["page_table_delta", "page_table_delta"]
    assert stream.send(window, full) == ["page_tables", "page_tables"]  # never by another group's


def test_a_group_that_leaves_anothers_tables_builds_on_none_that_the_server_has_forgotten() -> None:
    stream, full, window = Stream(), rows(0), rows(1_000)
    assert stream.send(full, window) == ["page_tables", "page_tables"]
    for _ in range(9):
        assert stream.send(full, full) == ["page_table_delta", "tables_of"]
    assert stream.send(full, window) == ["page_table_delta", "page_tables"]
    for _ in range(KEPT_TABLES - 2):
        assert stream.send(full, full) == ["page_table_delta", "tables_of"]
    assert stream.send(full, window) == ["page_table_delta", "page_table_delta"]


def test_what_is_not_answered_or_is_forgotten_is_built_upon_by_no_group() -> None:
    stream, full, window = Stream(), rows(0), rows(1_000)
    for _ in range(2):
        assert stream.send(full, window, answers=False) == ["page_tables", "page_tables"]
    stream.sent.accept(1)
    assert stream.send(full, window) == ["page_table_delta", "page_table_delta"]
    stream.sent.forget()
    assert stream.send(full, window) == ["page_tables", "page_tables"]


REFUSED = {
    "page_tables": (
        {"page_tables": TABLES, "groups": [StepGroup(TABLES)]},
        "page_tables is given, but must be absent where groups is given",
    ),
    "slot_mapping": (
        {"slot_mapping": SLOTS, "groups": [StepGroup(TABLES)]},
        "slot_mapping is given, but must be absent where groups is given",
    ),
    "window": ({"window": 4, "groups": [StepGroup(TABLES)]}, "window is 4, but must be 0 where groups is given"),
    "no_group": ({"groups": [StepGroup(TABLES), TABLES]}, "groups[1] is a list, but must be a StepGroup"),
    "no_tables": (
        {"groups": [StepGroup(slot_mapping=SLOTS)]},
        "groups[0].page_tables is None, but must be given where tables_of is not",
    ),
    "tables_twice": (
        {"groups": [StepGroup(TABLES), StepGroup(TABLES, tables_of=0)]},
        "groups[1].page_tables is given, but must be absent where tables_of is",
    ),
    "slots_twice": (
        {"groups": [StepGroup(TABLES), StepGroup(slot_mapping=SLOTS, tables_of=0)]},
        "groups[1].slot_mapping is given, but must be absent where tables_of is",
    ),
    "tables_of_itself": (
        {"groups": [StepGroup(TABLES), StepGroup(tables_of=1)]},
        "groups[1].tables_of is 1, but must be an earlier group, less than 1",
    ),
    "tables_of_nobody": ({"groups": [StepGroup(tables_of=-1)]}, "groups[0].tables_of is -1, but must be an integer"),
    "group_window": ({"groups": [StepGroup(TABLES, window=1.5)]}, "groups[0].window is 1.5, but must be an integer in"),
    "ragged": (
        {"groups": [StepGroup(TABLES), StepGroup([[1], [2, 3]])]},
        "groups[1].page_tables[1] has 2 pages, but must have 1 as groups[1].page_tables[0]",
    ),
    "floats": ({"groups": [StepGroup(torch.zeros(2, 1))]}, "groups[0].page_tables has dtype float32, but must be"),
    "further_slots": (
        {"groups": [StepGroup(TABLES), StepGroup(OTHERS, [*SLOTS, -1, 8])]},
        "groups[1].slot_mapping[4] is 8, but must be -1 past the step's 3 tokens",
    ),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_groups_that_the_wire_cannot_carry(fields: dict, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        StepMetadata(LENS, CONTEXTS, **fields).to_message(1, REF)
    assert message in str(caught.value)
    assert caught.value.field.partition("[")[0] == message.partition(" ")[0].partition("[")[0]
