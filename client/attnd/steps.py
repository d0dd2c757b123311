"""A step of a session, and its calls while they are under way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnd.errors import AttndError
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.requests import DEFAULT_OPTIONS, Reply

if TYPE_CHECKING:
    from attnd.planes.grpc import Stream
    from attnd.session import Session


class Step:
    """One forward pass: what its layers share has been sent."""

    def __init__(self, session: Session, step_id: int, stream: Stream) -> None:
        """Made by `Session.step`."""
        self.id = step_id
        self.stream = stream
        self.error: AttndError | None = None
        self._session = session

    def attend(self, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions = DEFAULT_OPTIONS) -> Any:
        """Attention of one layer: `submit`, and at once `PendingCall.wait`.

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
        return self._session._attend(self, layer, q, k, v, options)

    def submit(self, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions = DEFAULT_OPTIONS) -> PendingCall:
        """Sends a call and does not wait for its answer, so that the next one can be made meanwhile.

        With two halves of a batch as two steps, the worker computes the one's q, k and v while the server attends the
        other's. The server runs calls in the order in which they were sent. At most 4 of a session may be under way.

        Args:
            layer: as in `attend`.
            q: as in `attend`; may be overwritten when `submit` has returned, as may `k` and `v`.
            k: as in `attend`.
            v: as in `attend`.
            options: as in `attend`.

        Raises:
            Exhausted: too many calls are under way, or the region of a shm plane has no room for another: wait first.
            AttndError: the call cannot be sent.
        """
        return self._session._submit_timed(self, layer, q, k, v, options)


class PendingCall:
    """A call that was sent. Belongs to its session's thread."""

    def __init__(self, session: Session, step: Step, layer: int, like: Any, return_lse: bool) -> None:
        """Made by `Step.submit`."""
        self.step = step
        self.layer = layer
        self.like = like
        self.return_lse = return_lse
        self.seconds = 0.0  # that the caller has spent on it
        self.reply: Reply | None = None
        self.error: AttndError | None = None
        self.is_counted = False
        self._session = session

    def wait(self) -> Any:
        """The call's output, as `Step.attend` returns it. Calls may be waited for in any order; again gives the same.

        Raises:
            AttndError: of this call alone; others under way are not harmed. One with `retry_after_s` may be submitted
                again, behind those; `Step.attend` does so by itself. But if no answer comes in time, or the wait
                is interrupted, the session's stream ends, and with it all calls that are under way.
        """
        return self._session._wait_timed(self)
