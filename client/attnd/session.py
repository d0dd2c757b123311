"""Sessions, steps and calls: the hot path of the sync client."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from attnd import requests
from attnd.errors import AttndError, Disconnected, ServerFault, from_message
from attnd.options import AttentionOptions
from attnd.page_table_deltas import SentPageTables
from attnd.requests import DEFAULT_OPTIONS, Reply

if TYPE_CHECKING:
    from attnd.client import Cache
    from attnd.planes.choice import PlaneOptions
    from attnd.transport import Stream


@dataclass
class Timings:
    """Where the time of a session's calls went.

    Attributes:
        num_steps: steps that were opened.
        call_us: microseconds of each call, from the caller's side, copies of its tensors included.
        queue_us: microseconds that calls waited for the executor, summed.
        kernel_us: microseconds of store and attention, summed.
        bytes_sent: bytes of all messages to the server; not those that travel in shared memory.
        bytes_received: bytes of all messages from the server; likewise.
        backend: what ran last.
        plane: how tensors travelled.
    """

    num_steps: int = 0
    call_us: list[float] = field(default_factory=list)
    queue_us: int = 0
    kernel_us: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    backend: str = ""
    plane: str = "inline"

    @property
    def num_calls(self) -> int:
        """Calls that were answered."""
        return len(self.call_us)

    @property
    def wire_us(self) -> float:
        """Microseconds of calls that were neither queue nor kernel, summed: copies, gRPC, the network."""
        return max(0.0, sum(self.call_us) - self.queue_us - self.kernel_us)


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

    def __init__(self, cache: Cache, timeout_s: float, plane: PlaneOptions) -> None:
        """Opens no stream yet: the first step does."""
        self.cache = cache
        self.timeout_s = timeout_s
        self.plane = ""
        self.refusals: Mapping[str, str] = {}
        self._wanted = plane
        self._timings = Timings()
        self._stream: Stream | None = None
        self._last_step_id = 0
        self._unanswered: deque[Step] = deque()  # steps whose reply was not read yet
        self._sent_tables = SentPageTables()
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
            self.close()
            raise Disconnected(f"{reason}; the next step reconnects")
        if self._stream is None:
            self._sent_tables.forget()
        self._last_step_id += 1
        message = requests.as_step_metadata(metadata).to_message(self._last_step_id, self.cache.ref, self._sent_tables)
        if self._stream is None:
            self._stream, self.refusals = self.cache.open_stream(self._wanted, self.timeout_s)
            self.plane = self._timings.plane = self._stream.plane
        self._send(self._stream.step_request(message))
        self._timings.num_steps += 1
        step = Step(self, self._last_step_id, self._stream)
        self._unanswered.append(step)
        return step

    def timings(self) -> Timings:
        """Sums over the session's calls so far. The object goes on counting."""
        return self._timings

    def reset_timings(self) -> None:
        """Starts counting anew."""
        self._timings = Timings(plane=self._timings.plane)

    def close(self) -> None:
        """Ends the stream. The cache stays. The next step opens another stream."""
        stream, self._stream = self._stream, None
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

    def _call(self, step: Step, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions) -> Any:
        if self._stream is None or self._stream is not step.stream:
            raise Disconnected("the step's stream has ended; open the step again")
        if step.error is not None:
            raise step.error
        started = time.perf_counter()
        request = self._stream.call_request(step.id, layer, q, k, v, options)
        try:
            self._send(request)
            reply = self._receive_call(step, layer, q, options.return_lse)
        except BaseException:  # Ctrl-C too: the answer may still come, and must not be taken for that of a later call
            self.close()
            raise
        if isinstance(reply, AttndError):
            raise reply
        timings = self._timings
        timings.call_us.append((time.perf_counter() - started) * 1e6)
        timings.queue_us += reply.queue_us
        timings.kernel_us += reply.kernel_us
        timings.backend = reply.backend or timings.backend
        return reply.output

    def _receive_call(self, step: Step, layer: int, like: Any, return_lse: bool) -> Reply | AttndError:
        """Reads answers, which come in order, up to that of the call that was just sent."""
        assert self._stream is not None
        while True:
            kind, message, tensors, num_bytes = self._stream.receive(self.timeout_s)
            self._timings.bytes_received += num_bytes
            if kind == "going_away":
                self._going_away = message.reason
            elif self._unanswered:
                opened = self._unanswered.popleft()
                if kind == "error":
                    opened.error = from_message(message)
                    self._sent_tables.forget()
                elif kind == "step" and message.takes_deltas:
                    self._sent_tables.accept(opened.id)
            elif kind == "error":
                return step.error or from_message(message)
            elif kind == "call" and (message.step_id, message.layer) == (step.id, layer):
                return requests.reply(message, tensors, like, return_lse)
            else:
                raise ServerFault(f"the server answered layer {layer} of step {step.id} with {kind} {message}")

    def _send(self, request: bytes) -> None:
        assert self._stream is not None
        self._timings.bytes_sent += len(request)
        try:
            self._stream.send(request)
        except BaseException:  # it may have gone out in part
            self.close()
            raise


class Step:
    """One forward pass: what its layers share has been sent."""

    def __init__(self, session: Session, step_id: int, stream: Stream) -> None:
        """Made by `Session.step`."""
        self.id = step_id
        self.stream = stream
        self.error: AttndError | None = None
        self._session = session

    def attend(self, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions = DEFAULT_OPTIONS) -> Any:
        """Attention of one layer.

        Args:
            layer: 0 <= layer < num_layers.
            q: `[num_tokens, num_heads, head_dim]` of the cache's dtype; None in a store-only step.
            k: `[num_tokens, num_kv_heads, head_dim]`; None in a cache-only step.
            v: `[num_tokens, num_kv_heads, head_dim_v]`; None in a cache-only step.
            options: scale, softcap, window, ALiBi, sinks, lse, backend.

        Returns:
            `[num_tokens, num_heads, head_dim_v]`, a torch tensor on q's device if q is one, a numpy array if q is one,
            else an `attnd.Array`; with `options.return_lse` the tuple `(output, lse)`, lse float32
            `[num_tokens, num_heads]`; None in a store-only step.

        Raises:
            AttndError: see `attnd.errors`; the step's own refusal comes here too.
        """
        return self._session._call(self, layer, q, k, v, options)
