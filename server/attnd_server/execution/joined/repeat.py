"""Calls that repeat an earlier one in all but the layer: what was found out about that one is not looked at again.

A decode step is as many calls as the model has layers, whose tensors lie in the same places of a session's region. So
all that differs between two of them are a few numbers, and several callers' run together with hardly any work for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from attnd_server.attention.config import AttentionBackend
from attnd_server.device.copy_timer import Copies
from attnd_server.execution.by_options import Shareable
from attnd_server.execution.step import Call


@dataclass(frozen=True, eq=False)
class Repeatable:
    """A call, of whatever layer of its group, whose tensors and results lie where the device reaches them.

    Attributes:
        call: one such.
        backend: of its reply, which those of its repeats are said to be like.
        shareable: how it shares launches.
        at: where its tensors are, see `Call.at`.
        received_bytes: of q, k and v.
        sent_bytes: of output and lse.
    """

    call: Call
    backend: AttentionBackend
    shareable: Shareable
    at: tuple[int, int, int, int, int]
    received_bytes: int
    sent_bytes: int


class Repeat(NamedTuple):
    """A call that is only told by its layer.

    Attributes:
        of: what it repeats.
        layer: index among those of the group.
    """

    of: Repeatable
    layer: int


class Repeated(NamedTuple):
    """What came of repeats that ran together.

    Attributes:
        backend: that attended.
        copies: of each.
        kernel_us: of all.
    """

    backend: AttentionBackend
    copies: Copies
    kernel_us: int
