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
        adoptions: caches that a restarted server had restored.
        caches_lost: caches that were gone although nothing had happened that they do not outlive.
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
            "adoptions",
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
        server_life: counts up when a server is about to end.
        last_loss: the life that began with the loss of all caches.
        has_snapshots: not 0: a server that ends in good order keeps its caches.
    """

    _fields_ = [(name, ctypes.c_int64) for name in ("stop", "server_life", "last_loss", "has_snapshots")]


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
