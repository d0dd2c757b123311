"""Streams that may wait for long without holding up each other, or the stream of all other work.

A GPU has few hardware queues, and the driver gives streams to them as it likes: what comes after a wait in the same
queue waits too, whatever stream it is of. So streams are tried before they are used.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import torch

from attnd.protocol.cuda.driver import Device, Stream, call
from attnd.protocol.cuda.host_flags import HostFlags, HostWords

log = logging.getLogger(__name__)

# Streams that are tried for each that is needed.
_TRIES = 3
# Seconds after which a stream counts as held up: work of microseconds was given to it.
_HELD_UP_S = 0.1
# Seconds after which everything is let go, should a call of the driver itself wait.
_PATIENCE_S = 10.0


def independent_streams(on: Device, device: torch.device, count: int) -> list[Stream]:
    """So many streams, all of them independent of each other and of torch's current stream, as far as there are any.

    Args:
        on: their GPU, the thread's current one.
        device: the same, as torch has it.
        count: how many.
    """
    word = torch.zeros(1, dtype=torch.int32, device=device)
    source = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    others = torch.cuda.current_stream(device)

    def gets_on(stream: Stream) -> bool:
        call("cuMemsetD8Async", word.data_ptr(), 0, word.nbytes, stream.handle)
        return _within(_HELD_UP_S, stream.is_idle)

    def others_get_on() -> bool:
        word.add_(1)
        word.copy_(source, non_blocking=True)
        return _within(_HELD_UP_S, others.query)

    warm = Stream(on)
    gets_on(warm), others_get_on()  # loads kernels, for which the driver may wait
    on.synchronize()
    words = HostWords.private()
    waits: list[HostFlags] = []
    chosen: list[Stream] = []
    rest = [warm]
    patience = threading.Timer(_PATIENCE_S, lambda: _let_go(list(waits)))
    patience.start()
    try:
        while len(chosen) < count and len(rest) <= _TRIES * count:
            stream = Stream(on)
            if not gets_on(stream):
                rest.append(stream)
                continue
            waits.append(HostFlags(words, signal=0, flag=1 + len(waits)))
            waits[-1].wait(stream.handle, 0, is_last=False)
            if others_get_on():
                chosen.append(stream)
            else:
                waits[-1].stop()
                rest.append(stream)
    finally:
        patience.cancel()
        _let_go(waits)
        on.synchronize()
        words.close()
    if len(chosen) < count:
        log.warning("only %d of %d streams for cuda planes are independent: others may wait", len(chosen), count)
    while len(chosen) < count:
        chosen.append(rest.pop())
    for stream in rest:
        stream.close()
    return chosen


def _let_go(waits: list[HostFlags]) -> None:
    for each in waits:
        each.stop()


def _within(seconds: float, is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
    return True
