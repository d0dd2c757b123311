"""What a model's configuration says of its KV."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from attnd.errors import Unsupported

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

# transformers' names of layers with keys and values of their own, of those with states that are no keys, and of those
# with both. Of "dummy" layers no cache keeps anything: they have no attention, or attend to the keys of another.
_ATTENDING = ("full_attention", "sliding_attention")
_RECURRENT = ("linear_attention", "conv")
_BOTH = ("hybrid", "hybrid_sliding")
_NOTHING = ("dummy",)
_KNOWN = _ATTENDING + _RECURRENT + _BOTH + _NOTHING
_SLIDING = ("sliding_attention", "hybrid_sliding")
# By model type: what a model asks of its cache that no RemoteCache has.
_OWN_CACHES = {
    "minimax": "takes a MiniMaxCache only",
    "openai-gpt": "takes no cache",
    "recurrent_gemma": "keeps the states of its recurrences in its modules",
    "reformer": "caches buckets",
    "xlm": "takes no cache",
    "xlnet": "caches hidden states",
}
_SHAPE = "KV heads, elements per head of keys, and of values"
# What layers do that are served nowhere.
_UNSERVED = {
    "chunked_attention": "attends within chunks",
    "indexed_attention": "attends to keys that an index chooses",
    "compressed_sparse_attention": "attends to compressed keys",
    "heavily_compressed_attention": "attends to compressed keys",
}


@dataclass(frozen=True)
class Geometry:
    """The layers of a model, and the cache that they have on the server.

    Attributes:
        num_layers: of the model.
        served: by the number of each layer of the model that has keys on the server, its layer of the server's cache.
        last_number: of the last module that attends in a pass.
        num_kv_heads: KV heads per layer.
        head_dim: elements per head of q and k.
        head_dim_v: elements per head of v.
        windows: of each layer of the model, the sliding window in tokens; 0: none.
        num_states: by the number of each layer with convolutions or a recurrence, how many: their states stay here.
        crossing: numbers of layers that attend to images, and are left out where there are none.
    """

    num_layers: int
    served: dict[int, int]
    last_number: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    windows: tuple[int, ...]
    num_states: dict[int, int] = field(default_factory=dict)
    crossing: frozenset[int] = frozenset()

    def of_cache(self) -> dict[str, Any]:
        """Arguments of `create_cache`."""
        return {
            "num_layers": len(self.served),
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v,
        }

    def check(self, number: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Raises Unsupported if a layer's keys and values are other than the configuration let expect.

        Args:
            number: of the layer.
            key: `[batch_size, num_kv_heads, num_new, head_dim]`.
            value: `[batch_size, num_kv_heads, num_new, head_dim_v]`.
        """
        if number in self.crossing:
            rule = "a RemoteCache serves the text alone: leave images out, or generate without a RemoteCache"
            raise Unsupported(f"layer {number} attends to images (cross_attention_layers), but {rule}")
        if number not in self.served:
            rule = "must not have any, by the model's configuration: generate without a RemoteCache"
            raise Unsupported(f"layer {number} gives keys to the cache, but {rule}")
        given = key.shape[1], key.shape[-1], value.shape[-1]
        expected = self.num_kv_heads, self.head_dim, self.head_dim_v
        if given != expected:
            rule = f"must be {expected}, by the model's configuration: one cache has one geometry"
            raise Unsupported(f"{_SHAPE} of layer {number} are {given}, but {rule}")


def geometry_of(config: PreTrainedConfig) -> Geometry:
    """What a decoder's layers have in common.

    Raises:
        Unsupported: a layer is none of those that are served, or that keep their states here; or layers differ.
    """
    if config.is_encoder_decoder:
        rule = "must be a decoder: give it a RemotePair, or attach(model, client, max_tokens=...)"
        raise Unsupported(f"the model is an encoder-decoder, but {rule}")
    _check_known(config)
    configs = _layer_configs(config)
    reused = [number for number, mode in enumerate(getattr(config, "kv_sharing_modes", None) or ()) if mode == "reuse"]
    types = _layer_types(config, configs)[: len(configs)]  # an early exit has fewer layers than its lists say
    reused = [number for number in reused if number < len(types)]
    crossing = [number for number in getattr(config, "cross_attention_layers", None) or () if number < len(types)]
    for number in reused + crossing:
        types[number] = "dummy"
    for number, layer_type in enumerate(types):
        if layer_type not in _KNOWN:
            does = f", which {_UNSERVED[layer_type]}" if layer_type in _UNSERVED else ""
            rule = f"must be one of {', '.join(_KNOWN)}: generate without a RemoteCache"
            raise Unsupported(f"layer_types[{number}] is {layer_type}{does}, but {rule}", field="layer_types")
    served = [number for number, layer_type in enumerate(types) if layer_type in _ATTENDING + _BOTH]
    if not served:
        rule = "must, for them to be served: generate without a RemoteCache"
        raise Unsupported(f"no layer of a {config.model_type} model attends to cached keys, but one {rule}")
    shapes = {number: _shape(configs[number]) for number in served}
    for number, shape in shapes.items():
        if shape != shapes[served[0]]:
            rule = f"must be those of layer {served[0]}, {shapes[served[0]]}: one cache has one geometry"
            raise Unsupported(f"{_SHAPE} of layer {number} are {shape}, but {rule}")
    num_kv_heads, head_dim, head_dim_v = shapes[served[0]]
    windows = [
        getattr(each, "sliding_window", None) or 0 if layer_type in _SLIDING else 0
        for layer_type, each in zip(types, configs, strict=True)
    ]
    return Geometry(
        num_layers=len(types),
        served={number: layer for layer, number in enumerate(served)},
        last_number=max(served + reused),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        windows=tuple(windows),
        num_states={
            number: getattr(configs[number], "number_of_conv_states", 1)
            for number, layer_type in enumerate(types)
            if layer_type in _RECURRENT + _BOTH
        },
        crossing=frozenset(crossing),
    )


def _check_known(config: PreTrainedConfig) -> None:
    """Raises Unsupported for models whose cache is not one of layers of keys and values, or of states."""
    name = config.model_type
    for missing in ("num_hidden_layers", "num_attention_heads"):
        if not hasattr(config, missing) and not _is_of_layers(config, missing):
            rule = "must, for its keys and values to be served: generate without a RemoteCache"
            raise Unsupported(f"the configuration of a {name} model has no {missing}, but {rule}")
    if getattr(config, "kv_lora_rank", None):
        raise Unsupported(f"a {name} model caches latents (kv_lora_rank is set), but must cache keys and values")
    if name in _OWN_CACHES:
        raise Unsupported(f"a {name} model {_OWN_CACHES[name]}, but must take a cache of keys and values")


def _is_of_layers(config: PreTrainedConfig, name: str) -> bool:
    """Whether each layer has a value of its own of that name: asking for the model's raises."""
    return name in (getattr(config, "per_layer_attributes", None) or ())


def _layer_configs(config: PreTrainedConfig) -> list[Any]:
    """The configuration of each layer; most models have one for all."""
    each = getattr(config, "per_layer_config", None)
    number = config.num_hidden_layers
    return [config] * number if each is None else [each[layer] for layer in range(number)]


def _layer_types(config: PreTrainedConfig, configs: list[Any]) -> list[str]:
    """Transformers' name of what each layer caches."""
    given = getattr(config, "layer_types", None)
    if given is None:
        given = [
            "sliding_attention"
            if getattr(each, "sliding_window", None)
            else "chunked_attention"
            if getattr(each, "attention_chunk_size", None)
            else "full_attention"
            for each in configs
        ]
    return ["dummy" if layer_type in ("moe", "mlp") else layer_type for layer_type in given]


def _shape(config: Any) -> tuple[int, int, int]:
    """A layer's KV heads, elements per head of q and k, and elements per head of v."""
    num_heads = config.num_attention_heads
    num_kv_heads = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return num_kv_heads or num_heads, head_dim, getattr(config, "v_head_dim", None) or head_dim
