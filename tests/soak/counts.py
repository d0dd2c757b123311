"""What a client has seen, in memory that outlives it when it is killed."""

from __future__ import annotations

import ctypes
import time
from multiprocessing.sharedctypes import RawValue


class Counts(ctypes.Structure):
    """Counts of one client, or rather of all that ran one after the other in its place. Each is written by one thread.

    Attributes:
        steps: that were done, every layer of them.
        answers: that were compared with the oracle.
        wrong_answers: of these, were not close to it.
        writes: slots of a layer that were read back and compared, bit for bit.
        lost_writes: of these, were acknowledged and not there.
        reconnects: streams or connections that broke.
        caches_lost: caches that were gone although the server was not.
        unexpected: errors that nothing explains.
        leaks: descriptors or mappings that a client still had after it had closed.
        last_ok_ns: `time.monotonic_ns` of the last answer that was right.
    """

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "steps",
            "answers",
            "wrong_answers",
            "writes",
            "lost_writes",
            "reconnects",
            "caches_lost",
            "unexpected",
            "leaks",
            "last_ok_ns",
        )
    ]


class Shared(ctypes.Structure):
    """What the supervisor tells its clients.

    Attributes:
        stop: not 0: end in good order.
        server_life: counts up when a server is about to be killed.
    """

    _fields_ = [("stop", ctypes.c_int64), ("server_life", ctypes.c_int64)]


def new_counts() -> Counts:
    """All zeros; to be handed to processes."""
    counts: Counts = RawValue(Counts)
    return counts


def new_shared() -> Shared:
    """All zeros; to be handed to processes."""
    shared: Shared = RawValue(Shared)
    return shared


def now_ns() -> int:
    """The clock of `last_ok_ns`: the same in every process of a machine."""
    return time.monotonic_ns()
