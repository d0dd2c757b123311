"""How a cache opens sessions in asyncio."""

from __future__ import annotations

import weakref

from attnd.aio.choice import check_plane
from attnd.aio.leases import AsyncLease
from attnd.aio.session import AsyncSession
from attnd.errors import CacheLost


class AsyncSessions:
    """The part of a cache that opens sessions."""

    def __init__(self) -> None:
        """Has no session."""
        self._sessions: weakref.WeakValueDictionary[int, AsyncSession] = weakref.WeakValueDictionary()

    async def close_sessions(self, lost: CacheLost | None = None) -> None:
        """Ends the streams of all its sessions that somebody has. Their steps raise `lost`, if the cache has gone."""
        for reference in self._sessions.valuerefs():
            session = reference()
            if session is not None:
                await session.close(lost)

    def session(self: AsyncLease, *, plane: str = "") -> AsyncSession:
        """A session: the way to run steps.

        Args:
            plane: how tensors travel, as in `connect`; "" is what was said there.

        Raises:
            InvalidRequest: no such plane.
            Unsupported: the asyncio client does not have it.
        """
        wanted = self.default_plane
        if plane:
            wanted = wanted._replace(name=check_plane(plane))
        session = AsyncSession(self, self.timeout_s, wanted)
        self._sessions[id(session)] = session  # type: ignore[attr-defined]
        return session
