"""A step on a cuda plane: its layers are enqueued one after the other, and answered as a whole."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

from attnd.errors import AttndError, InvalidRequest
from attnd.planes.cuda.tensors import check_tensor
from attnd.planes.leases import Lease
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.cuda.layout import Place, StepLayout
from attnd.protocol.requests import DEFAULT_OPTIONS
from attnd.protocol.step_metadata import StepMetadata
from attnd.protocol.tensors import DTYPE_NAMES
from attnd.timings import Timings
from attnd.traces import StepSpan
from attnd.v1 import attention_pb2, backend_pb2

if TYPE_CHECKING:
    from attnd.planes.cuda.plane import CudaPlane  # has modules that other systems have not


class CudaSteps(Protocol):
    """What a step needs of its session."""

    cache: Lease
    lost: AttndError | None  # why the cache has gone, if it has

    def announce(self, step: CudaStep, num_heads: int, options: tuple[AttentionOptions, ...]) -> None:
        """Sends a step that was not sent yet."""

    def interrupted(self, step: CudaStep) -> None:
        """Ends the plane, because a layer of a step may be handed over in part."""

    def finish(self, step: CudaStep) -> None:
        """Waits for the answer of a step and those before it."""

    def enqueued(self, step: CudaStep) -> None:
        """The last layer of a step was."""

    def timings(self) -> Timings:
        """Sums over the session's steps."""


class CudaStep:
    """One forward pass on a cuda plane. Made by `CudaSession.step`."""

    def __init__(self, session: CudaSteps, step_id: int, metadata: StepMetadata) -> None:
        """Not sent yet."""
        self.id = step_id
        self.metadata = metadata
        self.error: AttndError | None = None
        self.span: StepSpan | None = None
        self.is_unsampled = False  # for a trace, as the sampler has said
        self._session = session
        self._plane: CudaPlane | None = None
        self._layouts: tuple[StepLayout, StepLayout] | None = None  # of even and odd layers
        self._options: tuple[AttentionOptions, ...] = ()
        self._dtype: Any = None  # torch's
        self._absent: tuple[tuple[str, bool], ...] = ()  # names of inputs, and whether there is none
        self._next_layer = 0

    @property
    def is_complete(self) -> bool:
        """Whether `attend` was called for each layer."""
        return self._next_layer == self._session.cache.config.num_layers

    def opened(
        self, plane: CudaPlane, layouts: tuple[StepLayout, StepLayout], options: tuple[AttentionOptions, ...]
    ) -> None:
        """The step was sent, or begun: its tensors lie at these places in even and odd layers."""
        self._plane, self._layouts, self._options = plane, layouts, options
        self._dtype = getattr(sys.modules["torch"], DTYPE_NAMES[layouts[0].q.dtype])
        store_only, cache_only = self.metadata.store_only, self.metadata.cache_only
        self._absent = ("q", store_only), ("k", cache_only), ("v", cache_only)

    def attend(self, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions | None = None) -> Any:
        """Enqueues attention of one layer on torch's current stream, and returns its output, which comes later.

        Args:
            layer: of the cache; 0 first, and none left out.
            q: `[num_tokens, num_heads, head_dim]` of the cache's dtype, on the session's GPU; None in a store-only
                step.
            k: `[num_tokens, num_kv_heads, head_dim]`; None in a cache-only step.
            v: `[num_tokens, num_kv_heads, head_dim_v]`; None in a cache-only step.
            options: None, or those that the step was opened with for this layer.

        Returns:
            As `Step.attend`.

        Raises:
            InvalidRequest: the tensors or the options are not those of this step, or the layer is not the next.
            AttndError: the plane failed.
        """
        started = time.perf_counter()
        num_layers = self._session.cache.config.num_layers
        if layer != self._next_layer or layer >= num_layers:
            rule = (
                f"on a cuda plane must be the next, {self._next_layer}" if self._next_layer < num_layers else "no more"
            )
            raise InvalidRequest(f"layer is {layer}, but {rule} of {num_layers}", field="layer")
        if self._layouts is None:
            heads = 0 if q is None else q.shape[1]
            self._session.announce(self, heads, (options or DEFAULT_OPTIONS,))
        assert self._layouts is not None
        assert self._plane is not None
        if self._plane.failure is not None:
            raise self._session.lost or self._plane.failure
        told = self._options[layer if len(self._options) > 1 else 0]
        if options is not None and options is not told and options.encoded != told.encoded:
            rule = "must be those that it was opened with; give session.step(..., options=[...]) those of each layer"
            raise InvalidRequest(f"options of layer {layer} are not those of the step, but {rule}", field="options")
        output = self._enqueue(layer, q, k, v, told.return_lse)
        self._next_layer += 1
        if self.is_complete:
            self._session.enqueued(self)
        timings, call_us = self._session.timings(), (time.perf_counter() - started) * 1e6
        timings.num_calls += 1
        timings.call_us.append(call_us)
        timings.total_us += call_us
        return output

    def finish(self) -> None:
        """Waits until the server has done the whole step, and so the stream up to here all but the last output.

        Raises:
            AttndError: it failed; outputs of this step mean nothing.
        """
        self._session.finish(self)

    def served(self, reply: attention_pb2.CudaStepReply) -> None:
        """The server has answered it. For the session."""
        if self.span is not None:
            self.span.served(reply.queue_us, reply.step_us)
        timings = self._session.timings()
        timings.queue_us += reply.queue_us
        timings.kernel_us += reply.step_us
        if reply.backend:
            timings.backend = backend_pb2.Backend.Name(reply.backend).removeprefix("BACKEND_").lower()

    def failed(self, error: AttndError) -> None:
        """Likewise, with an error."""
        self.error = error
        if self.span is not None:
            self.span.failed(error)

    def _enqueue(self, layer: int, q: Any, k: Any, v: Any, return_lse: bool) -> Any:
        plane, layouts = self._plane, self._layouts
        assert plane is not None
        assert layouts is not None
        held = []
        for value, place, (name, is_absent) in zip((q, k, v), layouts[layer % 2][:3], self._absent, strict=True):
            if is_absent != (value is None):
                rule = "must be absent in" if is_absent else "must be given to"
                raise InvalidRequest(f"{name} is {'given' if is_absent else 'None'}, but {rule} this step", field=name)
            if not is_absent:
                held.append((place, check_tensor(name, value, place, self._dtype, plane.torch_device)))
        stream = plane.current_stream()
        if stream is not None:
            return self._hand_over(plane, stream, layer, held, q, return_lse)
        with plane.stream() as stream:
            return self._hand_over(plane, stream, layer, held, q, return_lse)

    def _hand_over(
        self, plane: CudaPlane, stream: int, layer: int, held: list[tuple[Place, Any]], q: Any, return_lse: bool
    ) -> Any:
        assert self._layouts is not None
        layout, outputs = self._layouts[layer % 2], []
        if q is not None:
            outputs.append((layout.output, q.new_empty(layout.output.shape)))
            if return_lse:
                outputs.append((layout.lse, q.new_empty(layout.lse.shape, dtype=sys.modules["torch"].float32)))
        try:
            plane.hand_over(stream, layer, layer == self._session.cache.config.num_layers - 1, held, outputs)
        except BaseException:  # Ctrl-C too
            self._session.interrupted(self)
            raise
        if q is None:
            return None
        return (outputs[0][1], outputs[1][1]) if return_lse else outputs[0][1]
