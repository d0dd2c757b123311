"""Tiny configurations: a family's own defaults with small numbers in their places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VOCAB = 97
PAD = 0
NUM_LAYERS = 4
WINDOW = 6

# What a configuration gets where it has a field of this name. Weights are large, so that logits depend on attention.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "padded_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "n_embed", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("dim", "emb_dim", "input_embedding_size", "output_embedding_size", "lru_width"), 64),
    **dict.fromkeys(("projection_dim",), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff"), 96),
    **dict.fromkeys(("intermediate_size_mlp", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "dff", "mlp_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), NUM_LAYERS),
    **dict.fromkeys(("num_decoder_layers", "num_blocks"), NUM_LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "attention_head_dim", "v_head_dim", "kv_channels", "rotary_dim"), 16),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "num_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("max_target_positions", "max_seq_length", "seq_length"), 256),
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size"), WINDOW),
    # Latents.
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    # Recurrent layers.
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_head_dim"), 16),
    "mamba_d_ssm": 128,
    "linear_num_key_heads": 2,
    # Images and sound.
    "image_size": 32,
    "patch_size": 8,
    # Tokens.
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
    "tie_word_embeddings": False,
    # Features that a default leaves out.
    **dict.fromkeys(("attention_bias", "qk_layernorm", "scale_attn_by_inverse_layer_idx"), True),
    **dict.fromkeys(("attention_multiplier", "key_multiplier"), 0.4),
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 3.0,
    "clip_qkv": 4.0,
    # What would make a run differ from the next.
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop", "dropout", "hidden_dropout", "layerdrop"), 0.0),
}


def tiny_config(config_class: type[Any], overrides: Mapping[str, Any]) -> Any:
    """A configuration of `config_class` with few and small layers of every type that it has.

    Args:
        config_class: of transformers.
        overrides: what the table of names does not know; a dict for a part's configuration.
    """
    defaults = config_class()
    parts = getattr(config_class, "sub_configs", {})
    values = _small_values(defaults)
    for name in parts:
        part = getattr(defaults, name, None)
        if part is not None and not isinstance(part, dict):
            values[name] = {**_small_values(part), **overrides.get(name, {}), "model_type": part.model_type}
            if isinstance(parts[name], type) and parts[name].__name__ != "AutoConfig":
                values[name] = tiny_config(type(part), overrides.get(name, {}))
    values |= {name: value for name, value in overrides.items() if name not in parts or not isinstance(value, dict)}
    return config_class(**values)


def _small_values(config: Any) -> dict[str, Any]:
    config.allow_global_per_layer_attribute_access = True  # some fields have a value of their own in each layer
    values = {
        name: value for name, value in _SMALL.items() if _has_plain(config, name) and not _is_derived(config, name)
    }
    own_names = getattr(config, "attribute_map", {})
    if "kv_lora_rank" in values or "num_key_value_heads" in own_names:  # as many as of queries
        values.pop("num_key_value_heads", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types and not _is_derived(config, "layer_types"):
        kinds = list(dict.fromkeys(layer_types))
        values["layer_types"] = [kinds[index % len(kinds)] for index in range(NUM_LAYERS)]
    return values


def _has_plain(config: Any, name: str) -> bool:
    """Whether there is such a field, and it is no collection."""
    return hasattr(config, name) and not isinstance(getattr(config, name), list | tuple | dict)


def _is_derived(config: Any, name: str) -> bool:
    """Whether the configuration makes it of other fields."""
    own_name = getattr(config, "attribute_map", {}).get(name, name)
    return isinstance(getattr(type(config), own_name, None), property)
