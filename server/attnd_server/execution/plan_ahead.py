"""Makes a step ready before its first call, while the worker is still computing that call's q, k and v."""

from __future__ import annotations

import logging

from attnd_server.attention.metadata import AttentionOptions
from attnd_server.execution.executor import Executor
from attnd_server.execution.step import Step
from attnd_server.execution.work import on_cache

log = logging.getLogger(__name__)


def plan_ahead(executor: Executor, step: Step, options: AttentionOptions) -> None:
    """Makes a step ready for calls with these options.

    Not while calls share launches, which are planned as such. On the caller's thread if it is the server's, the work
    short and the device idle, else on the executor's. If that fails, for want of a place to wait say, nothing is lost:
    the call will tell.
    """
    if executor.runner.has_shared:
        return

    def work() -> bytes:
        step.make_ready(options, executor.ops)
        return b""

    try:
        may_run_here = step.is_small and executor.thread_settings.are_here
        if not may_run_here or executor.run_now(work) is None:
            executor.submit(on_cache(step.cache, work), lambda result, error: None)
    except Exception:  # busy, closing, or whatever the work raised
        log.debug("a step was not made ready before its first call", exc_info=True)
