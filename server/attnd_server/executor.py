"""One thread per device runs everything that touches KV memory, in the order in which it arrived."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from attnd.errors import AttndError, DeadlineExceeded, Disconnected, Exhausted
from attnd_server.cache import Cache, CacheTable
from attnd_server.config import AttentionBackend, ServerConfig
from attnd_server.dispatcher import Plan, TritonAttentionOps
from attnd_server.kernels.pages import StoredTokens, stored_tokens
from attnd_server.metadata import AttentionMetadata, AttentionOptions

Work = Callable[[], bytes]
Done = Callable[[bytes | None, BaseException | None], None]


@dataclass(eq=False)
class Step:
    """A validated step of one cache, with what its layers share.

    Attributes:
        id: the client's number for it.
        cache: the cache that it reads and writes.
        metadata: lengths, page tables, slots, masks.
        plans: by the options of a layer; filled by the executor at the first call with these options.
    """

    id: int
    cache: Cache
    metadata: AttentionMetadata
    plans: dict[AttentionOptions, Plan] = field(default_factory=dict)
    stored: StoredTokens | None = None  # on the device, from the first call on


class Call(NamedTuple):
    """One layer of one step, tensors on the host."""

    step: Step
    layer: int
    options: AttentionOptions
    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor | None


class Result(NamedTuple):
    """What a call gives, tensors on the host."""

    output: torch.Tensor | None
    lse: torch.Tensor | None
    backend: AttentionBackend | None


class _Job(NamedTuple):
    work: Work
    done: Done
    deadline: float  # time.monotonic()
    submitted_at: float  # time.perf_counter()


class Executor:
    """Runs work on one thread; owns the device.

    Work is refused when the queue is full, and not started once its deadline has passed. One piece of work runs at a
    time, whichever thread it is on.
    """

    # How often leases that have ended are looked for, in seconds.
    EXPIRY_PERIOD_S = 1.0

    def __init__(self, device: torch.device, caches: CacheTable, config: ServerConfig) -> None:
        """Starts the thread."""
        self._caches = caches
        self.device = device
        self.ops = TritonAttentionOps(device)
        self.queue_us = 0  # how long the running work waited; read by the work itself
        self._max_queue_depth = config.max_queue_depth
        self._threads = config.threads or max(1, (os.cpu_count() or 1) // 2)
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._device_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"executor-{device}", daemon=True)
        self._thread.start()

    @property
    def queue_depth(self) -> int:
        """Jobs that wait."""
        return self._queue.qsize()

    def submit(self, work: Work, done: Done, timeout_s: float | None = None) -> None:
        """Queues `work`; `done` gets its result or its exception, on the executor's thread.

        Args:
            work: called once, unless `timeout_s` has passed before its turn.
            done: must not block or raise.
            timeout_s: seconds within which the work must have started; None is forever.

        Raises:
            Exhausted: the queue is full.
            Disconnected: the executor was closed.
        """
        if self._closed:
            raise Disconnected("the server is shutting down")
        depth = self._queue.qsize()
        if depth >= self._max_queue_depth:
            raise Exhausted(f"{depth} calls wait, but the queue's limit is {self._max_queue_depth}; retry in a moment")
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        self._queue.put(_Job(work, done, deadline, time.perf_counter()))

    def run_now(self, work: Work) -> bytes | None:
        """Runs `work` on the caller's thread if the device is idle, which saves a lone caller two switches of thread.

        Returns:
            What `work` gives, or None: the device is busy, submit it instead. Raises what `work` raises.
        """
        if self._closed or not self._queue.empty() or not self._device_lock.acquire(blocking=False):
            return None
        try:
            self.queue_us = 0
            return work()
        except (torch.OutOfMemoryError, MemoryError) as full:
            raise self._exhausted(full) from None
        finally:
            self._device_lock.release()

    def prepare_thread(self) -> None:
        """Makes torch's settings of the calling thread what calls need."""
        torch.set_grad_enabled(False)
        torch.set_num_threads(self._threads)

    def _exhausted(self, full: BaseException) -> Exhausted:
        return Exhausted(f"{self.device} has no memory left for this call: {full}")

    def close(self, timeout_s: float = 5.0) -> None:
        """Lets what waits finish, then ends the thread."""
        self._closed = True
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        self.prepare_thread()
        expiry = time.monotonic() + self.EXPIRY_PERIOD_S
        while True:
            now = time.monotonic()
            if now >= expiry:
                with self._device_lock:
                    self._caches.expire()
                expiry = now + self.EXPIRY_PERIOD_S
            try:
                job = self._queue.get(timeout=expiry - now if expiry > now else 0)
            except queue.Empty:
                continue
            if job is None:
                return
            self._settle(job)
            del job  # holds the call's tensors

    def _settle(self, job: _Job) -> None:
        try:
            if time.monotonic() > job.deadline:
                raise DeadlineExceeded("the deadline passed while the call waited for the executor")
            with self._device_lock:
                self.queue_us = int((time.perf_counter() - job.submitted_at) * 1e6)
                result: bytes | None = job.work()
            error: BaseException | None = None
        except AttndError as refused:
            result, error = None, refused
        except (torch.OutOfMemoryError, MemoryError) as full:
            result, error = None, self._exhausted(full)
        except Exception as fault:
            result, error = None, fault
        job.done(result, error)

    def attend(self, call: Call) -> Result:
        """One layer: plan if it is the step's first with these options, store, attend. On the executor's thread."""
        step, cache = call.step, call.step.cache
        cache.refuse_if_closed()
        metadata = step.metadata
        k = None if call.k is None else call.k.to(self.device)
        v = None if call.v is None else call.v.to(self.device)
        plan = None if metadata.store_only else self._plan(step, call.options)
        if metadata.slot_mapping is not None and k is not None and v is not None:
            if step.stored is None:
                step.stored = stored_tokens(metadata.slot_mapping, self.device)
                cache.mark_written(metadata.slot_mapping)
            cache.store(call.layer, k, v, step.stored)
        if plan is None or call.q is None:
            return Result(None, None, None)
        q = call.q.to(self.device)
        k_pages, v_pages = cache.k_pages[call.layer], cache.v_pages[call.layer]
        output, lse = plan.run(q, k, v, k_pages, v_pages, cache.k_scales, cache.v_scales)
        return Result(output.cpu(), None if lse is None else lse.cpu(), plan.kernel.backend)

    def plan_ahead(self, step: Step, options: AttentionOptions) -> None:
        """Plans a step before its first call, while the worker is still computing that call's q, k and v.

        A guess: if it cannot be queued, or the step cannot be served so, nothing is lost and the call itself will tell.
        """

        def work() -> bytes:
            if not step.cache.is_closed and not step.metadata.store_only:
                self._plan(step, options)
            return b""

        try:
            self.submit(work, lambda result, error: None)
        except AttndError:
            pass  # busy or closing

    def _plan(self, step: Step, options: AttentionOptions) -> Plan:
        plan = step.plans.get(options)
        if plan is None:
            plan = step.plans[options] = self.ops.plan(step.cache.config, step.metadata, options)
        return plan
