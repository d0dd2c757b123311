"""FP8 pages through a server: stored, attended, read and copied, with scales."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

import attnd
from attnd.v1 import tensor_pb2
from tests.attention import dense_attention

FP8 = torch.float8_e4m3fn
PAGE, HEADS, KV_HEADS, HEAD_DIM = 4, 6, 2, 16
K_SCALES, V_SCALES = [0.25, 0.0123], 0.5
GEOMETRY = {
    "num_layers": 2,
    "num_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "num_pages": 32,
    "page_size": PAGE,
    "dtype": "float32",
    "kv_dtype": "float8_e4m3fn",
    "k_scales": K_SCALES,
    "v_scales": V_SCALES,
}


def qkv(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(num_tokens, HEADS, HEAD_DIM)
    return q, torch.randn(num_tokens, KV_HEADS, HEAD_DIM), torch.randn(num_tokens, KV_HEADS, HEAD_DIM)


def kept(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What FP8 pages make of K and V."""
    k_scales, v_scales = torch.tensor(K_SCALES)[:, None], torch.tensor([V_SCALES])[:, None]
    rounded = ((x / s).clamp(-448, 448).to(FP8).float() * s for x, s in ((k, k_scales), (v, v_scales)))
    return tuple(rounded)  # type: ignore[return-value]


@pytest.mark.parametrize("layout", ["unified", "distinct"])
@pytest.mark.parametrize("backend", ["auto", "naive", "sdpa"])
def test_cached_tokens_are_rounded_and_new_ones_are_not(any_client: attnd.Client, backend: str, layout: str) -> None:
    pages = torch.randperm(32)[:4].tolist()
    history = torch.empty(0, KV_HEADS, HEAD_DIM), torch.empty(0, KV_HEADS, HEAD_DIM)
    with any_client.create_cache(**GEOMETRY, backend=backend, layout=layout) as cache, cache.session() as session:
        for context_len, num_new in ((0, 6), (6, 1), (7, 1), (8, 5)):
            slots = [pages[p // PAGE] * PAGE + p % PAGE for p in range(context_len, context_len + num_new)]
            step = session.step(attnd.StepMetadata([num_new], [context_len], [pages], slots))
            q, k, v = qkv(num_new)
            expected = dense_attention(q, torch.cat([history[0], k]), torch.cat([history[1], v]))
            torch.testing.assert_close(step.attend(1, q, k, v), expected)
            read = cache.read_kv(1, slots, like=k)
            for actual, rounded in zip(read, kept(k, v), strict=True):
                assert torch.equal(actual, rounded)
            history = torch.cat([history[0], read[0]]), torch.cat([history[1], read[1]])


@pytest.mark.parametrize("layout", ["unified", "distinct"])
@pytest.mark.parametrize("backend", ["auto", "naive", "sdpa"])
@pytest.mark.parametrize("is_k", [True, False])
def test_k_or_v_alone_is_rounded(any_client: attnd.Client, is_k: bool, backend: str, layout: str) -> None:
    kinds = {"kv_dtype": FP8, "v_dtype": "float32", "v_scales": None}
    if not is_k:
        kinds = {"kv_dtype": None, "v_dtype": FP8, "k_scales": None}
    pages = torch.randperm(32)[:4].tolist()
    with any_client.create_cache(**GEOMETRY | kinds, backend=backend, layout=layout) as cache:
        assert cache.info().num_bytes == 2 * (1 + 4) * KV_HEADS * HEAD_DIM * 32 * PAGE
        history = [torch.empty(0, KV_HEADS, HEAD_DIM)] * 2
        with cache.session() as session:
            for context_len, num_new in ((0, 6), (6, 1), (7, 1), (8, 5)):
                slots = [pages[p // PAGE] * PAGE + p % PAGE for p in range(context_len, context_len + num_new)]
                step = session.step(attnd.StepMetadata([num_new], [context_len], [pages], slots))
                q, k, v = qkv(num_new)
                expected = dense_attention(q, torch.cat([history[0], k]), torch.cat([history[1], v]))
                torch.testing.assert_close(step.attend(1, q, k, v), expected)
                read = cache.read_kv(1, slots, like=k)
                stored = (kept(k, v)[0], v) if is_k else (k, kept(k, v)[1])
                for actual, wanted in zip(read, stored, strict=True):
                    assert torch.equal(actual, wanted)
                history = [torch.cat([old, new]) for old, new in zip(history, read, strict=True)]


def test_kv_is_stored_and_read_in_the_type_of_calls(any_client: attnd.Client) -> None:
    _, k, v = (tensor.bfloat16() for tensor in qkv(PAGE))
    with any_client.create_cache(**GEOMETRY | {"dtype": "bfloat16"}) as cache:
        cache.store_kv(0, range(PAGE), k, v)
        cache.copy_pages([0], [9])
        for first in (0, 9 * PAGE):
            read = cache.read_kv(0, range(first, first + PAGE), like=k)
            for actual, rounded in zip(read, kept(k.float(), v.float()), strict=True):
                assert torch.equal(actual, rounded.bfloat16())
        with pytest.raises(attnd.InvalidRequest, match=r"k has dtype torch\.float8_e4m3fn, but must be one of"):
            cache.store_kv(0, range(PAGE), k.to(FP8), v)


def test_a_cache_says_what_it_holds(any_client: attnd.Client) -> None:
    assert tensor_pb2.DTYPE_FLOAT8_E4M3FN in any_client.capabilities().kv_dtypes
    with any_client.create_cache(**GEOMETRY) as cache:
        info = cache.info()
    assert info.num_bytes == 2 * 2 * KV_HEADS * HEAD_DIM * 32 * PAGE
    assert info.config.kv_dtype == tensor_pb2.DTYPE_FLOAT8_E4M3FN
    assert np.frombuffer(info.config.k_scales.data, np.float32).tolist() == np.float32(K_SCALES).tolist()
    assert np.frombuffer(info.config.v_scales.data, np.float32).tolist() == [V_SCALES]


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        (
            {"kv_dtype": "float8"},
            "kv_dtype",
            "kv_dtype is float8, but must be one of float32, float16, bfloat16, float8_",
        ),
        ({"kv_dtype": torch.float16}, "kv_dtype", "kv_dtype is DTYPE_FLOAT16, but must be DTYPE_FLOAT32 as dtype, or"),
        (
            {"kv_dtype": None},
            "k_scales",
            "k_scales is given, but must be absent unless kv_dtype is DTYPE_FLOAT8_E4M3FN",
        ),
        ({"k_scales": torch.ones(3)}, "k_scales", "k_scales has 3 elements, but must have 1, or one for each of the 2"),
        ({"v_scales": 0.0}, "v_scales", "v_scales[0] is 0, but must be positive"),
        ({"v_scales": "big"}, "v_scales", "v_scales must hold one number for each head"),
    ],
)
def test_refusals(any_client: attnd.Client, changes: dict[str, object], field: str, text: str) -> None:
    with pytest.raises(attnd.InvalidRequest) as caught:
        any_client.create_cache(**GEOMETRY | changes)
    assert text in str(caught.value)
    assert caught.value.field == field


def test_asyncio_has_it_too(server_address: str) -> None:
    _, k, v = qkv(3)

    async def read() -> tuple[torch.Tensor, torch.Tensor]:
        async with await attnd.aio.connect(server_address) as client, await client.create_cache(**GEOMETRY) as cache:
            await cache.store_kv(0, [5, 1, 3], k, v)
            return await cache.read_kv(0, [5, 1, 3], like=k)

    for actual, rounded in zip(asyncio.run(read()), kept(k, v), strict=True):
        assert torch.equal(actual, rounded)
