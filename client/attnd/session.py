"""Sessions: the hot path of the sync client."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from attnd import traces
from attnd.errors import AttndError, Disconnected, Exhausted, ServerFault, from_message
from attnd.planes.choice import PlaneOptions
from attnd.planes.leases import Lease
from attnd.planes.retry_deadline import RetryDeadline
from attnd.planes.sent_steps import SentSteps
from attnd.planes.transport import Stream
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.requests import MAX_CALLS_UNDER_WAY, AttendReply
from attnd.steps import PendingCall, Step
from attnd.timings import Timings


class Session:
    """One Attend stream of one cache: a worker's sequence of steps. One thread at a time.

    Attributes:
        plane: how tensors travel, "inline" or "shm"; "" before the first step.
        refusals: by the name of each better plane, why the session does not have it.

    ```
    with cache.session() as session:
        step = session.step(attnd.StepMetadata(...))
        for layer in range(num_layers):
            output = step.attend(layer, q, k, v)
    ```
    """

    def __init__(self, cache: Lease, timeout_s: float, plane: PlaneOptions) -> None:
        """Opens no stream yet: the first step does."""
        self.cache = cache
        self.timeout_s = timeout_s
        self.plane = ""
        self.refusals: Mapping[str, str] = {}
        self._wanted = plane
        self._timings = Timings()
        self._stream: Stream | None = None
        self._unanswered: deque[Step | PendingCall] = deque()  # whose answers were not read yet, in order
        self._steps = SentSteps()
        self._going_away = ""

    def step(self, metadata: Any) -> Step:
        """Opens a step. Sends its metadata once and does not wait: a refusal comes with the step's first call.

        Of page tables only what changed is sent, if the server has answered a like step of the session before.

        Args:
            metadata: an `attnd.StepMetadata`, or an object with the attributes of Diffulex's metadata.

        Raises:
            InvalidRequest: the metadata cannot be sent.
            Disconnected: the server is draining.
            Unsupported: the plane that was asked for cannot be had; the message says why.
        """
        if self._going_away:
            reason, self._going_away = self._going_away, ""
            self._finish()
            raise Disconnected(f"{reason}; the next step reconnects")
        if self._stream is None:
            self._steps.forget()
        message = self._steps.message(metadata, self.cache.ref, self.timeout_s)
        if self._stream is None:
            self._stream, self.refusals = self.cache.open_stream(self._wanted, self.timeout_s)
            self.plane = self._timings.plane = self._stream.plane
        step = Step(self, message.id, self._stream)
        if traces.tracer is not None:
            step.span = traces.begin(message, range(self.cache.config.num_layers), self.plane)
        self._send(self._stream.step_request(message), step)
        self._timings.num_steps += 1
        return step

    def timings(self) -> Timings:
        """Sums over the session's calls so far. The object goes on counting."""
        return self._timings

    def reset_timings(self) -> None:
        """Starts counting anew."""
        self._timings = Timings(plane=self._timings.plane)

    def close(self) -> None:
        """Ends the stream, and calls that are under way. The cache stays. The next step opens another stream."""
        stream, self._stream = self._stream, None
        for request in self._unanswered:
            if isinstance(request, PendingCall):
                request.error = Disconnected("the session's stream ended before the call was answered")
        self._unanswered.clear()
        if stream is not None:
            stream.close()

    def __enter__(self) -> Session:
        """The session itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()

    def attend_layer(self, step: Step, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions) -> Any:
        """What `Step.attend` gives. For `Step`."""
        started = time.perf_counter()
        deadline: RetryDeadline | None = None
        while True:
            try:
                return self._wait(self._submit(step, layer, q, k, v, options), started)
            except Exhausted as refusal:
                # All calls that were sent before it have been answered, so that it still runs in its turn.
                deadline = deadline or RetryDeadline(self.timeout_s)
                pause_s = deadline.pause_s(refusal)
                if pause_s is None:
                    raise
            time.sleep(pause_s)

    def submit_layer(self, step: Step, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions) -> PendingCall:
        """What `Step.submit` gives. For `Step`."""
        started = time.perf_counter()
        call = self._submit(step, layer, q, k, v, options)
        call.seconds = time.perf_counter() - started
        return call

    def wait_for(self, call: PendingCall) -> Any:
        """What `PendingCall.wait` gives. For `PendingCall`."""
        return self._wait(call, time.perf_counter() - call.seconds)

    def _submit(self, step: Step, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions) -> PendingCall:
        stream = self._stream
        if stream is None or stream is not step.stream:
            raise Disconnected("the step's stream has ended; open the step again")
        if step.error is not None:
            raise step.error
        if len(self._unanswered) >= MAX_CALLS_UNDER_WAY:
            self._refuse_too_many()
        request = stream.call_request(step.id, layer, q, k, v, options)
        call = PendingCall(self, step, layer, q, options.return_lse)
        self._send(request, call)
        return call

    def _refuse_too_many(self) -> None:
        """Raises Exhausted if no more calls may be under way; steps may be."""
        num_calls = sum(isinstance(request, PendingCall) for request in self._unanswered)
        if num_calls >= MAX_CALLS_UNDER_WAY:
            raise Exhausted(f"{num_calls} calls of the session are under way, which is the limit; wait for one first")

    def _wait(self, call: PendingCall, started: float) -> Any:
        """Reads answers, which come in order, up to that of `call`; the caller has been at it since `started`."""
        try:
            while call.reply is None and call.error is None:
                self._receive()
        except BaseException:  # Ctrl-C too: the answer may still come, and must not be taken for that of a later call
            self.close()
            raise
        if call.error is not None:
            raise call.error
        assert call.reply is not None
        if not call.is_counted:
            call.is_counted = True
            self._timings.add(call.reply, time.perf_counter() - started)
        return call.reply.output

    def _receive(self) -> None:
        """Reads one message, and gives it to what it answers."""
        assert self._stream is not None  # whoever waits has a call under way, and close() ends those
        answer = self._stream.receive(self.timeout_s)
        self._timings.bytes_received += answer.num_bytes
        if answer.kind == "going_away":
            self._going_away = answer.message.reason
            return
        if not self._unanswered:
            raise ServerFault(f"the server sent {answer.kind} unasked")
        request = self._unanswered[0]
        if isinstance(request, PendingCall):
            request.answered(answer)
        else:
            self._answer_step(request, answer)
        self._unanswered.popleft()  # not before: a fault of the server ends all that are unanswered

    def _answer_step(self, step: Step, answer: AttendReply) -> None:
        kind, message, *_ = answer
        if kind == "error":
            step.error = from_message(message)
        elif kind != "step" or message.step_id != step.id:
            raise ServerFault(f"the server answered step {step.id} with {kind} {message}")
        self._steps.answered(step.id, kind, message)

    def _finish(self) -> None:
        """Takes the answers of all calls under way, which a server that drains still gives, and closes."""
        try:
            while any(isinstance(request, PendingCall) for request in self._unanswered):
                self._receive()
        except AttndError:
            pass  # their waits say so
        finally:
            self.close()

    def _send(self, request: bytes, sent: Step | PendingCall) -> None:
        assert self._stream is not None
        self._timings.bytes_sent += len(request)
        try:
            self._stream.send(request)
            self._unanswered.append(sent)
        except BaseException:  # it may have gone out in part
            self.close()
            raise
