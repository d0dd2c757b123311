"""Where the metadata of resident steps lies: what a worker of any language goes by, as attention.proto says it."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from attnd.errors import InvalidRequest
from attnd.protocol.cuda.layout import (
    ALIGNMENT,
    TO_SERVER,
    TO_WORKER,
    WORDS_BYTES,
    Geometry,
    StepLayout,
    step_layout,
)
from attnd.protocol.cuda.resident import (
    LENS_ROWS,
    REFUSED,
    VERSION,
    WAKE,
    common_tokens,
    layer_layouts,
    metadata_bytes,
    resident_layout,
    resident_tensors,
    rounded,
    tensors_end,
)
from attnd.v1 import tensor_pb2

MIB = 1 << 20


def step_of(num_tokens: int, num_heads: int = 2, head_dim: int = 64, head_dim_v: int = 64) -> StepLayout:
    """The tensors of a step, in one KV head."""
    geometry = Geometry(1, head_dim, head_dim_v, tensor_pb2.DTYPE_FLOAT32)
    return step_layout(num_tokens, num_heads, geometry, 1 << 30)


def test_numbers_are_rounded_up_to_whole_copies() -> None:
    assert [rounded(number) for number in (1, 3, 4, 5, 8, 9, 1023, 1024)] == [4, 4, 4, 8, 8, 12, 1024, 1024]


def test_metadata_lies_where_the_protocol_says() -> None:
    """Numbers, not formulas: a worker that was built before goes by them."""
    assert (VERSION, LENS_ROWS, REFUSED, WAKE) == (1, 4, 512, 1024)
    layout = resident_layout(64, 128, resident_tensors(step_of(64)), MIB)
    # Lengths take 4 rows of 64 numbers of 4 bytes, tables 64 rows of 128.
    assert layout == (64, 128, MIB - 33_792 - 256, MIB - 33_792 - 256 + 64, MIB - 33_792 - 256 + 64 + 1024)
    assert metadata_bytes(64, 128) == 64 + 1024 + 32_768
    layout = resident_layout(1, 1, resident_tensors(step_of(4)), MIB)
    assert layout == (4, 4, MIB - 512, MIB - 512 + 64, MIB - 512 + 64 + 256)
    assert metadata_bytes(1, 1) == 64 + 256 + 64


def test_words_that_the_host_or_the_server_writes_lie_apart() -> None:
    """A word may be written by 8 bytes, and none shares a sector of a GPU's memory with another side's."""
    of_results, of_host = (TO_WORKER, REFUSED, REFUSED + 16), (TO_SERVER, TO_WORKER, WAKE, WAKE + 8)
    for offsets in (of_results, of_host):
        assert all(offset <= WORDS_BYTES for offset in offsets)
    assert all(
        abs(one - other) >= 32 for one, other in itertools.combinations((TO_SERVER, TO_WORKER, REFUSED, WAKE), 2)
    )
    assert REFUSED % 8 == WAKE % 8 == 0


def test_layers_that_follow_each_other_have_k_and_v_in_places_of_their_own() -> None:
    """The server stores those of a layer while the worker writes those of the next."""
    chance = random.Random(1)
    for _ in range(200):
        layout = step_of(chance.randint(1, 99), chance.choice((1, 3, 8)), 24, chance.choice((8, 16)))
        even, odd = resident_tensors(layout)
        assert even == layout
        assert (odd.q, odd.output, odd.lse) == (layout.q, layout.output, layout.lse)
        for one, other in ((odd.k, layout.k), (odd.v, layout.v)):
            assert one._replace(offset=0) == other._replace(offset=0)
        places = sorted({*even, *odd})
        assert len(places) == 7
        assert all(place.offset % ALIGNMENT == 0 for place in places)
        for one, other in itertools.pairwise(places):
            assert one.offset + one.num_bytes <= other.offset
        assert tensors_end((even, odd)) == places[-1].offset + places[-1].num_bytes


def test_tensors_of_odd_layers_lie_where_the_protocol_says() -> None:
    """Numbers, as above: 5 tokens of 2 heads of q, one of k of 24 and v of 16 numbers of 4 bytes."""
    _, odd = resident_tensors(step_of(5, 2, 24, 16))
    assert [place.offset for place in odd] == [4096, 7168, 7680, 6144, 6912]


@pytest.mark.parametrize("seed", range(3))
def test_metadata_lies_behind_the_tensors_and_nothing_overlaps(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(500):
        max_reqs, max_pages = chance.randint(1, 1024), chance.randint(1, 300)
        num_bytes, step = metadata_bytes(max_reqs, max_pages), resident_tensors(step_of(rounded(max_reqs)))
        region_bytes = tensors_end(step) + num_bytes + chance.randint(2 * ALIGNMENT, MIB)
        layout = resident_layout(max_reqs, max_pages, step, region_bytes)
        assert (layout.max_reqs, layout.max_pages) == (rounded(max_reqs), rounded(max_pages))
        assert max_reqs <= layout.max_reqs < max_reqs + 4
        assert max_pages <= layout.max_pages < max_pages + 4
        assert tensors_end(step) <= layout.word
        assert layout.word % ALIGNMENT == 0
        assert layout.lens == layout.word + 64  # alone, as the worker writes it while the server's GPU reads it
        assert layout.lens + LENS_ROWS * 4 * layout.max_reqs <= layout.page_tables
        assert (layout.page_tables - layout.lens) % ALIGNMENT == 0
        assert layout.page_tables % 16 == layout.lens % 16 == 0  # as they are copied
        end = layout.page_tables + 4 * layout.max_reqs * layout.max_pages
        assert end == layout.word + num_bytes
        assert region_bytes - ALIGNMENT < end <= region_bytes


def test_metadata_fits_to_the_byte() -> None:
    step = resident_tensors(step_of(8))
    end, num_bytes = tensors_end(step), metadata_bytes(8, 16)
    assert end % ALIGNMENT == 0
    assert resident_layout(8, 16, step, end + num_bytes).word == end
    with pytest.raises(InvalidRequest) as refused:
        resident_layout(8, 16, step, end + num_bytes - 1)
    assert refused.value.field == "max_reqs"
    assert str(refused.value) == (
        f"steps of 8 requests with 16 pages take {end + num_bytes} bytes of a cuda plane's region, but it has "
        f"{end + num_bytes - 1}; the server's --cuda-region-bytes gives more"
    )


def test_a_region_that_does_not_even_hold_the_metadata_is_told() -> None:
    with pytest.raises(InvalidRequest, match="steps of 1024 requests with 1024 pages take"):
        resident_layout(1024, 1024, resident_tensors(step_of(1024)), MIB)
    with pytest.raises(InvalidRequest, match="but it has 0"):
        resident_layout(1, 1, resident_tensors(step_of(4)), 0)


def test_a_region_that_is_refused_has_less_than_what_is_asked_for() -> None:
    """And one of as many bytes as the message says is large enough: somebody will give it just these."""
    chance, num_refused = random.Random(1), 0
    for _ in range(500):
        max_reqs, max_pages = chance.randint(1, 64), chance.randint(1, 64)
        step = resident_tensors(step_of(rounded(max_reqs), 1, 24, 8))
        region_bytes = tensors_end(step) + metadata_bytes(max_reqs, max_pages) + chance.randint(-512, 256)
        try:
            resident_layout(max_reqs, max_pages, step, region_bytes)
        except InvalidRequest as refused:
            needed, num_refused = int(re.findall(r"take (\d+) bytes", str(refused))[0]), num_refused + 1
            assert needed > region_bytes
            resident_layout(max_reqs, max_pages, step, needed)
    assert num_refused > 100


LLAMA_8B = Geometry(8, 128, 128, tensor_pb2.DTYPE_BFLOAT16)


def test_steps_of_any_size_have_their_rows_where_those_of_the_layout_are() -> None:
    """So that a worker's CUDA graph serves steps by message and resident ones."""
    whole = layer_layouts(1024, 32, LLAMA_8B, 128 * MIB, 1024)
    assert whole == resident_tensors(step_layout(1024, 32, LLAMA_8B, 128 * MIB))
    for num_tokens in (1, 3, 1023, 1024):
        for some, all_of in zip(layer_layouts(num_tokens, 32, LLAMA_8B, 128 * MIB, 1024), whole, strict=True):
            for place, other in zip(some, all_of, strict=True):
                assert (place.offset, place.dtype, place.is_result) == (other.offset, other.dtype, other.is_result)
                assert place.shape == (num_tokens, *other.shape[1:])
                assert place.num_bytes * 1024 == other.num_bytes * num_tokens


def test_without_a_layout_all_layers_lie_as_ever() -> None:
    layout = step_layout(7, 32, LLAMA_8B, 128 * MIB)
    assert layer_layouts(7, 32, LLAMA_8B, 128 * MIB) == (layout, layout)


def test_a_layout_must_hold_the_step_and_fit_the_region() -> None:
    with pytest.raises(InvalidRequest, match="layout_tokens is 6, but must be 0, or at least the 7 tokens of the step"):
        layer_layouts(7, 32, LLAMA_8B, 128 * MIB, 6)
    end = tensors_end(resident_tensors(step_layout(64, 32, LLAMA_8B, 128 * MIB)))
    assert tensors_end(layer_layouts(64, 32, LLAMA_8B, end, 64)) == end
    with pytest.raises(
        InvalidRequest, match=f"layers of 64 tokens take {end} bytes of a cuda plane's region, but it has"
    ):
        layer_layouts(1, 32, LLAMA_8B, end - 1, 64)


@pytest.mark.parametrize("region_bytes", [0, 5000, 40_000, MIB, 8 * MIB, 128 * MIB])
def test_what_steps_have_in_common_leaves_half_of_the_region(region_bytes: int) -> None:
    count = common_tokens(32, LLAMA_8B, region_bytes)
    assert count in (0, *(1 << bits for bits in range(11)))
    if count:
        assert tensors_end(layer_layouts(count, 32, LLAMA_8B, region_bytes, count)) <= region_bytes // 2
    if count < 1024:
        more = resident_tensors(step_layout(2 * count or 1, 32, LLAMA_8B, 1 << 40))
        assert tensors_end(more) > region_bytes // 2
