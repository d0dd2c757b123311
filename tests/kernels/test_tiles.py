"""Requests that are computed a tile at a time, because they would take too much memory at once, against the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from attnd_server import NaiveAttention
from attnd_server.attention import tiles
from attnd_server.attention.backends import dense_prefill, gather, naive, part_costs
from attnd_server.attention.backends.gather import PartsInTurn
from attnd_server.attention.backends.sdpa import SdpaAttention
from attnd_server.attention.config import FP8, Layout
from attnd_server.attention.kernels import pages
from attnd_server.attention.kernels.pages import as_stored, copy_pages, page_copies, store_kv, stored_tokens
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.masks import visible
from tests import oracle
from tests.kernels.test_naive import MIXED
from tests.oracle import CAUSAL, Case, Request
from tests.tolerances import assert_close

ANY_STEP = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CPU = torch.device("cpu")
NAMED_AGAIN = Case([Request(4000, 3, 3, [7] * 250)], num_kv_heads=2, group=4, head_dim=8, head_dim_v=8, return_lse=True)


@pytest.fixture(params=[0, 20_000], ids=["nothing fits", "some fit"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", request.param)
    monkeypatch.setattr(tiles, "KEY_TILE", 8)
    monkeypatch.setattr(naive, "TILE", 3)


@pytest.mark.usefixtures("small_tiles")
@ANY_STEP
@given(case=oracle.cases())
def test_naive_by_tiles(case: Case) -> None:
    oracle.check(NaiveAttention(), case, "cpu")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_bits_of_tiles_do_not_depend_on_the_batch(layout: Layout, dtype: torch.dtype) -> None:
    case = replace(MIXED, layout=layout, dtype=dtype, softcap=4.0, alibi=True, sinks=True)
    tensors = oracle.tensors(case)
    output, lse = oracle.run(NaiveAttention(), case, tensors, "cpu")
    assert lse is not None
    for index in range(len(case.requests)):
        alone, rows = oracle.one_request(case, index)
        part = replace(tensors, q=tensors.q[rows], k=tensors.k[rows], v=tensors.v[rows])  # type: ignore[index]
        alone_output, alone_lse = oracle.run(NaiveAttention(), alone, part, "cpu")
        assert torch.equal(alone_output, output[rows])
        assert alone_lse is not None
        assert torch.equal(alone_lse, lse[rows])


def test_a_request_that_fits_is_computed_at_once_whatever_shares_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Request(37, 3, 3, [1, 2, 3])
    case = Case([small, replace(NAMED_AGAIN.requests[0], query_len=60, valid_len=60)], return_lse=True)
    case = replace(case, requests=[replace(small, pages=[1, 2, 3, *[-1] * 247]), case.requests[1]])
    tensors = oracle.tensors(replace(case, poison=0.5))
    at_once, _ = oracle.run(NaiveAttention(), case, tensors, "cpu")
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 1 << 20)
    by_tiles, _ = oracle.run(NaiveAttention(), case, tensors, "cpu")
    assert torch.equal(at_once[:3], by_tiles[:3])
    assert not torch.equal(at_once[3:], by_tiles[3:])
    assert_close(by_tiles, at_once.double().numpy(), torch.float32)


@pytest.mark.parametrize("first", [0, 7, 16])
@pytest.mark.parametrize("window", [0, 5])
def test_columns_of_a_mask_are_those_of_the_whole(first: int, window: int) -> None:
    metadata = MIXED.metadata()
    for request in range(metadata.num_reqs):
        whole = visible(metadata, request, window, page_size=16)
        for end in range(first, whole.shape[1] + 1, 3):
            part = visible(metadata, request, window, page_size=16, columns=slice(first, end))
            assert torch.equal(part, whole[:, first:end])


@pytest.fixture(params=[1 << 40, 5_000], ids=["products", "bytes"])
def small_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[Any, dict[str, int]] = {
        part_costs: {"MAX_PRODUCTS": 4096, "SCRATCH_BYTES": request.param},
        gather: {"MASK_ELEMENTS": 64, "KEPT_BYTES": 0, "PLAIN_ROWS": 4, "TILE_ROWS": 5, "BATCHED_ROWS": 3},
        dense_prefill: {"PLAIN_ROWS": 4},
    }
    for module, numbers in limits.items():
        for name, number in numbers.items():
            monkeypatch.setattr(module, name, number)


@pytest.mark.usefixtures("small_parts")
@ANY_STEP
@given(case=oracle.cases(plain=True))
def test_sdpa_some_heads_at_a_time(case: Case) -> None:
    oracle.check(SdpaAttention(), case, "cpu")


def test_sdpa_keeps_no_masks_that_take_much_memory() -> None:
    case = Case([Request(4000, 512, 512, [7] * 250)])
    given_options = oracle.options(case, oracle.tensors(Case([])))
    assert isinstance(gather.split(case.config(), case.metadata(), given_options, CPU), list)
    metadata = replace(case.metadata(), context_lens=torch.tensor([1 << 16]), page_tables=torch.zeros(1, 4096).int())
    parts = gather.split(case.config(), metadata, given_options, CPU)
    assert isinstance(parts, PartsInTurn)
    rows = [part.num_rows for part in parts]
    assert sum(rows) == 512
    assert max(rows) * ((1 << 16) + 512) <= gather.MASK_ELEMENTS
    assert rows == [part.num_rows for part in parts]  # for every layer again


def test_sdpa_refuses_a_head_that_is_too_big_with_the_number() -> None:
    case = Case([Request(4000, 1, 1, [7] * 250)], num_kv_heads=1, group=1, head_dim=128, head_dim_v=128)
    metadata = replace(case.metadata(), context_lens=torch.tensor([1 << 20]), page_tables=torch.zeros(1, 1 << 16).int())
    given_options = oracle.options(case, oracle.tensors(Case([])))
    assert SdpaAttention().supports(case.config(), case.metadata(), given_options) is None
    reason = SdpaAttention().supports(case.config(), metadata, given_options)
    assert reason is not None
    assert f"{(1 << 20) + 1} keys" in reason
    assert str(tiles.SCRATCH_BYTES) in reason


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(12, 3), (8, 8), (6, 1)])
@pytest.mark.parametrize("most", [0, 1, 3, 5, 100])
def test_blocks_have_each_head_once_and_its_kv_head(num_heads: int, num_kv_heads: int, most: int) -> None:
    group, seen = num_heads // num_kv_heads, []
    for heads in tiles.head_blocks(num_heads, num_kv_heads, most):
        block = range(num_heads)[heads.query]
        assert len(block) <= max(1, most)
        assert {head // group for head in block} == set(range(num_kv_heads)[heads.kv])
        assert len(block) % group == 0 or heads.kv.stop - heads.kv.start == 1
        seen += block
    assert seen == list(range(num_heads))


def pieces_of(case: Case, kernel: NaiveAttention | SdpaAttention) -> tuple[Iterator[None], torch.Tensor]:
    given_tensors = oracle.tensors(case)
    plan = kernel.plan(case.config(), case.metadata(), oracle.options(case, given_tensors), CPU)
    output = torch.full((case.num_tokens, case.num_heads, case.head_dim_v), 9.0, dtype=case.dtype)
    lse = torch.empty(output.shape[:2]) if case.return_lse else None
    tensors = given_tensors.q, given_tensors.k, given_tensors.v, given_tensors.pages
    return kernel.pieces(plan, output, lse, *tensors), output


@pytest.mark.usefixtures("small_tiles", "small_parts")
@pytest.mark.parametrize("kernel", [NaiveAttention(), SdpaAttention()])
def test_a_kernel_can_be_left_between_its_pieces(kernel: NaiveAttention | SdpaAttention) -> None:
    case = replace(NAMED_AGAIN, return_lse=False, requests=[Request(40, 3, 3, [7, 7, 7])], poison=0.5)
    pieces, output = pieces_of(case, kernel)
    num_pieces = sum(1 for _ in pieces)
    assert num_pieces >= 3
    assert_close(output, oracle.run(kernel, case, oracle.tensors(case), "cpu")[0].double().numpy(), torch.float32)
    pieces, output = pieces_of(case, kernel)
    next(pieces)
    assert (output == 9).any()  # the rest was not computed


def test_fp8_is_stored_a_part_at_a_time_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([], kv_dtype=FP8, k_scales=(0.1, 0.2), v_scales=(0.3,), num_pages=8)
    k, v = torch.randn(50, 2, 32), torch.randn(50, 2, 32)
    slots = torch.randperm(128)[:50]
    stored = []
    for elements in (pages.CONVERTED_ELEMENTS, 3 * 64):
        monkeypatch.setattr(pages, "CONVERTED_ELEMENTS", elements)
        config = case.config()
        empty = (torch.zeros(shape, dtype=torch.uint8) for shape in (config.k_shape, config.v_shape))
        k_pages, v_pages = (each.view(FP8) for each in empty)
        scales = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.3])
        store_kv(LayerPages(k_pages, v_pages, *scales), k, v, stored_tokens(slots, "cpu"), config.layout)
        stored.append((k_pages.view(torch.uint8), v_pages.view(torch.uint8)))
    assert all(map(torch.equal, *stored))


def test_fp8_that_is_read_at_once_is_converted_a_part_at_a_time_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens, scales = torch.randn(50, 2, 32, dtype=torch.float16), torch.tensor([0.1, 0.2])
    whole = as_stored(tokens, scales, tokens.dtype)
    assert not torch.equal(whole, tokens)
    monkeypatch.setattr(pages, "CONVERTED_ELEMENTS", 3 * 64)
    assert torch.equal(as_stored(tokens, scales, tokens.dtype), whole)


def test_pages_are_copied_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    k_pages, v_pages = torch.randn(2, 12, 4, 1, 8), torch.randn(2, 12, 4, 1, 8)
    expected = k_pages.clone(), v_pages.clone()
    sources, targets = torch.tensor([0, 1, 1, 4, 5]), torch.tensor([11, 10, 9, 8, 7])
    copy_pages(*expected, sources, targets)
    monkeypatch.setattr(pages, "COPIED_BYTES", 2 * k_pages[:, 0].nbytes)
    assert sum(1 for _ in page_copies(k_pages, v_pages, sources, targets)) == 6
    assert torch.equal(k_pages, expected[0])
    assert torch.equal(v_pages, expected[1])


def test_a_mask_of_a_long_prompt_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch would compute at once, however long that takes, is computed in parts that have an end."""
    case = Case([Request(0, 40, 40, [], CAUSAL)], num_kv_heads=1)
    given_options = oracle.options(case, oracle.tensors(case))
    assert [part.is_causal for part in gather.split(case.config(), case.metadata(), given_options, CPU)] == [True]
    for module in (gather, dense_prefill):
        monkeypatch.setattr(module, "PLAIN_ROWS", 39)
    monkeypatch.setattr(gather, "BATCHED_ROWS", 8)
    monkeypatch.setattr(gather, "TILE_ROWS", 16)
    parts = list(gather.split(case.config(), case.metadata(), given_options, CPU))
    assert [(part.num_rows, part.num_keys) for part in parts] == [(16, 16), (16, 32), (8, 40)]
    assert dense_prefill.dense_prefill(case.config(), case.metadata(), given_options, CPU) is None
    oracle.check(SdpaAttention(), case, "cpu")
