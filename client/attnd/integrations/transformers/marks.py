"""How an attention function finds the cache that keys come from."""

from __future__ import annotations

import weakref
from typing import Any

import torch

# Attribute of a key that names its cache, or a reference to it, and the layer which it was given to.
OWNER = "_attnd_owner"


def mark(key: torch.Tensor, cache: Any, layer: int) -> None:
    """Names the cache of a key, and its layer there. A key that outlives the pass is given a reference."""
    setattr(key, OWNER, (cache, layer))


def owner_of(key: torch.Tensor | None) -> tuple[Any, int]:
    """The cache that a key was given to, or None, and the layer."""
    cache, layer = getattr(key, OWNER, (None, 0))
    return (cache() if isinstance(cache, weakref.ref) else cache), layer
