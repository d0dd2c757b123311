"""How one forward pass of a model is run: over a stream in as many steps as it takes, or over a cuda plane in one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attnd.errors import AttndError, Unsupported
from attnd.integrations.split_steps import Most, Part, split
from attnd.planes.choice import REFUSALS
from attnd.planes.cuda.session import CudaSession
from attnd.planes.cuda.step import CudaStep
from attnd.planes.transport import Stream
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.regions import ALIGNMENT
from attnd.protocol.step_metadata import StepMetadata
from attnd.session import Session
from attnd.steps import Step

# Steps that a pass keeps open: a server lets older ones go if it must, but not these. A pass of more parts opens the
# step of each again for every layer.
MOST_OPEN_STEPS = 3
_LSE_BYTES = 4  # of an element, float32


@dataclass
class Model:
    """What is known of a model from its passes.

    Attributes:
        num_heads: query heads; 0: not known yet.
        options: of each layer, of the last pass that attended all.
        why_no_cuda: why it is not for a cuda plane; "": nothing speaks against it.
    """

    num_heads: int = 0
    options: tuple[AttentionOptions, ...] = ()
    why_no_cuda: str = ""


class Left(Exception):
    """A pass cannot stay on the cuda plane; the layer that was to be attended was not.

    Attributes:
        error: what it means to whoever wants no other plane; None: the next pass may well stay there.
        is_models: whether it is the model that is not for cuda planes; else it is the server.
    """

    def __init__(self, why: str, error: AttndError | None = None, *, is_models: bool = True) -> None:
        super().__init__(why)
        self.error = error
        self.is_models = is_models


class StreamRun:
    """A pass over a session that takes layers in any order."""

    def __init__(
        self, session: Session, metadata: StepMetadata, most: Most, most_bytes: int, most_open: int = MOST_OPEN_STEPS
    ) -> None:
        """Opens nothing yet.

        Args:
            session: that serves it.
            metadata: of the pass.
            most: what a step may have, whatever its tensors take.
            most_bytes: that the tensors of a call, or of its reply, may take in a message.
            most_open: steps that it may keep open.
        """
        self._session = session
        self._metadata = metadata
        self._most = most
        self._most_bytes = most_bytes
        self._most_open = most_open
        self._parts: list[Part] = []
        self._steps: dict[int, Step] = {}  # by the index of their parts

    def attend(
        self, layer: int, q: torch.Tensor | None, k: Any, v: Any, options: AttentionOptions
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
        """As `Step.attend`."""
        if not self._parts:
            self._open(q, k, v)
        if len(self._parts) == 1:
            whole: torch.Tensor = self._step(0).attend(layer, q, k, v, options)
            return whole
        results: list[torch.Tensor] = []
        for index, part in enumerate(self._parts):
            part_q, part_k, part_v = (None if each is None else each[part.rows] for each in (q, k, v))
            given = self._step(index).attend(layer, part_q, part_k, part_v, options)
            if q is None:
                continue
            given = given if isinstance(given, tuple) else (given,)
            results = results or [each.new_empty((q.shape[0], *each.shape[1:])) for each in given]
            for whole, rows in zip(results, given, strict=True):
                whole[part.rows] = rows
        if q is None:
            return None
        return (results[0], results[1]) if options.return_lse else results[0]

    def finish(self) -> None:
        """Nothing: every layer was waited for."""

    def _open(self, q: Any, k: Any, v: Any) -> None:
        """Finds the parts. What fits is known once there is a stream, and so once the first step is sent."""
        config, most = self._session.cache.config, self._most
        while True:
            parts = split(self._metadata, most, config.page_size)
            step = self._session.step(parts[0].metadata)
            fitting = self._tokens_that_fit(step.stream, q, k, v)
            if max(part.rows.stop - part.rows.start for part in parts) <= fitting:
                break
            most = most._replace(tokens=fitting)
        self._parts, self._steps = parts, {0: step}

    def _tokens_that_fit(self, stream: Stream, q: Any, k: Any, v: Any) -> int:
        """Tokens of a call whose tensors, and whose reply's, find room."""
        config = self._session.cache.config
        sent: int = sum(each.shape[1] * each.shape[2] * each.element_size() for each in (q, k, v) if each is not None)
        received = 0
        if q is not None:
            received = q.shape[1] * ((config.head_dim_v or config.head_dim) * q.element_size() + _LSE_BYTES)
        if stream.room is None:
            return self._most_bytes // max(sent, received)
        return (stream.room - 5 * ALIGNMENT) // (sent + received)

    def _step(self, index: int) -> Step:
        """The open step of a part."""
        step = self._steps.get(index)
        if step is None:
            step = self._session.step(self._parts[index].metadata)
            if len(self._parts) <= self._most_open:
                self._steps[index] = step
        elif len(self._parts) > self._most_open:
            del self._steps[index]  # the first one's, which others let go
        return step


class CudaRun:
    """A pass over a cuda plane, as one step."""

    def __init__(self, session: CudaSession, metadata: StepMetadata, model: Model, *, is_proven: bool) -> None:
        """Opens nothing yet.

        Args:
            session: whose plane is open, and holds the step's tensors.
            metadata: of the pass.
            model: what is known of it.
            is_proven: whether the server has served a step on the plane.
        """
        self._session = session
        self._metadata = metadata
        self._model = model
        self._is_proven = is_proven
        self._step: CudaStep | None = None
        self._options: tuple[AttentionOptions, ...] = ()
        self._num_heads = 0
        self._device: torch.device | None = None
        self._next_layer = 0

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to attend."""
        return self._step is None or self._step.is_complete

    def open(self, num_heads: int, options: tuple[AttentionOptions, ...]) -> None:
        """Tells the server of the step, with the options of each layer, or of all."""
        self._options, self._num_heads = options, num_heads
        self._step = self._session.step(self._metadata, num_heads=num_heads, options=options)

    def attend(self, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions) -> Any:
        """As `Step.attend`; the output comes later.

        Raises:
            Left: the pass cannot stay here.
            AttndError: the plane failed, or does not take such tensors.
        """
        heads, device = 0 if q is None else q.shape[1], (k if q is None else q).device
        if layer != self._next_layer:
            rule = f"where {self._next_layer} is next, and must attend all in order"
            raise _left(f"the model attends layer {layer} {rule}")
        if self._step is None:
            known = self._model.options
            self.open(heads, known if known and _are_same(known[0], options) else (options,))
        assert self._step is not None
        self._device = self._device or device
        if (heads, device) != (self._num_heads, self._device):
            rule = f"must have {self._num_heads} on {self._device} as the layers before"
            raise _left(f"the model has {heads} query heads on {device} in layer {layer}, and {rule}")
        told = self._options[layer if len(self._options) > 1 else 0]
        if not _are_same(told, options):
            raise Left(f"the options of layer {layer} are others than the step was opened with, and must stay the same")
        output = self._step.attend(layer, q, k, v, told)
        self._next_layer += 1
        if not self._is_proven:
            self._prove()
        return output

    def finish(self) -> None:
        """Waits until the server has done the step, every layer of which was attended. Raises AttndError: it failed."""
        if self._step is not None:
            self._step.finish()

    def leave(self) -> None:
        """Ends the step and its plane, once the layers that were attended are there. Raises AttndError: one failed."""
        failure = self._failure()
        self._session.close()
        if failure is not None:
            raise failure

    def give_up(self) -> None:
        """Ends the step and its plane, if the step was not attended to its end: its outputs are nobody's any more."""
        if not self.is_complete:
            self._session.close()

    def _prove(self) -> None:
        """Waits for the first layer: it may be now that the server finds out that it cannot serve such steps."""
        self._is_proven = True
        failure = self._failure()
        if isinstance(failure, REFUSALS):
            self._session.close()
            raise Left(str(failure), failure, is_models=False)

    def _failure(self) -> AttndError | None:
        """What went wrong up to here, once the stream is here."""
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return self._session.failure


def _left(why: str) -> Left:
    return Left(why, Unsupported(f"plane is cuda, but {why}", field="plane"))


def _are_same(one: AttentionOptions, other: AttentionOptions) -> bool:
    return one is other or one.encoded == other.encoded
