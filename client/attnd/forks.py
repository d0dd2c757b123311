"""Which process this is: what was connected before a fork belongs to the parent, and is of no use in the child."""

from __future__ import annotations

import os

from attnd.errors import ended

# Process ids from the process that imported this down to this one, each forked from the one before.
_pids = [os.getpid()]
# Forks up to this process. What is made keeps the number, and compares it when it is used: no call asks for its id.
generation = 0
_kept: list[object] = []


def _forked() -> None:
    global generation
    _pids.append(os.getpid())
    generation += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def keep(thing: object) -> None:
    """Never lets go of what the parent made: letting go of it would wait for threads that this process lacks."""
    _kept.append(thing)


def refuse(what: str, made: int) -> None:
    """Raises if `what` was made by a parent of this process, at generation `made`.

    Raises:
        Disconnected: it was.
    """
    if made != generation:
        raise ended(f"the {what} was made in another process, {_pids[made]}; connect again after the fork")
