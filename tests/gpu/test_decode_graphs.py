"""Warm-up on a GPU: what is captured gives what the same server gives without it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

import attnd

PAGE, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 16, 8, 2, 64, 3
PAGES_OF_REQUEST, MAX_REQS = 24, 9
NUM_SLOTS = 2 * MAX_REQS * PAGES_OF_REQUEST * PAGE
GEOMETRY = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": torch.bfloat16}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU",  # others have no fixed plans
    ),
]


@pytest.fixture
def caches(client: attnd.Client) -> Iterator[tuple[attnd.Cache, attnd.Cache]]:
    """Two with the same tokens: one to be warmed up, one not."""
    with (
        client.create_cache(**GEOMETRY, num_pages=NUM_SLOTS // PAGE) as warm,
        client.create_cache(**GEOMETRY, num_pages=NUM_SLOTS // PAGE) as cold,
    ):
        for layer in range(LAYERS):
            k, v = new_tokens(NUM_SLOTS)[1:]
            for cache in (warm, cold):
                cache.store_kv(layer, range(NUM_SLOTS), k, v)
        yield warm, cold


def new_tokens(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(num_tokens, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    k, v = (torch.randn(num_tokens, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in "kv")
    return q, k, v


def requests_of(session: int, num_reqs: int, query_len: int, kind: str = "decode") -> attnd.StepMetadata:
    """Requests of random context, in pages of their own; every fifth new token is not stored."""
    first = session * MAX_REQS * PAGES_OF_REQUEST
    tables = [list(range(first + PAGES_OF_REQUEST * r, first + PAGES_OF_REQUEST * (r + 1))) for r in range(num_reqs)]
    context_lens = torch.randint(0, PAGES_OF_REQUEST * PAGE - query_len, (num_reqs,)).tolist()
    slots = [
        table[position // PAGE] * PAGE + position % PAGE
        for table, context_len in zip(tables, context_lens, strict=True)
        for position in range(context_len, context_len + query_len)
    ]
    slots = [-1 if index % 5 == 4 else slot for index, slot in enumerate(slots)]
    lens = [query_len] * num_reqs
    if query_len == 1:
        return attnd.StepMetadata(lens, context_lens, tables, slots, kind=kind)
    mask = ("bidirectional", "block_causal")[num_reqs % 2]
    valid_lens = torch.randint(1, query_len + 1, (num_reqs,)).tolist()
    block = {"mask": mask, "block_size": query_len, "valid_lens": valid_lens}
    return attnd.StepMetadata(lens, context_lens, tables, slots, kind=kind, **block)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("query_len", [1, 32])
def test_warm_steps_give_what_cold_ones_give(
    caches: tuple[attnd.Cache, attnd.Cache], query_len: int, return_lse: bool
) -> None:
    warm, cold = caches
    options = attnd.AttentionOptions(return_lse=return_lse)
    told = warm.warm_up(num_heads=HEADS, query_len=query_len, max_reqs=MAX_REQS, options=options)
    assert told.reason == ""
    assert told.num_graphs == 3 * LAYERS  # for batches of 1, 4 and 9
    assert told.backend == "triton_grouped"
    assert told.num_bytes > 0
    assert warm.warm_up(num_heads=HEADS, query_len=query_len, max_reqs=MAX_REQS, options=options).num_graphs == 9
    sessions = [[cache.session(), cache.session()] for cache in caches]
    shapes = [(num_reqs, query_len, "decode") for num_reqs in (1, 9, 4, 5, 2, 8)]
    shapes += [(3, 40, "prefill"), (7, 1, "decode")]
    for index, (num_reqs, length, kind) in enumerate(shapes):
        other = shapes[(index + 3) % len(shapes)]
        metadata = [requests_of(0, num_reqs, length, kind), requests_of(1, *other)]
        steps = [[session.step(step) for session, step in zip(pair, metadata, strict=True)] for pair in sessions]
        for layer in range(LAYERS):
            for which, step in enumerate(metadata):
                call = new_tokens(sum(step.query_lens))
                outputs = [pair[which].attend(layer, *call, options) for pair in steps]
                for ours, theirs in zip(*(outputs if return_lse else [(output,) for output in outputs]), strict=True):
                    if step.query_lens[0] == 1:
                        assert torch.equal(ours, theirs), (index, layer, which)
                    else:
                        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    like = torch.empty(0, dtype=torch.bfloat16)
    for layer in range(LAYERS):
        stored = [cache.read_kv(layer, range(NUM_SLOTS), like) for cache in caches]
        for ours, theirs in zip(*stored, strict=True):
            assert torch.equal(ours, theirs)
    assert warm.info().num_pages_written == cold.info().num_pages_written


def test_a_warm_up_stores_nothing(client: attnd.Client) -> None:
    with client.create_cache(**GEOMETRY, num_pages=4) as cache:
        for query_len in (1, 32):
            assert cache.warm_up(num_heads=HEADS, query_len=query_len, max_reqs=2).num_graphs == 2 * LAYERS
        for layer in range(LAYERS):
            k, v = cache.read_kv(layer, range(4 * PAGE), torch.empty(0, dtype=torch.bfloat16))
            assert not k.any()
            assert not v.any()
        assert cache.info().num_pages_written == 0


def test_the_memory_of_graphs_is_freed_with_their_cache() -> None:
    def used() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def lease_warm_up_and_attend(client: attnd.Client) -> None:
        with client.create_cache(**GEOMETRY, num_pages=64) as cache, cache.session() as session:
            before = used()
            told = cache.warm_up(num_heads=HEADS, max_reqs=MAX_REQS, max_context_len=512)
            assert told.num_graphs == 3 * LAYERS
            assert used() - before >= told.num_bytes
            assert client.capabilities().devices[0].num_bytes_used == cache.info().num_bytes + told.num_bytes
            step = session.step(requests_of(0, 1, 1))
            for layer in range(LAYERS):
                step.attend(layer, *new_tokens(1))

    with attnd.connect("inproc://") as client:
        lease_warm_up_and_attend(client)  # what stays, stays from here on: libraries, a generator's state
        before = used()
        lease_warm_up_and_attend(client)
        assert used() == before
        assert client.capabilities().devices[0].num_bytes_used == 0
