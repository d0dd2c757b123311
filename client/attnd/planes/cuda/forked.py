"""The cuda planes of this process, for a child that was forked, where none is of use."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Plane(Protocol):
    """What a child must not touch."""

    def disown(self) -> None:
        """It is the parent's."""


PLANES: weakref.WeakSet[Plane] = weakref.WeakSet()


def _forked() -> None:
    for plane in list(PLANES):
        plane.disown()


os.register_at_fork(after_in_child=_forked)
