"""Steps and calls through a server: the same values as attention computed here, on every way in."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

import attnd
from tests.attention import dense_attention

PAGE = 4
GEOMETRY = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "num_pages": 32, "page_size": PAGE, "dtype": "float32"}
HEADS = 6


def qkv(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(num_tokens, HEADS, 16), torch.randn(num_tokens, 2, 16), torch.randn(num_tokens, 2, 16)


def prefill_metadata(pages: list[int], num_tokens: int) -> attnd.StepMetadata:
    slots = [pages[token // PAGE] * PAGE + token % PAGE for token in range(num_tokens)]
    return attnd.StepMetadata([num_tokens], [0], [pages], slots)


def decode_metadata(pages: list[int], context_len: int) -> attnd.StepMetadata:
    slot = pages[context_len // PAGE] * PAGE + context_len % PAGE
    return attnd.StepMetadata([1], [context_len], [pages], [slot], kind="decode")


@pytest.mark.parametrize("num_tokens", [1, PAGE - 1, PAGE, PAGE + 1, 17])
def test_prefill_then_decode_gives_attention(any_client: attnd.Client, num_tokens: int) -> None:
    pages = [int(page) for page in np.random.default_rng(num_tokens).permutation(32)[:8]]
    with any_client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        histories = []
        step = session.step(prefill_metadata(pages, num_tokens))
        for layer in range(2):
            q, k, v = qkv(num_tokens)
            histories.append((k, v))
            torch.testing.assert_close(step.attend(layer, q, k, v), dense_attention(q, k, v))
        for context_len in range(num_tokens, num_tokens + 5):
            step = session.step(decode_metadata(pages, context_len))
            for layer in range(2):
                q, k, v = qkv(1)
                histories[layer] = tuple(torch.cat(pair) for pair in zip(histories[layer], (k, v), strict=True))
                torch.testing.assert_close(step.attend(layer, q, k, v), dense_attention(q, *histories[layer]))


def test_unary_and_stream_and_asyncio_give_the_same_bits(client: attnd.Client, server_address: str) -> None:
    q, k, v = qkv(5)
    metadata = prefill_metadata([3, 1], 5)
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        unary = client.prefill(cache, metadata, 0, q, k, v)
        stream = session.step(metadata).attend(0, q, k, v)
        decoded = client.decode(cache, decode_metadata([3, 1], 5), 0, q[:1], k[:1], v[:1])

    async def through_asyncio() -> tuple[torch.Tensor, torch.Tensor]:
        async with await attnd.aio.connect(server_address) as aio_client:
            async with await aio_client.create_cache(**GEOMETRY) as aio_cache, aio_cache.session() as aio_session:
                step = await aio_session.step(metadata)
                prefilled = await step.attend(0, q, k, v)
                step = await aio_session.step(decode_metadata([3, 1], 5))
                return prefilled, await step.attend(0, q[:1], k[:1], v[:1])

    aio_prefilled, aio_decoded = asyncio.run(through_asyncio())
    assert torch.equal(unary, stream)
    assert torch.equal(unary, aio_prefilled)
    assert torch.equal(decoded, aio_decoded)


def test_lse_sinks_and_softcap_travel(any_client: attnd.Client) -> None:
    q, k, v = qkv(5)
    sinks = torch.randn(HEADS)
    options = attnd.AttentionOptions(scale=0.3, softcap=2.0, sinks=sinks, return_lse=True)
    with any_client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        output, lse = session.step(prefill_metadata([0, 1], 5)).attend(0, q, k, v, options)
    scores = 2.0 * torch.tanh(0.3 * torch.einsum("nhd,shd->hns", q, k.repeat_interleave(3, 1)) / 2.0)
    scores = scores.masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    with_sinks = torch.cat([scores, sinks[:, None, None].expand(-1, 5, 1)], dim=2)
    weights = with_sinks.softmax(2)[:, :, :-1]
    torch.testing.assert_close(lse, with_sinks.logsumexp(2).T.contiguous())
    torch.testing.assert_close(output, torch.einsum("hns,shd->nhd", weights, v.repeat_interleave(3, 1)))


def test_numpy_in_numpy_out(any_client: attnd.Client) -> None:
    q, k, v = (tensor.numpy() for tensor in qkv(3))
    with any_client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        output = session.step(prefill_metadata([7], 3)).attend(0, q, k, v)
    assert isinstance(output, np.ndarray)
    expected = dense_attention(*(torch.from_numpy(array) for array in (q, k, v)))
    np.testing.assert_allclose(output, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_bfloat16_travels(any_client: attnd.Client) -> None:
    q, k, v = (tensor.bfloat16() for tensor in qkv(3))
    with any_client.create_cache(**{**GEOMETRY, "dtype": torch.bfloat16}) as cache, cache.session() as session:
        output = session.step(prefill_metadata([7], 3)).attend(1, q, k, v)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), dense_attention(q.float(), k.float(), v.float()), rtol=2e-2, atol=2e-2)


def test_stored_kv_reads_back_in_chunks(any_client: attnd.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnd.protocol.requests.kv_transfers.STORE_CHUNK_BYTES", 2000)
    _, k, v = qkv(40)
    slots = torch.randperm(128)[:40]
    with any_client.create_cache(**GEOMETRY) as cache:
        assert cache.store_kv(1, slots, k, v) == 40
        read_k, read_v = cache.read_kv(1, slots, like=k)
        assert torch.equal(read_k, k)
        assert torch.equal(read_v, v)
        untouched, _ = cache.read_kv(0, slots, like=k)
        assert not untouched.any()
        assert cache.info().num_pages_written == len({int(slot) // PAGE for slot in slots})


def test_store_only_and_cache_only_steps(any_client: attnd.Client) -> None:
    q, k, v = qkv(6)
    slots = [4, 5, 6, 7, 12, 13]
    with any_client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        stored = session.step(attnd.StepMetadata([6], [0], [[1, 3]], slots, store_only=True)).attend(0, None, k, v)
        assert stored is None
        cached = attnd.StepMetadata([6], [6], [[1, 3]], cache_only=True)
        output = session.step(cached).attend(0, q, None, None)
    torch.testing.assert_close(output, dense_attention(q, k, v, causal=False))


def test_copied_pages_are_the_same_in_every_layer(any_client: attnd.Client) -> None:
    with any_client.create_cache(**GEOMETRY) as cache:
        stored = []
        for layer in range(2):
            _, k, v = qkv(PAGE)
            stored.append(k)
            cache.store_kv(layer, list(range(PAGE)), k, v)
        cache.copy_pages([0], [9])
        for layer in range(2):
            k, _ = cache.read_kv(layer, list(range(9 * PAGE, 10 * PAGE)), like=stored[layer])
            assert torch.equal(k, stored[layer])


def test_a_second_run_of_a_call_changes_nothing(any_client: attnd.Client) -> None:
    q, k, v = qkv(5)
    with any_client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        step = session.step(prefill_metadata([3, 1], 5))
        first = step.attend(0, q, k, v)
        pages = cache.read_kv(0, list(range(128)), like=k)
        assert torch.equal(step.attend(0, q, k, v), first)
        assert all(torch.equal(a, b) for a, b in zip(pages, cache.read_kv(0, list(range(128)), like=k), strict=True))


def test_metadata_crosses_once_per_step(client: attnd.Client) -> None:
    num_layers, max_pages = 30, 1024
    geometry = {**GEOMETRY, "num_layers": num_layers, "num_pages": max_pages}
    with client.create_cache(**geometry) as cache, cache.session() as session:
        table = torch.randperm(max_pages, dtype=torch.int32)[None]
        step = session.step(attnd.StepMetadata([1], [PAGE * max_pages - 1], table, None, kind="decode"))
        q, k, v = qkv(1)
        for layer in range(num_layers):
            step.attend(layer, q, k, v)
        sent = session.timings().bytes_sent
    tensors = num_layers * sum(tensor.nbytes for tensor in (q, k, v))
    metadata = sent - tensors
    assert 4 * max_pages < metadata < 4 * max_pages + 80 * num_layers + 200
    assert session.timings().num_calls == num_layers


def test_several_steps_are_open_at_once(client: attnd.Client) -> None:
    with client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        first = session.step(prefill_metadata([0, 1], 5))
        second = session.step(prefill_metadata([2, 3], 7))
        for step, num_tokens in ((second, 7), (first, 5), (second, 7)):
            q, k, v = qkv(num_tokens)
            torch.testing.assert_close(step.attend(0, q, k, v), dense_attention(q, k, v))
