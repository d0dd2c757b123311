"""Pages of a snapshot as the tokens that calls carry, and back.

Calls carry K and V in the cache's dtype and by token; a snapshot has the bytes of pages. Between the two lies what a
server does when it stores and reads, on a few pages at a time. FP8 is read as its value times a scale and stored as
that divided by the scale: where that gives every value back, the bits are the same (a NaN stays a NaN), else it is
refused.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attnd.errors import InvalidRequest
from attnd_server.attention.config import FP8, AttentionConfig
from attnd_server.attention.kernels.pages import dequantised, quantised, read_kv, store_kv, stored_tokens
from attnd_server.attention.layer_pages import LayerPages


def refuse_if_inexact(config: AttentionConfig) -> None:
    """Raises InvalidRequest where some FP8 value does not come back from a call's dtype."""
    if not config.is_quantised:
        return
    codes = torch.arange(256, dtype=torch.uint8)
    is_number = ~codes.view(FP8).float().isnan()
    for name, given in (("k_scales", config.k_scales), ("v_scales", config.v_scales)):
        scales = torch.tensor(given, dtype=torch.float32)
        values = codes.view(FP8)[:, None, None].expand(256, len(given), 1)
        again = quantised(dequantised(values, scales, config.dtype), scales).view(torch.uint8)[..., 0]
        wrong = (again != codes[:, None])[is_number].any(0).nonzero()
        if len(wrong):
            head = int(wrong[0])
            raise InvalidRequest(
                f"{name}[{head}] is {given[head]:g}, but must let every FP8 value times it be told from others in "
                f"{config.dtype}, in which calls carry it",
                field=name,
            )


def slots_of(pages: torch.Tensor, config: AttentionConfig) -> torch.Tensor:
    """Int64, the slots of pages, in order."""
    return (pages[:, None] * config.page_size + torch.arange(config.page_size)).flatten()


def narrowest(config: AttentionConfig) -> torch.dtype:
    """The dtype in which slots take the fewest bytes."""
    return torch.int32 if config.num_slots < 1 << 31 else torch.int64


def pages_of(k: torch.Tensor, v: torch.Tensor, config: AttentionConfig) -> dict[bool, torch.Tensor]:
    """The bytes of whole pages with these tokens, of K and of V: uint8."""
    pages = _like(config, len(k) // config.page_size)
    k_pages, v_pages = (torch.zeros(shape, dtype=config.kv_dtype) for shape in (pages.k_shape, pages.v_shape))
    slots = stored_tokens(torch.arange(len(k)), "cpu")
    store_kv(LayerPages(k_pages, v_pages, *_scales(config)), k, v, slots, config.layout)
    return {True: k_pages.flatten().view(torch.uint8), False: v_pages.flatten().view(torch.uint8)}


def tokens_of(k: bytearray, v: bytearray, num_pages: int, config: AttentionConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of whole pages with these bytes, of K and of V."""
    pages = _like(config, num_pages)
    dtype = config.kv_dtype or config.dtype
    k_pages, v_pages = (
        torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)
        for data, shape in ((k, pages.k_shape), (v, pages.v_shape))
    )
    stored = LayerPages(k_pages, v_pages, *_scales(config))
    return read_kv(stored, torch.arange(pages.num_slots), config.layout, config.dtype)


def _like(config: AttentionConfig, num_pages: int) -> AttentionConfig:
    return replace(config, num_layers=1, num_pages=num_pages)


def _scales(config: AttentionConfig) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    if not config.is_quantised:
        return None, None
    k, v = (torch.tensor(each).expand(config.num_kv_heads) for each in (config.k_scales, config.v_scales))
    return k, v
