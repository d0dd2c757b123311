"""Small models with random weights whose layers do not all attend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large enough that a token depends on what attention saw
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LINEAR, FULL = "linear_attention", "full_attention"
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}


def lfm2() -> Any:
    """Convolutions only, and one of them behind the last layer that attends."""
    config = transformers.Lfm2Config(**COMMON | {"num_hidden_layers": 4}, layer_types=["conv", FULL, FULL, "conv"])
    return transformers.Lfm2ForCausalLM(config)


def qwen3_next() -> Any:
    config = transformers.Qwen3NextConfig(
        **COMMON | {"num_hidden_layers": 4},
        layer_types=[LINEAR, FULL, LINEAR, FULL],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return transformers.Qwen3NextForCausalLM(config)


def granite() -> Any:
    """A recurrence behind the last layer that attends."""
    config = transformers.GraniteMoeHybridConfig(
        **COMMON, **MAMBA, layer_types=[LINEAR, FULL, LINEAR], shared_intermediate_size=32, num_local_experts=0
    )
    return transformers.GraniteMoeHybridForCausalLM(config)


def falcon_h1() -> Any:
    """Both kinds in each layer, side by side."""
    return transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**COMMON, **MAMBA, mamba_d_ssm=128))


def zamba2() -> Any:
    """One module that attends, run as two layers, each with a recurrence behind it."""
    own = {"mamba_ngroups": 1, "mamba_d_state": 8, "n_mamba_heads": 4, "chunk_size": 8}
    config = transformers.Zamba2Config(
        **COMMON | {"num_hidden_layers": 4, "num_key_value_heads": 4},
        **own,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
    )
    return transformers.Zamba2ForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "lfm2": lfm2,
    "qwen3_next": qwen3_next,
    "granite": granite,
    "falcon_h1": falcon_h1,
    "zamba2": zamba2,
}


def make_model(name: str) -> Any:
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    model.set_attn_implementation("attnd")
    return model
