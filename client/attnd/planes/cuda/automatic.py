"""Steps of a cuda plane's session that are resident ones without being asked for: decode steps, where they can be."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from attnd.errors import InvalidRequest, Unsupported
from attnd.planes.cuda.decode_numbers import DecodeNumbers, DecodeReader
from attnd.planes.cuda.hosted import HostedSteps
from attnd.planes.cuda.making import made
from attnd.planes.cuda.resident_shape import NotYet, ResidentShape, Session, places
from attnd.protocol import frames
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.cuda.resident import rounded
from attnd.protocol.step_metadata import StepMetadata
from attnd.v1 import capabilities_pb2

if TYPE_CHECKING:
    from attnd.planes.cuda.plane import CudaPlane  # has modules that other systems have not

# Steps of a kind in a row after which resident ones of that kind are made ready: at first, and instead of others.
FIRST_AFTER, OTHERS_AFTER = 2, 8
# Pages of a request that they have room for at least.
LEAST_PAGES = 16
# Seconds after which kernels that are on their way are asked for again.
LATE_S = 1.0
_Kind = tuple[int, int, str, int, tuple[bytes, ...]]


class AutomaticSteps:
    """Makes resident steps ready for a session's decode steps, and says why a step is none. Of one plane.

    Attributes:
        steps: that were made last; None: none were.
    """

    def __init__(self, session: Session, plane: CudaPlane) -> None:
        """None yet."""
        self.steps: HostedSteps | None = None
        self._session, self._plane, config = session, plane, session.cache.config
        self._reader = DecodeReader(config.page_size, config.num_pages)
        self._refusal = "" if plane.has_resident_steps else "the server has no resident steps for this worker"
        self._kind: _Kind | None = None  # of those that are ready
        self._last: _Kind | None = None  # of the last step, and how many in a row were such
        self._num_alike = 0
        self._late_until, self._reason_late = 0.0, ""  # when to ask again, `time.monotonic`
        self._limits: capabilities_pb2.Limits | None = None

    def begin(
        self, metadata: StepMetadata, num_heads: int, options: tuple[AttentionOptions, ...]
    ) -> DecodeNumbers | str:
        """Begins a step as a resident one, those before it being over; or says why it is to go by message.

        Raises:
            AttndError: the plane failed, or a field holds what the wire cannot carry.
        """
        if self._refusal:
            return self._refusal
        numbers = self._reader.read(metadata)
        if isinstance(numbers, str):
            return numbers
        block_size = int(metadata.block_size) if metadata.mask == "block_causal" else 0
        encoded = tuple(each.encoded for each in options)
        encoded = encoded[:1] if len(set(encoded)) == 1 else encoded  # one for all layers, however it is told
        kind = num_heads, numbers.query_len, str(metadata.mask), block_size, encoded
        self._num_alike = self._num_alike + 1 if kind == self._last else 1
        self._last = kind
        if self._kind is None and time.monotonic() < self._late_until:
            return self._reason_late
        after = FIRST_AFTER if self._kind is None else OTHERS_AFTER
        if kind != self._kind and self._num_alike < after:
            return f"resident steps are made ready after {after} that are alike"
        is_ready = kind == self._kind and self._has_room(numbers)
        if not is_ready and (reason := self._make(kind, numbers, options)):
            return reason
        assert self.steps is not None
        self.steps.begin_with(numbers)
        return numbers

    def _has_room(self, numbers: DecodeNumbers) -> bool:
        if self.steps is None or self.steps.is_over:  # others were asked for, and could not be had
            return False
        shape = self.steps.shape
        return numbers.num_reqs <= shape.max_reqs and numbers.num_pages <= shape.max_pages

    def _make(self, kind: _Kind, numbers: DecodeNumbers, options: tuple[AttentionOptions, ...]) -> str:
        """Makes them ready, with room to grow if that can be had; or says why not."""
        num_heads, query_len, mask, block_size, _ = kind
        roomy = _power_of_two(numbers.num_reqs), max(LEAST_PAGES, _power_of_two(numbers.num_pages))
        shapes, reason = [], ""
        for max_reqs, max_pages in dict.fromkeys((roomy, (numbers.num_reqs, max(1, numbers.num_pages)))):
            shape = ResidentShape(num_heads, max_reqs, max_pages, query_len, mask, block_size, options)
            if not (reason := self._too_large(shape)):
                shapes.append(shape)
        if not shapes:
            return reason
        try:
            self.steps = made(HostedSteps, self._session, self._plane, shapes, self.steps)
        except NotYet as error:
            self._kind, self._late_until, self._reason_late = None, time.monotonic() + LATE_S, str(error)
            return self._reason_late
        except Unsupported as error:
            self._refusal = str(error)
            return self._refusal
        self._kind = kind
        return ""

    def _too_large(self, shape: ResidentShape) -> str:
        """Why the server would take such steps for a fault; "": it would not."""
        if self._limits is None:
            data = self._session.cache.transport.unary("GetCapabilities", b"", self._session.timeout_s)
            self._limits = frames.parse(capabilities_pb2.GetCapabilitiesResponse, data).limits
        limits, num_reqs = self._limits, rounded(shape.max_reqs)
        for field, number in (
            ("max_step_reqs", num_reqs),
            ("max_step_tokens", num_reqs * shape.query_len),
            ("max_page_table_elements", num_reqs * rounded(shape.max_pages)),
        ):
            if number > getattr(limits, field):
                return f"resident steps of {num_reqs} requests exceed the server's {field}"
        try:
            places(shape, self._session.geometry, self._plane.num_bytes, num_reqs, rounded(shape.max_pages))
        except InvalidRequest as error:
            return str(error)
        return ""


def _power_of_two(number: int) -> int:
    """The least that is not less."""
    return 1 << max(0, number - 1).bit_length()
