"""Slots that a store-first step stores before it attends, because it reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from attnd_server.attention.kernels.pages import StoredTokens, kept_slots
from attnd_server.kv.layer_group import LayerGroup


@contextmanager
def replaced(group: LayerGroup, layer: int, stored: StoredTokens, store: Callable[[], None]) -> Iterator[None]:
    """Stores; if what follows fails, what lay in the slots comes back: a call that fails has stored nothing.

    Args:
        group: that is stored into.
        layer: index of it there.
        stored: the slots.
        store: stores into them.
    """
    put_back = kept_slots(group.layers[layer], stored, group.config.layout)
    try:
        store()
        yield
    except BaseException:
        if group.pages is not None:  # the cache was not closed
            put_back()
        raise
