"""A worker that computes q, k and v of one half of a batch while the server attends the other half.

Run it with `python examples/overlap.py`, or with the address of a server: `... overlap.py localhost:7411`. It needs
`attnd[torch]`, and `attnd[server]` for the server in this process that it has without an address. There nothing is
gained: it takes two processes.
"""

from __future__ import annotations

import sys

import torch

import attnd

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 4, 4, 16
WIDTH = NUM_HEADS * HEAD_DIM
HALVES = ((0, 1), (2, 3))  # requests of each half of the batch
NUM_STEPS = 6
torch.manual_seed(1)
TO_QKV = torch.randn(NUM_LAYERS, WIDTH, 3 * WIDTH) * WIDTH**-0.5
FIRST_INPUTS = torch.randn(4, WIDTH)  # one token of each request


def qkv(layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the worker computes of a layer: q, k and v, each `[num_tokens, NUM_HEADS, HEAD_DIM]`."""
    q, k, v = (hidden @ TO_QKV[layer]).unflatten(1, (-1, HEAD_DIM)).split(NUM_HEADS, 1)
    return q, k, v


def new_step(session: attnd.Session, requests: list[attnd.PagedSequence]) -> attnd.Step:
    """A decode step of one half of the batch."""
    context_lens = [request.length for request in requests]
    slots = [slot for request in requests for slot in request.extend(1)]
    page_tables = [request.pages for request in requests]
    return session.step(attnd.StepMetadata([1] * len(requests), context_lens, page_tables, slots, kind="decode"))


def main(address: str = "inproc://") -> None:
    """Decodes some tokens of each request, and prints the sum of each request's last hidden state."""
    with (
        attnd.connect(address) as client,
        client.create_cache(
            num_layers=NUM_LAYERS, num_kv_heads=NUM_HEADS, head_dim=HEAD_DIM, num_pages=4, dtype="float32"
        ) as cache,
        cache.session() as session,
    ):
        pool = attnd.PagePool(cache.config.num_pages, cache.config.page_size)
        halves = [[attnd.PagedSequence(pool) for _ in half] for half in HALVES]
        hidden = [FIRST_INPUTS[list(half)] for half in HALVES]
        for _ in range(NUM_STEPS):
            steps = [new_step(session, requests) for requests in halves]
            pending: list[attnd.PendingCall | None] = [None, None]
            for layer in range(NUM_LAYERS):
                for half, step in enumerate(steps):
                    call = pending[half]
                    if call is not None:  # of the layer before; the other half's call runs meanwhile
                        hidden[half] = hidden[half] + call.wait().flatten(1)
                    pending[half] = step.submit(layer, *qkv(layer, hidden[half]))
            for half, call in enumerate(pending):
                if call is not None:
                    hidden[half] = torch.tanh(hidden[half] + call.wait().flatten(1))  # the next step's input
    for half, rows in zip(HALVES, hidden, strict=True):
        for request, row in zip(half, rows, strict=True):
            print(f"request {request}: {row.sum():.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
