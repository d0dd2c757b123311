"""Page tables that are told by those of another step: what passes, and the message of what does not."""

from __future__ import annotations

import tracemalloc

import pytest
import torch

from attnd.errors import InvalidRequest
from attnd.v1 import step_pb2, tensor_pb2
from attnd_server.service import validation
from tests.unit.wire_messages import CONFIG, LIMITS, config_of, step, tensor

BASE = [[0, 1], [2, -1]]


def open_steps():
    """The steps of a stream: 4 has BASE, 6 has one row without pages."""
    one = {"cu_seqlens_q": tensor([0, 1]), "context_lens": tensor([0]), "slot_mapping": None}
    return {
        4: (validation.step(step(page_tables=tensor(BASE)), CONFIG, LIMITS),),
        6: (validation.step(step(**one, page_tables=tensor([[]])), CONFIG, LIMITS),),
    }


def delta(**changes):
    """Of BASE, to be spoiled: its rows change places and gain a column with page 3 in row 0."""
    fields = {
        "base_step_id": 4,
        "source_rows": tensor([1, 0]),
        "max_pages": 3,
        "indices": tensor([1, 2]),
        "pages": tensor([4, 3]),
    } | changes
    return step_pb2.PageTableDelta(**{field: value for field, value in fields.items() if value is not None})


def changed_step(**changes):
    """A step by that delta; fields of the step's own go beside those of the delta."""
    fields = {"page_tables": None, "context_lens": tensor([3, 5]), "slot_mapping": None}
    own = {field: changes.pop(field) for field in list(changes) if field in step_pb2.Step.DESCRIPTOR.fields_by_name}
    return step(**fields | {"page_table_delta": delta(**changes)} | own)


def tables(message, steps=None):
    return validation.step(message, CONFIG, LIMITS, open_steps() if steps is None else steps).page_tables


ACCEPTED = {
    "moved_and_changed": ({}, [[2, 4, 3], [0, 1, -1]]),
    "as_it_was": (
        {"source_rows": tensor([0, 1]), "max_pages": 2, "indices": tensor([]), "pages": tensor([])},
        [[0, 1], [2, -1]],
    ),
    "cut": ({"max_pages": 2, "indices": tensor([]), "pages": tensor([])}, [[2, -1], [0, 1]]),
    "forked": ({"source_rows": tensor([0, 0])}, [[0, 4, 3], [0, 1, -1]]),
    "from_nowhere": ({"source_rows": tensor([-1, 0])}, [[-1, 4, 3], [0, 1, -1]]),
    "page_taken_away": ({"pages": tensor([-1, -1])}, [[2, -1, -1], [0, 1, -1]]),
    "every_element": (
        {"max_pages": 2, "indices": tensor([0, 1, 2, 3]), "pages": tensor([7, 6, 5, 4])},
        [[7, 6], [5, 4]],
    ),
    "from_another_open_step": (
        {"base_step_id": 6, "source_rows": tensor([-1, 0])},
        [[-1, 4, 3], [-1, -1, -1]],
    ),
}


@pytest.mark.parametrize(("changes", "expected"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_a_delta_gives_a_table(changes, expected):
    given = tables(changed_step(**changes))
    assert given.tolist() == expected
    assert given.dtype == torch.int32
    assert given.is_contiguous()


def test_a_table_without_columns():
    no_context = {"cu_seqlens_q": tensor([0, 2, 4, 6]), "context_lens": tensor([0, 0, 0])}
    nothing = {"max_pages": 0, "indices": tensor([]), "pages": tensor([])}
    assert tables(changed_step(**no_context, **nothing, source_rows=tensor([1, -1, 0]))).shape == (3, 0)


def test_the_base_stays_as_it_is():
    steps = open_steps()
    tables(changed_step(), steps).fill_(-7)
    unchanged = {"source_rows": tensor([0, 1]), "max_pages": 2, "indices": tensor([]), "pages": tensor([])}
    same = tables(changed_step(**unchanged), steps)
    assert same.data_ptr() == steps[4][0].page_tables.data_ptr()  # held once: what was checked is not written to
    assert steps[4][0].page_tables.tolist() == BASE


def refuse(message, field, text, config=CONFIG, steps=None):
    steps = open_steps() if steps is None else steps
    with pytest.raises(InvalidRequest) as caught:
        validation.step(message, config, LIMITS, steps)
    assert str(caught.value) == text
    assert caught.value.field == field
    assert steps.get(4) is None or steps[4][0].page_tables.tolist() == BASE


REFUSED = {
    "both": (
        {"page_tables": tensor(BASE)},
        "page_table_delta",
        "page_table_delta is given, but must be absent where page_tables is given",
    ),
    "neither": (
        {"page_table_delta": None},
        "page_tables",
        "page_tables is absent, but must be given",
    ),
    "base_unknown": (
        {"base_step_id": 5},
        "page_table_delta.base_step_id",
        "page_table_delta.base_step_id is 5, but the stream's open steps are: 4, 6; send page_tables instead",
    ),
    "base_itself": (
        {"base_step_id": 1},
        "page_table_delta.base_step_id",
        "page_table_delta.base_step_id is 1, but the stream's open steps are: 4, 6; send page_tables instead",
    ),
    "source_rows_absent": (
        {"source_rows": None},
        "page_table_delta.source_rows",
        "page_table_delta.source_rows is absent, but must be given",
    ),
    "source_rows_length": (
        {"source_rows": tensor([0])},
        "page_table_delta.source_rows",
        "page_table_delta.source_rows has shape [1], but must be [2]",
    ),
    "source_rows_int64": (
        {"source_rows": tensor([0, 1], "int64")},
        "page_table_delta.source_rows",
        "page_table_delta.source_rows has dtype int64, but must be int32",
    ),
    "source_rows_past_the_base": (
        {"source_rows": tensor([0, 2])},
        "page_table_delta.source_rows",
        "page_table_delta.source_rows[1] is 2, but the table of step 4 has rows 0..1, and -1 is no row",
    ),
    "source_rows_below_minus_one": (
        {"source_rows": tensor([-2, 0])},
        "page_table_delta.source_rows",
        "page_table_delta.source_rows[0] is -2, but the table of step 4 has rows 0..1, and -1 is no row",
    ),
    "too_large": (
        {"max_pages": 13},
        "page_table_delta.max_pages",
        "page_table_delta.max_pages is 13, but must be at most 12: page tables have at most 24 elements",
    ),
    "far_too_large": (
        {"max_pages": 2**32 - 1},
        "page_table_delta.max_pages",
        "page_table_delta.max_pages is 4294967295, but must be at most 12: page tables have at most 24 elements",
    ),
    "indices_absent": (
        {"indices": None},
        "page_table_delta.indices",
        "page_table_delta.indices is absent, but must be given",
    ),
    "indices_rank": (
        {"indices": tensor([[0, 2]])},
        "page_table_delta.indices",
        "page_table_delta.indices has shape [1, 2], but must be [num_changes]",
    ),
    "indices_bytes": (
        {"indices": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_INT32, shape=[2**40], data=bytes(8))},
        "page_table_delta.indices",
        f"page_table_delta.indices has 8 bytes of data, but must have {2**42} for int32 [{2**40}]",
    ),
    "indices_past_the_table": (
        {"indices": tensor([1, 6])},
        "page_table_delta.indices",
        "page_table_delta.indices[1] is 6, but the table has elements 0..5",
    ),
    "indices_negative": (
        {"indices": tensor([-1, 2])},
        "page_table_delta.indices",
        "page_table_delta.indices[0] is -1, but the table has elements 0..5",
    ),
    "indices_twice": (
        {"indices": tensor([2, 2])},
        "page_table_delta.indices",
        "page_table_delta.indices[1] is 2, but must be greater than 2, the element before it",
    ),
    "indices_fall": (
        {"indices": tensor([1, 3, 2]), "pages": tensor([1, 1, 1])},
        "page_table_delta.indices",
        "page_table_delta.indices[2] is 2, but must be greater than 3, the element before it",
    ),
    "pages_absent": (
        {"pages": None},
        "page_table_delta.pages",
        "page_table_delta.pages is absent, but must be given",
    ),
    "pages_length": (
        {"pages": tensor([3])},
        "page_table_delta.pages",
        "page_table_delta.pages has shape [1], but must be [2]",
    ),
    "pages_region": (
        {"pages": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_INT32, shape=[2], region=tensor_pb2.Region(id=3))},
        "page_table_delta.pages",
        "page_table_delta.pages.region.id is 3, but must be a region that OpenPlane registered",
    ),
    "page_past_the_cache": (
        {"pages": tensor([4, 8])},
        "page_tables",
        "page_tables[0, 2] is 8, but the cache has pages 0..7, and -1 is no page",
    ),
    "page_below_minus_one": (
        {"pages": tensor([-2, 3])},
        "page_tables",
        "page_tables[0, 1] is -2, but the cache has pages 0..7, and -1 is no page",
    ),
    "context_not_covered": (
        {"max_pages": 1, "indices": tensor([]), "pages": tensor([])},
        "context_lens",
        "context_lens[1] is 5, but page_tables covers 4: 1 pages of 4 tokens",
    ),
    "stores_into_what_a_page_of_the_base_holds": (
        {"slot_mapping": tensor([0, -1, -1, -1])},
        "slot_mapping",
        "slot_mapping[0] is 0, but must not be a slot that request 1 of the step reads",
    ),
}


@pytest.mark.parametrize(("changes", "field", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(changes, field, text):
    refuse(changed_step(**changes), field, text)


def test_a_unary_request_has_no_step_to_build_upon():
    text = "page_table_delta.base_step_id is 4, but the stream's open steps are: none; send page_tables instead"
    refuse(changed_step(), "page_table_delta.base_step_id", text, steps={})


def test_pages_of_a_base_of_a_larger_cache_are_checked_against_this_one():
    text = "page_tables[0, 0] is 2, but the cache has pages 0..1, and -1 is no page"
    refuse(changed_step(), "page_tables", text, config=config_of(2))


def test_nothing_is_allocated_for_a_table_beyond_the_limit():
    message, steps = changed_step(max_pages=1 << 30), open_steps()
    tracemalloc.start()
    try:
        refuse(
            message,
            "page_table_delta.max_pages",
            f"page_table_delta.max_pages is {1 << 30}, but must be at most 12: page tables have at most 24 elements",
            steps=steps,
        )
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
