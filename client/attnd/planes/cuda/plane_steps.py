"""The steps of one cuda plane: where their tensors lie, and which of them are resident ones."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from attnd import traces
from attnd.errors import AttndError, Disconnected
from attnd.planes.cuda.automatic import AutomaticSteps
from attnd.planes.cuda.making import made, num_done
from attnd.planes.cuda.requests import begin_span, num_tokens_of, step_request
from attnd.planes.cuda.resident import ResidentSteps
from attnd.planes.cuda.resident_shape import ResidentShape, Session
from attnd.planes.cuda.step import CudaStep
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.cuda.layout import StepLayout
from attnd.protocol.cuda.resident import common_tokens, layer_layouts
from attnd.protocol.page_table_deltas import SentPageTables

if TYPE_CHECKING:
    from attnd.planes.cuda.plane import CudaPlane  # has modules that other systems have not


class PlaneSteps:
    """What a session has of one plane's steps.

    Attributes:
        begun: a resident step that is not finished; None: there is none.
        unanswered: steps that were sent and not answered, the oldest first.
    """

    def __init__(self, session: Session, plane: CudaPlane) -> None:
        """No step yet."""
        self.begun: CudaStep | None = None
        self.unanswered: deque[CudaStep] = deque()
        self._tables = SentPageTables()
        self._session, self._plane = session, plane
        self._asked: ResidentSteps | None = None  # for by `CudaSession.resident`
        self._automatic = AutomaticSteps(session, plane)

    @property
    def _resident(self) -> ResidentSteps | None:
        return self._asked or self._automatic.steps

    def resident(self, shape: ResidentShape) -> ResidentSteps:
        """Makes resident steps ready, instead of those before. See `CudaSession.resident`."""
        self._asked = made(ResidentSteps, self._session, self._plane, [shape], self._resident)
        return self._asked

    def layouts(self, num_tokens: int, num_heads: int) -> tuple[tuple[StepLayout, StepLayout], int]:
        """Where a step's tensors lie in even and odd layers, and its `layout_tokens`.

        Raises:
            InvalidRequest: the region does not hold them.
        """
        geometry, plane, resident = self._session.geometry, self._plane, self._resident
        common = common_tokens(num_heads, geometry, plane.num_bytes) if plane.has_resident_steps else 0
        layout_tokens = common if num_tokens <= common else 0
        num_bytes = plane.num_bytes if resident is None or resident.is_over else resident.tensor_bytes
        return layer_layouts(num_tokens, num_heads, geometry, num_bytes, layout_tokens), layout_tokens

    def begin(self, step: CudaStep, num_heads: int, options: tuple[AttentionOptions, ...], *, is_wanted: bool) -> str:
        """Begins a step as a resident one; or says why it is to go by message.

        Args:
            step: not sent yet.
            num_heads: query heads of every layer.
            options: of all layers, or of each.
            is_wanted: whether steps are to be resident at all.

        Raises:
            AttndError: the plane failed, or a field holds what the wire cannot carry.
        """
        if not is_wanted:
            return "uses_resident_steps is False"
        if self._asked is not None:
            return "session.resident has made others"
        if self.unanswered or self.begun is not None:
            return "a step before it is not finished"
        if self._plane.is_capturing:
            return "a CUDA graph is being captured"
        if traces.tracer is not None and begin_span(self._session.cache, step):
            return "it is traced"
        numbers = self._automatic.begin(step.metadata, num_heads, options)
        if isinstance(numbers, str):
            return numbers
        self.begun = step
        layouts, _ = self.layouts(numbers.num_tokens, num_heads)
        step.opened(self._plane, layouts, options)
        return ""

    def send(self, step: CudaStep, num_heads: int, options: tuple[AttentionOptions, ...]) -> int:
        """Sends a step; returns the bytes of its message.

        Raises:
            AttndError: it cannot be sent, the plane failed, or what went wrong in a resident step before it.
        """
        request = step_request(self._session.cache, step, self._tables, num_heads, options)
        layouts, request.layout_tokens = self.layouts(num_tokens_of(request), request.num_heads)
        step.opened(self._plane, layouts, options)
        if self._asked is not None:
            request.after_resident = num_done(self._asked)
        elif self._automatic.steps is not None:  # of which one may be under way
            request.after_resident = self._automatic.steps.num_begun
        self._plane.send(request, self._session.timeout_s)
        self.unanswered.append(step)
        return request.ByteSize()

    def take(self, wait: bool) -> bool:
        """Takes the answer of the oldest step that was sent; False: there is none yet. Raises the step's error."""
        step = self.unanswered[0]
        answer = self._plane.answer(step.id, wait)
        if answer is None:
            return False
        self.unanswered.popleft()
        if answer.reply is None:
            assert answer.error is not None
            step.failed(answer.error)
            raise answer.error
        if answer.reply.takes_deltas:
            self._tables.accept(step.id)
        step.served(answer.reply)
        return True

    def enqueued(self, step: CudaStep) -> None:
        """The last layer of a step was: what says how a resident one went comes behind it."""
        if step is self.begun:
            assert self._automatic.steps is not None
            self._automatic.steps.mark()

    @property
    def is_known(self) -> bool:
        """Whether `finish` need not wait."""
        steps = self._automatic.steps
        return self.begun is not None and steps is not None and steps.is_known

    @property
    def oldest_is_complete(self) -> bool:
        """Whether every layer of the oldest step that was sent was enqueued."""
        return bool(self.unanswered) and self.unanswered[0].is_complete

    @property
    def is_complete(self) -> bool:
        """Whether those of all steps were."""
        return not self.unanswered and (self.begun is None or self.begun.is_complete)

    def finish(self) -> None:
        """Waits until the step that was begun is done.

        Raises:
            AttndError: it failed. If it was refused, and no step was sent since, the plane goes on.
        """
        step, steps = self.begun, self._automatic.steps
        if step is None or steps is None:
            return
        try:
            steps.finish_last(resumes=not self.unanswered)
        except AttndError as error:
            step.error, self.begun = error, None
            raise
        self.begun = None  # and not after an interrupt: whoever asks again, waits again

    def drop(self, error: AttndError | None = None) -> bool:
        """Gives up what is under way, each step with an error of its own or this one; whether anything was."""
        under_way = [*self.unanswered, *([] if self.begun is None else [self.begun])]
        closed = Disconnected("the session was closed before the step was answered")
        for step in under_way:
            step.error = error or step.error or closed
        self.unanswered.clear()
        self.begun = None
        return bool(under_way)

    def close(self) -> bool:
        """Ends the resident steps of a plane that is closed; whether there were any."""
        if self._resident is None:
            return False
        self._resident.close()
        return True
