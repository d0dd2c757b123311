"""How resident steps come after others of the same plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from attnd.errors import Unsupported
from attnd.planes.cuda.resident import ResidentSteps
from attnd.planes.cuda.resident_shape import NotYet, ResidentShape, Session

if TYPE_CHECKING:
    from attnd.planes.cuda.plane import CudaPlane  # has modules that other systems have not


Steps = TypeVar("Steps", bound=ResidentSteps)


def made(
    kind: type[Steps], session: Session, plane: CudaPlane, shapes: Sequence[ResidentShape], before: ResidentSteps | None
) -> Steps:
    """Makes resident steps ready, instead of those before, of no use then. Raises as `CudaSession.resident`.

    Args:
        kind: of what is made.
        session: whose they are.
        plane: that is open.
        shapes: the first one that the server has room for.
        before: those that were made last.
    """
    done = num_done(before)
    refusal = Unsupported("no shape of resident steps was given")
    for shape in shapes:
        try:
            steps = kind(session, plane, shape, done)
        except Unsupported as error:  # if it is a NotYet, no other shape is there sooner
            refusal, steps = error, None
        if before is not None:  # the server has let go of them, whatever came of these
            before.close()
        if steps is not None:
            return steps
        if isinstance(refusal, NotYet):
            break
    raise refusal


def num_done(steps: ResidentSteps | None) -> int:
    """Resident steps of a plane up to now, which are done then. Raises as `finish`."""
    if steps is None:
        return 0
    if not steps.is_over:
        steps.finish()
    return steps.num_done
