"""Diffulex's steps through a server: what its kernel computes of the same metadata, in float64."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
import torch

import attnd
from attnd.errors import InvalidRequest

PAGE, BLOCK, HEADS, KV_HEADS, DIM, SCALE = 4, 4, 4, 2, 8, 0.3
GEOMETRY = {
    "num_layers": 1,
    "num_kv_heads": KV_HEADS,
    "head_dim": DIM,
    "num_pages": 8,
    "page_size": PAGE,
    "dtype": "float32",
}
WINDOW = attnd.AttentionOptions(scale=SCALE, window=6)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def tensors(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(num_tokens, HEADS, DIM), *torch.randn(2, num_tokens, KV_HEADS, DIM)


def one_row(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """q `[HEADS, DIM]` over keys and values `[num_seen, KV_HEADS, DIM]`."""
    q, keys, values = q.double(), keys.double().repeat_interleave(2, 1), values.double().repeat_interleave(2, 1)
    return torch.einsum("hs,shd->hd", torch.softmax(SCALE * torch.einsum("hd,shd->hs", q, keys), 1), values)


def sees(i: int, j: int, context: int, prefix: int, padded: int) -> bool:
    """Whether new token i of a request in prefill sees new token j, with `is_prefix_full`: i and j are offsets."""
    if i < prefix:
        return j < prefix
    if i < padded:
        return j < padded
    return context + j < ((context + i) // BLOCK + 1) * BLOCK


@pytest.mark.parametrize(
    ("contexts", "prefixes", "padded"),
    [
        pytest.param((0, 4), (2, 5), (4, 8), id="a_page_of_context"),
        pytest.param((0, 6), (2, 3), (4, 4), id="inside_of_a_block"),
        pytest.param((4, 4), (0, 11), (0, 12), id="no_prefix_and_all_of_it"),
    ],
)
def test_a_prefix_behind_a_context_is_counted_from_the_first_new_token(
    any_client: attnd.Client, contexts: tuple[int, int], prefixes: tuple[int, int], padded: tuple[int, int]
) -> None:
    pages, bounds = ([0, 1, 7], [2, 3, 4, 5, 6]), (0, 5, 16)
    cached = [torch.randn(2, context, KV_HEADS, DIM) for context in contexts]
    q, k, v = tensors(16)
    slots = [
        table[(context + i) // PAGE] * PAGE + (context + i) % PAGE
        for table, context, length in zip(pages, contexts, (5, 11), strict=True)
        for i in range(length)
    ]
    metadata = attnd.AttnMetaDataBase(
        is_prefill=[True, True],
        cu_seqlens_q=int32(*bounds),
        context_lens=int32(*contexts),
        page_tables=torch.tensor([[0, 1, 7, -1, -1], [2, 3, 4, 5, 6]], dtype=torch.int32),
        slot_mapping=int32(*slots),
        page_size=PAGE,
        block_size=BLOCK,
    )
    metadata.init_multi_block(
        valid_slices=int32(5, 16),
        is_prefix_full=True,
        status_table=int32(0, 0),
        prefix_lens=int32(*prefixes),
        padded_prefix_lens=int32(*padded),
    )
    expected = torch.zeros(16, HEADS, DIM, dtype=torch.float64)
    for request, (start, end) in enumerate(pairwise(bounds)):
        for i in range(end - start):
            rows = [
                start + j
                for j in range(end - start)
                if sees(i, j, contexts[request], prefixes[request], padded[request])
            ]
            keys, values = (torch.cat([old, new[rows]]) for old, new in zip(cached[request], (k, v), strict=True))
            expected[start + i] = one_row(q[start + i], keys, values)

    with any_client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        for table, context, (old_k, old_v) in zip(pages, contexts, cached, strict=True):
            if context:
                slots = [table[p // PAGE] * PAGE + p % PAGE for p in range(context)]
                step = session.step(attnd.StepMetadata([context], [0], [table], slots))
                step.attend(0, torch.zeros(context, HEADS, DIM), old_k, old_v)
        output = session.step(metadata).attend(0, q, k, v, attnd.AttentionOptions(scale=SCALE))

    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def refining() -> attnd.AttnMetaDataBase:
    """One request refines positions 4..8 of its 12."""
    metadata = attnd.AttnMetaDataBase(
        cu_seqlens_q=int32(0, 4),
        context_lens=int32(12),
        page_tables=torch.tensor([[3, 0, 5]], dtype=torch.int32),
        slot_mapping=int32(0, 1, 2, 3),
        page_size=PAGE,
        block_size=BLOCK,
    )
    metadata.init_multi_block(int32(4), 2, False, int32(2), int32(0), int32(0))
    metadata.fdv2_cache_only = True
    return metadata


def test_a_windowed_layer_refuses_to_refine_in_place(any_client: attnd.Client) -> None:
    q, k, v = tensors(4)
    with any_client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        step = session.step(refining())
        for call in (step.attend, step.submit):
            with pytest.raises(InvalidRequest, match="window is 6, but must be absent in a step with fdv2_cache_only"):
                call(0, q, k, v, WINDOW)
        for request in (any_client.prefill, any_client.decode):
            with pytest.raises(InvalidRequest, match="window is 6, but must be absent"):
                request(cache, refining(), 0, q, k, v, WINDOW)
        assert cache.written_pages() == []
        plain = step.attend(0, q, k, v, attnd.AttentionOptions(scale=SCALE))
        assert torch.isfinite(plain).all()
        assert cache.written_pages() == [0]


def test_an_asyncio_step_refuses_it_too(server_address: str) -> None:
    async def attend() -> None:
        async with await attnd.aio.connect(server_address) as client:
            async with await client.create_cache(**GEOMETRY) as cache, cache.session() as session:
                step = await session.step(refining())
                await step.attend(0, *tensors(4), WINDOW)

    with pytest.raises(InvalidRequest, match="window is 6, but must be absent"):
        asyncio.run(attend())
