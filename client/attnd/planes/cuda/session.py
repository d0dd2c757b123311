"""Sessions on a cuda plane: a step is one message or none, and its layers only enqueue work on the worker's stream."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attnd.errors import AttndError, DeadlineExceeded, Disconnected, InvalidRequest, Unsupported
from attnd.foreign_metadata import as_step_metadata, check_options
from attnd.planes import call_threads
from attnd.planes.choice import PlaneOptions
from attnd.planes.cuda.ending import await_end
from attnd.planes.cuda.plane_steps import PlaneSteps
from attnd.planes.cuda.resident_shape import ResidentShape
from attnd.planes.cuda.step import CudaStep
from attnd.planes.leases import Lease
from attnd.planes.turns import Turn
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.cuda.layout import Geometry
from attnd.protocol.head_dims import only_group
from attnd.protocol.requests import DEFAULT_OPTIONS
from attnd.timings import Timings

if TYPE_CHECKING:
    from types import TracebackType

    from attnd.planes.cuda.plane import CudaPlane
    from attnd.planes.cuda.resident import ResidentSteps

Options = AttentionOptions | Sequence[AttentionOptions]


class CudaSession:
    """A worker's sequence of steps of one cache, all layers of each, without a message between them.

    `attend` returns at once, as torch's own operations do: its output is there when the stream gets to it. What goes
    wrong in a step is raised by `CudaStep.finish`, or by the next `step`, and ends the plane; the next step after that
    opens another. Outputs count once `finish` has returned. A decode step has no message where it can be a resident one
    (see `ResidentSteps`): those before it are finished, and the server's GPU checks and plans it. If it is refused, the
    plane goes on.

    Attributes:
        plane: "cuda"; "" before the first step.
        refusals: of better planes; none is.
        uses_resident_steps: whether decode steps may be resident ones, without a message.
        by_message: why the last step went by message all the same; "": it did not.

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
        self.uses_resident_steps, self.by_message = True, ""
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
        self._last_step_id = 0
        self._turn = Turn("session")
        self.lost: AttndError | None = None  # that the cache was deleted
        self._steps: PlaneSteps | None = None  # of the plane that is open
        self._end_plane: Any = None  # closes the plane of a session that nobody has any more
        self._layers: tuple[int, tuple[AttentionOptions, ...]] | None = None

    def step(self, metadata: Any, *, num_heads: int | None = None, options: Options | None = None) -> CudaStep:
        """Opens a step. Does not wait, but for the answer of the last step but one, or where resident steps are made.

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
        assert self._steps is not None
        for each in options:
            check_options(step.metadata, each)
        self._layers = num_heads, options
        self.by_message = self._steps.begin(step, num_heads, options, is_wanted=self.uses_resident_steps)
        if not self.by_message:
            return
        try:
            self._timings.bytes_sent += self._steps.send(step, num_heads, options)
        except AttndError as error:
            if self.failure is not None:
                step.error = error
                self._end(error)
            raise

    def resident(self, num_heads: int, *, max_reqs: int, max_pages: int, **more: Any) -> ResidentSteps:
        """Makes resident steps ready, by the numbers of `ResidentShape`: decode steps without a message each.

        Raises:
            AttndError: what went wrong in an earlier step.
            Unsupported: the server has none for such steps; the message says why. Steps by message go on.
        """
        with self._turn:
            self._settle()
            if self._steps is None:
                self._open()
            assert self._steps is not None
            self._finish_begun()
            while self._steps.unanswered:  # tensors of a step under way may lie where the metadata is to
                self._take(wait=True)
            return self._steps.resident(ResidentShape(num_heads, max_reqs, max_pages, **more))

    def finish(self, step: CudaStep) -> None:
        """Waits for the answer of a step and those before it. For `CudaStep`."""
        with self._turn:
            if self._steps is not None and step is self._steps.begun:
                self._finish_begun()
            while self._steps is not None and step in self._steps.unanswered:
                self._take(wait=True)
        if isinstance(step.error, Disconnected) and self.lost is not None:
            raise self.lost
        if step.error is not None:
            raise step.error

    def enqueued(self, step: CudaStep) -> None:
        """The last layer of a step was. For `CudaStep`."""
        if self._steps is not None:
            self._steps.enqueued(step)

    def interrupted(self, step: CudaStep) -> None:
        """Ends the plane, because a layer of a step may be handed over in part. For `CudaStep`."""
        step.error = Disconnected("a layer of the step was interrupted; open the step again")
        self._end(step.error)

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
        assert self._steps is not None
        try:
            self._steps.layouts(num_tokens, num_heads)
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
        self._end()

    def _end(self, error: AttndError | None = None) -> None:
        """Ends the plane. What is under way fails, with this error if there is one."""
        (plane, self._plane), (steps, self._steps) = (self._plane, None), (self._steps, None)
        if self._end_plane is not None:
            self._end_plane.detach()
        was_in_use = steps is not None and steps.drop(error)
        if plane is not None:
            plane.close()
            if (steps is not None and steps.close()) or was_in_use:
                await_end(self.cache.transport, self._plane_id, self.timeout_s)

    def __enter__(self) -> CudaSession:
        """The session itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes; without an exception, after steps whose every layer was enqueued. Raises what went wrong there."""
        try:
            while kind is None and self._steps is not None and self._steps.oldest_is_complete:
                self._take(wait=True)
            if kind is None and self._steps is not None and self._steps.is_complete:
                self._finish_begun()
        finally:
            self.close()

    def _settle(self) -> None:
        """Takes what was answered, and waits where too much is not."""
        while (steps := self._steps) is not None and steps.unanswered:
            if not self._take(wait=len(steps.unanswered) >= self.MAX_UNANSWERED_STEPS):
                break
        if self._steps is not None and self._steps.is_known:
            self._finish_begun()
        if (plane := self._plane) is not None and plane.failure is not None:
            self.close()
        elif plane is not None and plane.going_away:
            reason = plane.going_away
            self.close()
            raise Disconnected(f"{reason}; the next step reconnects")

    def _take(self, wait: bool) -> bool:
        """Takes the answer of the oldest step; False: there is none yet. Raises the step's error."""
        assert self._steps is not None
        try:
            return self._steps.take(wait)
        except AttndError as error:
            self._end(error)
            raise

    def _finish_begun(self) -> None:
        """Waits for the resident step that is not finished, if there is one. Raises the step's error."""
        if self._steps is None:
            return
        try:
            self._steps.finish()
        except AttndError as error:
            # A refusal ends no plane, unless another step was told to come after it.
            if isinstance(error, DeadlineExceeded) or self.failure is not None or self._steps.unanswered:
                self._end(error)
            raise

    def _open(self) -> None:
        if sys.platform != "linux":
            raise Unsupported(f"plane is cuda, but this process runs on {sys.platform}, and it needs Linux")
        from attnd.planes.cuda import opening  # has modules that other systems have not

        self._plane, self._plane_id = opening.asked(self.cache.transport, self._wanted.socket_dir, self.timeout_s)
        self._end_plane = weakref.finalize(self, call_threads.start_last, self._plane.close)
        self._end_plane.atexit = False
        self._steps = PlaneSteps(self, self._plane)
        self.plane = "cuda"
        self._last_step_id = 0
