"""Which CUDA graphs were captured for which layer group, and which of them serves a step."""

from __future__ import annotations

from functools import partial

from attnd_server.attention.backends.base import DecodeShape
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.execution.decode_graphs import DecodeGraphs
from attnd_server.kv.cache import Cache
from attnd_server.kv.layer_group import LayerGroup

GroupGraphs = dict[tuple[object, ...], list[DecodeGraphs]]
"""The graphs of one layer group, by what `CapturedGraphs.find` looks for, small ones first."""


class CapturedGraphs:
    """The graphs of all caches of a device. What is added and removed, by whoever has the device."""

    def __init__(self) -> None:
        """None yet."""
        self._by_group: dict[LayerGroup, GroupGraphs] = {}

    def of(self, cache: Cache) -> list[DecodeGraphs]:
        """Those of a cache. Any thread may ask."""
        return [graphs for group in cache.groups for graphs in _listed(self._by_group.get(group, {}))]

    def all(self) -> list[DecodeGraphs]:
        """Those of all caches. Any thread may ask."""
        return [graphs for captured in list(self._by_group.values()) for graphs in _listed(captured)]

    def find(self, group: LayerGroup, options: AttentionOptions, metadata: AttentionMetadata) -> DecodeGraphs | None:
        """The smallest graphs of a group that serve a step of layers with these options."""
        captured = self._by_group.get(group)
        if captured is None or not metadata.is_decode:
            return None
        query_len = metadata.num_tokens // metadata.num_reqs
        return next((graphs for graphs in captured.get(_key(options, query_len), ()) if graphs.fits(metadata)), None)

    def add(self, cache: Cache, group: LayerGroup, options: AttentionOptions, graphs: DecodeGraphs) -> None:
        """Lets steps of a group use captured graphs, until its cache closes."""
        captured = self._by_group.get(group)
        if captured is None:
            captured = self._by_group[group] = {}
            cache.when_closed(partial(self._close, group))
        alike = captured.setdefault(_key(options, graphs.shape.query_len), [])
        alike.append(graphs)
        alike.sort(key=lambda each: (each.shape.num_reqs, each.shape.max_context_len))

    def ready(self, group: LayerGroup, options: AttentionOptions, shape: DecodeShape) -> DecodeGraphs | None:
        """Graphs of a group for batches of just that size that serve every step of `shape`."""
        for graphs in self._by_group.get(group, {}).get(_key(options, shape.query_len), ()):
            if graphs.shape.num_reqs == shape.num_reqs and graphs.shape.max_context_len >= shape.max_context_len:
                return graphs
        return None

    def _close(self, group: LayerGroup) -> None:
        for graphs in _listed(self._by_group.pop(group)):
            graphs.close()


def _listed(captured: GroupGraphs) -> list[DecodeGraphs]:
    """All graphs of a group."""
    return [graphs for alike in list(captured.values()) for graphs in list(alike)]


def _key(options: AttentionOptions, query_len: int) -> tuple[object, ...]:
    return (query_len, options.key)
