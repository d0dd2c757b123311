"""An autoregressive model with two requests: a prefill step of both prompts, then decode steps of a token each.

Run it with `python examples/decode_loop.py`, or with the address of a server: `... decode_loop.py localhost:7411`.
It needs `attnd[torch]`, and `attnd[server]` for the server in this process that it has without an address.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import chain

import torch

import attnd

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VOCABULARY = 2, 4, 2, 16, 64
PROMPTS = ([3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9])
NEW_TOKENS = 20
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class ToyModel:
    """A transformer with random weights. All that it does not do itself is attention."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        width = NUM_HEADS * HEAD_DIM
        self.embedding = torch.randn(VOCABULARY, width)
        self.to_qkv = torch.randn(NUM_LAYERS, width, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM) * width**-0.5
        self.to_hidden = torch.randn(NUM_LAYERS, width, width) * width**-0.5
        self.to_logits = torch.randn(width, VOCABULARY)

    def logits(self, tokens: list[int], attend: Attend) -> torch.Tensor:
        """`[num_tokens, VOCABULARY]` of the new tokens of all requests, one request after the other."""
        hidden = self.embedding[tokens]
        for layer in range(NUM_LAYERS):
            qkv = (hidden @ self.to_qkv[layer]).unflatten(1, (-1, HEAD_DIM))
            q, k, v = qkv.split((NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS), 1)
            hidden = hidden + attend(layer, q, k, v).flatten(1) @ self.to_hidden[layer]
        return hidden @ self.to_logits


def new_step(
    session: attnd.Session, requests: list[attnd.PagedSequence], query_lens: list[int], kind: str
) -> attnd.Step:
    """A step in which each request gets new tokens, and pages for them."""
    context_lens = [request.length for request in requests]
    slots = [slot for request, length in zip(requests, query_lens, strict=True) for slot in request.extend(length)]
    num_pages = max(len(request.pages) for request in requests)
    page_tables = [request.pages + [-1] * (num_pages - len(request.pages)) for request in requests]
    return session.step(attnd.StepMetadata(query_lens, context_lens, page_tables, slots, kind=kind))


def main(address: str = "inproc://") -> None:
    """Generates tokens after each prompt, and prints them."""
    with (
        attnd.connect(address) as client,
        client.create_cache(
            num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, num_pages=16, dtype="float32"
        ) as cache,
        cache.session() as session,
    ):
        model, pool = ToyModel(), attnd.PagePool(cache.config.num_pages, cache.config.page_size)
        requests = [attnd.PagedSequence(pool) for _ in PROMPTS]
        tokens, query_lens = list(chain(*PROMPTS)), [len(prompt) for prompt in PROMPTS]
        answers = []
        for kind in ["prefill"] + ["decode"] * (NEW_TOKENS - 1):
            logits = model.logits(tokens, new_step(session, requests, query_lens, kind).attend)
            last_rows = torch.tensor(query_lens).cumsum(0) - 1  # of each request
            tokens, query_lens = logits[last_rows].argmax(1).tolist(), [1] * len(requests)
            answers.append(tokens)
    for answer in zip(*answers, strict=True):
        print(*answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
