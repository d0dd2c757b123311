"""How a cache opens sessions in asyncio."""

from __future__ import annotations

from attnd.aio.choice import check_plane
from attnd.aio.leases import AsyncLease
from attnd.aio.session import AsyncSession


class AsyncSessions:
    """The part of a cache that opens sessions."""

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
        return AsyncSession(self, self.timeout_s, wanted)
