"""Which steps are traced, and the thread that makes spans of them."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from typing import Protocol
from weakref import finalize

from attnd_server.config import ServerConfig
from attnd_server.execution.step import Step
from attnd_server.observe.traces.allowance import Allowance
from attnd_server.observe.traces.parent import sampled_parent
from attnd_server.observe.traces.record import StepTrace

log = logging.getLogger(__name__)

# Steps that are traced at one time, also those whose spans are not made yet: 200 KB each at worst.
MAX_UNDER_WAY = 64
# Seconds that spans have to leave the process when it ends.
CLOSE_S = 2.0


class SpanSink(Protocol):
    """What makes spans and sends them off."""

    def write(self, trace: StepTrace) -> None:
        """Makes the spans of a step. Does not wait for the network."""

    def close(self) -> None:
        """Sends off what was written, and may take long."""


class Traces:
    """Steps that are traced. Any thread may use it."""

    def __init__(self, config: ServerConfig, sink: SpanSink) -> None:
        """Traces up to `config.traces` steps a second, and half of them for one principal where there are several."""
        share = 2 if config.asks_who_calls else 1
        self._allowance = Allowance(config.traces, config.traces / share)
        self._most_of_one = MAX_UNDER_WAY // share
        self._under_way: dict[StepTrace, str] = {}
        self._sink = sink
        self._lock = threading.Lock()
        self._ended: queue.SimpleQueue[StepTrace | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def begin(self, traceparent: str, steps: Sequence[Step], plane: str, began_ns: int) -> StepTrace | None:
        """The trace of a step that came at `began_ns`; None: it has none.

        Args:
            traceparent: as the client gave it; whatever is wrong with it, the step goes on.
            steps: checked, one for each layer group.
            plane: over which it came.
            began_ns: `time.time_ns`.
        """
        parent = sampled_parent(traceparent) if traceparent else None
        if parent is None:
            return None
        principal = steps[0].cache.principal
        with self._lock:
            own = sum(each == principal for each in self._under_way.values())
            if len(self._under_way) >= MAX_UNDER_WAY or own >= self._most_of_one:
                return None
            if not self._allowance.take(principal):
                return None
            trace = StepTrace(parent, steps, plane, began_ns, self._ended.put)
            self._under_way[trace] = principal
        for step in steps:
            step.trace = trace
            finalize(step, trace.dropped).atexit = False
        return trace

    def close(self) -> None:
        """Sends off the spans of steps that have ended, for a time that is limited. Later ones have none."""
        self._ended.put(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (trace := self._ended.get()) is not None:
            with self._lock:
                if self._under_way.pop(trace, None) is None:
                    continue
            try:
                self._sink.write(trace)
            except Exception:  # the thread must live
                log.exception("the spans of a step cannot be made")
        self._sink.close()
