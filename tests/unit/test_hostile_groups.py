"""Steps that a client must not send: each verdict names field, value and rule, and no byte of any page changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from attnd.errors import InvalidRequest
from attnd.v1 import attention_pb2, step_pb2, tensor_pb2
from tests.fuzz.hostile import Stream, hybrid, step, verdict
from tests.fuzz.pool import Pool
from tests.fuzz.tensors import ints
from tests.fuzz.world import CALLER, World

INT_MIN, INT_MAX = -(2**31), 2**31 - 1

Change = Callable[[step_pb2.Step], object]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture
def pool(world: World) -> Pool:
    return hybrid(world)


def wide(value: int) -> tensor_pb2.Tensor:
    return ints([value], wide=True)


def header(*shape: int, dtype: int = tensor_pb2.DTYPE_INT32) -> tensor_pb2.Tensor:
    """A tensor that says it has so many elements, and has two."""
    return tensor_pb2.Tensor(dtype=tensor_pb2.Dtype.ValueType(dtype), shape=shape, data=bytes(8))


def group(index: int, **fields: Any) -> Change:
    """Changes of a layer group; None: the field goes."""

    def change(message: step_pb2.Step) -> None:
        for field, value in fields.items():
            message.groups[index].ClearField(field)  # type: ignore[arg-type]
            if value is not None:
                message.groups[index].MergeFrom(step_pb2.StepGroup(**{field: value}))

    return change


def tables_of(*sources: tuple[int, int]) -> Change:
    """Groups that have another's tables, and say nothing else."""

    def change(message: step_pb2.Step) -> None:
        for index, source in sources:
            message.groups[index].CopyFrom(step_pb2.StepGroup(tables_of=source))

    return change


def whole(**fields: Any) -> Change:
    """Changes of the step itself."""

    def change(message: step_pb2.Step) -> None:
        for field, value in fields.items():
            message.ClearField(field)  # type: ignore[arg-type]
            message.MergeFrom(step_pb2.Step(**{field: value}))

    return change


def many(count: int) -> Change:
    """So many empty groups more."""
    return lambda message: [message.groups.add() for _ in range(count)]


def both(*changes: Change) -> Change:
    """One after the other."""
    return lambda message: [change(message) for change in changes]


def delta(**fields: Any) -> step_pb2.PageTableDelta:
    """One upon step 1, of a cache without groups."""
    given = {"base_step_id": 1, "source_rows": ints([0]), "max_pages": 2, "indices": ints([]), "pages": ints([])}
    return step_pb2.PageTableDelta(**given | fields)


EARLIER = "but must be an earlier group that gives page_tables"
STEPS: dict[str, tuple[Change, str, str]] = {
    "no groups": (lambda message: message.ClearField("groups"), "groups", "groups has 0 elements, but must have 4"),
    "a group more": (many(1), "groups", "groups has 5 elements, but must have 4"),
    "a thousand": (many(1_000), "groups", "groups has 1004 elements, but must have 4"),
    "thousands": (many(60_000), "", "starts a field beyond the 4096 that a message may have"),
    "itself": (tables_of((1, 1)), "groups[1].tables_of", f"tables_of is 1, {EARLIER}"),
    "the first itself": (tables_of((0, 0)), "groups[0].tables_of", f"tables_of is 0, {EARLIER}"),
    "a later one": (tables_of((1, 3)), "groups[1].tables_of", f"tables_of is 3, {EARLIER}"),
    "a chain": (tables_of((1, 0), (3, 1)), "groups[3].tables_of", f"tables_of is 1, {EARLIER}"),
    "a circle": (tables_of((1, 3), (3, 1)), "groups[1].tables_of", f"tables_of is 3, {EARLIER}"),
    "none": (tables_of((1, 2**32 - 1)), "groups[1].tables_of", f"tables_of is 4294967295, {EARLIER}"),
    "other pages": (tables_of((2, 0)), "groups[2].tables_of", "it has pages of 4 tokens, and this one of 2"),
    "both": (group(1, tables_of=0), "groups[1].page_tables", "is given, but must be absent where tables_of is given"),
    "a page of another": (
        both(group(0, page_tables=ints([1, 5], 1, 2)), tables_of((1, 0))),
        "groups[1].page_tables",
        "page_tables[0, 1] is 5, but the cache has pages 0..4",
    ),
    "a slot of another": (
        both(group(0, slot_mapping=ints([23])), tables_of((1, 0))),
        "groups[1].slot_mapping",
        "slot_mapping[0] is 23, but the cache has slots 0..19",
    ),
    "a page behind no window": (
        group(0, page_tables=ints([INT_MIN, 2], 1, 2)),
        "groups[0].page_tables",
        f"page_tables[0, 0] is {INT_MIN}, but the cache has pages 0..5",
    ),
    "a wide slot": (group(2, slot_mapping=wide(2**31)), "groups[2].slot_mapping", "is 2147483648, but the cache has"),
    "one that wraps": (
        group(2, slot_mapping=wide(2**32 + 6)),
        "groups[2].slot_mapping",
        "is 4294967302, but the cache has slots 0..17",
    ),
    "the widest": (group(2, slot_mapping=wide(2**63 - 1)), "groups[2].slot_mapping", "is 9223372036854775807, but"),
    "no slot": (group(2, slot_mapping=wide(-2)), "groups[2].slot_mapping", "slot_mapping[0] is -2, but the cache has"),
    "a slot that is read": (group(3, slot_mapping=ints([20])), "groups[3].slot_mapping", "must not be a slot that"),
    "another window": (group(1, window=4), "groups[1].window", "window is 4, but must be 0 or 5"),
    "no window": (group(1, window=2**32 - 1), "groups[1].window", "window is 4294967295, but must be 0 or 5"),
    "a step's window": (whole(window=5), "window", "window is 5, but must be absent where groups is given"),
    "a step's tables": (whole(page_tables=ints([1, 2], 1, 2)), "page_tables", "must be absent where groups is given"),
    "a step's slots": (whole(slot_mapping=ints([9])), "slot_mapping", "must be absent where groups is given"),
    "a step's delta": (whole(page_table_delta=delta()), "page_table_delta", "must be absent where groups is given"),
    "huge by header": (
        group(0, page_tables=header(1, 2**31)),
        "groups[0].page_tables",
        "has 8 bytes of data, but must have 8589934592 for int32 [1, 2147483648]",
    ),
    "past any integer": (group(0, page_tables=header(1, 2**62)), "groups[0].page_tables", "but must have 184467440737"),
    "fewer than none": (group(0, page_tables=header(1, -2)), "groups[0].page_tables", "has shape [1, -2], but must be"),
    "rows of others": (group(0, page_tables=header(2, 1)), "groups[0].page_tables", "has shape [2, 1], but must be [1"),
    "wide tables": (
        group(0, page_tables=header(1, 1, dtype=tensor_pb2.DTYPE_INT64)),
        "groups[0].page_tables",
        "has dtype int64, but must be int32",
    ),
    "no tables": (group(3, page_tables=None), "groups[3].page_tables", "page_tables is absent, but must be given"),
    "too little context": (
        group(2, page_tables=ints([0, 1], 1, 2)),
        "groups[2].context_lens",
        "context_lens[0] is 6, but page_tables covers 4: 2 pages of 2 tokens",
    ),
    "too many elements": (
        group(2, page_tables=ints([0] * 25, 1, 25)),
        "groups[2].page_tables",
        "has 25 elements, but must have at most 24",
    ),
    "the least length": (whole(context_lens=ints([INT_MIN])), "context_lens", f"is {INT_MIN}, but must be at least 0"),
    "the greatest": (whole(context_lens=ints([INT_MAX])), "context_lens", f"is {INT_MAX}, but a request has at most"),
    "fewer than its own": (whole(context_lens=ints([-2])), "context_lens", "[0] is -2, but must be at least 0"),
    "a padded row's slot": (
        whole(context_lens=ints([-1])),
        "groups[0].slot_mapping",
        "slot_mapping[0] is 10, but must be -1: its request has no tokens",
    ),
    "half an owner": (whole(attend_new=ints([2])), "attend_new", "attend_new[0] is 2, but must be 0 or 1"),
    "no owner": (whole(attend_new=ints([-1])), "attend_new", "attend_new[0] is -1, but must be 0 or 1"),
    "before all": (whole(first_position=ints([-1])), "first_position", "first_position[0] is -1, but must be 0..1073"),
    "past all": (whole(first_position=ints([2**30 + 1])), "first_position", "is 1073741825, but must be 0..1073741824"),
    "delta and tables": (
        group(1, page_table_delta=delta()),
        "groups[1].page_table_delta",
        "is given, but must be absent where page_tables is given",
    ),
    "delta and tables_of": (
        both(tables_of((1, 0)), group(1, page_table_delta=delta())),
        "groups[1].page_table_delta",
        "is given, but must be absent where tables_of is given",
    ),
    "a base without the group": (
        group(1, page_tables=None, page_table_delta=delta()),
        "groups[1].page_table_delta.base_step_id",
        "base_step_id is 1, but must be a step with layer group 1: its cache has groups 0..0",
    ),
    "no base": (
        group(0, page_tables=None, page_table_delta=delta(base_step_id=2**64 - 1)),
        "groups[0].page_table_delta.base_step_id",
        "base_step_id is 18446744073709551615, but the stream's open steps are: 1",
    ),
    "a delta of many pages": (
        group(0, page_tables=None, page_table_delta=delta(max_pages=2**32 - 1)),
        "groups[0].page_table_delta.max_pages",
        "max_pages is 4294967295, but must be at most 24",
    ),
    "a row of no base": (
        group(0, page_tables=None, page_table_delta=delta(source_rows=ints([1]))),
        "groups[0].page_table_delta.source_rows",
        "source_rows[0] is 1, but the table of step 1 has rows 0..0",
    ),
    "pages of a delta": (
        group(0, page_tables=None, page_table_delta=delta(indices=ints([1]), pages=ints([6]))),
        "groups[0].page_tables",
        "page_tables[0, 1] is 6, but the cache has pages 0..5",
    ),
}


def flat_step(world: World) -> step_pb2.Step:
    """Step 1, of a cache without groups."""
    pool = next(pool for pool in world.own if not pool.info.config.groups)
    message = step(pool, 1)
    message.page_tables.CopyFrom(message.groups[0].page_tables)
    message.ClearField("groups")
    return message


@pytest.mark.parametrize(("change", "field", "text"), STEPS.values(), ids=STEPS)
def test_steps(world: World, pool: Pool, change: Change, field: str, text: str) -> None:
    stream = Stream(world)
    stream.step(flat_step(world))
    message = step(pool, 2)
    change(message)
    error = verdict(world, lambda: stream.step(message))
    assert isinstance(error, InvalidRequest)
    assert (error.field, text in str(error)) == (field, True), str(error)
    request = attention_pb2.PrefillRequest(step=message, call=step_pb2.Call()).SerializeToString()
    assert isinstance(verdict(world, lambda: world.service.prefill(request, CALLER)), InvalidRequest)
    stream.step(step(pool, 3))


@pytest.mark.parametrize(
    "change",
    [
        group(0, window=2**32 - 1),
        group(1, window=5, page_tables=ints([3, 4, -1], 1, 3)),
        whole(first_position=ints([2**30])),
        tables_of((3, 0)),
        group(1, slot_mapping=wide(18)),
    ],
)
def test_steps_at_the_limits_are_taken(world: World, pool: Pool, change: Change) -> None:
    message = step(pool)
    change(message)
    Stream(world).step(message)


def test_a_step_of_two_caches_builds_upon_each_others_groups_only_by_index(world: World, pool: Pool) -> None:
    """Another cache's table of the same group is a table: what it says is checked as any other is."""
    other = next(each for each in world.own if len(each.groups) == 3)
    stream = Stream(world)
    stream.step(step(pool, 1))
    message = step(other, 2)
    del message.groups[3]
    group(2, page_tables=ints([0, 1], 1, 2), slot_mapping=ints([10]))(message)
    group(1, page_tables=ints([0, 1], 1, 2), slot_mapping=ints([10]))(message)
    group(2, page_tables=None, page_table_delta=delta(max_pages=4))(message)
    stream.step(message)  # pages 0..3 of a latent group are pages of this one too
    message.id = 3
    group(1, page_tables=None, page_table_delta=delta())(message)
    error = verdict(world, lambda: stream.step(message))
    assert "groups[1].page_tables[0, 1] is 4, but the cache has pages 0..3" in str(error)


def test_a_delta_upon_a_step_that_has_gone(world: World, pool: Pool) -> None:
    stream = Stream(world)
    for step_id in range(1, 12):
        stream.step(step(pool, step_id))
    message = step(pool, 12)
    group(3, page_tables=None, page_table_delta=delta(base_step_id=3))(message)
    error = verdict(world, lambda: stream.step(message))
    assert "base_step_id is 3, but the stream's open steps are: 4, 5, 6" in str(error)
