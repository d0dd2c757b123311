"""Work of a session that has its turn among the calls, copies and deletion of its cache."""

from __future__ import annotations

import queue

from attnd_server.execution.executor import Executor
from attnd_server.execution.work import CacheWork


def run_in_turn(executor: Executor, work: CacheWork) -> None:
    """Does some work on the executor, or at once where nobody has the device. Raises what it raises."""
    outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    if executor.run_now(work) is None:
        executor.submit(work, lambda result, error: outcome.put(error))
        error = outcome.get()
        if error is not None:
            raise error
