"""Where everything lies in a safetensors file of a cache's pages.

The format (https://huggingface.co/docs/safetensors) is 8 bytes with the length of a header, the header in JSON, and the
tensors' bytes one after the other. Here these are `pages`, the ids of the pages that were written to, and for each
layer `layers.N.k` and `layers.N.v`, those pages of it. Of a cache with layer groups each has its own `groups.N.pages`;
a latent one has K alone, whose rows have V in them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from attnd_server.attention.geometry import ITEM_SIZES, Geometry, dtype_name
from attnd_server.kv.cache_shape import CacheShape

# Bytes that are in memory at one time.
CHUNK_BYTES = 16 << 20

# The format's names.
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}


class Part(NamedTuple):
    """K or V of a layer.

    Attributes:
        group: the layer's group.
        layer: index of the layer among those of the group.
        is_k: K, or V.
        offset: where it begins in the file.
        page_bytes: bytes of one page.
    """

    group: int
    layer: int
    is_k: bool
    offset: int
    page_bytes: int


class TensorLayout:
    """Where everything lies in the file of a cache with some pages.

    Attributes:
        header: the file's first bytes.
        num_bytes: of the file.
        num_pages: of each layer group in it.
        parts: K and V of each layer, in the order of the file.
    """

    def __init__(self, shape: CacheShape[Any], num_pages: tuple[int, ...]) -> None:
        """Of so many pages of each layer group."""
        self.num_pages = num_pages
        tensors: dict[str, object] = {}
        end = 0
        for group, count in enumerate(num_pages):
            begin, end = end, end + 4 * count
            tensors["pages" if shape.is_flat else f"groups.{group}.pages"] = _tensor("I32", (count,), begin, end)
        parts: list[Part] = []
        for group, (config, numbers) in enumerate(zip(shape.groups, shape.layers, strict=True)):
            for layer, number in enumerate(numbers):
                for is_k, dtype, page in _tensors_of(config):
                    page_bytes = math.prod(page) * ITEM_SIZES[dtype]
                    begin, end = end, end + num_pages[group] * page_bytes
                    name = f"layers.{number}.{'k' if is_k else 'v'}"
                    tensors[name] = _tensor(_DTYPES[dtype], (num_pages[group], *page), begin, end)
                    parts.append(Part(group, layer, is_k, begin, page_bytes))
        text = json.dumps(tensors, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that tensors are aligned
        self.header = len(text).to_bytes(8, "little") + text
        self.num_bytes = len(self.header) + end
        self.parts = [part._replace(offset=len(self.header) + part.offset) for part in parts]

    def chunks(self, part: Part) -> Iterator[slice]:
        """The pages of a part by the megabytes."""
        step = max(1, CHUNK_BYTES // part.page_bytes)
        count = self.num_pages[part.group]
        return (slice(first, min(first + step, count)) for first in range(0, count, step))

    def most_bytes(self, part: Part) -> int:
        """Of the largest of a part's `chunks`."""
        return min(self.num_pages[part.group], max(1, CHUNK_BYTES // part.page_bytes)) * part.page_bytes


def _tensors_of(config: Geometry) -> list[tuple[bool, str, tuple[int, ...]]]:
    """Of a layer whether it is K, its type, and the shape of a page: K, and V unless it is a part of K."""
    k = True, dtype_name(config.kv_dtype), config.k_shape[1:]
    v = False, dtype_name(config.v_dtype), config.v_shape[1:]
    return [k] if config.latent else [k, v]


def _tensor(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
