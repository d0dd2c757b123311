"""Sessions on a cuda plane: a step is one message, and its layers only enqueue work on the worker's stream."""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attnd.errors import AttndError, Disconnected, InvalidRequest, Unsupported
from attnd.foreign_metadata import as_step_metadata, check_options
from attnd.planes import call_threads
from attnd.planes.choice import PlaneOptions
from attnd.planes.cuda.ending import await_end
from attnd.planes.cuda.requests import num_tokens_of, step_request
from attnd.planes.cuda.resident import ResidentSteps, made, num_done
from attnd.planes.cuda.resident_shape import ResidentShape
from attnd.planes.cuda.step import CudaStep
from attnd.planes.leases import Lease
from attnd.planes.turns import Turn
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.cuda.layout import Geometry, step_layout
from attnd.protocol.head_dims import only_group
from attnd.protocol.page_table_deltas import SentPageTables
from attnd.protocol.requests import DEFAULT_OPTIONS
from attnd.timings import Timings
from attnd.v1 import backend_pb2

if TYPE_CHECKING:
    from types import TracebackType

    from attnd.planes.cuda.plane import Answer, CudaPlane

Options = AttentionOptions | Sequence[AttentionOptions]


class CudaSession:
    """A worker's sequence of steps of one cache, all layers of each, without a message between them.

    `attend` returns at once, as torch's own operations do: its output is there when the stream gets to it. What goes
    wrong in a step is raised by `CudaStep.finish`, or by the next `step`, and ends the plane; the next step after that
    opens another. Outputs count once `finish` has returned.

    Attributes:
        plane: "cuda"; "" before the first step.
        refusals: of better planes; none is.

    ```
    with cache.session(plane="cuda") as session:
        step = session.step(attnd.StepMetadata(...), num_heads=32)
        for layer in range(num_layers):
            output = step.attend(layer, q, k, v)
        step.finish()
    ```

    In a CUDA graph: `attend` of every layer may be captured during a step, and is replayed in this or any later step of
    as many tokens, between `session.step(..., num_heads=...)` and `finish`. A graph belongs to one plane: capture it
    again after a step that failed, and do not replay it after `close`.
    """

    # Steps that were sent and not answered; `step` waits for the oldest beyond these.
    MAX_UNANSWERED_STEPS = 2

    def __init__(self, cache: Lease, timeout_s: float, plane: PlaneOptions) -> None:
        """Opens no plane yet: the first step does."""
        self.cache = cache
        self.timeout_s = timeout_s
        self.plane = ""
        self.refusals: dict[str, str] = {}
        group = only_group(cache.config)
        if group is None:
            kind = f"has {len(cache.config.groups)} layer groups" if len(cache.config.groups) > 1 else "is latent"
            raise Unsupported(f"plane is cuda, but the cache {kind}: use shm or inline", field="plane")
        head_dim, head_dim_v = group.head_dim, group.head_dim_v or group.head_dim
        self.geometry = Geometry(group.num_kv_heads, head_dim, head_dim_v, cache.config.dtype)
        self._wanted = plane
        self._timings = Timings(plane="cuda")
        self._plane: CudaPlane | None = None
        self._plane_id = 0
        self._tables = SentPageTables()
        self._last_step_id = 0
        self._unanswered: deque[CudaStep] = deque()
        self._turn = Turn("session")
        self.lost: AttndError | None = None  # that the cache was deleted
        self._resident: ResidentSteps | None = None
        self._end_plane: Any = None  # closes the plane of a session that nobody has any more
        self._layers: tuple[int, tuple[AttentionOptions, ...]] | None = None

    def step(self, metadata: Any, *, num_heads: int | None = None, options: Options | None = None) -> CudaStep:
        """Opens a step. Does not wait, but for the answer of the last step but one.

        Args:
            metadata: as of `Session.step`.
            num_heads: query heads of every layer. None: those of the session's last step; in its first, the step is
                sent with the first `attend`, which tells.
            options: of all layers, or of each. None: likewise.

        Raises:
            AttndError: what went wrong in an earlier step.
            InvalidRequest: the metadata cannot be sent.
            Disconnected: the server is draining.
            Unsupported: there is no cuda plane; the message says why.
        """
        with self._turn:
            return self._opened_step(metadata, num_heads, options)

    def _opened_step(self, metadata: Any, num_heads: int | None, options: Options | None) -> CudaStep:
        self._settle()
        if self._plane is None:
            self._open()
        if num_heads is not None or options is not None:
            each = DEFAULT_OPTIONS if options is None else options
            listed = (each,) if isinstance(each, AttentionOptions) else tuple(each)
            if num_heads is None and self._layers is None:
                rule = "must be given with options in a session's first step"
                raise InvalidRequest(f"num_heads is None, but {rule}", field="num_heads")
            self._layers = self._layers[0] if num_heads is None and self._layers else num_heads or 0, listed
        self._last_step_id += 1
        step = CudaStep(self, self._last_step_id, as_step_metadata(metadata))
        if self._layers is not None:
            self.announce(step, *self._layers)
        self._timings.num_steps += 1
        return step

    def announce(self, step: CudaStep, num_heads: int, options: tuple[AttentionOptions, ...]) -> None:
        """Sends a step that was not sent yet. For `CudaStep`."""
        plane = self._plane
        assert plane is not None
        for each in options:
            check_options(step.metadata, each)
        self._layers = num_heads, options
        request = step_request(self.cache, step, self._tables, num_heads, options)
        tokens = num_tokens_of(request)
        step.opened(plane, step_layout(tokens, request.num_heads, self.geometry, plane.num_bytes), options)
        request.after_resident = num_done(self._resident)
        try:
            plane.send(request, self.timeout_s)
        except AttndError as error:
            step.error = error
            self._fail(error)
            raise
        self._timings.bytes_sent += request.ByteSize()
        self._unanswered.append(step)

    def resident(self, num_heads: int, *, max_reqs: int, max_pages: int, **more: Any) -> ResidentSteps:
        """Makes resident steps ready, by the numbers of `ResidentShape`: decode steps without a message each.

        Raises:
            AttndError: what went wrong in an earlier step.
            Unsupported: the server has none for such steps; the message says why. Steps by message go on.
        """
        with self._turn:
            self._settle()
            if self._plane is None:
                self._open()
            shape, plane = ResidentShape(num_heads, max_reqs, max_pages, **more), self._plane
            self._resident = made(self, plane, shape, self._resident)  # type: ignore[arg-type]  # it is open
            return self._resident

    def finish(self, step: CudaStep) -> None:
        """Waits for the answer of a step and those before it. For `CudaStep`."""
        with self._turn:
            while step in self._unanswered:
                self._take(wait=True)
        if isinstance(step.error, Disconnected) and self.lost is not None:
            raise self.lost
        if step.error is not None:
            raise step.error

    def interrupted(self, step: CudaStep) -> None:
        """Ends the plane, because a layer of a step may be handed over in part. For `CudaStep`."""
        step.error = Disconnected("a layer of the step was interrupted; open the step again")
        self._fail(step.error)

    @property
    def takes_turns(self) -> bool:
        """Whether the plane that is open is slow: both sides have one GPU and no CUDA Multi-Process Service."""
        return self._plane is not None and self._plane.takes_turns

    def fits(self, num_tokens: int, num_heads: int) -> bool:
        """Whether the plane's region holds a step of so many tokens. Opens a plane if there is none.

        Raises:
            AttndError: as `step`, where there is no plane.
        """
        if self._plane is None:
            self._open()
        assert self._plane is not None
        try:
            step_layout(num_tokens, num_heads, self.geometry, self._plane.num_bytes)
        except InvalidRequest:
            return False
        return True

    @property
    def failure(self) -> AttndError | None:
        """Why the plane that is open is of no use any more, as far as it is known; None: it is, or none is open."""
        return None if self._plane is None else self._plane.failure

    def timings(self) -> Timings:
        """Sums over the session's steps. `call_us` has what `attend` took to enqueue; `kernel_us` whole steps."""
        return self._timings

    def reset_timings(self) -> None:
        """Starts counting anew."""
        self._timings = Timings(plane="cuda")

    def close(self) -> None:
        """Ends the plane, once the worker's GPU is idle. The next step opens another.

        What waits for the server is let go, and means nothing: `finish` steps first. Of a step that was not finished
        the server stores whatever lies in the region, into that step's slots; that is over when this returns.
        """
        if self._turn.is_anothers:
            return  # another process has it; or another thread is inside, and its step's deadline ends it
        plane, self._plane = self._plane, None
        resident, self._resident = self._resident, None
        if self._end_plane is not None:
            self._end_plane.detach()
        was_under_way = bool(self._unanswered)
        for step in self._unanswered:
            step.error = step.error or Disconnected("the session was closed before the step was answered")
        self._unanswered.clear()
        self._tables.forget()
        if plane is not None:
            plane.close()
            if resident is not None:
                resident.close()
            if was_under_way or resident is not None:
                await_end(self.cache.transport, self._plane_id, self.timeout_s)

    def __enter__(self) -> CudaSession:
        """The session itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes; without an exception, after steps whose every layer was enqueued. Raises what went wrong there."""
        try:
            while kind is None and self._unanswered and self._unanswered[0].is_complete:
                self._take(wait=True)
        finally:
            self.close()

    def _settle(self) -> None:
        """Takes what was answered, and waits where too much is not."""
        while self._unanswered and self._take(wait=len(self._unanswered) >= self.MAX_UNANSWERED_STEPS):
            pass
        if (plane := self._plane) is not None and plane.failure is not None:
            self.close()
        elif plane is not None and plane.going_away:
            reason = plane.going_away
            self.close()
            raise Disconnected(f"{reason}; the next step reconnects")

    def _take(self, wait: bool) -> bool:
        """Takes the answer of the oldest step; False: there is none yet. Raises the step's error."""
        step = self._unanswered[0]
        plane = self._plane
        assert plane is not None
        answer: Answer | None = plane.answer(step.id, wait)
        if answer is None:
            return False
        self._unanswered.popleft()
        if answer.reply is None:
            assert answer.error is not None
            step.error = answer.error
            if step.span is not None:
                step.span.failed(answer.error)
            self._fail(answer.error)
            raise answer.error
        if answer.reply.takes_deltas:
            self._tables.accept(step.id)
        if step.span is not None:
            step.span.served(answer.reply.queue_us, answer.reply.step_us)
        self._timings.queue_us += answer.reply.queue_us
        self._timings.kernel_us += answer.reply.step_us
        if answer.reply.backend:
            name = backend_pb2.Backend.Name(answer.reply.backend)
            self._timings.backend = name.removeprefix("BACKEND_").lower()
        return True

    def _fail(self, error: AttndError) -> None:
        """Ends the plane; what went wrong is told once, and by the `finish` of each step that was not answered."""
        for step in self._unanswered:
            step.error = error
        self.close()

    def _open(self) -> None:
        if sys.platform != "linux":
            raise Unsupported(f"plane is cuda, but this process runs on {sys.platform}, and it needs Linux")
        from attnd.planes.cuda import opening  # has modules that other systems have not

        self._plane, self._plane_id = opening.asked(self.cache.transport, self._wanted.socket_dir, self.timeout_s)
        self._end_plane = weakref.finalize(self, call_threads.start_last, self._plane.close)
        self._end_plane.atexit = False
        self.plane = "cuda"
        self._last_step_id = 0
