"""The attention function and the mask function that transformers calls."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function

from attnd.errors import AttndError, InvalidRequest, Unsupported
from attnd.integrations.transformers.cache_layers import number_of
from attnd.integrations.transformers.compiling import hidden
from attnd.integrations.transformers.encoders.cross_cache import RemoteCrossCache
from attnd.integrations.transformers.encoders.local_attention import attend_here, stays_here
from attnd.integrations.transformers.marks import owner_of
from attnd.integrations.transformers.masks import whole
from attnd.integrations.transformers.passes import without_weights
from attnd.integrations.transformers.remote_cache import RemoteCache
from attnd.integrations.transformers.running import given_cache
from attnd.protocol.attention_options import AttentionOptions

NAME = "attnd"

# Attribute of a mask: the sliding window of the layers that it is for, 0 for none.
_WINDOW = "_attnd_window"


def register() -> None:
    """Makes "attnd" known as an attention implementation. Importing this module does it."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)


@hidden
def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: the model's attention module.
        query: `[batch_size, num_heads, num_new, head_dim]`.
        key: `[batch_size, num_kv_heads, num_new, head_dim]`, from `RemoteCache.update`.
        value: `[batch_size, num_kv_heads, num_new, head_dim_v]`.
        attention_mask: from `padding_mask`.
        dropout: must be 0.
        scaling: factor of q.k; None is `head_dim ** -0.5`.
        **kwargs: `sliding_window`, `softcap`, `s_aux` (sinks) and what does not matter here.

    Returns:
        Output `[batch_size, num_new, num_heads, head_dim_v]`, contiguous, and None for the weights.

    Raises:
        InvalidRequest: the key does not come from a RemoteCache.
        Unsupported: gradients, dropout, or something else that no call can carry.
        AttndError: see `Step.attend`.
    """
    cache, layer = owner_of(key)
    if isinstance(cache, RemoteCrossCache):
        return cache.attend(layer, query, attention_mask, _cross_options(cache, scaling, kwargs)), None
    if cache is not None:
        cache.was_read()
    elif stays_here(module, attention_mask, kwargs):
        return attend_here(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    else:
        raise _without_cache()
    if dropout or (query.requires_grad and torch.is_grad_enabled()):
        raise Unsupported("attention on a server has no gradients: use model.eval() and torch.no_grad()")
    if kwargs.get("output_attentions"):
        raise without_weights()
    options = _options(cache, module, layer, query, attention_mask, scaling, kwargs)
    return cache.attend(module, layer, query, key, value, attention_mask, options), None


@hidden
def padding_mask(
    batch_size: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor:
    """The mask that `attention` gets, see `masks.py`, with the window of its layers as an attribute.

    Args:
        batch_size: rows.
        kv_length: tokens of each row, cached ones and new ones.
        attention_mask: bool `[batch_size, kv_length]`, or None: all are real.
        local_size: sliding window, in tokens.
        allow_is_causal_skip: False where the mask is more than causal, windowed and padded.
        device: of the mask.
        **kwargs: `q_length`, `mask_function`, and what other implementations need.

    Returns:
        bool `[batch_size, kv_length]`, or int8 `[batch_size, 1, q_length, kv_length]`; int8 `[batch_size, kv_length]`
        of an encoder.
    """
    if kwargs.get("mask_function") is bidirectional_mask_function:
        # Of an encoder, or of cross-attention. Its type keeps it apart from the mask of a causal layer.
        if attention_mask is None:
            attention_mask = torch.ones((batch_size, kv_length), dtype=torch.bool, device=device)
        return attention_mask.to(torch.int8)
    if not allow_is_causal_skip:
        mask = whole(batch_size, kwargs.pop("q_length"), kv_length, attention_mask, device, **kwargs)
    elif attention_mask is None:
        mask = torch.ones((batch_size, kv_length), dtype=torch.bool, device=device)
    else:
        mask = attention_mask.detach()  # another object: several masks are made of one
    if local_size is not None or mask.dim() == 2:  # else the window, if any, is within the mask, and the layer tells it
        setattr(mask, _WINDOW, local_size or 0)
    return mask


def _without_cache() -> AttndError:
    """What to tell of keys that come from no cache."""
    cache = given_cache()
    unread = getattr(cache, "unread", None)
    if unread is not None:
        cache.was_read()  # it is told of here
        rule = "must hand them to its attention as they are: generate without a RemoteCache"
        return Unsupported(f"the model changes keys of layer {unread} after it has given them to the cache, but {rule}")
    return InvalidRequest(
        f'attention "{NAME}" needs keys from a RemoteCache: attach(model, client, max_tokens=...), or pass '
        "past_key_values=RemoteCache(client, model.config, ...) to the model, or choose another attention with "
        'model.set_attn_implementation("sdpa")',
        field="past_key_values",
    )


def _cross_options(cache: RemoteCrossCache, scaling: float | None, kwargs: dict[str, Any]) -> AttentionOptions:
    """Options of cross-attention, made at the first call of their kind."""
    softcap = kwargs.get("softcap")
    options = cache.options.get((scaling, softcap))
    if options is None:
        options = cache.options[scaling, softcap] = AttentionOptions(scale=scaling, softcap=softcap or 0.0)
    return options


def _options(
    cache: RemoteCache,
    module: torch.nn.Module,
    layer: int,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> AttentionOptions:
    """A layer's options, made at its first call."""
    window = _window(cache, number_of(module, layer), query, mask, kwargs)
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    key = (layer, scaling, window, softcap, _state_of(sinks))
    options = cache.rows.options.get(key)
    if options is None:
        _refuse_unsupported(module, mask, kwargs)
        options = AttentionOptions(scale=scaling, window=window, softcap=softcap or 0.0, sinks=sinks)
        cache.rows.options[key] = options  # keeps the sinks alive, and so their id
    return options


def _window(
    cache: RemoteCache, number: int, query: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> int:
    """The sliding window of a layer, in tokens; 0: none.

    Eager attention sees what the mask says, so a mask that still knows its window has the word. On another device it is
    a copy that does not: then the layer's own keyword counts, then what the configuration says of the layer.
    """
    window = getattr(mask, _WINDOW, None)
    if window is None:
        window = kwargs.get("sliding_window")
    configured = cache.geometry.windows[number] if number < len(cache.geometry.windows) else 0
    if window is None:
        return configured
    # Where only the configuration has a window, transformers' cache drops keys, and the mask hides none of a pass.
    if window == 0 and configured and cache.get_seq_length() >= configured:
        if query.shape[2] > 1:
            rule = "must come one by one: eager attention would show each of them another number of tokens before"
            raise Unsupported(
                f"sliding_window of layer {number} is {configured}, and its masks have none: {query.shape[2]} new "
                f"tokens behind {cache.get_seq_length()} {rule}",
                field="sliding_window",
            )
        return configured
    return int(window or 0)


def _state_of(sinks: torch.Tensor | None) -> tuple[int, int]:
    """What changes where a tensor, or what it holds, is another. Writing to its `.data` does not."""
    if sinks is None:
        return 0, 0
    return id(sinks), 0 if sinks.is_inference() else sinks._version


def _refuse_unsupported(module: torch.nn.Module, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    if mask is None and (kwargs.get("is_causal") is False or not getattr(module, "is_causal", True)):
        raise Unsupported("the layer is not causal, but a RemoteCache serves causal attention only")
    if kwargs.get("position_bias") is not None:
        raise Unsupported("the layer adds a position bias, but calls cannot carry one")


register()
