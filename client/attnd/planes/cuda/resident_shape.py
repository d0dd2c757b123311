"""What resident steps have in common, and how a server is asked for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from attnd.errors import AttndError, InvalidRequest, Unsupported
from attnd.foreign_metadata import check_options
from attnd.planes.leases import Lease
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.cuda.layout import Geometry, StepLayout
from attnd.protocol.cuda.resident import ResidentLayout, common_tokens, resident_places, rounded
from attnd.protocol.requests import DEFAULT_OPTIONS
from attnd.protocol.step_metadata import MASKS, StepMetadata
from attnd.timings import Timings
from attnd.v1 import attention_pb2, backend_pb2

if TYPE_CHECKING:
    from attnd.planes.cuda.plane import CudaPlane  # has modules that other systems have not


@dataclass(frozen=True)
class ResidentShape:
    """What resident steps have in common.

    Attributes:
        num_heads: query heads of every layer.
        max_reqs: most requests of a step.
        max_pages: most pages of a request.
        query_len: new tokens of each request.
        mask: "causal", "block_causal" or "bidirectional".
        block_size: of "block_causal".
        options: of all layers, or of each. None: the default ones.
    """

    num_heads: int
    max_reqs: int
    max_pages: int
    query_len: int = 1
    mask: str = "causal"
    block_size: int = 0
    options: AttentionOptions | Sequence[AttentionOptions] | None = None

    @property
    def each_options(self) -> tuple[AttentionOptions, ...]:
        """One for all layers, or one for each."""
        options = DEFAULT_OPTIONS if self.options is None else self.options
        return (options,) if isinstance(options, AttentionOptions) else tuple(options)


class NotYet(Unsupported):
    """There are no resident steps yet; it is worth asking again in a second."""


class Session(Protocol):
    """What resident steps need of their session."""

    cache: Lease
    timeout_s: float
    geometry: Geometry
    lost: AttndError | None

    def timings(self) -> Timings:
        """Sums over the session's steps."""

    def close(self) -> None:
        """Ends the plane."""


def made_ready(
    session: Session, plane: CudaPlane, shape: ResidentShape, num_done: int, *, if_ready: bool
) -> tuple[tuple[StepLayout, StepLayout], ResidentLayout]:
    """Asks the server; where the tensors of even and odd layers lie, and the metadata.

    Raises:
        NotYet: their kernels are on their way; only if they are asked for `if_ready`, else they are waited for.
        Unsupported: there are none.
    """
    if not plane.has_resident_steps:
        rule = "they need a GPU each, or one under MPS, and version 0.2"
        raise Unsupported(f"the server has no resident steps for this worker: {rule}")
    options = shape.each_options
    for each in options:
        check_options(StepMetadata(), each)
    if shape.mask not in MASKS:
        raise InvalidRequest(f"mask is {shape.mask!r}, but must be one of {', '.join(MASKS)}", field="mask")
    message = attention_pb2.ResidentSteps(
        cache=session.cache.ref,
        num_heads=shape.num_heads,
        options=[] if options == (DEFAULT_OPTIONS,) else [each.message for each in options],
        query_len=shape.query_len,
        max_reqs=shape.max_reqs,
        max_pages=shape.max_pages,
        mask=MASKS[shape.mask],
        block_size=shape.block_size,
        after_resident=num_done,
        layout_tokens=_layout_tokens(shape, session.geometry, plane.num_bytes),
        if_ready=if_ready,
    )
    reply = plane.ask(attention_pb2.AttendRequest(resident_steps=message), session.timeout_s)
    if reply.reason:
        kind = NotYet if reply.is_late else Unsupported
        raise kind(f"there are no resident steps{' yet' if reply.is_late else ''}: {reply.reason}")
    session.timings().backend = backend_pb2.Backend.Name(reply.backend).removeprefix("BACKEND_").lower()
    return places(shape, session.geometry, plane.num_bytes, reply.max_reqs, reply.max_pages)


def places(
    shape: ResidentShape, geometry: Geometry, region_bytes: int, max_reqs: int, max_pages: int
) -> tuple[tuple[StepLayout, StepLayout], ResidentLayout]:
    """As `resident_places`, with room for so many requests and pages. Raises as it does."""
    tokens = _layout_tokens(shape, geometry, region_bytes)
    return resident_places(max_reqs, max_pages, shape.query_len, shape.num_heads, geometry, region_bytes, tokens)


def _layout_tokens(shape: ResidentShape, geometry: Geometry, region_bytes: int) -> int:
    common = common_tokens(shape.num_heads, geometry, region_bytes)
    return common if rounded(shape.max_reqs) * shape.query_len <= common else 0
