"""Sessions: the hot path of the sync client."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from attnd import traces
from attnd.errors import AttndError, CacheLost, Disconnected, Exhausted, ServerFault, Unauthenticated, from_message
from attnd.foreign_metadata import as_step_metadata
from attnd.planes.choice import PlaneOptions
from attnd.planes.leases import Lease
from attnd.planes.retry_deadline import RetryDeadline
from attnd.planes.sent_steps import SentSteps
from attnd.planes.transport import Stream
from attnd.planes.turns import Turn
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.requests import MAX_CALLS_UNDER_WAY, AttendReply, CallTensors, step_shape
from attnd.steps import PendingCall, Step
from attnd.timings import Timings

Sent = Step | PendingCall | weakref.ref[PendingCall]
"""What was sent. A reference, of a call for which somebody else is to wait: if nobody has it any more, nobody does."""


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
        self._unanswered: deque[Sent] = deque()  # whose answers were not read yet, in order
        self._steps = SentSteps()
        self._going_away = ""
        self._is_midway = False  # whether a message may have gone or come that `_unanswered` does not know of
        self._turn = Turn("session")
        self.lost: CacheLost | None = None  # that the cache was deleted

    def step(self, metadata: Any) -> Step:
        """Opens a step. Sends its metadata once and does not wait: a refusal comes with the step's first call.

        Of page tables only what changed is sent, if the server has answered a like step of the session before.

        Args:
            metadata: an `attnd.StepMetadata`, or an object with the attributes of Diffulex's metadata.

        Raises:
            InvalidRequest: the metadata cannot be sent.
            Disconnected: the server is draining.
            Unsupported: the plane that was asked for cannot be had, or the server is of a version that does not know
                what the step says; the message says why.
        """
        self._begin()
        try:
            if self._going_away:
                raise Disconnected(f"{self._finish()}; the next step reconnects")
            if self._stream is None:
                self._steps.forget()
            metadata = as_step_metadata(metadata)
            message = self._steps.message(metadata, self.cache.ref, self.timeout_s, self.cache.missing)
            stream = self._stream
            if stream is None:
                stream, self.refusals = self.cache.open_stream(self._wanted, self.timeout_s)
                self.plane = self._timings.plane = stream.plane
                self._stream = stream
            step = Step(self, message.id, stream, metadata, step_shape(message, self.cache.config))
            if traces.tracer is not None:
                step.span = traces.begin(message, range(self.cache.config.num_layers), self.plane)
            self._send(stream.step_request(message), step)
            self._timings.num_steps += 1
            return step
        finally:
            self._turn.end()

    def timings(self) -> Timings:
        """Sums over the session's calls so far. The object goes on counting."""
        return self._timings

    def reset_timings(self) -> None:
        """Starts counting anew."""
        self._timings = Timings(plane=self._timings.plane)

    def close(self) -> None:
        """Ends the stream, and calls that are under way. The cache stays. The next step opens another stream.

        From any thread: a call that another thread waits for ends with Disconnected.
        """
        if self._turn.is_anothers:
            if (stream := self._stream) is not None:
                stream.stop()
            return
        self._end()

    def __enter__(self) -> Session:
        """The session itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()

    def attend_layer(self, step: Step, layer: int, tensors: CallTensors, options: AttentionOptions) -> Any:
        """What `Step.attend` gives. For `Step`."""
        started = time.perf_counter()
        deadline: RetryDeadline | None = None
        self._begin()
        try:
            while True:
                try:
                    call = self._submit(step, layer, tensors, options, is_awaited=True)
                    return self._wait(call, started)
                except Exhausted as refusal:
                    # All calls that were sent before it have been answered, so that it still runs in its turn.
                    deadline = deadline or RetryDeadline(self.timeout_s)
                    pause_s = deadline.pause_s(refusal)
                    if pause_s is None:
                        raise
                time.sleep(pause_s)
        finally:
            self._turn.end()

    def submit_layer(self, step: Step, layer: int, tensors: CallTensors, options: AttentionOptions) -> PendingCall:
        """What `Step.submit` gives. For `Step`."""
        started = time.perf_counter()
        self._begin()
        try:
            call = self._submit(step, layer, tensors, options, is_awaited=False)
        finally:
            self._turn.end()
        call.seconds = time.perf_counter() - started
        return call

    def wait_for(self, call: PendingCall) -> Any:
        """What `PendingCall.wait` gives. For `PendingCall`."""
        started = time.perf_counter() - call.seconds
        self._begin()
        try:
            return self._wait(call, started)
        finally:
            self._turn.end()

    def _begin(self) -> None:
        """Goes inside. What an interrupt left in the middle is ended first: its answers may still come."""
        if not self._turn.begin() or self._is_midway:
            self._end()

    def _submit(
        self, step: Step, layer: int, tensors: CallTensors, options: AttentionOptions, *, is_awaited: bool
    ) -> PendingCall:
        stream = self._stream
        if stream is None or stream is not step.stream:
            raise self.lost or Disconnected("the step's stream has ended; open the step again")
        if step.error is not None:
            raise step.error
        if len(self._unanswered) >= MAX_CALLS_UNDER_WAY:
            self._make_room()
        q, k, v, wanted = tensors
        request = stream.call_request(step.id, layer, q, k, v, options)
        call = PendingCall(self, step, layer, wanted)
        self._send(request, call if is_awaited else weakref.ref(call))
        return call

    def _make_room(self) -> None:
        """Takes answers of calls that nobody has any more. Raises Exhausted if too many others are under way."""
        while (num_calls := sum(not isinstance(sent, Step) for sent in self._unanswered)) >= MAX_CALLS_UNDER_WAY:
            if isinstance(_object_of(self._unanswered[0]), PendingCall):
                rule = "which is the limit; wait for one first"
                raise Exhausted(f"{num_calls} calls of the session are under way, {rule}")
            self._receive()

    def _wait(self, call: PendingCall, started: float) -> Any:
        """Reads answers, which come in order, up to that of `call`; the caller has been at it since `started`."""
        try:
            while call.reply is None and call.error is None:
                if self._stream is not call.step.stream:
                    raise Disconnected("the session's stream ended before the call was answered")
                self._receive()
        except BaseException as error:
            # Ctrl-C too: the answer may still come, and must not be taken for a later call's.
            if call.step.span is not None:
                call.step.span.failed(error)
            if self._stream is call.step.stream:
                self._end()
            raise
        if call.error is not None:
            if isinstance(call.error, Unauthenticated) and self._stream is call.step.stream:
                self._end()  # the next step opens a stream with the token of then
            raise call.error
        assert call.reply is not None
        if not call.is_counted:
            call.is_counted = True
            self._timings.add(call.reply, time.perf_counter() - started)
        return call.reply.output

    def _receive(self) -> None:
        """Reads one message, and gives it to what it answers."""
        assert self._stream is not None  # whoever waits has a call under way, and its stream is this one
        self._is_midway = True
        answer = self._stream.receive(self.timeout_s)
        self._timings.bytes_received += answer.num_bytes
        if answer.kind == "going_away":
            self._going_away = answer.message.reason
            self._is_midway = False
            return
        if not self._unanswered:
            raise ServerFault(f"the server sent {answer.kind} unasked")
        sent = _object_of(self._unanswered[0])
        if isinstance(sent, PendingCall):
            sent.answered(answer)
        elif sent is not None:
            self._answer_step(sent, answer)
        self._unanswered.popleft()  # not before: a fault of the server ends all that are unanswered
        self._is_midway = False

    def _answer_step(self, step: Step, answer: AttendReply) -> None:
        kind, message, *_ = answer
        if kind == "error":
            step.error = from_message(message)
        elif kind != "step" or message.step_id != step.id:
            raise ServerFault(f"the server answered step {step.id} with {kind} {message}")
        self._steps.answered(step.id, kind, message)

    def _finish(self, has_hung_up: bool = False) -> str:
        """Takes the answers of all calls under way, which a server that drains still gives, and closes.

        If the server has hung up, takes all that came before. Returns why it wants no more steps, if it has said so.
        """
        try:
            while has_hung_up or any(not isinstance(sent, Step) for sent in self._unanswered):
                self._receive()
        except AttndError:
            pass  # their waits say so
        finally:
            reason = self._going_away
            self._end()
        return reason

    def _send(self, request: bytes, sent: Sent) -> None:
        assert self._stream is not None
        self._timings.bytes_sent += len(request)
        self._is_midway = True
        try:
            self._stream.send(request)
            self._unanswered.append(sent)
        except Disconnected as error:
            if reason := self._finish(has_hung_up=True):
                raise Disconnected(f"{reason}; the next step reconnects") from error
            raise
        except BaseException:  # it may have gone out in part
            self._end()
            raise
        self._is_midway = False

    def _end(self) -> None:
        """The stream is over, with all that is under way."""
        stream, self._stream = self._stream, None
        unanswered, self._unanswered = self._unanswered, deque()
        for sent in map(_object_of, unanswered):
            if isinstance(sent, PendingCall):
                sent.error = Disconnected("the session's stream ended before the call was answered")
        self._going_away, self._is_midway = "", False
        if stream is not None:
            stream.close()


def _object_of(sent: Sent) -> Step | PendingCall | None:
    """What was sent; None: a call that nobody has any more."""
    return sent() if isinstance(sent, weakref.ref) else sent
