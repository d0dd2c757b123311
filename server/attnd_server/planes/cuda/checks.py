"""What a cuda plane looks at before it enqueues anything of a step, by message or resident."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attnd.errors import InvalidRequest
from attnd.protocol.cuda.layout import Geometry, StepLayout
from attnd.protocol.cuda.resident import layer_layouts
from attnd.protocol.tensors import DTYPES
from attnd.v1 import step_pb2
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.metadata import AttentionOptions
from attnd_server.execution.cost import Cost, too_costly
from attnd_server.service.service import AttentionService


def refuse_wrong_heads(num_heads: int, config: AttentionConfig) -> None:
    """Raises InvalidRequest: the cache's KV heads do not serve so many query heads."""
    if num_heads == 0 or num_heads % config.num_kv_heads:
        rule = f"must be a multiple of the cache's {config.num_kv_heads} KV heads"
        raise InvalidRequest(f"num_heads is {num_heads}, but {rule}", field="num_heads")


def layer_options(
    service: AttentionService,
    messages: Sequence[step_pb2.AttentionOptions],
    config: AttentionConfig,
    num_heads: int,
    window: int,
) -> list[AttentionOptions]:
    """Those of each layer; without a message, all have the defaults.

    Raises:
        InvalidRequest: they are wrong, or neither one for all nor one for each.
    """
    told = list(messages) or [step_pb2.AttentionOptions()]
    options = [service.checked_options(each, config, num_heads, window) for each in told]
    if len(options) not in (1, config.num_layers):
        rule = f"must have one for all layers, or one for each of the cache's {config.num_layers}"
        raise InvalidRequest(f"options has {len(options)} elements, but {rule}", field="options")
    return options * config.num_layers if len(options) == 1 else options


def refuse_costly(options: list[AttentionOptions], cost: Callable[[AttentionOptions], Cost], most: float) -> None:
    """Raises Exhausted: the layers together would have the device for longer than the `most` work."""
    costs = {each: cost(each).work for each in dict.fromkeys(options)}
    if (work := sum(costs[each] for each in options)) > most:
        raise too_costly(work, most)


def places_of(
    config: AttentionConfig, num_tokens: int, num_heads: int, region_bytes: int, layout_tokens: int = 0
) -> tuple[StepLayout, StepLayout]:
    """Where the tensors of a step's even and odd layers lie. Arguments and errors as of `layer_layouts`."""
    return layer_layouts(num_tokens, num_heads, geometry_of(config), region_bytes, layout_tokens)


def geometry_of(config: AttentionConfig) -> Geometry:
    """What a step's tensors have in common with their cache."""
    dtype = DTYPES[str(config.dtype).removeprefix("torch.")]
    return Geometry(config.num_kv_heads, config.head_dim, config.head_dim_v, dtype)
