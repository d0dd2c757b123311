"""Several asyncio tasks, a request each, that share a session of one cache: their calls are under way together.

Start a server with `attnd serve`, then run `python examples/asyncio_workers.py`, or name another address than
localhost:7411 after it. It needs `attnd[torch]`. The asyncio client has no server in its own process.
"""

from __future__ import annotations

import asyncio
import sys

import torch

import attnd
import attnd.aio

NUM_WORKERS, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 3, 2, 4, 2, 16
PROMPT_LEN, NEW_TOKENS = 20, 5


def tensors(worker: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of all tokens of a request, `[NUM_LAYERS, num_tokens, heads, HEAD_DIM]`, instead of a model's."""
    generator = torch.Generator().manual_seed(worker)
    heads, num_tokens = NUM_HEADS + 2 * NUM_KV_HEADS, PROMPT_LEN + NEW_TOKENS
    qkv = torch.randn(NUM_LAYERS, num_tokens, heads, HEAD_DIM, generator=generator)
    q, k, v = qkv.split((NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS), 2)
    return q, k, v


async def work(worker: int, session: attnd.aio.AsyncSession, pool: attnd.PagePool) -> float:
    """Prefill and decode of one request. Returns the sum of the last output."""
    q, k, v = tensors(worker)
    request, output = attnd.PagedSequence(pool), torch.zeros(())
    while request.length < PROMPT_LEN + NEW_TOKENS:
        start = request.length
        slots = request.extend(1 if start else PROMPT_LEN)
        kind = "decode" if start else "prefill"
        metadata = attnd.StepMetadata([len(slots)], [start], [request.pages], slots, kind=kind)
        step = await session.step(metadata)
        new = slice(start, request.length)
        for layer in range(NUM_LAYERS):
            output = await step.attend(layer, q[layer, new], k[layer, new], v[layer, new])
    request.free()
    return output[-1].sum().item()


async def main(address: str = "localhost:7411") -> None:
    """Runs the workers, and prints what each got."""
    async with (
        await attnd.aio.connect(address) as client,
        await client.create_cache(
            num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, num_pages=16, dtype="float32"
        ) as cache,
        cache.session() as session,
    ):
        pool = attnd.PagePool(cache.config.num_pages, cache.config.page_size)
        sums = await asyncio.gather(*(work(worker, session, pool) for worker in range(NUM_WORKERS)))
    for worker, each in enumerate(sums):
        print(f"worker {worker}: {each:.4f}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
