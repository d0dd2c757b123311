"""What a model's configuration says of its KV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnd.errors import Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Geometry:
    """The layers of a model, and the cache that they have on the server.

    Attributes:
        num_layers: of the model.
        served: by the number of each layer of the model that has keys on the server, its layer of the server's cache.
        last_number: of the last module that attends in a pass.
        num_kv_heads: KV heads per layer.
        head_dim: elements per head of q and k.
        windows: of each layer of the model, the sliding window in tokens; 0: none.
    """

    num_layers: int
    served: dict[int, int]
    last_number: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int, ...]

    def of_cache(self) -> dict[str, Any]:
        """Arguments of `create_cache`."""
        return {"num_layers": len(self.served), "num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim}


def geometry_of(config: PreTrainedConfig) -> Geometry:
    """What a decoder's layers have in common.

    Raises:
        Unsupported: a layer is not plain attention over keys and values of its own.
    """
    if config.is_encoder_decoder:
        raise Unsupported("the model is an encoder-decoder, but must be a decoder: cross-attention is not served")
    if getattr(config, "kv_lora_rank", None):
        raise Unsupported("the model caches latents (kv_lora_rank is set), but must cache keys and values")
    num_layers = config.num_hidden_layers
    sliding = getattr(config, "sliding_window", None) or 0
    layer_types = (
        getattr(config, "layer_types", None) or ["sliding_attention" if sliding else "full_attention"] * num_layers
    )
    for number, layer_type in enumerate(layer_types):
        if layer_type not in _LAYER_TYPES:
            rule = f"must be one of {', '.join(_LAYER_TYPES)}"
            raise Unsupported(f"layer_types[{number}] is {layer_type}, but {rule}", field="layer_types")
    num_heads = config.num_attention_heads
    return Geometry(
        num_layers=num_layers,
        served={number: number for number in range(num_layers)},
        last_number=num_layers - 1,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        windows=tuple(sliding if layer_type == "sliding_attention" else 0 for layer_type in layer_types),
    )
