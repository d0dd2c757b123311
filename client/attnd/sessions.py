"""How a cache opens sessions."""

from __future__ import annotations

import weakref
from typing import Literal, overload

from attnd.errors import CacheLost
from attnd.planes.choice import check_plane
from attnd.planes.cuda.session import CudaSession
from attnd.planes.leases import Lease
from attnd.session import Session


class Sessions:
    """The part of a cache that opens sessions."""

    def __init__(self) -> None:
        """Has no session."""
        self._sessions: weakref.WeakValueDictionary[int, Session | CudaSession] = weakref.WeakValueDictionary()

    def close_sessions(self, lost: CacheLost | None = None) -> None:
        """Ends the streams of all its sessions that somebody has. Their steps raise `lost`, if the cache has gone."""
        for reference in self._sessions.valuerefs():
            session = reference()
            if session is not None:
                session.close()
                session.lost = lost

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
        session = kind(self, self.timeout_s, wanted)
        self._sessions[id(session)] = session  # type: ignore[attr-defined]
        return session
