"""The layer groups of a cache: the geometry of each, and which layers are in it. Plain Python, for commands too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

from attnd.errors import InvalidRequest
from attnd_server.attention.geometry import Geometry

G = TypeVar("G", bound=Geometry)

MAX_LAYERS = 1024
# What all groups of a cache have in common.
COMMON = ("dtype", "layout", "backend", "precision", "kv_split")


@dataclass(frozen=True)
class CacheShape(Generic[G]):
    """The layer groups of a cache. One that exists is a valid one.

    Attributes:
        groups: geometry of each; its `num_layers` are the layers of the group.
        layers: numbers that each group's layers have in the cache, rising.
        is_flat: it was asked for without groups, as a cache whose layers are all alike.
    """

    groups: tuple[G, ...]
    layers: tuple[tuple[int, ...], ...]
    is_flat: bool = False

    def __post_init__(self) -> None:
        """Raises InvalidRequest."""
        if not 1 <= self.num_layers <= MAX_LAYERS:
            rule = f"must have 1..{MAX_LAYERS}"
            raise InvalidRequest(f"groups have {self.num_layers} layers together, but {rule}", field="groups")
        for index, (config, layers) in enumerate(zip(self.groups, self.layers, strict=True)):
            if len(layers) != config.num_layers:
                rule = f"must have {config.num_layers}, its num_layers"
                raise InvalidRequest(f"groups[{index}] has {len(layers)} layers, but {rule}", field="groups")
            for name in COMMON:
                if getattr(config, name) != getattr(self.groups[0], name):
                    raise InvalidRequest(f"groups[{index}].{name} differs, but must be that of groups[0]", field=name)
        check_layers(self.layers, self.num_layers)
        if self.is_flat and len(self.groups) != 1:
            raise InvalidRequest(f"is_flat is true of {len(self.groups)} groups, but must be of 1", field="groups")

    @classmethod
    def of(cls, config: G) -> CacheShape[G]:
        """That of a cache whose layers are all alike."""
        return cls((config,), (tuple(range(config.num_layers)),), is_flat=True)

    @property
    def common(self) -> G:
        """A group, for what all have in common: see COMMON."""
        return self.groups[0]

    @cached_property
    def num_layers(self) -> int:
        """Layers of the cache."""
        return sum(len(layers) for layers in self.layers)

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Of each layer the group, and its index there."""
        places = [(0, 0)] * self.num_layers
        for group, layers in enumerate(self.layers):
            for index, layer in enumerate(layers):
                places[layer] = group, index
        return places

    @cached_property
    def num_pages(self) -> int:
        """Pages of all groups."""
        return sum(config.num_pages for config in self.groups)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of KV memory."""
        return sum(config.num_bytes for config in self.groups)

    def __str__(self) -> str:
        """Its pages, for people who ask for too many."""
        return "num_pages is {}".format(" + ".join(str(config.num_pages) for config in self.groups))


def check_layers(groups: Sequence[Sequence[int]], num_layers: int) -> None:
    """Refuses layers of groups unless each of 0..num_layers - 1 is in one of them, and they rise.

    Raises:
        InvalidRequest: as said.
    """
    owners: dict[int, int] = {}
    for group, layers in enumerate(groups):
        field = f"groups[{group}].layers"
        if not len(layers):
            raise InvalidRequest(f"{field} is empty, but must have at least one layer", field=field)
        for index, layer in enumerate(layers):
            if not 0 <= layer < num_layers:
                rule = f"must be 0..{num_layers - 1}: the cache has {num_layers} layers"
                raise InvalidRequest(f"{field}[{index}] is {layer}, but {rule}", field=field)
            if index and layer <= layers[index - 1]:
                rule = f"must be greater than {layers[index - 1]}, the element before it"
                raise InvalidRequest(f"{field}[{index}] is {layer}, but {rule}", field=field)
            if layer in owners:
                rule = f"must be in one group, and is in groups[{owners[layer]}]"
                raise InvalidRequest(f"{field}[{index}] is {layer}, but {rule}", field=field)
            owners[layer] = group
    missing = next((layer for layer in range(num_layers) if layer not in owners), None)
    if missing is not None:
        raise InvalidRequest(
            f"groups have no layer {missing}, but each of the {num_layers} must be in one", field="groups"
        )
