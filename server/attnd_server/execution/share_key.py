"""What calls can share a launch by."""

from __future__ import annotations

from typing import NamedTuple


class ShareKey(NamedTuple):
    """Equal for calls that can share a launch; see `batch`.

    Attributes:
        has_graphs: whether each would be the replay of a CUDA graph.
        rest: what else must be equal.
    """

    has_graphs: bool
    rest: tuple[object, ...]
