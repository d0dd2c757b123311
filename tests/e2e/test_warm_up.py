"""A warm-up where there is nothing to capture: the caller learns why, and that is no error."""

from __future__ import annotations

import asyncio

import pytest
import torch

import attnd
from tests.attention import dense_attention

GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 16, "dtype": "float32"}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the server would take the GPU, and capture")


def test_a_processor_says_why_it_captures_nothing_and_serves(any_client: attnd.Client) -> None:
    q, k, v = torch.randn(1, 4, 16), torch.randn(1, 2, 16), torch.randn(1, 2, 16)
    with any_client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        for query_len in (1, 1, 4):
            told = cache.warm_up(num_heads=4, max_reqs=8, query_len=query_len)
            assert (told.num_graphs, told.num_bytes, told.backend) == (0, 0, "sdpa")
            assert told.reason == "device is cpu, and only a GPU has CUDA graphs"
            assert told.seconds > 0
        output = session.step(attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")).attend(0, q, k, v)
    torch.testing.assert_close(output, dense_attention(q, k, v))


def test_what_cannot_be_served_is_refused(any_client: attnd.Client) -> None:
    with any_client.create_cache(**GEOMETRY) as cache:
        with pytest.raises(attnd.InvalidRequest, match="num_heads is 3, but must be a multiple") as refused:
            cache.warm_up(num_heads=3, max_reqs=1)
        assert refused.value.field == "num_heads"
        with pytest.raises(attnd.InvalidRequest, match="max_reqs is -1, but must be an integer in 0"):
            cache.warm_up(num_heads=4, max_reqs=-1)
        with pytest.raises(attnd.Unsupported, match="triton is off"):
            cache.warm_up(num_heads=4, max_reqs=1, options=attnd.AttentionOptions(backend="triton"))
    with pytest.raises(attnd.CacheLost):
        cache.warm_up(num_heads=4, max_reqs=1)


def test_asyncio_has_it_too(server_address: str) -> None:
    async def told() -> attnd.WarmUp:
        async with await attnd.aio.connect(server_address) as client:
            async with await client.create_cache(**GEOMETRY) as cache:
                return await cache.warm_up(num_heads=4, max_reqs=2)

    assert asyncio.run(told()).reason == "device is cpu, and only a GPU has CUDA graphs"
