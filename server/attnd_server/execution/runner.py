"""What comes of work that has the device: of one piece, or of calls of several callers in one launch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import torch

from attnd.errors import AttndError, DeadlineExceeded, Disconnected, Exhausted
from attnd_server.attention.ops import TritonAttentionOps
from attnd_server.config import ServerConfig
from attnd_server.device.copy_timer import Copies
from attnd_server.device.faults import DeviceFaults
from attnd_server.device.kernels.launch import KernelMissing
from attnd_server.device.memory import is_memory_error
from attnd_server.execution.batch import SharedLaunches, batch_of
from attnd_server.execution.decode_graphs import Capture
from attnd_server.execution.joined.repeats import RepeatObserver, Repeats
from attnd_server.execution.queue import IsWorthIt, Joins
from attnd_server.execution.step import Call, Result, attend
from attnd_server.execution.step_observers import StepCounts
from attnd_server.execution.turns import Outcome, Turns, attend_in_pieces
from attnd_server.execution.work import Cancelled, Job, Pieces, Work, WorkInPieces

log = logging.getLogger(__name__)

# One call of so many of a session is timed for its counts: the histograms are out of the processor's cache by the next.
TIMED_EVERY = 16


class Observer(RepeatObserver, Protocol):
    """Sees the calls that ran. With the device."""

    def begins(self, call: Call) -> Call:
        """A call is about to run. Returns what runs instead: it may have its tensors in memory of their own."""

    def launched(self, num_calls: int) -> None:
        """A launch had so many calls; `served` is told of each."""

    def served(self, call: Call, result: Result, queue_us: int, kernel_us: int) -> None:
        """A call has run, and its reply comes next.

        Args:
            call: the call.
            result: what it gave.
            queue_us: how long it waited, in microseconds.
            kernel_us: how long it had the device, without copies.

        Raises:
            AttndError: is answered instead.
        """


class Runner:
    """Runs work for whoever has the device.

    Attributes:
        ops: the backends of the device.
        ended: why nothing is begun any more, nor gone on with; "": it is.
        has_shared: whether several jobs ran together last.
        repeats: runs calls that are only told by their layers.
    """

    def __init__(
        self,
        device: torch.device,
        limits: ServerConfig,
        faults: DeviceFaults,
        observer: Observer | None,
        capture: Capture | None = None,
    ) -> None:
        """Keeps nothing yet.

        Args:
            device: where work runs.
            limits: of a step, which calls in one launch obey too.
            faults: told of errors.
            observer: sees the calls that ran; None: nobody does.
            capture: how launches of several calls are captured; None: they are not.
        """
        self.ops = TritonAttentionOps(device)
        self._shared = SharedLaunches(self.ops, capture)
        self.repeats = Repeats(self._shared.joined, self.ops, limits, faults, observer, _count)
        self._limits = limits
        self._faults = faults
        self._observer = observer
        self.ended, self.has_shared = "", False
        self._turns = Turns(self.reason_against, self._begin, self.told)

    def forget(self) -> None:
        """Keeps no plans of steps that are over."""
        self._shared.forget()

    def outcomes(self, jobs: list[Job], started: float) -> list[Outcome]:
        """What comes of a job, or of several that joined. With the device.

        The error is KernelMissing if a job is to run again once the kernel is there: it has changed nothing yet.
        """
        self.has_shared = len(jobs) > 1
        return self._outcomes_together(jobs, started) if self.has_shared else [self.outcome(jobs[0], started)]

    def outcome(self, job: Job, started: float | None = None) -> Outcome:
        """What comes of a job alone, which begins now or did at `started`, `time.perf_counter()`.

        With the device, unless its work is SideWork.
        """
        error = self.reason_against(job)
        if error is not None:
            return None, error
        try:
            return self.perform(job.work, _waited_us(job, started or time.perf_counter())), None
        except Exception as fault:
            return None, self.told(fault)

    def perform(self, work: Work, queue_us: int) -> bytes:
        """What comes of some work, which waited for so long. With the device, unless it is SideWork."""
        return self._reply(work, queue_us) if isinstance(work, Call) else work()

    def runs_in_turns(self, job: Job) -> bool:
        """Whether a job runs in pieces, with turns of others between. With the device."""
        work = job.work
        return job.rest is not None or isinstance(work, WorkInPieces) or (isinstance(work, Call) and work.is_long)

    def turn(self, job: Job) -> Outcome | None:
        """Goes on with a job that runs in turns; None: something is left of it. With the device."""
        return self._turns.turn(job)

    def _begin(self, job: Job) -> Pieces:
        return job.work.work() if isinstance(job.work, WorkInPieces) else self._reply_in_pieces(job)

    def _reply(self, call: Call, queue_us: int) -> bytes:
        """Attends a call and encodes its reply."""
        if self._observer is not None:
            call = self._observer.begins(call)
        started = time.perf_counter()
        result = self.attend(call)
        return self._encoded(call, result, queue_us, time.perf_counter() - started)

    def _reply_in_pieces(self, job: Job) -> Pieces:
        """As `_reply`, of a long call."""
        assert isinstance(job.work, Call)
        call, queue_us = job.work, _waited_us(job, time.perf_counter())
        if self._observer is not None:
            call = self._observer.begins(call)
        ran_s, pieces = 0.0, attend_in_pieces(call, self.ops)
        while True:
            started = time.perf_counter()
            try:
                next(pieces)
            except StopIteration as end:
                return self._encoded(call, end.value, queue_us, ran_s + time.perf_counter() - started)
            ran_s += time.perf_counter() - started
            yield

    def _encoded(self, call: Call, result: Result, queue_us: int, ran_s: float) -> bytes:
        """The reply to a call that ran for so long. K and V are stored last, when nothing else can fail."""
        assert call.encode is not None
        kernel_us = max(0, int(ran_s * 1e6) - sum(result.copies))
        _note(call, result, queue_us, kernel_us)
        store = result.store
        if self._observer is not None:
            self._observer.launched(1)
            try:
                self._observer.served(call, result, queue_us, kernel_us)
            except AttndError:  # the output is withheld; K and V are the caller's own
                if store is not None:
                    store()
                raise
        if store is not None and call.plane != "inline":  # elsewhere results may be placed where k and v lie
            store()
            store = None
        reply = call.encode(call, result, queue_us, kernel_us)
        if store is not None:
            store()
        return reply

    def _replies(self, calls: list[Call], queue_us: list[int]) -> list[bytes | Exception]:
        """Attends calls of one batch in one launch, and encodes the reply of each, or the error of its own."""
        if self._observer is not None:
            calls = [self._observer.begins(call) for call in calls]
        started = time.perf_counter()
        results = self.attend_together(calls)
        kernel_us = max(0, int((time.perf_counter() - started) * 1e6) - sum(results[0].copies))
        if self._observer is not None:
            self._observer.launched(len(calls))
        replies: list[bytes | Exception] = []
        for call, result, waited_us in zip(calls, results, queue_us, strict=True):
            assert call.encode is not None
            _note(call, result, waited_us, kernel_us)
            try:
                if self._observer is not None:
                    self._observer.served(call, result, waited_us, kernel_us)
                replies.append(call.encode(call, result, waited_us, kernel_us))
            except Exception as error:  # this call's own
                replies.append(error)
        return replies

    def others_for(self, job: Job, take: Callable[[Joins, IsWorthIt], list[Job]]) -> list[Job]:
        """The jobs whose calls join that of one that was taken: those that `take` finds."""
        if not isinstance(job.work, Call):
            return []
        try:
            batch = batch_of(job.work, self.ops, self._limits)
            return [] if batch is None else take(lambda other: batch.takes(other.work), lambda: batch.is_worth_it)
        except Exception as error:  # then it runs alone
            self._faults.look_at(error)
            log.exception("calls cannot be looked at together")
            return []

    def _outcomes_together(self, jobs: list[Job], started: float) -> list[Outcome]:
        """What comes of jobs that joined, of which some may not be wanted any more."""
        outcomes: list[Outcome] = [(None, self.reason_against(job)) for job in jobs]
        left = [index for index, (_, error) in enumerate(outcomes) if error is None]
        calls = [call for index in left if isinstance(call := jobs[index].work, Call)]
        try:
            waited = [_waited_us(jobs[index], started) for index in left]
            results = self._replies(calls, waited) if len(calls) > 1 else []
        except KernelMissing:  # by then each may have run alone, or waits for what it needs itself
            results = []
        except Exception as fault:
            # Whatever it was, one call alone may do without it; if not, each is told its own. So it is if the device
            # has failed: then none is begun.
            self._faults.look_at(fault)
            log.warning("%d calls cannot run together", len(calls), exc_info=fault)
            results = []
        if not results:
            for index in left:
                outcomes[index] = self.outcome(jobs[index], started)
        for index, result in zip(left, results, strict=False):
            outcomes[index] = (None, result) if isinstance(result, Exception) else (result, None)
        return outcomes

    def reason_against(self, job: Job) -> Exception | None:
        """Why a job whose turn has come, or that waits for a kernel, is not started, or a call not gone on with."""
        if self._faults.reason:
            return self._faults.refusal()
        if job.ran_s and not isinstance(job.work, Call):
            return None
        if self.ended:
            return Disconnected(self.ended)
        if not job.ran_s and time.monotonic() > job.deadline:
            return DeadlineExceeded("the deadline passed while the call waited for the executor")
        if job.ran_s > (limit := self._limits.max_call_s):
            return DeadlineExceeded(f"the call had the processor for {job.ran_s:.1f} s, but max_call_s is {limit:g}")
        try:
            if job.is_cancelled or (job.is_wanted is not None and not job.is_wanted()):
                return Cancelled("nobody waits for the call any more")
        except AttndError as error:
            return error
        return None

    def told(self, error: Exception) -> Exception:
        """What an error of some work is to whoever waits for it."""
        if self._faults.look_at(error):
            return self._faults.refusal()
        if is_memory_error(error):
            return Exhausted(f"{self.ops.device} has no memory left for this call: {error}")
        return error

    def attend(self, call: Call) -> Result:
        """One layer; see `step.attend`. With the device."""
        alone = None if call.at is None else self._shared.attend_alone(call)
        return attend(call, self.ops) if alone is None else alone

    def attend_together(self, calls: list[Call]) -> list[Result]:
        """A layer each of several steps of one `Batch`, in one launch. With the device."""
        return self._shared.attend(calls)


def _note(call: Call, result: Result, queue_us: int, kernel_us: int) -> None:
    """Notes a call that was served, for whoever sent it."""
    _count(call.step.counts, queue_us, result.copies, kernel_us)
    trace = call.step.trace
    if trace is not None:
        backend = "" if result.backend is None else result.backend.value
        trace.call_served(call.step.group.layer_numbers[call.layer], queue_us, kernel_us, result.copies, backend)


def _count(counts: StepCounts | None, queue_us: int, copies: Copies, kernel_us: int) -> None:
    """Counts a call of a step for whoever asks whose it was, if anybody may."""
    if counts is not None:
        if not counts.calls % TIMED_EVERY:
            counts.time(queue_us, copies, kernel_us)
        counts.calls += 1


def _waited_us(job: Job, started: float) -> int:
    return int((started - job.submitted_at) * 1e6)
