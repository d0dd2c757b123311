"""How a cache opens sessions."""

from __future__ import annotations

from typing import Literal, overload

from attnd.planes.choice import check_plane
from attnd.planes.cuda.session import CudaSession
from attnd.planes.leases import Lease
from attnd.session import Session


class Sessions:
    """The part of a cache that opens sessions."""

    @overload
    def session(self: Lease, *, plane: Literal["cuda"]) -> CudaSession: ...  # type: ignore[overload-overlap]  # a str, too

    @overload
    def session(self: Lease, *, plane: str = "") -> Session: ...

    def session(self: Lease, *, plane: str = "") -> Session | CudaSession:
        """A session: the way to run steps.

        Args:
            plane: how tensors travel, as in `attnd.connect`; "" is what was said there. Of "cuda" it is a CudaSession.

        Raises:
            InvalidRequest: no such plane.
        """
        wanted = self.default_plane
        if plane:
            wanted = wanted._replace(name=check_plane(plane))
        kind = CudaSession if wanted.name == "cuda" else Session
        return kind(self, self.timeout_s, wanted)
