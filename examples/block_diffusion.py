"""A block-diffusion model: a block is denoised in several steps that store nothing, and stored once it is finished.

Run it with `python examples/block_diffusion.py`, or with the address of a server: `... block_diffusion.py
localhost:7411`. It needs `attnd[torch]`, and `attnd[server]` for the server in this process that it has without an
address.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

import attnd

NUM_LAYERS, NUM_HEADS, HEAD_DIM, VOCABULARY, MASK = 2, 4, 16, 64, 63
BLOCK = 8  # tokens that see each other
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]  # one block, so that every block starts where a block may
NEW_BLOCKS, TOKENS_PER_STEP = 3, 2
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class ToyModel:
    """A transformer with random weights. All that it does not do itself is attention."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        width = NUM_HEADS * HEAD_DIM
        self.embedding, self.places = torch.randn(VOCABULARY, width), torch.randn(BLOCK, width)
        self.to_qkv = torch.randn(NUM_LAYERS, width, 3 * width) * width**-0.5
        self.to_logits = torch.randn(width, MASK)

    def logits(self, tokens: list[int], attend: Attend) -> torch.Tensor:
        """`[BLOCK, MASK]` of the tokens of one block."""
        hidden = self.embedding[tokens] + self.places
        for layer in range(NUM_LAYERS):
            q, k, v = (hidden @ self.to_qkv[layer]).unflatten(1, (-1, HEAD_DIM)).split(NUM_HEADS, 1)
            hidden = hidden + attend(layer, q, k, v).flatten(1)
        return hidden @ self.to_logits


def denoise(model: ToyModel, block: list[int], attend: Attend) -> None:
    """Fills in the masked tokens of which the model is surest."""
    confidence, tokens = model.logits(block, attend).softmax(1).max(1)
    masked = [place for place in range(BLOCK) if block[place] == MASK]
    for place in sorted(masked, key=lambda place: -confidence[place])[:TOKENS_PER_STEP]:
        block[place] = int(tokens[place])


def main(address: str = "inproc://") -> None:
    """Generates blocks after the prompt, and prints each."""
    model = ToyModel()
    with (
        attnd.connect(address) as client,
        client.create_cache(
            num_layers=NUM_LAYERS, num_kv_heads=NUM_HEADS, head_dim=HEAD_DIM, num_pages=8, dtype="float32"
        ) as cache,
        cache.session() as session,
    ):
        request = attnd.PagedSequence(attnd.PagePool(cache.config.num_pages, cache.config.page_size))

        def step(slots: list[int], context_len: int) -> attnd.Step:
            block = {"kind": "decode", "mask": "block_causal", "block_size": BLOCK}
            return session.step(attnd.StepMetadata([BLOCK], [context_len], [request.pages], slots, **block))

        model.logits(PROMPT, step(request.extend(BLOCK), 0).attend)
        for _ in range(NEW_BLOCKS):
            block, context_len = [MASK] * BLOCK, request.length
            while MASK in block:
                denoise(model, block, step([-1] * BLOCK, context_len).attend)
            model.logits(block, step(request.extend(BLOCK), context_len).attend)
            print(*block)


if __name__ == "__main__":
    main(*sys.argv[1:])
