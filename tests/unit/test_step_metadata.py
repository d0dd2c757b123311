"""`StepMetadata` to the wire: every kind of array gives the same message, and what cannot be carried is named."""

from __future__ import annotations

import sys
import time
from array import array

import numpy as np
import pytest
import torch

from attnd.errors import InvalidRequest
from attnd.protocol.step_metadata import StepMetadata
from attnd.protocol.tensors import Array
from attnd.v1 import cache_pb2, step_pb2, tensor_pb2
from tests.unit.plain import elements, with_narrow_slots

REF = cache_pb2.CacheRef(id=bytes(range(16)), epoch=7)


def _attnd_array(values: list) -> Array:
    return Array(tensor_pb2.DTYPE_INT32, np.shape(values), memoryview(np.array(values, np.int32).tobytes()))


KINDS_OF_ARRAYS = {
    "list": lambda values: values,
    "tuple": lambda values: tuple(tuple(v) if isinstance(v, list) else v for v in values),
    "numpy_int32": lambda values: np.array(values, np.int32),
    "numpy_int64": lambda values: np.array(values, np.int64),
    "numpy_int16": lambda values: np.array(values, np.int16),
    "numpy_strided": lambda values: np.repeat(np.array(values, np.int64), 2, -1)[..., ::2],
    "numpy_big_endian": lambda values: np.array(values, ">i8"),
    "torch_int32": lambda values: torch.tensor(values, dtype=torch.int32),
    "torch_int64": lambda values: torch.tensor(values, dtype=torch.int64),
    "torch_int16": lambda values: torch.tensor(values, dtype=torch.int16),
    "torch_strided": lambda values: torch.tensor(values, dtype=torch.int32).repeat_interleave(2, -1)[..., ::2],
    "torch_strided_int64": lambda values: torch.tensor(values).repeat_interleave(2, -1)[..., ::2],
    "attnd_array": _attnd_array,
    "memoryview": lambda values: memoryview(np.array(values, np.int32)),
    "memoryview_int64": lambda values: memoryview(np.array(values, np.int64)),
    "memoryview_strided": lambda values: memoryview(np.repeat(np.array(values, np.int64), 2, -1)[..., ::2]),
}


OF_INT64 = {
    "numpy_int64",
    "numpy_strided",
    "torch_int64",
    "torch_strided_int64",
    "memoryview_int64",
    "memoryview_strided",
}


def _metadata(make=lambda values: values, **changes) -> StepMetadata:
    fields = {
        "query_lens": make([2, 1]),
        "context_lens": make([5, 0]),
        "page_tables": make([[3, 4, -1], [7, -1, -1]]),
        "slot_mapping": make([29, -1, 56]),
    }
    return StepMetadata(**{**fields, **changes})


def everything(make) -> StepMetadata:
    """A step that gives every array."""
    return _metadata(
        make,
        mask="prefix_full",
        block_size=4,
        valid_lens=make([2, 0]),
        prefix_lens=make([1, 2]),
        padded_prefix_lens=make([4, 4]),
        attend_new=make([0, 1]),
        first_position=make([8, 0]),
    )


def test_every_array_has_its_field() -> None:
    message = everything(lambda values: values).to_message(9, REF)
    assert message.id == 9
    assert message.cache == REF
    assert message.kind == step_pb2.STEP_KIND_PREFILL
    assert message.mask == step_pb2.MASK_PREFIX_FULL
    assert message.block_size == 4
    values = {field.name: elements(value) for field, value in message.ListFields() if hasattr(value, "data")}
    assert values == {
        "cu_seqlens_q": [0, 2, 3],
        "context_lens": [5, 0],
        "page_tables": [[3, 4, -1], [7, -1, -1]],
        "slot_mapping": [29, -1, 56],
        "valid_lens": [2, 0],
        "prefix_lens": [1, 2],
        "padded_prefix_lens": [4, 4],
        "attend_new": [0, 1],
        "first_position": [8, 0],
    }
    assert {getattr(message, name).dtype for name in values} == {tensor_pb2.DTYPE_INT32}


@pytest.mark.parametrize("kind", KINDS_OF_ARRAYS)
@pytest.mark.parametrize("has_numpy", [True, False], ids=["", "without_numpy"])
def test_every_kind_of_array_gives_the_same_message(
    kind: str, has_numpy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = everything(KINDS_OF_ARRAYS[kind])
    if not has_numpy:
        if isinstance(metadata.query_lens, np.ndarray):
            pytest.skip("an array of numpy comes with numpy")
        monkeypatch.delitem(sys.modules, "numpy")
    message = metadata.to_message(9, REF)
    is_wide = kind in OF_INT64  # whose slots stay so, as 0.1.0 sends them
    assert message.slot_mapping.dtype == (tensor_pb2.DTYPE_INT64 if is_wide else tensor_pb2.DTYPE_INT32)
    assert with_narrow_slots(message) == everything(lambda values: values).to_message(9, REF)


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_truth_values_say_who_attends_to_new_tokens(make) -> None:
    message = _metadata(attend_new=make([True, False])).to_message(1, REF)
    assert elements(message.attend_new) == [1, 0]


def test_what_is_not_given_is_absent() -> None:
    message = _metadata(slot_mapping=None, kind="decode").to_message(1, REF)
    assert message.kind == step_pb2.STEP_KIND_DECODE
    assert message.mask == step_pb2.MASK_CAUSAL
    for name in ("slot_mapping", "valid_lens", "masks", "prefix_lens", "padded_prefix_lens"):
        assert not message.HasField(name)
    for name in ("attend_new", "first_position", "page_table_delta"):
        assert not message.HasField(name)
    assert not any((message.mask_prefix_hole, message.cache_only, message.store_only, message.store_first))
    assert message.window == 0
    assert not message.groups


def test_flags_travel() -> None:
    metadata = _metadata(mask_prefix_hole=True, cache_only=True, store_only=True, store_first=True, window=3)
    message = metadata.to_message(1, REF)
    assert message.store_first
    assert message.window == 3
    assert message.mask_prefix_hole
    assert message.cache_only
    assert message.store_only


def test_one_mask_for_each_request() -> None:
    message = _metadata(mask=["causal", "bidirectional"]).to_message(1, REF)
    assert message.mask == step_pb2.MASK_UNSPECIFIED
    assert elements(message.masks) == [step_pb2.MASK_CAUSAL, step_pb2.MASK_BIDIRECTIONAL]


@pytest.mark.parametrize(
    ("tables", "shape"),
    [([], [0, 0]), ([[], []], [2, 0]), (np.zeros((0, 4), np.int32), [0, 4]), (torch.zeros(2, 0).int(), [2, 0])],
    ids=["no_reqs", "no_pages_list", "no_reqs_numpy", "no_pages_torch"],
)
def test_empty_page_tables_keep_their_shape(tables, shape: list[int]) -> None:
    message = _metadata(page_tables=tables).to_message(1, REF)
    assert message.page_tables.shape == shape
    assert message.page_tables.data == b""


def test_no_requests() -> None:
    message = StepMetadata([], [], [], []).to_message(1, REF)
    assert elements(message.cu_seqlens_q) == [0]
    assert message.context_lens.shape == [0]


def test_rows_of_page_tables_may_be_arrays() -> None:
    rows = [np.array([1, 2]), torch.tensor([3, 4]), (5, 6)]
    assert elements(_metadata(page_tables=rows).to_message(1, REF).page_tables) == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("make", [list, np.array, lambda values: array("q", values)], ids=["list", "numpy", "array"])
def test_slots_beyond_32_bits_travel_as_int64(make) -> None:
    message = _metadata(slot_mapping=make([1 << 40, -1, 3])).to_message(1, REF)
    assert message.slot_mapping.dtype == tensor_pb2.DTYPE_INT64
    assert elements(message.slot_mapping) == [1 << 40, -1, 3]


REFUSED = {
    "kind": ({"kind": "mixed"}, "kind is 'mixed', but must be one of prefill, decode"),
    "mask": ({"mask": "full"}, "mask is 'full', but must be one of causal, block_causal, bidirectional, prefix_full"),
    "mask_none": ({"mask": None}, "mask is None, but must be one of"),
    "mask_of_request": ({"mask": ["causal", 3]}, "mask[1] is 3, but must be one of"),
    "block_size": ({"block_size": -1}, "block_size is -1, but must be an integer in 0..4294967295"),
    "block_size_float": ({"block_size": 1.5}, "block_size is 1.5, but must be an integer"),
    "float_lens": ({"query_lens": [1.0, 2.0]}, "query_lens must hold 32-bit integers"),
    "float_array": ({"context_lens": np.array([1.0], np.float32)}, "context_lens has dtype float32"),
    "text": ({"context_lens": "12"}, "context_lens is a str"),
    "bytes": ({"context_lens": b"12345678"}, "context_lens has format"),
    "too_big": ({"context_lens": [1 << 31]}, "context_lens must hold 32-bit integers"),
    "too_small": ({"context_lens": [-(1 << 31) - 1]}, "context_lens must hold 32-bit integers"),
    "too_small_numpy": ({"context_lens": np.array([0, -(1 << 31) - 1])}, "context_lens must hold 32-bit integers"),
    "too_big_torch": ({"context_lens": torch.tensor([1 << 31])}, "context_lens must hold 32-bit integers"),
    "too_big_view": ({"context_lens": array("q", [1 << 31])}, "context_lens must hold 32-bit integers"),
    "too_big_pages": ({"page_tables": np.array([[1 << 31]])}, "page_tables must hold 32-bit integers"),
    "unsigned": ({"slot_mapping": np.array([1 << 63], np.uint64)}, "slot_mapping must hold 64-bit integers"),
    "float_tensor": ({"context_lens": torch.zeros(2)}, "context_lens has dtype float32, but must be int32 or int64"),
    "rows_without_length": ({"page_tables": [iter([1]), iter([2])]}, "page_tables must hold rows of one length"),
    "window": ({"window": -1}, "window is -1, but must be an integer in 0..4294967295"),
    "attend_new": ({"attend_new": [0.5, 1]}, "attend_new must hold 32-bit integers"),
    "first_position": ({"first_position": [1 << 31, 0]}, "first_position must hold 32-bit integers"),
    "too_big_array": ({"context_lens": np.array([1 << 31])}, "context_lens must hold 32-bit integers"),
    "too_long": ({"query_lens": [1 << 30, 1 << 30]}, "query_lens is 2147483648 in all, but must be at most 2147483647"),
    "two_dimensions": ({"query_lens": np.zeros((2, 2), np.int32)}, "query_lens has shape [2, 2], but must be 1-D"),
    "page_too_big": ({"page_tables": [[1 << 31], [0]]}, "page_tables[0] must hold 32-bit integers"),
    "flat_tables": ({"page_tables": [1, 2]}, "page_tables[0] must hold 32-bit integers"),
    "ragged": ({"page_tables": [[1, 2], [3]]}, "page_tables[1] has 1 pages, but must have 2 as page_tables[0]"),
    "missing": ({"page_tables": None}, "page_tables is None, but must be given where groups is not"),
    "no elements": (
        {"page_tables": torch.zeros(1, 1, dtype=torch.int32, device="meta")},
        "page_tables has device meta, but must have elements",
    ),
    "slot_too_big": ({"slot_mapping": [1 << 63]}, "slot_mapping must hold 64-bit integers"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_the_wire_cannot_carry(changes: dict, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _metadata(**changes).to_message(1, REF)
    assert message in str(caught.value)
    assert caught.value.field == next(iter(changes))


def test_metadata_is_frozen_and_compared_by_identity() -> None:
    metadata = _metadata(np.array)
    with pytest.raises(AttributeError):
        metadata.kind = "decode"  # type: ignore[misc]
    assert metadata != _metadata(np.array)
    assert metadata in {metadata}


@pytest.mark.parametrize("kind", ["list", "numpy_int32", "torch_int32"])
def test_a_decode_step_of_64_requests_is_cheap(kind: str) -> None:
    make = KINDS_OF_ARRAYS[kind]
    metadata = StepMetadata(
        make([1] * 64), make([100] * 64), make([list(range(8))] * 64), make(list(range(64))), kind="decode"
    )
    times = []
    for _ in range(200):
        start = time.perf_counter()
        metadata.to_message(1, REF)
        times.append(time.perf_counter() - start)
    # Some 25 to 45 microseconds where it was measured; the bound leaves room for busy machines.
    assert min(times) < 300e-6
