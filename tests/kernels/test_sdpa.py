"""Backend `sdpa` against the oracle, and against `naive` where the oracle is too slow."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from attnd_server import NaiveAttention
from attnd_server.attention.backends.dense_prefill import dense_kernels, dense_prefill
from attnd_server.attention.backends.gather import BATCHED_ROWS, TILE_ROWS, Part, split
from attnd_server.attention.backends.sdpa import SdpaAttention
from attnd_server.attention.config import FP8, Layout, PrecisionMode
from attnd_server.attention.kernels.pages import store_kv, stored_tokens
from attnd_server.attention.metadata import AttentionOptions
from tests import oracle
from tests.oracle import BIDIRECTIONAL, BLOCK_CAUSAL, CAUSAL, PREFIX_FULL, Case, Request
from tests.tolerances import assert_close

DEVICES = pytest.mark.parametrize("device", oracle.devices())
CPU = torch.device("cpu")


def parts(case: Case) -> list[tuple[int, bool, bool]]:
    """Requests of each part, and whether it has a mask and is causal."""
    found = split(case.config(), case.metadata(), oracle.options(case, oracle.tensors(case)), CPU)
    return [(part.num_reqs, part.mask is not None, part.is_causal) for part in found]


def compare_with_naive(case: Case, device: str) -> None:
    tensors = oracle.tensors(case)
    output, _ = oracle.run(SdpaAttention(), case, tensors, device)
    expected, _ = oracle.run(NaiveAttention(), case, tensors, device)
    assert_close(output, expected.double().numpy(), case.coarsest)


@DEVICES
@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=oracle.cases(plain=True))
def test_any_step(device: str, case: Case) -> None:
    assert SdpaAttention().supports(case.config(), case.metadata(), oracle.options(case, oracle.tensors(case))) is None
    oracle.check(SdpaAttention(), case, device)


@DEVICES
@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=oracle.cases())
def test_any_step_that_it_supports(device: str, case: Case) -> None:
    oracle.check(SdpaAttention(), case, device)


@DEVICES
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("mask", [CAUSAL, BLOCK_CAUSAL, BIDIRECTIONAL, PREFIX_FULL])
@pytest.mark.parametrize("context_len", [0, 70])
@pytest.mark.parametrize("head_dim_v", [8, 16])
def test_a_long_prefill(device: str, context_len: int, mask: str, window: int, head_dim_v: int) -> None:
    num_tokens = 2 * TILE_ROWS + 77
    long = Request(context_len, num_tokens, num_tokens - 5, list(range(40, 45)), mask, 32, 100, 1000)
    short = Request(33, 3, 3, [9, 8, 7, -1, -1], mask, 32, 34, 36)
    compare_with_naive(Case([short, long], head_dim=8, head_dim_v=head_dim_v, num_kv_heads=1, window=window), device)


@DEVICES
@pytest.mark.parametrize("num_rows", [1, 8])
def test_contexts_of_different_length_share_parts(device: str, num_rows: int) -> None:
    lens = [0, 1, 15, 16, 17, 100, 255, 300, 512, 1000]
    pages, tables = iter(range(160)), []
    for length in lens:
        used = -(-length // 16)
        tables.append([next(pages) for _ in range(used)] + [-1] * (63 - used))
    case = Case(
        [Request(length, num_rows, num_rows, table, BIDIRECTIONAL) for length, table in zip(lens, tables, strict=True)],
        group=3,
        poison=float("nan"),
    )
    assert sorted(num_reqs for num_reqs, _, _ in parts(case)) == [2, 8]
    compare_with_naive(case, device)


def test_one_token_that_sees_everything_has_no_mask() -> None:
    assert parts(Case([Request(30, 1, 1, [1, 2])])) == [(1, False, False)]
    assert parts(Case([Request(30, 1, 1, [1, 2]), Request(30, 1, 1, [3, 4])])) == [(2, False, False)]
    assert parts(Case([Request(30, 1, 1, [1, 2]), Request(29, 1, 1, [3, 4])])) == [(2, True, False)]


@pytest.mark.parametrize(("head_dim_v", "latent"), [(8, False), (16, False), (24, True), (32, True)])
@pytest.mark.parametrize("context_len", [1, 15, 16, 17, 31, 32, 33])
def test_one_token_behind_pages_that_follow_each_other_reads_them_where_they_lie(
    context_len: int, head_dim_v: int, latent: bool
) -> None:
    def with_slots(pages: list[int]) -> tuple[Case, list[Part], torch.Tensor]:
        """The step with a slot for its token, its parts, and its output where the token is stored."""
        case = Case([Request(context_len, 1, 1, pages)], group=3, head_dim_v=head_dim_v, poison=math.nan, num_pages=12)
        case = replace(case, num_kv_heads=1 if latent else 2, latent=latent)
        slot = pages[context_len // 16] * 16 + context_len % 16
        metadata = replace(case.metadata(), slot_mapping=torch.tensor([slot]))
        given = oracle.tensors(case)
        assert given.k is not None
        assert given.v is not None
        plan = SdpaAttention().plan(case.config(), metadata, oracle.options(case, given), CPU)
        stored = stored_tokens(torch.tensor([slot]), CPU)
        store_kv(given.pages, given.k, given.v, stored, case.layout)
        output, _ = SdpaAttention().run(plan, given.q, given.k, given.v, given.pages)
        assert_close(output, oracle.attend(case, given)[0], case.coarsest)
        return case, plan.parts, output

    _, (part,), in_place = with_slots([4, 5, 6])
    assert part.side_by_side == slice(64, 64 + context_len + 1)
    _, (part,), gathered = with_slots([11, 3, 0])
    if context_len >= 16:  # more than one page
        assert part.side_by_side is None
        assert torch.equal(in_place, gathered)


@pytest.mark.parametrize(
    ("change", "slot"),
    [
        ({}, -1),  # not stored
        ({}, 81),  # stored elsewhere
        ({"layout": Layout.DISTINCT}, 80),
        ({"kv_dtype": FP8}, 80),
        ({"v_dtype": FP8}, 80),
        ({"kv_dtype": FP8, "v_dtype": torch.float32}, 80),
        ({"window": 100}, 80),
    ],
)
def test_what_cannot_be_read_where_it_lies_is_gathered(change: dict[str, Any], slot: int) -> None:
    case = replace(Case([Request(16, 1, 1, [4, 5])]), **change)
    metadata = replace(case.metadata(), slot_mapping=torch.tensor([slot]))
    (part,) = split(case.config(), metadata, oracle.options(case, oracle.tensors(case)), CPU)
    assert part.side_by_side is None
    assert part.slots is not None


@pytest.mark.parametrize("num_reqs", [1, 2])
def test_slots_past_the_32_bits_of_page_ids(num_reqs: int) -> None:
    case = Case([Request(10, 1, 1, [5 << 20])] * num_reqs, page_size=1024)
    (part,) = split(case.config(), case.metadata(), AttentionOptions(case.num_heads, 1.0), torch.device("cpu"))
    assert part.slots is not None
    assert part.slots.max() == 5368709129


def test_a_causal_prefill_without_context_has_no_mask() -> None:
    num_tokens = 2 * TILE_ROWS
    assert parts(Case([Request(0, num_tokens, num_tokens, [])])) == [(1, False, True)]
    assert parts(Case([Request(0, 9, 9, []), Request(0, 9, 7, [])])) == [(2, False, True)]
    assert parts(Case([Request(0, 9, 9, [])], window=8)) == [(1, True, False)]


def dense(case: Case, device: str = "cpu") -> list[tuple[int, bool]] | None:
    """Requests of each part of a prefill without masks and whether it is causal; None for other steps."""
    given_options = oracle.options(case, oracle.tensors(case))
    found = dense_prefill(case.config(), case.metadata(), given_options, torch.device(device))
    return None if found is None else [(part.num_reqs, part.is_causal) for part in found]


def prefill(*lens: int, mask: str = CAUSAL) -> list[Request]:
    return [Request(0, length, length, [], mask) for length in lens]


def test_prefill_of_equal_lengths_is_one_part() -> None:
    many = BATCHED_ROWS + 3
    assert dense(Case(prefill(many, many))) == [(2, True)]
    assert dense(Case(prefill(many, 5, 0, many, 1, 5))) == [(2, True), (2, True), (1, False)]
    assert dense(Case(prefill(5, 5, mask=BIDIRECTIONAL) + prefill(5))) == [(2, False), (1, True)]
    assert dense(Case([Request(0, 32, 32, [], BLOCK_CAUSAL, 32)])) == [(1, False)]
    assert dense(Case(prefill(9), window=9)) == [(1, True)]
    assert dense(Case(prefill(0))) == []


@pytest.mark.parametrize(
    "case",
    [
        Case([Request(0, 9, 9, [-1]), Request(1, 9, 9, [1])]),
        Case([Request(0, 9, 8, [])]),
        Case([Request(0, 33, 33, [], BLOCK_CAUSAL, 32)]),
        Case(prefill(9), window=8),
        Case(prefill(9), head_dim_v=16),
        Case(prefill(9), cache_only=True),
    ],
)
def test_what_is_no_prefill_without_masks(case: Case) -> None:
    assert dense(case) is None


def test_prefill_on_a_gpu_needs_what_its_kernels_take() -> None:
    case = Case(prefill(9))
    assert dense(case, "cuda") is None
    assert dense(replace(case, precision=PrecisionMode.BF16), "cuda") == [(1, True)]
    assert dense(replace(case, dtype=torch.float16), "cuda") == [(1, True)]
    assert dense(replace(case, dtype=torch.float16, head_dim=264, head_dim_v=264), "cuda") is None


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mask", [CAUSAL, BIDIRECTIONAL])
def test_prefill_without_context(device: str, mask: str, dtype: torch.dtype) -> None:
    oracle.check(SdpaAttention(), Case(prefill(5, 17, 0, 5, 1, mask=mask), group=3, dtype=dtype), device)
    compare_with_naive(Case(prefill(17, 100, 0, 17, 1, 100, mask=mask), group=3, dtype=dtype), device)


def test_many_rows_are_not_batched() -> None:
    num_rows = BATCHED_ROWS + 1
    assert len(parts(Case([Request(1, num_rows, num_rows, [page]) for page in range(3)]))) == 3
    assert len(parts(Case([Request(1, BATCHED_ROWS, BATCHED_ROWS, [page]) for page in range(3)]))) == 1


@pytest.mark.parametrize("layout", Layout)
def test_pages_outside_the_window_and_past_the_context_are_never_read(layout: Layout) -> None:
    case = Case([Request(40, 1, 1, [10**9, 5, 6, 10**9])], window=20, layout=layout)
    with_pages = replace(case, requests=[replace(case.requests[0], pages=[-1, 5, 6, -1])])
    tensors = oracle.tensors(with_pages)
    output, _ = oracle.run(SdpaAttention(), case, tensors, "cpu")
    assert_close(output, oracle.attend(with_pages, tensors)[0], torch.float32)


@pytest.mark.parametrize(
    ("option", "value"), [("softcap", 2.0), ("alibi", True), ("sinks", True), ("return_lse", True)]
)
def test_what_torch_does_not_have_is_refused_by_name(option: str, value: float | bool) -> None:
    case = replace(Case([Request(3, 1, 1, [1])]), **{option: value})
    reason = SdpaAttention().supports(case.config(), case.metadata(), oracle.options(case, oracle.tensors(case)))
    assert reason is not None
    assert f"has no {option}" in reason


def test_masks_beyond_memory_are_refused() -> None:
    request = Request(0, 40_000, 40_000, [], BIDIRECTIONAL)
    case = Case([request], num_kv_heads=1, group=1, head_dim=8, head_dim_v=8)
    given_options = oracle.options(case, oracle.tensors(Case([])))
    reason = SdpaAttention().supports(case.config(), case.metadata(), given_options)
    assert reason is not None
    assert "elements" in reason
    causal = replace(case, requests=[replace(request, mask=CAUSAL)])
    assert SdpaAttention().supports(case.config(), causal.metadata(), given_options) is None


def test_no_keys_at_all_give_zeros() -> None:
    case = Case([Request(0, 3, 3, []), Request(0, 1, 1, [])], cache_only=True)
    output, _ = oracle.run(SdpaAttention(), case, oracle.tensors(case), "cpu")
    assert not output.any()


def test_a_step_without_requests() -> None:
    case = Case([])
    output, _ = oracle.run(SdpaAttention(), case, oracle.tensors(case), "cpu")
    assert output.shape == (0, case.num_heads, case.head_dim_v)


def test_a_part_of_many_requests_gathers_a_bounded_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([Request(5 + request, 1, 1, [request, 9, 8, 7]) for request in range(7)])
    tensors = oracle.tensors(case)
    whole, _ = oracle.run(SdpaAttention(), case, tensors, "cpu")
    monkeypatch.setattr("attnd_server.attention.backends.gather.PART_TOKENS", 3 * 513)
    assert [num_reqs for num_reqs, _, _ in parts(case)] == [3, 3, 1]
    in_parts, _ = oracle.run(SdpaAttention(), case, tensors, "cpu")
    assert_close(in_parts, whole.double().numpy(), torch.float32)


@pytest.mark.parametrize("lens", [(17,), (17, 1, 5)])
def test_results_can_be_written_into_tensors_that_are_there(lens: tuple[int, ...]) -> None:
    oracle.check_launch(SdpaAttention(), Case(prefill(*lens), group=3), "cpu")


@DEVICES
@pytest.mark.parametrize("kernel", [NaiveAttention(), SdpaAttention()], ids=["naive", "sdpa"])
@pytest.mark.parametrize("kv_dtype", [None, FP8])
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(576, 512), (40, 40), (1024, 8)])
def test_latent_rows(
    device: str, kernel: NaiveAttention | SdpaAttention, kv_dtype: torch.dtype | None, head_dim: int, head_dim_v: int
) -> None:
    """V is the first part of K's rows: decode, a block, a prompt without context, and chunks behind some."""
    for query_lens, mask in (([1, 1, 1], CAUSAL), ([4, 4, 4], BLOCK_CAUSAL), ([9, 0, 20], CAUSAL), ([70], CAUSAL)):
        contexts = [0, 16, 37] if len(query_lens) == 3 else [0]
        tables = [[-1, -1, -1], [7, -1, -1], [3, 9, 1]]
        case = Case(
            [
                Request(context_len, query_len, query_len, table, mask, block_size=4)
                for context_len, query_len, table in zip(contexts, query_lens, tables, strict=False)
            ],
            num_kv_heads=1,
            group=5,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            num_pages=12,
            kv_dtype=kv_dtype,
            k_scales=(0.02,) if kv_dtype else (1.0,),
            scale=head_dim**-0.5,
            latent=True,
        )
        assert kernel.supports(case.config(), case.metadata(), oracle.options(case, oracle.tensors(case))) is None
        oracle.check(kernel, case, device)


@pytest.mark.parametrize("is_on", [True, False])
def test_cudnn_attends_only_where_it_is_on(is_on: bool) -> None:
    """A server with cuda planes has it off: it would load kernels for new shapes while others' steps wait."""
    backends = torch.backends.cuda
    was_on = backends.cudnn_sdp_enabled()
    backends.enable_cudnn_sdp(is_on)
    try:
        with dense_kernels():
            assert backends.cudnn_sdp_enabled() == is_on
            assert backends.flash_sdp_enabled()
        assert backends.cudnn_sdp_enabled() == is_on
    finally:
        backends.enable_cudnn_sdp(was_on)
