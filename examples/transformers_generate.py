"""A transformers model whose `generate` has its attention and KV on a server: a batch of two padded prompts.

Run it with `python examples/transformers_generate.py`, or with the address of a server: `... transformers_generate.py
localhost:7411`. It needs `attnd[transformers]`, and `attnd[server]` for the server in this process that it has without
an address. The model is a small Llama with random weights; `AutoModelForCausalLM.from_pretrained` gives a real one.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnd
from attnd.integrations.transformers import attach

PADDING = 0
PROMPTS = {
    "input_ids": torch.tensor([[PADDING, PADDING, 7, 8, 9], [3, 1, 4, 1, 5]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}
HOW = {"min_new_tokens": 16, "max_new_tokens": 16, "do_sample": False, "pad_token_id": PADDING}


def make_model() -> Any:
    """A model with random weights, of which there is no copy on the server."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def main(address: str = "inproc://") -> None:
    """Generates tokens after each prompt, and prints them."""
    model = make_model()
    with attnd.connect(address) as client, attach(model, client, max_tokens=512):
        tokens = model.generate(**PROMPTS, **HOW)
    for answer in tokens[:, PROMPTS["input_ids"].shape[1] :].tolist():
        print(*answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
