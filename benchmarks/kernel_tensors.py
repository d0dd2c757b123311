"""Random data for the steps that kernels are timed on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.layer_pages import LayerPages
from benchmarks.kernel_cases import FP8, Case

_COLD_BYTES = 512 << 20
_MAX_LAYERS = 256


@dataclass(frozen=True, eq=False)
class Tensors:
    """Data of a cell. Every slot of the pages is filled; the new tokens also lie in theirs, for peers.

    Attributes:
        q: `[num_tokens, num_heads, head_dim]`, shared by the layers.
        k: `[num_tokens, num_kv_heads, head_dim]`, likewise.
        v: like k.
        layers: the pages of each layer, `[num_pages, page_size, num_kv_heads, head_dim]`; all have the same scales.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layers: list[LayerPages]

    def config(self, case: Case) -> AttentionConfig:
        """Of the cache that the pages are."""
        pages = self.layers[0]
        geometry = (len(self.layers), case.num_kv_heads, case.head_dim, len(pages.k), case.page_size)
        if pages.k_scales is None or pages.v_scales is None:
            return AttentionConfig(*geometry, dtype=case.dtype)
        return AttentionConfig(
            *geometry,
            dtype=case.dtype,
            kv_dtype=case.kv_dtype,
            k_scales=tuple(pages.k_scales.tolist()),
            v_scales=tuple(pages.v_scales.tolist()),
        )


def draw(case: Case, device: torch.device) -> Tensors:
    """Fresh random data, with as many layers as `num_layers` says."""
    q, k, v = (
        normal((case.num_tokens, heads, case.head_dim), case.dtype, device)
        for heads in (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    )
    num_pages = int((case.page_tables >= 0).sum())
    shape = (num_pages, case.page_size, case.num_kv_heads, case.head_dim)
    scales = [0.5 + torch.rand(case.num_kv_heads, device=device) if case.kv_dtype else None for _ in range(2)]
    pages_dtype, slots, layers = case.kv_dtype or case.dtype, case.new_slots.to(device), []
    for _ in range(num_layers(case, device)):
        k_pages, v_pages = normal(shape, pages_dtype, device), normal(shape, pages_dtype, device)
        as_slots(k_pages).index_copy_(0, slots, _raw(k.to(pages_dtype)))
        as_slots(v_pages).index_copy_(0, slots, _raw(v.to(pages_dtype)))
        layers.append(LayerPages(k_pages, v_pages, *scales))
    return Tensors(q, k, v, layers)


def num_layers(case: Case, device: torch.device) -> int:
    """Layers to go through in turn, so many that no KV is still in the L2 cache when its layer comes again."""
    if device.type == "cpu" or not any(case.context_lens):
        return 2
    cold_bytes = max(_COLD_BYTES, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    return max(2, min(_MAX_LAYERS, math.ceil(cold_bytes / case.num_bytes)))


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normally distributed numbers in any type."""
    result = torch.empty(shape, dtype=dtype, device=device)
    if dtype is not FP8:
        return result.normal_()
    for part in result.view(-1).split(1 << 28):
        part.copy_(torch.randn(part.shape, dtype=torch.bfloat16, device=device))
    return result


def as_slots(pages: torch.Tensor) -> torch.Tensor:
    """Pages as `[num_slots, num_kv_heads, head_dim]`, FP8 as bytes, which torch can index. Shares memory."""
    return _raw(pages).view(-1, *pages.shape[2:])


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype is FP8 else tensor
