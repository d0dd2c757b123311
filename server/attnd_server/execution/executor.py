"""Everything that touches KV memory, one piece at a time: of one cache in order, the caches in turn.

A thread for each device does what waits; while nothing does, whoever has a short piece of work may do it at once.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from attnd.errors import Disconnected
from attnd_server.config import ServerConfig
from attnd_server.device.faults import DeviceFaults, watch
from attnd_server.device.kernels.launch import KernelMissing, here
from attnd_server.device.kernels.library import KernelLibrary
from attnd_server.device.quiet import quiet_gpu
from attnd_server.execution.captured_graphs import CapturedGraphs
from attnd_server.execution.cost import most_work
from attnd_server.execution.decode_graphs import Capture, cuda_capture
from attnd_server.execution.idle_device import repeat_together, settle_together
from attnd_server.execution.joined.repeat import Repeat, Repeated
from attnd_server.execution.kept_plans import KeptPlans
from attnd_server.execution.queue import WorkQueue
from attnd_server.execution.runner import Observer, Runner
from attnd_server.execution.side import SideThread, take_turn
from attnd_server.execution.threads import ThreadSettings, default_threads
from attnd_server.execution.work import NO_CACHE, Done, Job, SideWork, Work
from attnd_server.kv.caches import CacheTable

log = logging.getLogger(__name__)


class Executor:
    """Runs work on a thread of its own, or on its caller's; owns the device.

    Work is refused when the queue is full, and not started once its deadline has passed or nobody wants it any more.
    One piece runs at a time, whichever thread it is on; those of one cache in the order in which they came. A kernel
    is never waited for: work that lacks one is held until it is there, with its cache's work behind it, and run again.

    Attributes:
        faults: whether the device has failed: then nothing runs any more.
        kernels: those of the device, closed with this; None: Triton compiles them where they are launched.
        graphs: what warm-ups captured.
        runner: runs what has the device.
        waiting: counts, by principal, the jobs that wait.
        ops: its backends.
        quiet: knows what may wait in the device for a worker.
        prepare_thread: makes torch's settings of the calling thread what calls need.
        thread_settings: whose these are.
        kept_plans: which steps keep theirs.
        most_work: that one call may ask for; see `cost`.
        running_cache_id: of the cache whose work the thread does; `NO_CACHE` if of none.
    """

    EXPIRY_PERIOD_S = 1.0  # seconds between two looks for leases that have ended

    def __init__(
        self,
        device: torch.device,
        caches: CacheTable,
        config: ServerConfig,
        capture: Capture | None = None,
        *,
        faults: DeviceFaults | None = None,
        kernels: KernelLibrary | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Starts the thread.

        Args:
            device: that it owns.
            caches: on the device.
            config: the limits.
            capture: how decode steps are captured; None: as CUDA graphs, where there are any.
            faults: of the device; None: new ones.
            kernels: those of the device; None: Triton compiles them where they are launched.
            observer: sees the calls that ran; None: nobody does.
        """
        self._caches, self._config, self.device = caches, config, device
        self.capture = capture or cuda_capture(device)
        self.faults = faults or DeviceFaults(device)
        self.quiet = quiet_gpu(device)
        self.kernels, self.graphs = kernels, CapturedGraphs()
        self.runner = Runner(device, config, self.faults, observer, self.capture)
        self.ops = self.runner.ops
        num_threads = config.threads or default_threads(device)
        self.thread_settings = ThreadSettings(num_threads)
        self.prepare_thread = self.thread_settings.prepare
        self.kept_plans, self.running_cache_id = KeptPlans(), NO_CACHE
        self.most_work = most_work(config, device, num_threads, has_kernels=self.ops.has_kernels)
        self._queue = WorkQueue(config.max_queue_depth, config.max_cache_queue_depth, caches.share.queue_depth)
        self.waiting = self._queue.waiting
        self.faults.listen(lambda reason: self._queue.release())
        self._began = 0.0  # when what has the device began, `time.monotonic`; 0: nothing has it
        self._device_lock = threading.Lock()
        self._side = SideThread(device, config, self.runner, self.prepare_thread)
        self._thread = threading.Thread(target=self._run, name=f"executor-{device}", daemon=True)
        self._thread.start()
        if device.type == "cuda" and config.device_timeout_s:  # a processor is slow, but ends
            watch(self.faults, lambda: self.busy_s, config.device_timeout_s)

    @property
    def queue_depth(self) -> int:
        """Jobs that wait."""
        return self._queue.num_waiting

    @property
    def busy_s(self) -> float:
        """Seconds for which the running work has had the device; 0 if there is none."""
        return time.monotonic() - began if (began := self._began) else 0.0

    def submit(
        self,
        work: Work,
        done: Done,
        timeout_s: float | None = None,
        is_wanted: Callable[[], bool] | None = None,
    ) -> Job:
        """Queues `work`; `done` gets its result or its exception, on a thread of the executor's.

        Args:
            work: called once, unless `timeout_s` has passed before its turn, or nobody wants it.
            done: must not block or raise.
            timeout_s: seconds within which the work must have started; None is forever.
            is_wanted: asked when its turn has come, if anybody still waits for it; `done` gets Cancelled if not.

        Returns:
            What `cancel` takes.

        Raises:
            Exhausted: the queue is full, or too much of it is of the same cache; `retry_after_s` says when to retry.
            Disconnected: the executor was closed, or the device has failed.
        """
        if self._queue.is_closed:
            raise self._refusal()
        self.faults.refuse()
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        job = Job(work, done, deadline, time.perf_counter(), is_wanted)
        if isinstance(work, SideWork):
            self._side.submit(job, work.principal)
        else:
            self._queue.put(job)
        return job

    def _refusal(self) -> Disconnected:
        return Disconnected(self.runner.ended or "the server is shutting down")

    def cancel(self, job: Job) -> None:
        """Takes a job out of the queue: its `done` is never called then. A call in pieces ends before the next one."""
        job.is_cancelled = True
        if self._queue.remove(job):
            job.rest = None  # and what it holds

    def run_now(self, work: Work) -> bytes | None:
        """Runs `work` on the caller's thread if the device is idle, which saves a lone caller two switches of thread.

        Returns:
            What `work` gives, or raises; None: the device is busy or a kernel is not there yet, submit it instead.
        """
        if not self._take_idle_device():
            return None
        try:
            if self.faults.reason:
                self.faults.refuse()
            if getattr(work, "cache_id", NO_CACHE) in self._queue.held:
                return None
            return self.runner.perform(work, queue_us=0)
        except KernelMissing:
            return None
        except Exception as error:
            told = self.runner.told(error)
            if told is error:
                raise
            raise told from None
        finally:
            self._give_device_back()

    def settle_now(self, jobs: Sequence[Job], most_s: float = math.inf) -> Sequence[Job]:
        """Runs jobs on the caller's thread while the device is idle; see `settle_together`."""
        return settle_together(jobs, self.runner, self._queue, self._take_idle_device, self._give_device_back, most_s)

    def repeat_now(self, repeats: Sequence[Repeat]) -> Repeated | None:
        """Runs repeats on the caller's thread if the device is idle; see `repeat_together`."""
        return repeat_together(repeats, self.runner, self._queue, self._take_idle_device, self._give_device_back)

    def _take_idle_device(self) -> bool:
        """Takes the device for the calling thread, unless somebody has it or waits for it."""
        queue = self._queue  # what waits or is about to begin came before: it may be of the same cache
        if queue.is_closed or queue.depth or queue.is_taken or not self._device_lock.acquire(blocking=False):
            return False
        self._began = time.monotonic()
        here.may_wait = False
        return True

    def _give_device_back(self) -> None:
        here.may_wait = True
        self._began = 0.0
        self._device_lock.release()

    def take_turn(self, work: Callable[[], None]) -> None:
        """Runs a piece of SideWork on the executor's thread, to its end. Raises what it raises, and Disconnected."""
        take_turn(partial(self._queue.put, always=True), self._thread.is_alive, work)

    def end_running(self, reason: str) -> None:
        """From now on nothing is begun, and calls on a processor end between their pieces. Any thread; does not wait.

        Who waits is told Disconnected with `reason`, and has stored nothing. A GPU's launch goes on.
        """
        self.runner.ended = reason
        self._queue.close()

    def close(self, timeout_s: float = 5.0) -> None:
        """Lets what waits finish, then ends the thread."""
        self._queue.close()
        self._side.close()
        self._thread.join(timeout_s)
        if self.kernels is not None:
            self.kernels.close()

    def is_quiet(self, timeout_s: float = 0.0) -> bool:
        """After `close`: whether nothing touches KV memory any more, nor ever will again.

        Args:
            timeout_s: how long to wait for calls that run, on this thread or others or in the GPU, in seconds each.

        Raises:
            RuntimeError: the device has failed.
        """
        self._thread.join(timeout_s)
        # Not for all that the process has on the GPU: some of it may wait for a worker.
        if self._thread.is_alive() or not self.quiet.are_over(timeout_s):
            return False
        if not self._device_lock.acquire(timeout=timeout_s):
            return False
        if self.device.type == "cuda":
            torch.cuda.default_stream(self.device).synchronize()
        return True

    def _run(self) -> None:
        self.thread_settings.prepare(opens_team=True)
        here.may_wait = False
        expiry = time.monotonic() + self.EXPIRY_PERIOD_S
        while True:
            now = time.monotonic()
            if now >= expiry or self._queue.is_closed:
                self._queue.give_up_held(self.runner.reason_against, self._refusal())
            if now >= expiry:
                self._tidy()
                expiry = now + self.EXPIRY_PERIOD_S
            job = self._queue.take(expiry - now if expiry > now else 0)
            if job is not None:
                self._settle(job)
                del job  # holds the call's tensors
            elif self._queue.is_closed and not self._queue.num_waiting:
                return

    def _tidy(self) -> None:
        """Frees what nobody holds any more."""
        if self.faults.reason:
            return
        with self._device_lock:
            self._began = time.monotonic()
            try:
                self._caches.expire()
                if self._queue.is_idle:
                    self.runner.forget()
            except Exception as error:  # the thread must live: it answers everybody
                if not self.faults.look_at(error):
                    log.exception("what nobody holds any more cannot be freed")
            finally:
                self._began = 0.0

    def _settle(self, job: Job) -> None:
        with self._device_lock:
            self._began, self.running_cache_id = time.monotonic(), job.cache_id
            started = time.perf_counter()
            jobs = [job]
            if self.runner.runs_in_turns(job):
                outcomes = [self.runner.turn(job)]
            else:
                if self._queue.depth:
                    jobs += self.runner.others_for(job, partial(self._queue.take_others, job.cache_id))
                outcomes = list(self.runner.outcomes(jobs, time.perf_counter()))
            self._began, self.running_cache_id = 0.0, NO_CACHE
        for each, outcome in zip(jobs, outcomes, strict=True):
            if outcome is None:
                self._queue.put_back(each)
            elif isinstance(outcome[1], KernelMissing):
                self._queue.hold(each, outcome[1].ready)
        # First, so that who gets the answer finds the executor idle, if it is.
        self._queue.finished((time.perf_counter() - started) / len(jobs))
        for each, outcome in zip(jobs, outcomes, strict=True):
            if outcome is not None and not isinstance(outcome[1], KernelMissing):
                each.done(*outcome)
