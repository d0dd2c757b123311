"""Which planes the asyncio client has: all but the cuda plane."""

from __future__ import annotations

from attnd.errors import Unsupported
from attnd.planes import choice


def check_plane(name: str) -> str:
    """`name`, if it can be asked for.

    Raises:
        InvalidRequest: no such plane.
        Unsupported: the sync client alone has it.
    """
    if choice.check_plane(name) == "cuda":
        raise Unsupported("plane is cuda, which the sync client alone has", field="plane")
    return name
