"""Every rule of step.proto: what passes, and the message of what does not."""

from __future__ import annotations

import pytest
import torch

from attnd.errors import InvalidRequest
from attnd.v1 import step_pb2, tensor_pb2
from attnd_server.attention.metadata import MOST_COLUMN, REQUEST_COLUMNS
from attnd_server.service import validation
from tests.unit.wire_messages import CONFIG, LIMITS, PAGE_SIZE, step, tensor

DECODE = step_pb2.STEP_KIND_DECODE
PREFIX_FULL = {
    "mask": step_pb2.MASK_PREFIX_FULL,
    "block_size": 2,
    "prefix_lens": tensor([2, 3]),
    "padded_prefix_lens": tensor([4, 3]),
}


def validate(message):
    return validation.step(message, CONFIG, LIMITS)


def test_a_step_becomes_metadata():
    metadata = validate(step(valid_lens=tensor([2, 1])))
    assert not metadata.is_decode
    assert metadata.num_tokens == 4
    assert metadata.query_lens == [2, 2]
    expected = {
        "cu_seqlens_q": [0, 2, 4],
        "context_lens": [5, 3],
        "page_tables": [[0, 1], [2, -1]],
        "slot_mapping": [5, 6, 11, 12],
        "valid_lens": [2, 1],
        "block_sizes": [1, 1],
        "prefix_lens": [0, 0],
        "padded_prefix_lens": [0, 0],
        "hole_starts": [0, 0],
        "hole_ends": [0, 0],
    }
    for field, values in expected.items():
        actual = getattr(metadata, field)
        assert actual.dtype == (torch.int32 if field == "page_tables" else torch.int64), field
        assert actual.is_contiguous(), field
        assert actual.tolist() == values, field


def test_metadata_lies_in_memory_of_its_own():
    message = step()
    sent = message.SerializeToString(deterministic=True)
    metadata = validate(message)
    for value in vars(metadata).values():
        if isinstance(value, torch.Tensor):
            value.fill_(-7)
    assert message.SerializeToString(deterministic=True) == sent
    assert validate(message).context_lens.tolist() == [5, 3]


def test_all_new_tokens_count_unless_valid_lens_says_so():
    assert validate(step()).valid_lens.tolist() == [2, 2]


def test_a_step_without_slots_stores_nothing():
    assert validate(step(slot_mapping=None)).slot_mapping is None


def test_slots_may_be_int64():
    assert validate(step(slot_mapping=tensor([-1, 6, -1, 31], "int64"))).slot_mapping.tolist() == [-1, 6, -1, 31]


def test_a_prefill_request_may_have_no_new_tokens():
    assert validate(step(cu_seqlens_q=tensor([0, 0, 4]))).query_lens == [0, 4]


def test_requests_without_context_need_no_pages():
    message = step(context_lens=tensor([0, 0]), page_tables=tensor([[], []]))
    assert validate(message).page_tables.shape == (2, 0)


def test_pages_past_the_context_are_neither_read_nor_refused():
    message = step(page_tables=tensor([[0, 1, 3, 3], [2, 3, -1, 7]]), slot_mapping=tensor([13, 14, 11, 12]))
    assert validate(message).page_tables.tolist() == [[0, 1, 3, 3], [2, 3, -1, 7]]


def test_decode():
    assert validate(step(kind=DECODE)).is_decode


@pytest.mark.parametrize(
    ("mask", "block_size"),
    [
        (step_pb2.MASK_CAUSAL, 1),
        (step_pb2.MASK_BLOCK_CAUSAL, 4),
        (step_pb2.MASK_BIDIRECTIONAL, 0),
    ],
)
def test_masks_reduce_to_block_sizes(mask, block_size):
    assert validate(step(mask=mask, block_size=4)).block_sizes.tolist() == [block_size, block_size]


def test_sizes_past_every_token_mean_the_greatest_that_kernels_take():
    greatest = {"prefix_lens": tensor([2**31 - 1, 0]), "padded_prefix_lens": tensor([2**31 - 1, 2**31 - 1])}
    metadata = validate(step(mask=step_pb2.MASK_PREFIX_FULL, block_size=2**32 - 1, **greatest))
    assert metadata.block_sizes.tolist() == [2**32 - 1] * 2
    columns = dict(zip(REQUEST_COLUMNS, metadata.columns.tolist(), strict=True))
    assert columns["block_sizes"] == [MOST_COLUMN, MOST_COLUMN]
    assert columns["prefix_lens"] == [MOST_COLUMN, 0]
    assert columns["padded_prefix_lens"] == [MOST_COLUMN, MOST_COLUMN]
    assert columns["context_lens"] == metadata.context_lens.tolist()
    assert metadata.columns.dtype == "int32"


def test_prefix_full_keeps_the_prefixes():
    metadata = validate(step(**PREFIX_FULL))
    assert metadata.block_sizes.tolist() == [2, 2]
    assert metadata.prefix_lens.tolist() == [2, 3]
    assert metadata.padded_prefix_lens.tolist() == [4, 3]
    assert metadata.hole_ends.tolist() == [0, 0]


def test_each_request_may_have_its_own_mask():
    masks = tensor([step_pb2.MASK_BIDIRECTIONAL, step_pb2.MASK_PREFIX_FULL])
    metadata = validate(step(**PREFIX_FULL | {"mask": None, "masks": masks}))
    assert metadata.block_sizes.tolist() == [0, 2]
    assert metadata.prefix_lens.tolist() == [0, 3]
    assert metadata.padded_prefix_lens.tolist() == [0, 3]


def test_a_hole_needs_no_prefix_full_mask():
    metadata = validate(step(**PREFIX_FULL | {"mask": step_pb2.MASK_CAUSAL, "mask_prefix_hole": True}))
    assert metadata.hole_starts.tolist() == [2, 3]
    assert metadata.hole_ends.tolist() == [4, 3]
    assert metadata.prefix_lens.tolist() == [0, 0]


def test_cache_only():
    metadata = validate(step(cache_only=True, slot_mapping=None))
    assert metadata.cache_only
    assert metadata.slot_mapping is None


def test_store_only_reads_nothing_and_so_may_store_into_its_context():
    metadata = validate(step(store_only=True, slot_mapping=tensor([0, 1, 2, 3])))
    assert metadata.store_only


@pytest.mark.parametrize("context_len", [1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1])
def test_the_table_covers_the_context_to_the_token(context_len):
    pages = -(-context_len // PAGE_SIZE)
    lens = {"cu_seqlens_q": tensor([0, 1]), "context_lens": tensor([context_len]), "slot_mapping": None}
    assert validate(step(**lens, page_tables=tensor([[6] * pages]))).context_lens.tolist() == [context_len]
    covered = (pages - 1) * PAGE_SIZE
    refuse(
        step(**lens, page_tables=tensor([[6] * (pages - 1)])),
        "context_lens",
        f"context_lens[0] is {context_len}, but page_tables covers {covered}: {pages - 1} pages of 4 tokens",
    )


def refuse(message, field, text):
    with pytest.raises(InvalidRequest) as caught:
        validate(message)
    assert str(caught.value) == text
    assert caught.value.field == field


REFUSED = {
    "kind_unspecified": (
        {"kind": None},
        "kind",
        "kind is unspecified, but must be STEP_KIND_PREFILL or STEP_KIND_DECODE",
    ),
    "kind_unknown": ({"kind": 9}, "kind", "kind is 9, but must be STEP_KIND_PREFILL or STEP_KIND_DECODE"),
    "cache_only_and_store_only": (
        {"cache_only": True, "store_only": True},
        "store_only",
        "store_only is true, but must be false in a cache-only step",
    ),
    "cache_only_with_slots": (
        {"cache_only": True},
        "slot_mapping",
        "slot_mapping is given, but must be absent in a cache-only step",
    ),
    "store_only_without_slots": (
        {"store_only": True, "slot_mapping": None},
        "slot_mapping",
        "slot_mapping is absent, but must be given in a store-only step",
    ),
    "cu_seqlens_q_absent": (
        {"cu_seqlens_q": None},
        "cu_seqlens_q",
        "cu_seqlens_q is absent, but must be given",
    ),
    "cu_seqlens_q_int64": (
        {"cu_seqlens_q": tensor([0, 2, 4], "int64")},
        "cu_seqlens_q",
        "cu_seqlens_q has dtype int64, but must be int32",
    ),
    "cu_seqlens_q_rank": (
        {"cu_seqlens_q": tensor([[0, 2, 4]])},
        "cu_seqlens_q",
        "cu_seqlens_q has shape [1, 3], but must be [num_reqs + 1]",
    ),
    "cu_seqlens_q_start": (
        {"cu_seqlens_q": tensor([1, 2, 4])},
        "cu_seqlens_q",
        "cu_seqlens_q[0] is 1, but must be 0",
    ),
    "cu_seqlens_q_falls": (
        {"cu_seqlens_q": tensor([0, 4, 2])},
        "cu_seqlens_q",
        "cu_seqlens_q[2] is 2, but must be at least 4, the element before it",
    ),
    "cu_seqlens_q_negative": (
        {"cu_seqlens_q": tensor([0, -1, 4])},
        "cu_seqlens_q",
        "cu_seqlens_q[1] is -1, but must be at least 0, the element before it",
    ),
    "no_requests": (
        {"cu_seqlens_q": tensor([0])},
        "cu_seqlens_q",
        "cu_seqlens_q has 1 elements, but must have 2..5: a step has 1..4 requests",
    ),
    "no_requests_at_all": (
        {"cu_seqlens_q": tensor([])},
        "cu_seqlens_q",
        "cu_seqlens_q has 0 elements, but must have 2..5: a step has 1..4 requests",
    ),
    "too_many_requests": (
        {"cu_seqlens_q": tensor([0, 1, 2, 3, 4, 5])},
        "cu_seqlens_q",
        "cu_seqlens_q has 6 elements, but must have 2..5: a step has 1..4 requests",
    ),
    "no_tokens": (
        {"cu_seqlens_q": tensor([0, 0, 0])},
        "cu_seqlens_q",
        "cu_seqlens_q[2] is 0, but a step has 1..16 new tokens",
    ),
    "too_many_tokens": (
        {"cu_seqlens_q": tensor([0, 2, 17])},
        "cu_seqlens_q",
        "cu_seqlens_q[2] is 17, but a step has 1..16 new tokens",
    ),
    "decode_ragged": (
        {"kind": DECODE, "cu_seqlens_q": tensor([0, 2, 5])},
        "cu_seqlens_q",
        "cu_seqlens_q gives 3 new tokens to request 1, but must give 2 as to request 0: "
        "in a decode step all have equally many",
    ),
    "context_lens_absent": (
        {"context_lens": None},
        "context_lens",
        "context_lens is absent, but must be given",
    ),
    "context_lens_length": (
        {"context_lens": tensor([5, 3, 1])},
        "context_lens",
        "context_lens has shape [3], but must be [2]",
    ),
    "context_lens_negative": (
        {"context_lens": tensor([5, -1])},
        "context_lens",
        "context_lens[1] is -1, but must be at least 0",
    ),
    "context_lens_past_the_table": (
        {"context_lens": tensor([5, 9])},
        "context_lens",
        "context_lens[1] is 9, but page_tables covers 8: 2 pages of 4 tokens",
    ),
    "page_tables_absent": ({"page_tables": None}, "page_tables", "page_tables is absent, but must be given"),
    "page_tables_rows": (
        {"page_tables": tensor([[0, 1]])},
        "page_tables",
        "page_tables has shape [1, 2], but must be [2, max_pages]",
    ),
    "page_tables_flat": (
        {"page_tables": tensor([0, 1, 2, -1])},
        "page_tables",
        "page_tables has shape [4], but must be [2, max_pages]",
    ),
    "page_tables_past_the_cache": (
        {"page_tables": tensor([[0, 1], [2, 8]])},
        "page_tables",
        "page_tables[1, 1] is 8, but the cache has pages 0..7, and -1 is no page",
    ),
    "page_tables_below_minus_one": (
        {"page_tables": tensor([[0, -2], [2, 3]])},
        "page_tables",
        "page_tables[0, 1] is -2, but the cache has pages 0..7, and -1 is no page",
    ),
    "page_tables_wrong_past_the_context": (
        {"page_tables": tensor([[0, 1, 99], [2, -1, -1]])},
        "page_tables",
        "page_tables[0, 2] is 99, but the cache has pages 0..7, and -1 is no page",
    ),
    "page_tables_too_large": (
        {"page_tables": tensor([[0] * 13, [2] * 13])},
        "page_tables",
        "page_tables has 26 elements, but must have at most 24",
    ),
    "slot_mapping_length": (
        {"slot_mapping": tensor([5, 6, 11])},
        "slot_mapping",
        "slot_mapping has shape [3], but must be [4]",
    ),
    "slot_mapping_float": (
        {"slot_mapping": tensor([5, 6, 11, 12], "float32")},
        "slot_mapping",
        "slot_mapping has dtype float32, but must be int32 or int64",
    ),
    "slot_mapping_past_the_cache": (
        {"slot_mapping": tensor([5, 6, 11, 32])},
        "slot_mapping",
        "slot_mapping[3] is 32, but the cache has slots 0..31, and -1 is not stored",
    ),
    "slot_mapping_huge": (
        {"slot_mapping": tensor([5, 6, 11, 2**62], "int64")},
        "slot_mapping",
        f"slot_mapping[3] is {2**62}, but the cache has slots 0..31, and -1 is not stored",
    ),
    "slot_mapping_below_minus_one": (
        {"slot_mapping": tensor([5, -2, 11, 12])},
        "slot_mapping",
        "slot_mapping[1] is -2, but the cache has slots 0..31, and -1 is not stored",
    ),
    "valid_lens_length": (
        {"valid_lens": tensor([2])},
        "valid_lens",
        "valid_lens has shape [1], but must be [2]",
    ),
    "valid_lens_past_the_query": (
        {"valid_lens": tensor([2, 3])},
        "valid_lens",
        "valid_lens[1] is 3, but must be 0..2, the request's new tokens",
    ),
    "valid_lens_negative": (
        {"valid_lens": tensor([-1, 2])},
        "valid_lens",
        "valid_lens[0] is -1, but must be 0..2, the request's new tokens",
    ),
    "mask_unspecified": (
        {"mask": None},
        "mask",
        "mask is unspecified, but must be MASK_CAUSAL, MASK_BLOCK_CAUSAL, MASK_BIDIRECTIONAL or MASK_PREFIX_FULL",
    ),
    "mask_unknown": (
        {"mask": 5},
        "mask",
        "mask is 5, but must be MASK_CAUSAL, MASK_BLOCK_CAUSAL, MASK_BIDIRECTIONAL or MASK_PREFIX_FULL",
    ),
    "masks_unspecified": (
        {"masks": tensor([1, 0])},
        "masks",
        "masks[1] is 0, but must be MASK_CAUSAL, MASK_BLOCK_CAUSAL, MASK_BIDIRECTIONAL or MASK_PREFIX_FULL",
    ),
    "masks_length": ({"masks": tensor([1])}, "masks", "masks has shape [1], but must be [2]"),
    "block_size_missing": (
        {"mask": step_pb2.MASK_BLOCK_CAUSAL},
        "block_size",
        "block_size is 0, but must be at least 1 for a block-causal or prefix-full mask",
    ),
    "block_size_missing_for_one": (
        {"masks": tensor([1, 2])},
        "block_size",
        "block_size is 0, but must be at least 1 for a block-causal or prefix-full mask",
    ),
    "block_size_missing_for_prefix_full": (
        PREFIX_FULL | {"block_size": 0},
        "block_size",
        "block_size is 0, but must be at least 1 for a block-causal or prefix-full mask",
    ),
    "prefix_lens_absent": (
        PREFIX_FULL | {"prefix_lens": None},
        "prefix_lens",
        "prefix_lens is absent, but must be given",
    ),
    "padded_prefix_lens_absent": (
        PREFIX_FULL | {"padded_prefix_lens": None},
        "padded_prefix_lens",
        "padded_prefix_lens is absent, but must be given",
    ),
    "hole_without_prefix_lens": (
        {"mask_prefix_hole": True},
        "prefix_lens",
        "prefix_lens is absent, but must be given",
    ),
    "prefix_lens_negative": (
        PREFIX_FULL | {"prefix_lens": tensor([-1, 3])},
        "prefix_lens",
        "prefix_lens[0] is -1, but must be at least 0",
    ),
    "prefix_lens_wrong_though_unused": (
        {"prefix_lens": tensor([1, -3])},
        "prefix_lens",
        "prefix_lens[1] is -3, but must be at least 0",
    ),
    "padded_prefix_lens_below": (
        PREFIX_FULL | {"padded_prefix_lens": tensor([4, 2])},
        "padded_prefix_lens",
        "padded_prefix_lens[1] is 2, but must be at least 3, the request's prefix_lens",
    ),
}


@pytest.mark.parametrize(("changes", "field", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(changes, field, text):
    refuse(step(**changes), field, text)


INT32 = tensor_pb2.DTYPE_INT32
HEADERS = {
    "dtype_unspecified": (
        tensor_pb2.Tensor(shape=[2], data=bytes(8)),
        "context_lens has dtype unspecified, but must be int32",
    ),
    "dtype_unknown": (
        tensor_pb2.Tensor(dtype=77, shape=[2], data=bytes(8)),
        "context_lens has dtype 77, but must be int32",
    ),
    "cut_short": (
        tensor_pb2.Tensor(dtype=INT32, shape=[2], data=bytes(7)),
        "context_lens has 7 bytes of data, but must have 8 for int32 [2]",
    ),
    "too_long": (
        tensor_pb2.Tensor(dtype=INT32, shape=[2], data=bytes(12)),
        "context_lens has 12 bytes of data, but must have 8 for int32 [2]",
    ),
    "no_data": (
        tensor_pb2.Tensor(dtype=INT32, shape=[2]),
        "context_lens has 0 bytes of data, but must have 8 for int32 [2]",
    ),
    "no_shape": (
        tensor_pb2.Tensor(dtype=INT32, data=bytes(8)),
        "context_lens has shape [], but must be [2]",
    ),
    "many_dimensions": (
        tensor_pb2.Tensor(dtype=INT32, shape=[1] * 100_000, data=bytes(4)),
        "context_lens has shape [1, 1, 1, 1, 1, 1, 1, 1, ...], but must be [2]",
    ),
    "region": (
        tensor_pb2.Tensor(dtype=INT32, shape=[2], region=tensor_pb2.Region(id=3)),
        "context_lens.region.id is 3, but must be a region that OpenPlane registered",
    ),
}


@pytest.mark.parametrize(("value", "text"), HEADERS.values(), ids=HEADERS.keys())
def test_headers_are_refused(value, text):
    refuse(step(context_lens=value), "context_lens", text)


@pytest.mark.parametrize("extent", [2**31, 2**60, 2**63 - 1])
def test_a_huge_extent_is_refused_before_anything_is_allocated(extent):
    value = tensor_pb2.Tensor(dtype=INT32, shape=[2, extent], data=bytes(16))
    text = f"page_tables has 16 bytes of data, but must have {8 * extent} for int32 [2, {extent}]"
    refuse(step(page_tables=value), "page_tables", text)


@pytest.mark.parametrize("extent", [-1, -(2**63)])
def test_a_negative_extent_is_refused(extent):
    value = tensor_pb2.Tensor(dtype=INT32, shape=[2, extent], data=bytes(16))
    refuse(step(page_tables=value), "page_tables", f"page_tables has shape [2, {extent}], but must be [2, max_pages]")
