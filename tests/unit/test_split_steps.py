"""Steps that are split: the float64 oracle's values whatever the parts, and what cannot be split is refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

import attnd
from attnd.integrations.model_session import ModelSession
from attnd.integrations.split_steps import Most, split
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.inproc import InprocTransport
from tests import oracle
from tests.oracle import BIDIRECTIONAL, BLOCK_CAUSAL, CAUSAL, PREFIX_FULL, Case, Request
from tests.tolerances import assert_close

PAGE, MOST_TOKENS, MOST_REQS = 4, 8, 3
WIDE = Most(1 << 20, 1 << 20, 1 << 20)


@pytest.fixture(scope="module")
def client() -> Iterator[attnd.Client]:
    """Of a server whose steps are small."""
    config = ServerConfig(device="cpu", max_step_tokens=MOST_TOKENS, max_step_reqs=MOST_REQS)
    with attnd.Client(InprocTransport(build_service(config))) as connected:
        yield connected


def run(client: attnd.Client, case: Case, metadata: attnd.StepMetadata, given: oracle.Tensors) -> torch.Tensor:
    """The output of a case whose context lies in the pages; and its lse."""
    geometry = {"num_kv_heads": case.num_kv_heads, "head_dim": case.head_dim, "page_size": case.page_size}
    with client.create_cache(num_layers=1, num_pages=case.num_pages, dtype="float32", **geometry) as cache:
        slots = list(given.slots)
        if slots:
            pages = [slot // PAGE for slot in slots], [slot % PAGE for slot in slots]
            cache.store_kv(0, slots, given.k_pages[pages], given.v_pages[pages])
        options = attnd.AttentionOptions(
            scale=case.scale,
            window=case.window,
            alibi_slopes=given.alibi_slopes,
            sinks=given.sinks,
            return_lse=case.return_lse,
        )
        session = ModelSession(cache)
        result = session.begin(metadata).attend(0, given.q, given.k, given.v, options)
        session.close()
        return result


def metadata_of(case: Case) -> attnd.StepMetadata:
    """Each new token is stored behind its request's context."""
    requests = case.requests
    slots = [
        request.pages[position // PAGE] * PAGE + position % PAGE
        for request in requests
        for position in range(request.context_len, request.context_len + request.query_len)
    ]
    lens = [request.query_len for request in requests]
    return attnd.StepMetadata(
        query_lens=lens,
        context_lens=[request.context_len for request in requests],
        page_tables=[request.pages for request in requests],
        slot_mapping=None if case.cache_only else slots,
        kind="decode" if len(set(lens)) == 1 else "prefill",
        mask=[request.mask for request in requests],
        block_size=max(request.block_size for request in requests),
        valid_lens=[request.valid_len for request in requests],
        prefix_lens=[request.prefix_len for request in requests],
        padded_prefix_lens=[request.padded_prefix_len for request in requests],
        mask_prefix_hole=case.mask_prefix_hole,
        cache_only=case.cache_only,
    )


def random_case(seed: int) -> Case:
    """Requests of all lengths around pages and limits, of which each has pages for its new tokens."""
    draw = random.Random(seed)
    free = draw.sample(range(160), 160)
    block_size = draw.choice([1, 2, 4, 8])
    requests = []
    for _ in range(draw.choice([1, 2, 5])):
        context_len = draw.choice([0, 1, PAGE - 1, PAGE, PAGE + 1, 9])
        query_len = draw.choice([0, 1, PAGE - 1, PAGE, PAGE + 1, MOST_TOKENS, MOST_TOKENS + 1, 21])
        mask = draw.choice([CAUSAL, CAUSAL, BLOCK_CAUSAL, PREFIX_FULL, BIDIRECTIONAL])
        if mask == BIDIRECTIONAL:
            query_len = min(query_len, MOST_TOKENS)
        prefix_len = draw.randint(0, context_len + query_len)
        requests.append(
            Request(
                context_len=context_len,
                query_len=query_len,
                valid_len=draw.choice([query_len, query_len, draw.randint(0, query_len)]),
                pages=[free.pop() for _ in range(8)],
                mask=mask,
                block_size=block_size,
                prefix_len=prefix_len,
                padded_prefix_len=prefix_len + draw.randint(0, 6),
            )
        )
    if not sum(request.query_len for request in requests):
        requests[0] = replace(requests[0], query_len=MOST_TOKENS + 1, valid_len=MOST_TOKENS + 1, mask=CAUSAL)
    return Case(
        requests=requests,
        head_dim=8,
        head_dim_v=8,
        page_size=PAGE,
        window=draw.choice([0, 0, 1, 3, PAGE, 11]),
        alibi=draw.random() < 0.3,
        sinks=draw.random() < 0.3,
        return_lse=draw.random() < 0.5,
        mask_prefix_hole=draw.random() < 0.3,
        cache_only=draw.random() < 0.2,
        seed=seed,
    )


def test_split_steps_give_what_whole_ones_do(client: attnd.Client) -> None:
    num_split, refusals = 0, []
    for seed in range(150):
        case = random_case(seed)
        given, metadata = oracle.tensors(case), metadata_of(case)
        try:
            num_split += len(split(metadata, Most(MOST_TOKENS, MOST_REQS, 1 << 20), PAGE)) > 1
        except attnd.Unsupported as error:
            refusals.append((case.cache_only, str(error)))
            continue
        output = run(client, case, metadata, given)
        output, lse = output if case.return_lse else (output, None)
        expected, expected_lse = oracle.attend(case, given)
        assert_close(output, expected, torch.float32)
        if lse is not None:
            assert_close(lse, expected_lse, torch.float32)
    assert num_split > 60
    assert 0 < len(refusals) < 30
    assert all(("prefix hole" if cache_only else "mask prefix_full") in told for cache_only, told in refusals)


def one(query_len: int, context_len: int = 0, **more: object) -> attnd.StepMetadata:
    """One request in pages 0..15."""
    slots = range(context_len, context_len + query_len)
    return attnd.StepMetadata([query_len], [context_len], [list(range(16))], slots, **more)


def bounds(metadata: attnd.StepMetadata, tokens: int) -> list[tuple[int, int]]:
    parts = split(metadata, WIDE._replace(tokens=tokens), PAGE)
    return [(part.rows.start, part.rows.stop) for part in parts]


def test_where_requests_are_cut() -> None:
    assert bounds(one(9), 9) == [(0, 9)]
    assert bounds(one(9), 8) == [(0, 8), (8, 9)]
    assert bounds(one(9), 3) == [(0, 3), (3, 6), (6, 9)]
    # Blocks are those of absolute positions: 6, 8, 12.
    assert bounds(one(9, 6, mask="block_causal", block_size=4), 5) == [(0, 2), (2, 6), (6, 9)]
    # The prefix, the padded prefix, and blocks after it.
    prefix = {"prefix_lens": [5], "padded_prefix_lens": [7], "block_size": 4}
    assert bounds(one(14, mask="prefix_full", **prefix), 5) == [(0, 5), (5, 8), (8, 12), (12, 14)]
    assert bounds(one(14, mask="prefix_full", **prefix), 6) == [(0, 5), (5, 8), (8, 14)]
    assert bounds(one(14, mask="prefix_full", **prefix), 7) == [(0, 7), (7, 14)]
    store_only = attnd.StepMetadata([9], [0], [[0]], range(9), mask="bidirectional", store_only=True)
    assert bounds(store_only, 4) == [(0, 4), (4, 8), (8, 9)]


def test_requests_that_fit_are_not_cut() -> None:
    metadata = attnd.StepMetadata([5, 5, 1, 1], [0] * 4, [[page] for page in range(4)], None, mask="bidirectional")
    assert bounds(metadata, 8) == [(0, 5), (5, 12)]
    parts = split(metadata, Most(100, 3, 100), PAGE)
    assert [part.metadata.query_lens for part in parts] == [[5, 5, 1], [1]]
    assert [part.metadata.query_lens for part in split(metadata, Most(100, 100, 2), PAGE)] == [[5, 5], [1, 1]]
    assert parts[1].metadata.kind == "prefill"
    decode = replace(metadata, query_lens=[1] * 4, kind="decode")
    assert [part.metadata.kind for part in split(decode, Most(2, 100, 100), PAGE)] == ["decode"] * 2
    assert split(decode, WIDE, PAGE)[0].metadata is decode


@pytest.mark.parametrize(
    ("metadata", "error", "told"),
    [
        (
            one(9, mask="bidirectional"),
            attnd.Unsupported,
            "request 0 has 9 new tokens with mask bidirectional, of which",
        ),
        (one(16, mask="block_causal", block_size=16), attnd.Unsupported, "with mask block_causal"),
        (
            attnd.StepMetadata([9], [0], [[0, 1, 2]], None),
            attnd.InvalidRequest,
            r"slot_mapping\[0\] is -1, but must be",
        ),
        (
            attnd.StepMetadata([9], [0], [[0, 1, 2]], [0, 1, 2, 9, 4, 5, 6, 7, 8]),
            attnd.InvalidRequest,
            r"slot_mapping\[3\] is 9, but must be the slot of position 3 in request 0's page table",
        ),
        (attnd.StepMetadata([9], [0], [[0]], range(9)), attnd.InvalidRequest, r"slot_mapping\[4\] is 4, but must be"),
        (
            attnd.StepMetadata([4, 5], [0, 0], [[0, 1], [2, 3]], [0, 1, 2, 3, 0, 9, 10, 11, 12]),
            attnd.InvalidRequest,
            r"slot_mapping\[4\] is 0, but must differ from slot_mapping\[0\]",
        ),
        (
            attnd.StepMetadata([4, 5], [0, 2], [[0, 1], [0, 3]], [0, 1, 2, 3, 10, 12, 13, 14, 15]),
            attnd.InvalidRequest,
            r"slot_mapping\[0\] is 0, but must not be a slot that request 1 of the step reads",
        ),
        (attnd.StepMetadata([4, 5], [0], [[0], [1]], range(9)), attnd.InvalidRequest, "context_lens has 1 elements"),
        (attnd.StepMetadata([4, 5], [0, 0], [[0], [1]], [0]), attnd.InvalidRequest, "slot_mapping has 1 elements"),
        (
            attnd.StepMetadata(
                [9], [6], [[0, 1]], cache_only=True, prefix_lens=[1], padded_prefix_lens=[3], mask_prefix_hole=True
            ),
            attnd.Unsupported,
            r"prefix hole \[1, 3\) ends inside its context",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_before_anything_is_sent(
    metadata: attnd.StepMetadata, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        split(metadata, WIDE._replace(tokens=8), PAGE)


def test_a_call_of_which_no_token_fits_is_refused() -> None:
    with pytest.raises(attnd.Exhausted, match="has no room for one token"):
        split(one(2), WIDE._replace(tokens=0), PAGE)


@pytest.mark.parametrize(
    "changes",
    [{"store_first": True}, {"window": 4}, {"attend_new": np.array([1])}, {"first_position": [0]}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_a_part_cannot_say_is_not_split(changes: dict) -> None:
    metadata = attnd.StepMetadata(cu_seqlens_q=[0, 9], seq_lens=[9], page_tables=[[1, 2, 3]], **changes)
    assert [part.metadata for part in split(metadata, Most(9, 100, 100), PAGE)] == [metadata]
    with pytest.raises(attnd.Unsupported) as caught:
        split(metadata, Most(8, 100, 100), PAGE)
    assert caught.value.field == next(iter(changes))


def test_lengths_as_engines_have_them_are_split_too() -> None:
    metadata = attnd.StepMetadata(cu_seqlens_q=np.array([0, 1, 3]), seq_lens=[4, 2], page_tables=[[1], [2]])
    first, second = split(metadata, Most(2, 100, 100), PAGE)
    assert (first.metadata.query_lens, first.metadata.context_lens, first.rows) == ([1], [3], slice(0, 1))
    assert (second.metadata.query_lens, second.metadata.context_lens, second.rows) == ([2], [0], slice(1, 3))
    assert second.metadata.num_tokens == 2
