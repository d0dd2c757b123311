"""Slots that a store-first step stores before it attends, because it reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from attnd_server.attention.kernels.pages import StoredTokens, kept_slots
from attnd_server.kv.cache import Cache


@contextmanager
def replaced(cache: Cache, layer: int, stored: StoredTokens, store: Callable[[], None]) -> Iterator[None]:
    """Stores; if what follows fails, what lay in the slots comes back: a call that fails has stored nothing.

    Args:
        cache: that is stored into.
        layer: of it.
        stored: the slots.
        store: stores into them.
    """
    put_back = kept_slots(cache.layers[layer], stored, cache.config.layout)
    try:
        store()
        yield
    except BaseException:
        if not cache.is_closed:
            put_back()
        raise
