"""Where everything lies in a safetensors file of a cache's pages.

The format (https://huggingface.co/docs/safetensors) is 8 bytes with the length of a header, the header in JSON, and the
tensors' bytes one after the other. Here these are `pages`, the ids of the pages that were written to, and for each
layer `layers.N.k` and `layers.N.v`, those pages of it; in a latent cache `layers.N.k` has V too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import NamedTuple

from attnd_server.attention.geometry import ITEM_SIZES, Geometry, dtype_name

# Bytes that are in memory at one time.
CHUNK_BYTES = 16 << 20

# The format's names.
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}


class Part(NamedTuple):
    """K or V of a layer.

    Attributes:
        layer: which.
        is_k: K, or V.
        offset: where it begins in the file.
        page_bytes: bytes of one page.
    """

    layer: int
    is_k: bool
    offset: int
    page_bytes: int


class TensorLayout:
    """Where everything lies in the file of a geometry and a number of pages.

    Attributes:
        header: the file's first bytes.
        num_bytes: of the file.
        num_pages: in it.
        parts: K and V of each layer, or K alone, in the order of the file.
    """

    def __init__(self, config: Geometry, num_pages: int) -> None:
        """Of `num_pages` pages of a cache."""
        self.num_pages = num_pages
        tensors: dict[str, object] = {"pages": _tensor("I32", (num_pages,), 0, 4 * num_pages)}
        parts: list[Part] = []
        end = 4 * num_pages
        kinds = {True: (config.k_shape[1:], dtype_name(config.kv_dtype))}
        if not config.latent:
            kinds[False] = config.v_shape[1:], dtype_name(config.v_dtype)
        for layer in range(config.num_layers):
            for is_k, (shape, dtype) in kinds.items():
                page_bytes = math.prod(shape) * ITEM_SIZES[dtype]
                begin, end = end, end + num_pages * page_bytes
                name = f"layers.{layer}.{'k' if is_k else 'v'}"
                tensors[name] = _tensor(_DTYPES[dtype], (num_pages, *shape), begin, end)
                parts.append(Part(layer, is_k, begin, page_bytes))
        text = json.dumps(tensors, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that tensors are aligned
        self.header = len(text).to_bytes(8, "little") + text
        self.num_bytes = len(self.header) + end
        self.parts = [part._replace(offset=len(self.header) + part.offset) for part in parts]

    def chunks(self, part: Part) -> Iterator[slice]:
        """The pages of a part by the megabytes."""
        step = max(1, CHUNK_BYTES // part.page_bytes)
        return (slice(first, min(first + step, self.num_pages)) for first in range(0, self.num_pages, step))

    def most_bytes(self, part: Part) -> int:
        """Of the largest of a part's `chunks`."""
        return min(self.num_pages, max(1, CHUNK_BYTES // part.page_bytes)) * part.page_bytes


def _tensor(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
