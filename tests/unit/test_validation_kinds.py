"""Rules of what engines say of a step: windows, store-first, owners, first positions, padded rows, layer groups."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnd.errors import InvalidRequest
from attnd.v1 import step_pb2
from attnd_server.service import validation
from tests.unit.wire_messages import CONFIG, LIMITS, step, tensor

DECODE = step_pb2.STEP_KIND_DECODE
GROUPED = [CONFIG, replace(CONFIG, window=4), replace(CONFIG, num_pages=2)]
# Requests of two new tokens with contexts of 5 and 3, pages of 4, page tables [[0, 1], [2, -1]], slots 5, 6, 11, 12.


def validate(message, configs=(CONFIG,), open_steps=validation.NO_STEPS):
    return validation.steps(message, configs, LIMITS, open_steps)


def refused(message, *configs):
    with pytest.raises(InvalidRequest) as raised:
        validate(message, configs or (CONFIG,))
    return raised.value.field, str(raised.value)


def groups(*more):
    """A step of three layer groups: the second has the first one's tables, the third what `more` says."""
    message = step()
    first = step_pb2.StepGroup(page_tables=message.page_tables, slot_mapping=message.slot_mapping)
    for field in ("page_tables", "slot_mapping"):
        message.ClearField(field)
    third = (
        more[0]
        if more
        else step_pb2.StepGroup(page_tables=tensor([[0, 1], [1, -1]]), slot_mapping=tensor([7, -1, -1, -1]))
    )
    message.groups.extend([first, step_pb2.StepGroup(tables_of=0), third])
    return message


@pytest.mark.parametrize("junk", [-1, 1 << 30, -(1 << 31), 2])
def test_pages_that_the_window_hides_are_not_looked_at(junk):
    (metadata,) = validate(step(window=2, page_tables=tensor([[junk, 1], [2, -1]]), slot_mapping=tensor([6, 7, 8, 12])))
    assert metadata.window == 2
    assert metadata.page_tables.tolist() == [[junk if junk == 2 else 0, 1], [2, -1]]
    assert metadata.tables_as_sent.tolist() == [[junk, 1], [2, -1]]
    assert not metadata.has_absent_pages(4)


@pytest.mark.parametrize("window", [2, 3, 4, 5, 6])
def test_the_first_page_that_a_token_sees_must_be_there(window):
    message = step(window=window, page_tables=tensor([[99, 1], [2, -1]]), slot_mapping=tensor([-1] * 4))
    if window == 2:  # the first new token, at 5, sees 4 and 5
        validate(message)
    else:
        field, text = refused(message)
        assert field == "page_tables"
        assert text.startswith("page_tables[0, 0] is 99, but the cache has pages 0..")


def test_a_slot_behind_the_window_may_be_stored_into_and_one_within_it_may_not():
    at = {"context_lens": tensor([8, 3]), "page_tables": tensor([[0, 1], [2, -1]])}
    for slot, window in ((0, 8), (3, 4), (4, 4)):
        validate(step(**at, window=window, slot_mapping=tensor([slot, -1, -1, -1])))
    for slot, window in ((0, 0), (0, 9), (1, 8), (5, 4)):
        field, text = refused(step(**at, window=window, slot_mapping=tensor([slot, -1, -1, -1])))
        assert (field, text) == (
            "slot_mapping",
            f"slot_mapping[0] is {slot}, but must not be a slot that request 0 of the step reads",
        )


def test_a_later_step_is_told_by_what_was_sent_and_not_by_what_kernels_follow():
    (base,) = validate(step(window=2, page_tables=tensor([[-1, 1], [2, -1]]), slot_mapping=tensor([6, 7, 8, 12])))
    delta = step_pb2.PageTableDelta(
        base_step_id=4, source_rows=tensor([0, 1]), max_pages=2, indices=tensor([]), pages=tensor([])
    )
    message = step(page_table_delta=delta, slot_mapping=tensor([-1] * 4))
    message.ClearField("page_tables")
    (metadata,) = validate(message, open_steps={4: (base,)})
    assert metadata.page_tables.tolist() == [[-1, 1], [2, -1]]
    assert metadata.has_absent_pages(4)


def test_a_store_first_step_may_read_what_it_stores_but_not_store_twice():
    slots = tensor([0, 6, 8, 12])
    assert refused(step(slot_mapping=slots))[0] == "slot_mapping"
    (metadata,) = validate(step(slot_mapping=slots, store_first=True))
    assert metadata.store_first
    assert metadata.reads_stored
    assert not validate(step(store_first=True))[0].reads_stored
    field, text = refused(step(slot_mapping=tensor([7, 7, 8, 12]), store_first=True))
    assert (field, text) == ("slot_mapping", "slot_mapping[1] is 7, but must differ from slot_mapping[0]")


def test_tokens_that_are_no_keys():
    def seen(**more):
        (metadata,) = validate(step(**more))
        assert (metadata.seen_new is None) == metadata.is_plain or metadata.without_sinks is not None
        return None if metadata.seen_new is None else metadata.seen_new.tolist()

    assert seen(store_first=True) is None
    assert seen(slot_mapping=tensor([5, -1, 11, -1])) is None
    assert seen(slot_mapping=tensor([5, -1, 11, 12]), store_first=True) == [True, False, True, True]
    valid = {"valid_lens": tensor([1, 2])}
    assert seen(slot_mapping=tensor([5, -1, 11, 12]), store_first=True, **valid) is None
    assert seen(attend_new=tensor([1, 0])) == [True, True, False, False]
    assert seen(attend_new=tensor([1, 1])) is None
    (metadata,) = validate(step(attend_new=tensor([0, 1])))
    assert metadata.without_sinks.tolist() == [True, False]
    nothing = step(store_first=True)
    nothing.ClearField("slot_mapping")
    assert validate(nothing)[0].seen_new.tolist() == [False] * 4


def test_positions_count_from_the_first():
    at = {"mask": step_pb2.MASK_PREFIX_FULL, "block_size": 4, "mask_prefix_hole": True}
    prefix = {"prefix_lens": tensor([10, 2]), "padded_prefix_lens": tensor([13, 9])}
    (metadata,) = validate(step(first_position=tensor([8, 4]), **at, **prefix))
    assert metadata.prefix_lens.tolist() == metadata.hole_starts.tolist() == [2, 0]
    assert metadata.padded_prefix_lens.tolist() == metadata.hole_ends.tolist() == [5, 5]
    field, text = refused(step(first_position=tensor([8, 6]), **at, **prefix))
    rule = "must be a multiple of block_size, 4, for a block-causal or prefix-full mask"
    assert (field, text) == ("first_position", f"first_position[1] is 6, but {rule}")
    validate(step(first_position=tensor([8, 6])))


def test_padded_rows():
    padded = {"context_lens": tensor([5, -2]), "slot_mapping": tensor([5, 6, -1, -1])}
    (metadata,) = validate(step(**padded))
    assert metadata.context_lens.tolist() == [5, 0]
    assert metadata.valid_lens.tolist() == [2, 0]
    field, text = refused(step(**{**padded, "slot_mapping": tensor([5, 6, -1, 12])}))
    assert field == "slot_mapping"
    assert text == "slot_mapping[3] is 12, but must be -1: its request has no tokens, and pads the batch"
    for value in (-1, -3, -(1 << 31)):
        field, text = refused(step(**{**padded, "context_lens": tensor([5, value])}))
        assert (field, text) == ("context_lens", f"context_lens[1] is {value}, but must be at least 0")


def test_a_decode_step_leaves_out_requests_without_tokens():
    (metadata,) = validate(
        step(
            kind=DECODE, cu_seqlens_q=tensor([0, 0, 2, 2, 4]), context_lens=tensor([3, 5, 0, 3]),
            page_tables=tensor([[3, -1], [0, 1], [0, 0], [2, -1]]),
        )
    )  # fmt: skip
    assert metadata.num_reqs == 2
    assert metadata.query_lens == [2, 2]
    assert metadata.context_lens.tolist() == [5, 3]
    assert metadata.page_tables.tolist() == [[0, 1], [2, -1]]
    assert len(metadata.tables_as_sent) == 4
    field, text = refused(
        step(
            kind=DECODE,
            cu_seqlens_q=tensor([0, 0, 2, 4, 7]),
            context_lens=tensor([0] * 4),
            page_tables=tensor([[0]] * 4),
        )
    )
    assert field == "cu_seqlens_q"
    assert text.startswith("cu_seqlens_q gives 3 new tokens to request 3, but must give 2 as to request 1")


@pytest.mark.parametrize("kind", ["cache_only", "store_only"])
def test_what_does_not_go_together(kind):
    message = step(**{kind: True})
    if kind == "cache_only":
        message.ClearField("slot_mapping")
    message.store_first = True
    assert refused(message)[1] == f"store_first is true, but must be false in a {kind.replace('_', '-')} step"
    message.store_first = False
    message.attend_new.CopyFrom(tensor([1, 1]))
    assert refused(message)[1] == f"attend_new is given, but must be absent in a {kind.replace('_', '-')} step"


def test_numbers_out_of_range():
    assert refused(step(attend_new=tensor([1, 2])))[1] == "attend_new[1] is 2, but must be 0 or 1"
    assert refused(step(attend_new=tensor([1])))[0] == "attend_new"
    assert refused(step(first_position=tensor([-1, 0])))[0] == "first_position"
    assert refused(step(first_position=tensor([0, (1 << 30) + 1])))[0] == "first_position"
    assert refused(step(window=3), replace(CONFIG, window=4)) == (
        "window",
        "window is 3, but must be 0 or 4, that of the cache's layer group",
    )


def test_groups_have_tables_slots_and_windows_of_their_own():
    first, second, third = validate(groups(), GROUPED)
    assert first.page_tables.tolist() == second.page_tables.tolist() == [[0, 1], [2, -1]]
    assert first.slot_mapping.tolist() == second.slot_mapping.tolist()
    assert third.page_tables.tolist() == [[0, 1], [1, -1]]
    assert [metadata.window for metadata in (first, second, third)] == [0, 4, 0]


def test_a_group_builds_upon_the_same_group():
    base = validate(groups(), GROUPED)
    delta = step_pb2.PageTableDelta(
        base_step_id=3, source_rows=tensor([1, 0]), max_pages=2, indices=tensor([3]), pages=tensor([0])
    )
    message = groups(step_pb2.StepGroup(page_table_delta=delta, slot_mapping=tensor([-1] * 4)))
    message.context_lens.CopyFrom(tensor([3, 5]))
    message.groups[0].page_tables.CopyFrom(tensor([[2, -1], [0, 1]]))
    _, _, third = validate(message, GROUPED, {3: base})
    assert third.page_tables.tolist() == [[1, -1], [0, 0]]


GROUP_ERRORS = {
    "a page of another group": (
        step_pb2.StepGroup(page_tables=tensor([[0, 2], [1, -1]])),
        ("groups[2].page_tables", "groups[2].page_tables[0, 1] is 2, but the cache has pages 0..1, and -1 is no page"),
    ),
    "a slot of another group": (
        step_pb2.StepGroup(page_tables=tensor([[0, 1], [1, -1]]), slot_mapping=tensor([8, -1, -1, -1])),
        (
            "groups[2].slot_mapping",
            "groups[2].slot_mapping[0] is 8, but the cache has slots 0..7, and -1 is not stored",
        ),
    ),
    "no tables": (
        step_pb2.StepGroup(),
        ("groups[2].page_tables", "groups[2].page_tables is absent, but must be given"),
    ),
    "tables of itself": (
        step_pb2.StepGroup(tables_of=2),
        ("groups[2].tables_of", "groups[2].tables_of is 2, but must be an earlier group that gives page_tables"),
    ),
    "tables of one that has none of its own": (
        step_pb2.StepGroup(tables_of=1),
        ("groups[2].tables_of", "groups[2].tables_of is 1, but must be an earlier group that gives page_tables"),
    ),
    "tables twice": (
        step_pb2.StepGroup(tables_of=0, page_tables=tensor([[0]])),
        ("groups[2].page_tables", "groups[2].page_tables is given, but must be absent where tables_of is given"),
    ),
    "tables that are too large for this group": (
        step_pb2.StepGroup(tables_of=0),
        ("groups[2].page_tables", "groups[2].page_tables[1, 0] is 2, but the cache has pages 0..1, and -1 is no page"),
    ),
}


@pytest.mark.parametrize("name", GROUP_ERRORS)
def test_groups_are_refused_by_name(name):
    third, expected = GROUP_ERRORS[name]
    assert refused(groups(third), *GROUPED) == expected


def test_as_many_groups_as_the_cache_has():
    assert refused(groups(), CONFIG, CONFIG)[0] == "groups"
    assert refused(groups())[1] == "groups has 3 elements, but must have 1: one for each layer group of the cache"
    assert refused(step(), CONFIG, CONFIG)[1].startswith("groups has 0 elements, but must have 2")
    message = groups()
    message.slot_mapping.CopyFrom(tensor([-1] * 4))
    assert refused(message, *GROUPED)[1] == "slot_mapping is given, but must be absent where groups is given"
    message = groups()
    message.window = 4
    assert refused(message, *GROUPED)[1] == "window is 4, but must be absent where groups is given"


def test_a_call_has_the_window_of_its_step():
    def options(window, of_step):
        return validation.options(step_pb2.AttentionOptions(window=window), CONFIG, 4, of_step).window

    assert [options(0, 0), options(7, 0), options(0, 4), options(4, 4)] == [0, 7, 4, 4]
    for window in (3, 5, 2**32 - 1):
        with pytest.raises(InvalidRequest, match=f"window is {window}, but must be 0 or 4, that of the step"):
            options(window, 4)
