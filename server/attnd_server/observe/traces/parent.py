"""The span of a client, as `Step.traceparent` names it: https://www.w3.org/TR/trace-context/#traceparent-header."""

from __future__ import annotations

import re
from typing import NamedTuple

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_LENGTH, _SAMPLED = 55, 1


class Parent(NamedTuple):
    """A span that was sampled.

    Attributes:
        trace_id: of 128 bits, not 0.
        span_id: of 64 bits, not 0.
    """

    trace_id: int
    span_id: int


def sampled_parent(traceparent: str) -> Parent | None:
    """The span that a header names; None: it is not sampled, or this is no such header."""
    found = _TRACEPARENT.fullmatch(traceparent) if len(traceparent) == _LENGTH else None
    if found is None or not int(found[3], 16) & _SAMPLED:
        return None
    parent = Parent(int(found[1], 16), int(found[2], 16))
    return parent if parent.trace_id and parent.span_id else None
