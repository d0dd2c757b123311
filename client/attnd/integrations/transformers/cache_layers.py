"""What transformers asks of each layer of a cache."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin

from attnd.integrations.transformers.geometry import Geometry


class Owner(Protocol):
    """What the layers ask of their cache: a `RemoteCache`, which see."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values of a layer."""

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of a mask."""

    def get_seq_length(self) -> int:
        """Tokens of each row."""

    def get_max_length(self) -> int:
        """How many there may be."""


def layers_of(owner: Owner, geometry: Geometry) -> list[Any]:
    """The layers of a cache, one for each of the model; `local_layers.put` puts those with states in their places."""
    nothing = getattr(cache_utils, "DummyLayer", None)
    asked = geometry.served.keys() | geometry.crossing  # of these models ask more than a DummyLayer knows
    return [
        RemoteLayer(owner, number) if number in asked or nothing is None else nothing()
        for number in range(geometry.num_layers)
    ]


def number_of(module: torch.nn.Module, layer: int) -> int:
    """The number of a module that attends to keys of the cache's layer `layer`: its own, as several may share these."""
    number = getattr(module, "layer_idx", None)
    return number if isinstance(number, int) and number >= 0 else layer  # one module may run as several layers


class RemoteLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__
    """One layer; all of them share the rows of one RemoteCache."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, owner: Owner, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers gives it no types
        self._reference = weakref.ref(owner)  # so that the cache goes with its last user, and its lease with it
        self._index = index

    @property
    def _owner(self) -> Owner:
        owner = self._reference()
        assert owner is not None  # whoever asks a layer has its cache
        return owner

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the server has the memory."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See RemoteCache."""
        return self._owner.update(key_states, value_states, self._index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See RemoteCache."""
        return self._owner.get_mask_sizes(query_length, self._index)

    def get_seq_length(self) -> int:
        """See RemoteCache."""
        return self._owner.get_seq_length()

    def get_max_length(self) -> int:
        """See RemoteCache."""
        return self._owner.get_max_length()
