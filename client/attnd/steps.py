"""Steps of the sync client, and their calls."""

from __future__ import annotations

import time
from typing import Any, Protocol

from attnd.errors import AttndError, from_message
from attnd.foreign_metadata import check_options
from attnd.planes.transport import Stream
from attnd.protocol import requests
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.requests import (
    DEFAULT_OPTIONS,
    AttendReply,
    CallTensors,
    Reply,
    StepShape,
    Wanted,
    call_tensors,
)
from attnd.protocol.step_metadata import StepMetadata
from attnd.traces import StepSpan


class Steps(Protocol):
    """What a step and its calls need of their session."""

    def attend_layer(self, step: Step, layer: int, tensors: CallTensors, options: AttentionOptions) -> Any:
        """As `Step.attend`."""

    def submit_layer(self, step: Step, layer: int, tensors: CallTensors, options: AttentionOptions) -> PendingCall:
        """As `Step.submit`."""

    def wait_for(self, call: PendingCall) -> Any:
        """As `PendingCall.wait`."""


class Step:
    """One forward pass: what its layers share has been sent."""

    def __init__(self, session: Steps, step_id: int, stream: Stream, metadata: StepMetadata, shape: StepShape) -> None:
        """Made by `Session.step`."""
        self.id = step_id
        self.metadata = metadata
        self.shape = shape
        self.stream = stream
        self.error: AttndError | None = None
        self.span: StepSpan | None = None
        self._session = session

    def attend(
        self, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions = DEFAULT_OPTIONS, out: Any = None
    ) -> Any:
        """Attention of one layer: `submit`, and at once `PendingCall.wait`.

        Rows of q, k and v may lie apart, as slices of one projection do. If all of them have the same number of rows
        and that is more than the step has tokens, the first ones are sent; the output's other rows are zeros, and those
        of lse -infinity.

        Args:
            layer: 0 <= layer < num_layers.
            q: `[num_tokens, num_heads, head_dim]` of the cache's dtype; None in a store-only step.
            k: `[num_tokens, num_kv_heads, head_dim]`; None in a cache-only step.
            v: `[num_tokens, num_kv_heads, head_dim_v]`; None in a cache-only step, and of a latent layer.
            options: scale, softcap, window, ALiBi, sinks, lse, backend.
            out: where the output is written, with as many rows as the step has tokens, or as q: a torch tensor on any
                device or a numpy array, of the cache's dtype and any strides. It is as before if the call fails. None:
                a new one is made.

        Returns:
            `out`, or `[num_tokens, num_heads, head_dim_v]`, a torch tensor on q's device if q is one, a numpy array if
            q is one, else an `attnd.Array`; with `options.return_lse` the tuple `(output, lse)`, lse float32
            `[num_tokens, num_heads]`; None in a store-only step.

        Raises:
            AttndError: see `attnd.errors`; the step's own refusal comes here too.
        """
        check_options(self.metadata, options)
        tensors = call_tensors(self.shape, layer, q, k, v, options, out)
        return self._session.attend_layer(self, layer, tensors, options)

    def submit(
        self, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions = DEFAULT_OPTIONS, out: Any = None
    ) -> PendingCall:
        """Sends a call and does not wait for its answer, so that the next one can be made meanwhile.

        With two halves of a batch as two steps, the worker computes the one's q, k and v while the server attends the
        other's. The server runs calls in the order in which they were sent. At most 4 of a session may be under way.

        Args:
            layer: as in `attend`.
            q: as in `attend`; may be overwritten when `submit` has returned, as may `k` and `v`.
            k: as in `attend`.
            v: as in `attend`.
            options: as in `attend`.
            out: as in `attend`; written by the `wait` of this call, or of one that was sent after it.

        Raises:
            Exhausted: too many calls are under way, or the region of a shm plane has no room for another: wait first.
            AttndError: the call cannot be sent.
        """
        check_options(self.metadata, options)
        tensors = call_tensors(self.shape, layer, q, k, v, options, out)
        return self._session.submit_layer(self, layer, tensors, options)


class PendingCall:
    """A call that was sent. Belongs to its session's thread."""

    def __init__(self, session: Steps, step: Step, layer: int, wanted: Wanted) -> None:
        """Made by `Step.submit`."""
        self.step = step
        self.layer = layer
        self.wanted: Wanted | None = wanted  # until it is answered
        self.seconds = 0.0  # that the caller has spent on it
        self.reply: Reply | None = None
        self.error: AttndError | None = None
        self.is_counted = False
        self._session = session
        self._sent_at = 0.0 if step.span is None else time.perf_counter()

    def wait(self) -> Any:
        """The call's output, as `Step.attend` returns it. Calls may be waited for in any order; again gives the same.

        Raises:
            AttndError: of this call alone; others under way are not harmed. One with `retry_after_s` may be submitted
                again, behind those; `Step.attend` does so by itself. But if no answer comes in time, or the wait
                is interrupted, the session's stream ends, and with it all calls that are under way.
        """
        return self._session.wait_for(self)

    def answered(self, answer: AttendReply) -> None:
        """Takes the answer. Raises ServerFault if it is to something else."""
        if answer.kind == "error":
            self.error = self.step.error or from_message(answer.message)
        elif self.wanted is not None:
            # Now, because the stream may use the message and what its tensors lie in again.
            self.reply = requests.call_reply(answer, self.step.id, self.layer, self.wanted)
        self.wanted = None
        span = self.step.span
        if span is not None and self.error is not None:
            span.failed(self.error)
        elif span is not None:
            span.answered(self.layer, time.perf_counter() - self._sent_at)
