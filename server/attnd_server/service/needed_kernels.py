"""Has the kernels that calls of a new cache can need compiled and loaded before such a call comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from attnd_server.attention.config import AttentionConfig
from attnd_server.device.kernels.library import KernelLibrary, Launches

# Kernels that may wait to be compiled before geometries are passed over: their calls then ask for what they need.
MAX_WAITING = 512
# Geometries that are remembered, and fields of a configuration that are none of it: kernels are the same for all.
MAX_GEOMETRIES = 4_096
_NO_GEOMETRY = {"num_layers", "num_pages", "k_scales", "v_scales", "window"}


class NeededKernels:
    """Asks for them, once for each geometry."""

    def __init__(self, library: KernelLibrary, launches: Callable[[AttentionConfig], Launches]) -> None:
        """Has asked for nothing yet.

        Args:
            library: of the device.
            launches: the launches that calls of a cache can make, those first that are most likely.
        """
        self._library, self._launches = library, launches
        self._asked: set[tuple[object, ...]] = set()

    def ask(self, config: AttentionConfig) -> None:
        """A layer group of this configuration was made. Returns at once."""
        geometry = tuple(getattr(config, each.name) for each in fields(config) if each.name not in _NO_GEOMETRY)
        if geometry in self._asked or self._library.states().num_waiting > MAX_WAITING:
            return
        if len(self._asked) >= MAX_GEOMETRIES:
            self._asked.clear()
        self._asked.add(geometry)
        self._library.collect(self._launches(config))
