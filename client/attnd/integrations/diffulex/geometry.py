"""Whether Diffulex's metadata belongs to a cache."""

from __future__ import annotations

from typing import Any

from attnd.errors import InvalidRequest
from attnd.v1 import cache_pb2


def check_geometry(metadata: Any, config: cache_pb2.CacheConfig) -> None:
    """Checks the page size and layout that a Diffulex-like object names against those of the cache.

    Raises:
        InvalidRequest: they differ.
    """
    page_size = getattr(metadata, "page_size", config.page_size)
    if page_size != config.page_size:
        raise InvalidRequest(
            f"page_size is {page_size}, but must be {config.page_size} as in the cache", field="page_size"
        )
    layout = getattr(metadata, "kv_cache_layout", None)
    expected = "distinct" if config.layout == cache_pb2.LAYOUT_DISTINCT else "unified"
    if layout is not None and layout != expected:
        raise InvalidRequest(
            f"kv_cache_layout is {layout!r}, but must be {expected!r} as in the cache", field="kv_cache_layout"
        )
