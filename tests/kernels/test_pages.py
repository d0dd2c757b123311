"""K and V in and out of pages."""

from __future__ import annotations

import math

import pytest
import torch

from attnd_server.attention.config import FP8, AttentionConfig, Layout
from attnd_server.attention.kernels.pages import (
    copy_pages,
    gather_pages,
    is_latent,
    read_kv,
    replace_slot,
    store_kv,
    stored_tokens,
)
from attnd_server.attention.layer_pages import LayerPages
from tests.oracle import DTYPES, devices

LAYOUTS = pytest.mark.parametrize("layout", Layout)
DEVICES = pytest.mark.parametrize("device", devices())
PAGE_SIZE, HEADS, DIM, DIM_V = 4, 3, 16, 24


def empty_pages(
    layout: Layout, device: str, dtype: torch.dtype = torch.float32
) -> tuple[AttentionConfig, torch.Tensor, torch.Tensor]:
    """Pages full of NaN."""
    config = AttentionConfig(1, HEADS, DIM, 10, page_size=PAGE_SIZE, head_dim_v=DIM_V, dtype=dtype, layout=layout)
    pages = (torch.full(shape, float("nan"), dtype=dtype, device=device) for shape in (config.k_shape, config.v_shape))
    return config, *pages


def element(pages: torch.Tensor, layout: Layout, slot: int, head: int, i: int) -> float:
    """One element of a slot, straight from the definition of the layouts."""
    page, offset = divmod(slot, PAGE_SIZE)
    if layout is Layout.UNIFIED:
        return pages[page, offset, head, i].item()
    if pages.dim() == 5:
        return pages[page, head, i // 8, offset, i % 8].item()
    return pages[page, head, i, offset].item()


@DEVICES
@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "slot_mapping", [[37, -1, 0, 5, -1, 39], [37, 0, 5, 39], [2, 3, 4, 5, 6, 7, 8, 9, 10], [39], [11, 12, 13], [3, 2]]
)
def test_tokens_land_in_their_slots_and_nowhere_else(
    device: str, layout: Layout, dtype: torch.dtype, slot_mapping: list[int]
) -> None:
    _, k_pages, v_pages = empty_pages(layout, device, dtype)
    slots = torch.tensor(slot_mapping)
    # Not contiguous: a server's tensors are, others' may not be.
    k = torch.randn(len(slots), DIM, HEADS).to(device, dtype).transpose(1, 2)
    v = torch.randn(len(slots), DIM_V, HEADS).to(device, dtype).transpose(1, 2)
    store_kv(LayerPages(k_pages, v_pages), k, v, stored_tokens(slots, device), layout)
    for pages, tokens in ((k_pages, k), (v_pages, v)):
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                stored = [[element(pages, layout, slot, h, i) for i in range(tokens.shape[2])] for h in range(HEADS)]
                assert stored == tokens[token].tolist()
        assert pages.isfinite().sum() == (slots >= 0).sum() * tokens[0].numel()


@pytest.mark.parametrize(
    ("slots", "first"),
    [([7], 7), ([7, 8, 9], 7), ([7, 9], None), ([8, 7], None), ([7, -1], None), ([-1], None), ([], None)],
)
def test_slots_that_follow_each_other_are_known_by_their_first(slots: list[int], first: int | None) -> None:
    assert stored_tokens(torch.tensor(slots, dtype=torch.int64), "cpu").first_slot == first
    assert stored_tokens(torch.tensor(slots, dtype=torch.int64), "meta").first_slot is None


@DEVICES
@LAYOUTS
def test_slots_are_read_back_in_the_order_asked(device: str, layout: Layout) -> None:
    _, k_pages, v_pages = empty_pages(layout, device)
    slots = torch.randperm(40)[:17]
    k, v = torch.randn(17, HEADS, DIM, device=device), torch.randn(17, HEADS, DIM_V, device=device)
    store_kv(LayerPages(k_pages, v_pages), k, v, stored_tokens(slots, device), layout)
    order = torch.tensor([16, 3, 3, 0])
    k_read, v_read = read_kv(LayerPages(k_pages, v_pages), slots[order].to(device), layout, torch.float32)
    assert torch.equal(k_read, k[order.to(device)])
    assert torch.equal(v_read, v[order.to(device)])
    assert k_read.is_contiguous()
    assert v_read.is_contiguous()


@DEVICES
@LAYOUTS
def test_pages_are_gathered_in_token_order(device: str, layout: Layout) -> None:
    _, k_pages, v_pages = empty_pages(layout, device)
    k, v = torch.randn(40, HEADS, DIM, device=device), torch.randn(40, HEADS, DIM_V, device=device)
    store_kv(LayerPages(k_pages, v_pages), k, v, stored_tokens(torch.arange(40), device), layout)
    ids = torch.tensor([7, 2, -1], device=device)
    for pages, tokens in ((k_pages, k), (v_pages, v)):
        gathered = gather_pages(pages, ids, layout, torch.float32)
        assert gathered.shape == (3 * PAGE_SIZE, *tokens.shape[1:])
        assert gathered.is_contiguous()
        assert torch.equal(gathered[: 2 * PAGE_SIZE], torch.cat([tokens[28:32], tokens[8:12]]))
        assert gather_pages(pages, ids[:0], layout, torch.float32).shape == (0, *tokens.shape[1:])


@DEVICES
@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_pages_hold_each_number_over_its_scale_clamped_and_rounded(
    device: str, layout: Layout, dtype: torch.dtype
) -> None:
    shapes = empty_pages(layout, "cpu")[0]
    k_pages, v_pages = (torch.zeros(shape, device=device).to(FP8) for shape in (shapes.k_shape, shapes.v_shape))
    k_scales, v_scales = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.75, 0.75, 0.75])
    k = torch.zeros(2, HEADS, DIM)
    # Rounded to even at the middle, clamped, subnormal, rounded to zero, negative zero.
    k[0, :, :10] = torch.tensor([1.0, 17.0, 18.1, 19.0, 1e4, math.inf, -math.inf, math.nan, 2**-10, -0.0])
    v = torch.randn(2, HEADS, DIM_V)
    tokens, slots = [x.to(device, dtype) for x in (k, v)], torch.tensor([-1, 7])
    pages = LayerPages(k_pages, v_pages, k_scales.to(device), v_scales.to(device))
    store_kv(pages, *tokens, stored_tokens(slots.flip(0), device), layout)
    k_read, v_read = read_kv(pages, torch.tensor([7], device=device), layout, torch.float32)
    expected = [
        [1.0, 16.0, 18.0, 20.0, 448 * scale, 448 * scale, -448 * scale, math.nan, 2**-10 if scale < 1 else 0.0, -0.0]
        for scale in k_scales.tolist()
    ]
    torch.testing.assert_close(k_read[0, :, :10].cpu(), torch.tensor(expected), rtol=0, atol=0, equal_nan=True)
    # 3 bits of mantissa: half a unit in the last place is 2^-4 of the number.
    torch.testing.assert_close(v_read[0].cpu(), v[0], rtol=2**-4, atol=2**-10)
    gathered = gather_pages(v_pages, torch.tensor([1], device=device), layout, torch.float32, pages.v_scales)
    assert torch.equal(gathered[3], v_read[0])
    assert not gathered[:3].any()


@DEVICES
@LAYOUTS
def test_nothing_is_stored_when_every_slot_is_minus_one(device: str, layout: Layout) -> None:
    _, k_pages, v_pages = empty_pages(layout, device)
    k, v = torch.randn(2, HEADS, DIM, device=device), torch.randn(2, HEADS, DIM_V, device=device)
    store_kv(LayerPages(k_pages, v_pages), k, v, stored_tokens(torch.tensor([-1, -1]), device), layout)
    assert k_pages.isnan().all()
    assert v_pages.isnan().all()


@DEVICES
@LAYOUTS
def test_pages_are_copied_in_every_layer(device: str, layout: Layout) -> None:
    config, _, _ = empty_pages(layout, device)
    k_pages = torch.randn(3, *config.k_shape, device=device)
    v_pages = torch.randn(3, *config.v_shape, device=device)
    before = k_pages.clone(), v_pages.clone()
    copy_pages(k_pages, v_pages, torch.tensor([4, 1, 4]), torch.tensor([0, 9, 7]))
    for pages, old in zip((k_pages, v_pages), before, strict=True):
        expected = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        expected[0], expected[9], expected[7] = 4, 1, 4
        assert torch.equal(pages, old[:, expected])


@LAYOUTS
def test_offsets_beyond_two_to_the_31(layout: Layout) -> None:
    num_pages = 2**31 // (16 * 8 * 512) + 1
    config = AttentionConfig(1, 8, 512, num_pages, head_dim_v=8, layout=layout)
    # Bytes are enough, and memory that is never touched costs nothing.
    k_pages = torch.empty(config.k_shape, dtype=torch.uint8)
    v_pages = torch.empty(config.v_shape, dtype=torch.uint8)
    k, v = torch.full((1, 8, 512), 7, dtype=torch.uint8), torch.full((1, 8, 8), 9, dtype=torch.uint8)
    slots = torch.tensor([config.num_slots - 1])
    store_kv(LayerPages(k_pages, v_pages), k, v, stored_tokens(slots, "cpu"), layout)
    k_read, v_read = read_kv(LayerPages(k_pages, v_pages), slots, layout, torch.uint8)
    assert torch.equal(k_read, k)
    assert torch.equal(v_read, v)
    assert torch.equal(gather_pages(k_pages, torch.tensor([num_pages - 1]), layout, torch.uint8)[-1:], k)


@DEVICES
@LAYOUTS
@pytest.mark.parametrize("is_k", [True, False])
@pytest.mark.parametrize("slot_mapping", [[7, 8, 9], [7, -1, 3]])
def test_fp8_of_k_or_of_v_alone(device: str, layout: Layout, is_k: bool, slot_mapping: list[int]) -> None:
    plain = empty_pages(layout, device)[1:]
    k, v = torch.randn(3, HEADS, DIM, device=device), torch.randn(3, HEADS, DIM_V, device=device)
    scales = torch.tensor([0.5, 0.03, 2.0], device=device)
    stored = stored_tokens(torch.tensor(slot_mapping), device)
    slots = torch.tensor([slot for slot in slot_mapping if slot >= 0], device=device)
    fp8 = [pages.to(FP8) for pages in plain]
    both = LayerPages(*fp8, scales, scales)
    store_kv(LayerPages(*plain), k, v, stored, layout)
    store_kv(both, k, v, stored, layout)
    mixed = empty_pages(layout, device)[1:]
    mixed = [mixed[0].to(FP8), mixed[1]] if is_k else [mixed[0], mixed[1].to(FP8)]
    pages = LayerPages(*mixed, *((scales, None) if is_k else (None, scales)))
    store_kv(pages, k, v, stored, layout)
    expected = (both.k, plain[1]) if is_k else (plain[0], both.v)
    for actual, wanted in zip(pages[:2], expected, strict=True):
        assert torch.equal(actual.view(torch.uint8), wanted.view(torch.uint8))
    all_fp8, all_plain = (read_kv(each, slots, layout, torch.float32) for each in (both, LayerPages(*plain)))
    for actual, wanted in zip(
        read_kv(pages, slots, layout, torch.float32),
        (all_fp8[0], all_plain[1]) if is_k else (all_plain[0], all_fp8[1]),
        strict=True,
    ):
        assert torch.equal(actual, wanted)


def latent_pages(device: str, dtype: torch.dtype, scale: float | None = None) -> LayerPages:
    """Latent pages full of NaN."""
    k_pages = torch.full((10, PAGE_SIZE, 1, DIM_V), math.nan, device=device).to(dtype)
    scales = None if scale is None else torch.tensor([scale], device=device)
    return LayerPages(k_pages, k_pages[..., :DIM], scales, scales)


@DEVICES
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("slot_mapping", [[7, 8, 9, 10], [38, -1, 0, 3], [39, 0, 2, 1]])
def test_a_latent_row_is_stored_once_and_has_v_in_it(device: str, scale: float | None, slot_mapping: list[int]) -> None:
    pages = latent_pages(device, torch.float32 if scale is None else FP8, scale)
    assert is_latent(pages)
    k, slots = torch.randn(4, 1, DIM_V, device=device), torch.tensor(slot_mapping)
    store_kv(pages, k, torch.full((4, 1, DIM), math.nan), stored_tokens(slots, device), Layout.UNIFIED)
    is_stored = slots >= 0
    read_k, read_v = read_kv(pages, slots[is_stored].to(device), Layout.UNIFIED, torch.float32)
    expected = k[is_stored.to(device)]
    if scale is not None:
        expected = (expected / scale).to(FP8).float() * scale
    torch.testing.assert_close(read_k, expected, rtol=1e-6, atol=0)
    assert torch.equal(read_v, read_k[..., :DIM])
    assert pages.k.float().isfinite().sum() == is_stored.sum() * DIM_V
    first = gather_pages(pages.v, torch.tensor([slot_mapping[0] // 4], device=device), Layout.UNIFIED, torch.float32)
    assert first.is_contiguous()
    assert first.shape == (PAGE_SIZE, 1, DIM)
    assert torch.equal(first[slot_mapping[0] % 4], pages.k.float()[slot_mapping[0] // 4, slot_mapping[0] % 4, :, :DIM])


def test_a_latent_row_is_put_back_whole() -> None:
    pages = latent_pages("cpu", torch.float32)
    pages.k.copy_(torch.arange(pages.k.numel()).view(pages.k.shape))
    before = pages.k.clone()
    k = torch.full((1, 1, DIM_V), -1.0)
    put_back = replace_slot(pages, k, k[..., :DIM], 17)
    assert (pages.k.flatten(0, 1)[17] == -1).all()
    changed = (pages.k != before).sum()
    assert changed == DIM_V
    put_back()
    assert torch.equal(pages.k, before)


def test_latent_pages_are_copied_once() -> None:
    k_pages = torch.randn(2, 10, PAGE_SIZE, 1, DIM_V)
    before = k_pages.clone()
    copy_pages(k_pages, None, torch.tensor([3, 5]), torch.tensor([9, 0]))
    assert torch.equal(k_pages[:, [9, 0]], before[:, [3, 5]])
    assert torch.equal(k_pages[:, 1:9], before[:, 1:9])
