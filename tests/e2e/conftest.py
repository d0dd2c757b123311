"""What several modules of transformers' tests need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import attnd


@pytest.fixture
def remote(client: attnd.Client) -> Iterator[Callable[..., Any]]:
    """Makes RemoteCaches that are closed afterwards."""
    from attnd.integrations.transformers import RemoteCache

    caches: list[RemoteCache] = []

    def of(served: Any, **options: Any) -> RemoteCache:
        options = {"max_tokens": 1024, "dtype": served.dtype, "page_size": 4} | options
        caches.append(RemoteCache(client, served.config, **options))
        return caches[-1]

    yield of
    for cache in caches:
        cache.close()
