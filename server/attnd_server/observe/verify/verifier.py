"""Picks calls, has them verified, and says what came of it: in numbers, in the log and, if asked to, to the caller."""

from __future__ import annotations

import logging
import math
import os
import queue
import random
import secrets
import sys
import threading
from dataclasses import replace
from typing import NamedTuple

import torch

from attnd.errors import ServerFault
from attnd_server.attention.config import AttentionBackend
from attnd_server.device.faults import DeviceFaults
from attnd_server.execution.step import Call, Result
from attnd_server.observe.verify.check import NotWanted, Verdict, verify
from attnd_server.observe.verify.choice import Choice, choose
from attnd_server.observe.verify.description import described
from attnd_server.observe.verify.sample import Sample, on_host, sample_of
from attnd_server.observe.verify.tally import FAILED, QUEUE_FULL, TOO_BIG, VerifyTally

log = logging.getLogger(__name__)

# Bytes of all samples that wait, and of one of them.
MAX_BYTES, MAX_SAMPLE_BYTES = 256 << 20, 64 << 20
# Samples that wait.
MAX_SAMPLES = 64
# What an infinite ratio counts as in their sum.
_MOST_RATIO = 1e6
# Of the thread: the system lets everybody else go first.
_LEAST_PRIORITY = 19
# Calls between two samples.
_LONGEST_GAP = 1 << 62


class _Waiting(NamedTuple):
    sample: Sample
    num_bytes: int


class Verifier:
    """Verifies a fraction of the calls of one device.

    Attributes:
        tallies: by backend.
    """

    def __init__(self, fraction: float, device: torch.device, faults: DeviceFaults, *, refuses: bool = False) -> None:
        """Starts the thread, unless it refuses.

        Args:
            fraction: of the calls, above 0 and up to 1.
            device: of the caches.
            faults: told of errors.
            refuses: verifies before a call is answered, and raises instead of answering wrongly.
        """
        backends = [backend for backend in AttentionBackend if backend is not AttentionBackend.AUTO]
        self.tallies: dict[AttentionBackend, VerifyTally] = {backend: VerifyTally() for backend in backends}
        self._fraction = fraction
        self._faults = faults
        self._refuses = refuses
        self._stream = torch.cuda.Stream(device, priority=0) if device.type == "cuda" else None
        self._random = random.Random(secrets.randbits(64))
        self._calls_left = self._gap()
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._num_bytes = self._num_samples = 0  # of what waits or is being verified
        self._counting = threading.Lock()
        self._is_closed = False
        self._has_told = False  # of outputs that cannot be compared
        self._thread: threading.Thread | None = None
        if not refuses:
            self._thread = threading.Thread(target=self._run, name="verifier", daemon=True)
            self._thread.start()

    def is_due(self) -> bool:
        """Whether to take the next call. By the thread that has the device, once for each call."""
        self._calls_left -= 1
        if self._calls_left:
            return False
        self._calls_left = self._gap()
        return True

    def passes_over(self, num_calls: int) -> bool:
        """Takes none of the next calls, so many, if none of them is due; False: one is, so ask for each."""
        if self._calls_left <= num_calls:
            return False
        self._calls_left -= num_calls
        return True

    def sampled(self, call: Call) -> Call:
        """A call that will be taken, before it runs: a client may change its tensors in shared memory meanwhile."""
        if call.plane != "shm":
            return call._replace(is_sampled=True)
        q, k, v = (None if tensor is None else tensor.clone() for tensor in (call.q, call.k, call.v))
        return call._replace(q=q, k=k, v=v, is_sampled=True)

    def take(self, call: Call, result: Result) -> None:
        """Takes a call that has just run; nothing of it is needed afterwards. By the thread that has the device.

        Raises:
            ServerFault: the result is wrong, and whoever sees that is to refuse.
        """
        if result.output is None or result.backend is None or not result.output.numel():
            return  # it only stored
        seed = self._random.getrandbits(32)
        choice = choose(call.step.metadata, call.step.group.config, call.options, seed, MAX_SAMPLE_BYTES)
        tally = self.tallies[result.backend]
        if choice is None:
            self._drop(tally, TOO_BIG)
        elif self._refuses:
            self._refuse_if_wrong(sample_of(call, result, choice, seed))
        elif not self._reserve(choice):
            self._drop(tally, QUEUE_FULL)
        else:
            try:
                self._queue.put(_Waiting(sample_of(call, result, choice, seed), choice.num_bytes))
            except Exception as error:  # the device has no memory for the copies, for example
                self._release(choice.num_bytes)
                self._failed(tally, error)

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the thread, after what waits; but what takes longer is not verified any more."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout_s)
            self._is_closed = True
            self._thread.join(timeout_s)  # it ends with the head that it looks at

    @property
    def num_bytes(self) -> int:
        """Bytes of samples that wait or are being verified."""
        return self._num_bytes

    def _gap(self) -> int:
        """Calls up to the next that is taken: drawn, because every n-th would often be of the same layer."""
        if self._fraction >= 1:
            return 1
        gap = math.log1p(-self._random.random()) / math.log1p(-self._fraction)
        return 1 + int(min(gap, _LONGEST_GAP))  # of the least fractions it is infinite

    def _reserve(self, choice: Choice) -> bool:
        with self._counting:
            if self._num_samples >= MAX_SAMPLES or self._num_bytes + choice.num_bytes > MAX_BYTES:
                return False
            self._num_samples += 1
            self._num_bytes += choice.num_bytes
        return True

    def _release(self, num_bytes: int) -> None:
        with self._counting:
            self._num_samples -= 1
            self._num_bytes -= num_bytes

    def _drop(self, tally: VerifyTally, reason: str) -> None:
        with self._counting:
            tally.dropped[reason] += 1

    def _failed(self, tally: VerifyTally, error: Exception) -> None:
        self._drop(tally, FAILED)
        if not self._faults.look_at(error):
            log.error("a sample cannot be verified", exc_info=error)

    def _refuse_if_wrong(self, sample: Sample) -> None:
        verdict = verify(on_host(sample, self._stream))
        fault_id = self._count(sample, verdict)
        if fault_id:
            raise ServerFault(
                f"internal error {fault_id}: the output of layer {sample.layer} by backend {sample.backend.value} was "
                "withheld, because verification found it wrong; the server's log has the details under this id"
            )

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        torch.set_num_threads(1)
        if sys.platform == "linux":  # where threads have priorities of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
        while (waiting := self._queue.get()) is not None:
            try:
                sample = waiting.sample
                if self._is_closed:
                    break
                sample = replace(on_host(sample, self._stream), is_wanted=lambda: not self._is_closed)
                self._count(sample, verify(sample))
            except NotWanted:
                pass
            except Exception as error:
                self._failed(self.tallies[waiting.sample.backend], error)
            finally:
                self._release(waiting.num_bytes)
            del waiting, sample  # they hold the tensors

    def _count(self, sample: Sample, verdict: Verdict) -> str:
        """Counts a sample. Returns the id under which it was logged, "" if it is right."""
        tally = self.tallies[sample.backend]
        tally.not_finite += verdict.num_not_finite
        tally.beyond += verdict.num_beyond
        if verdict.num_beyond and not self._has_told:
            self._has_told = True
            log.info("some outputs are not compared: a caller's numbers are beyond float32; metrics count them")
        tally.mismatches += verdict.is_mismatch
        tally.ratios.observe(min(verdict.ratio, _MOST_RATIO))  # the last: it counts the sample
        if not verdict.is_mismatch:
            return ""
        fault_id = secrets.token_hex(4)
        log.error("wrong output %s", fault_id, extra=described(sample, verdict))
        return fault_id
