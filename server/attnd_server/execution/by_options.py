"""What a step keeps by the options of its calls: no more than so many, and options of no more than so many bytes."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from attnd_server.attention.metadata import AttentionOptions

# Of one step of one layer group. Layers of a model may each have sinks of their own: a kilobyte at most.
MAX_OPTIONS, MAX_OPTION_BYTES = 1_024, 256 << 10

V = TypeVar("V")


class ByOptions(dict[AttentionOptions, V]):
    """By the options of a layer, what was made of them. `put` alone adds to it."""

    def __init__(self) -> None:
        """Nothing yet."""
        super().__init__()
        self._num_bytes = 0

    def put(self, options: AttentionOptions, value: V) -> V:
        """Keeps and returns `value`, and lets all others go where there would be too many."""
        num_bytes = options.num_bytes
        if len(self) >= MAX_OPTIONS or self._num_bytes + num_bytes > MAX_OPTION_BYTES:
            self.clear()
            self._num_bytes = 0
        if num_bytes <= MAX_OPTION_BYTES:
            self[options] = value
            self._num_bytes += num_bytes
        return value


class ShareKey(NamedTuple):
    """Equal for calls that can share a launch; see `batch`.

    Attributes:
        has_graphs: whether each would be the replay of a CUDA graph.
        rest: what else must be equal.
    """

    has_graphs: bool
    rest: tuple[object, ...]


class Shareable(NamedTuple):
    """What there is to know of the calls of a step that can share a launch.

    Attributes:
        key: equal for those that can share one.
        work: of a call.
        num_bytes: of its tensors.
        num_reqs: requests.
        num_tokens: new tokens.
        num_pages: columns of its page tables.
    """

    key: ShareKey
    work: int
    num_bytes: int
    num_reqs: int
    num_tokens: int
    num_pages: int
