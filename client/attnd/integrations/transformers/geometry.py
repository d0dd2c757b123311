"""What a model's configuration says of its KV."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from attnd.errors import Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LAYER_TYPES = ("full_attention", "sliding_attention")


class Geometry(NamedTuple):
    """As `create_cache` takes it."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def geometry_of(config: PreTrainedConfig) -> Geometry:
    """What a decoder's layers have in common.

    Raises:
        Unsupported: a layer is not plain attention over keys and values of its own.
    """
    if config.is_encoder_decoder:
        raise Unsupported("the model is an encoder-decoder, but must be a decoder: cross-attention is not served")
    if getattr(config, "kv_lora_rank", None):
        raise Unsupported("the model caches latents (kv_lora_rank is set), but must cache keys and values")
    for number, layer_type in enumerate(getattr(config, "layer_types", None) or ()):
        if layer_type not in _LAYER_TYPES:
            rule = f"must be one of {', '.join(_LAYER_TYPES)}"
            raise Unsupported(f"layer_types[{number}] is {layer_type}, but {rule}", field="layer_types")
    num_heads = config.num_attention_heads
    return Geometry(
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
    )
