"""One Attend stream, or what is like it on a plane: its open steps, and the work of their calls."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from attnd.errors import AttndError, InvalidRequest
from attnd.protocol import frames
from attnd.protocol.requests import MAX_CALLS_UNDER_WAY
from attnd.protocol.tensors import Array
from attnd.v1 import attention_pb2, step_pb2
from attnd_server.attention.metadata import AttentionOptions
from attnd_server.config import ServerConfig
from attnd_server.execution.executor import Executor
from attnd_server.execution.joined.repeats import repeatable
from attnd_server.execution.plan_ahead import plan_ahead
from attnd_server.execution.step import Call, Step
from attnd_server.execution.work import Work
from attnd_server.identity import TokenPrincipal, refuse_if_revoked, wanted_until_revoked
from attnd_server.observe.callers import Callers
from attnd_server.service import validation
from attnd_server.service.kept_steps import HeldBytes, KeptSteps, StepRoom, bases_of, is_big
from attnd_server.service.repeated_lane import RepeatedLane
from attnd_server.service.replies import Replies

# Steps that a stream keeps, so that calls of several may be under way and later ones build upon their page tables.
# The contract has this number too: at Step.id and at StepReply.takes_deltas.
MAX_OPEN_STEPS = 8
# Bytes of a message beside the tensors of a call from which it must be a step: the options of a call have fewer, with
# slopes and sinks of thousands of heads, and protobuf copies the rest.
BIG_HEADER_BYTES = 256 << 10
# Bytes of the message of a call that is kept, so that the next one may say "again": its tensors lie in a region.
MAX_KEPT_CALL_BYTES = 256 << 10
# Layer groups that are made ready for their first calls when a step is opened: models have a few, and a step with a
# thousand is not to have the device for all of them.
MAX_GROUPS_AHEAD = 8
# Bytes of the options that are kept for that, of each: models have a thousand heads.
MAX_BYTES_OF_OPTIONS_AHEAD = 16 << 10
# Seconds without a message after which nobody goes on with a step that is open: no layer of a model takes so long.
SILENT_S = 3.0


@dataclass(frozen=True, eq=False)
class BigStep:
    """A step that takes long to check. Call it on any thread, before the session gets its next request.

    Attributes:
        answer: checks and opens it. Raises what `AttendSession.request` raises.
    """

    answer: Callable[[], bytes]


class Checks(Protocol):
    """What a session asks its service.

    Attributes:
        callers: among whom it is counted.
        config: the limits.
        executor: that runs its calls.
        step_room: for its steps.
    """

    callers: Callers
    config: ServerConfig
    executor: Executor
    step_room: StepRoom

    def step(
        self,
        message: step_pb2.Step,
        principal: str,
        open_steps: validation.OpenSteps = ...,
        plane: str = ...,
        take: Callable[[int], HeldBytes] | None = None,
    ) -> tuple[Step, ...]:
        """Checks a step, and makes one for each layer group. Raises AttndError: it is refused."""

    def told(self, error: Exception, principal: str = "") -> AttndError:
        """What a client is told, and counts as refused."""

    def call(self, steps: Sequence[Step], message: step_pb2.Call, tensors: Mapping[str, Array]) -> Call:
        """Checks a call of a step, which is given for each layer group. Raises AttndError: it is refused."""


class AttendSession:
    """The state of one Attend stream: its open steps.

    Attributes:
        is_wanted: of its work, for the executor; see `wanted_until_revoked`.
    """

    def __init__(self, service: Checks, principal: str, replies: Replies) -> None:
        """Starts without steps."""
        self._service = service
        self._principal = principal
        self._counts = service.callers.open(principal, replies.plane)
        # Streams and planes end in many ways, and in none does anything keep the session.
        weakref.finalize(self, service.callers.close, self._counts).atexit = False
        self._can_be_revoked = isinstance(principal, TokenPrincipal)
        self.is_wanted = wanted_until_revoked(principal)
        self._replies = replies
        self._max_header_bytes = service.config.max_header_bytes
        # Of a stream with a region, by lane, the last call: what came, and what was made of it unless it was refused.
        self._last_calls: dict[int, frames.Framed] = {}
        self._last_checked: dict[int, Call] = {}
        self._steps = KeptSteps(service.step_room, principal, MAX_OPEN_STEPS)
        # Of the open steps, those whose last layer was not called yet; and when a message came last.
        self._unfinished: set[int] = set()
        self._heard_at = 0.0
        self._last_id = -1
        self._last_options: dict[int, AttentionOptions] = {}  # by layer group

    def is_under_way(self) -> bool:
        """Whether a step is: its last layer was not called yet, and the stream is not silent. From any thread."""
        return bool(self._unfinished) and time.monotonic() - self._heard_at < SILENT_S

    def request(self, data: bytes, lane: int = 0) -> bytes | Work:
        """Answers a message of the stream: a step at once, a call of `lane` by work for the executor."""
        answer = self.request_in_parts(data, lane)
        return answer.answer() if isinstance(answer, BigStep) else answer

    def request_in_parts(self, data: bytes, lane: int = 0) -> bytes | Work | BigStep:
        """As `request`, but a step that takes long to check is left to the caller."""
        if self._can_be_revoked:
            refuse_if_revoked(self._principal)
        stripped = frames.ATTEND_REQUEST.stripped(data, self._replies.region, self._max_header_bytes)
        if len(stripped.header) > BIG_HEADER_BYTES:
            return BigStep(partial(self._open_big, stripped))
        message, tensors = frames.ATTEND_REQUEST.parsed(stripped)
        kind = message.WhichOneof("message")
        if kind == "call":
            if self._replies.region is not None:
                if lane >= MAX_CALLS_UNDER_WAY:
                    raise InvalidRequest(f"lane is {lane}, but must be in 0..{MAX_CALLS_UNDER_WAY - 1}", field="lane")
                self._last_calls.pop(lane, None)
                self._last_checked.pop(lane, None)
                if len(data) <= MAX_KEPT_CALL_BYTES:
                    self._last_calls[lane] = frames.Framed(message.call, tensors)
            return self._call(message.call, tensors, lane)
        if kind == "step":
            step: step_pb2.Step = message.step
            return BigStep(partial(self._open, step)) if is_big(step) else self._open(step)
        raise InvalidRequest("message is not set, but must be step or call", field="message")

    def repeat(self, layer: int, step_id: int, lane: int) -> Work:
        """The last call of `lane` again, of another step or layer; checked as if it had come whole."""
        if self._can_be_revoked:
            refuse_if_revoked(self._principal)
        last_call, last = self._last_calls.get(lane), self._last_checked.get(lane)
        if last_call is None:
            rule = f"there was no call in lane {lane}, of at most {MAX_KEPT_CALL_BYTES} bytes, that is meant again"
            raise InvalidRequest(f"message is absent, but must be given: {rule}")
        if last is not None and last.step in self._steps.get(step_id, ()):
            cache = last.step.cache
            group, index = validation.place(layer, cache.shape)
            if group == last.step.group.index:
                # What was checked lies in this process and is the same; only the layer is new.
                cache.renew()
                self._called(last.step, layer)
                return last._replace(layer=index)
        message, tensors = last_call
        message.layer, message.step_id = layer, step_id
        return self._call(message, tensors, lane)

    def repeated_lane(self, lane: int) -> RepeatedLane | None:
        """What the next requests of a lane may be that have no message; None: each is to be looked at by itself."""
        call = self._last_checked.get(lane)
        backend = None if call is None else self._replies.repeated(call, lane)
        if call is None or backend is None:
            return None
        found = repeatable(call, backend, self._service.executor.ops)
        return None if found is None else RepeatedLane(found, lane, self._principal, partial(self._called, call.step))

    def told(self, error: Exception) -> AttndError:
        """What the client is told of an error, which counts as refused."""
        return self._service.told(error, self._principal)

    def _call(self, message: step_pb2.Call, tensors: Mapping[str, Array], lane: int) -> Work:
        call = self._service.call(self._of_id(message.step_id), message, tensors)
        call = self._replies.answered(call, message, lane)
        index, options = call.step.group.index, call.options
        is_new = self._last_options.get(index) is not options and index < MAX_GROUPS_AHEAD
        if is_new and message.options.ByteSize() <= MAX_BYTES_OF_OPTIONS_AHEAD:
            self._last_options[index] = options
        self._called(call.step, message.layer)
        if lane in self._last_calls:
            self._last_checked[lane] = call
        return call

    def _open_big(self, stripped: frames.Stripped) -> bytes:
        """Opens a step whose message others do not wait for either."""
        message = frames.ATTEND_REQUEST.parsed(stripped).message
        if message.WhichOneof("message") != "step":
            rule = f"must have at most {BIG_HEADER_BYTES}, as it is no step"
            raise InvalidRequest(f"message has {len(stripped.header)} bytes beside the tensors of a call, but {rule}")
        return self._open(message.step)

    def _called(self, step: Step, layer: int) -> None:
        """A layer of a step was called."""
        self._heard_at = time.monotonic()
        if layer == step.cache.shape.num_layers - 1:
            self._unfinished.discard(step.id)

    def _open(self, message: step_pb2.Step) -> bytes:
        if message.id <= self._last_id:
            raise InvalidRequest(
                f"step.id is {message.id}, but must be greater than the stream's last, {self._last_id}", field="step.id"
            )
        take = partial(self._steps.take, bases_of(message), forget=self._forget)
        steps = self._service.step(message, self._principal, self._steps.metadata(), self._replies.plane, take)
        self._forget(self._steps.add(steps))
        for step in steps:
            step.counts = self._counts.served
        self._counts.step_opened(steps[0].metadata.num_tokens)
        self._last_id = message.id
        self._unfinished.add(message.id)
        self._heard_at = time.monotonic()
        for step in steps[:MAX_GROUPS_AHEAD]:
            options = self._last_options.get(step.group.index)
            if options is not None:  # most likely those of its first call, too
                plan_ahead(self._service.executor, step, options)
        reply = attention_pb2.StepReply(step_id=message.id, takes_deltas=True)
        return attention_pb2.AttendResponse(step=reply).SerializeToString()

    def _forget(self, step_ids: list[int]) -> None:
        """Steps that are not kept any more."""
        for step_id in step_ids:
            self._unfinished.discard(step_id)
        if step_ids:
            for lane, call in list(self._last_checked.items()):
                if call.step.id not in self._steps:
                    del self._last_checked[lane]

    def close(self) -> None:
        """Keeps nothing any more."""
        self._steps.clear()
        self._unfinished.clear()
        self._last_calls.clear()
        self._last_checked.clear()

    def _of_id(self, step_id: int) -> tuple[Step, ...]:
        steps = self._steps.get(step_id)
        if steps is None:
            raise InvalidRequest(
                f"call.step_id is {step_id}, but the stream's open steps are: {self._steps}", field="call.step_id"
            )
        return steps
