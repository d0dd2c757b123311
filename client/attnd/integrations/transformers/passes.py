"""How the passes of some rows begin, count, and are taken back."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch

from attnd.errors import Unsupported
from attnd.integrations.model_session import ModelSession
from attnd.integrations.transformers.geometry import Geometry
from attnd.integrations.transformers.leasing import Leasing
from attnd.integrations.transformers.local.states import States
from attnd.integrations.transformers.masks import read
from attnd.integrations.transformers.one_pass import Pass, Touch
from attnd.integrations.transformers.padded_batch import PaddedBatch
from attnd.integrations.transformers.recovering import Recovering
from attnd.integrations.transformers.running import call_with
from attnd.integrations.transformers.served_pass import ServedPass
from attnd.planes.turns import Turn
from attnd.protocol.attention_options import AttentionOptions

log = logging.getLogger(__name__)


def without_weights() -> Unsupported:
    """The error for who asks for attention weights."""
    return Unsupported(
        "output_attentions is true, but a server gives no attention weights: leave it out, or choose another "
        'attention with model.set_attn_implementation("eager")',
        field="output_attentions",
    )


class Passes:
    """The passes of a model with one cache, one after the other.

    A pass counts when its last layer has attended, and those that have states here have changed them. One that was
    stopped before, by Ctrl-C or by any error, never was: what comes next takes its tokens and its states back. So it
    does where the model's call was stopped behind the last layer, but for models with states here.

    Attributes:
        lease: the server's memory.
        session: what its steps run on.
        batch: which tokens there are.
        recovery: what computes lost KV again, if somebody asked for it.
        states: of layers that have them here.
        options: of the layers, made at their first calls; made anew with each prompt, as sinks may have changed.
        crosses: whether the last layer attends to an encoder's output afterwards, and tells by `crossed`.
    """

    def __init__(
        self,
        owner: object,
        geometry: Geometry,
        lease: Leasing,
        session: ModelSession,
        batch: PaddedBatch,
        states: States,
    ) -> None:
        """None yet. `owner` is the cache that the model is given."""
        self.lease = lease
        self.session = session
        self.batch = batch
        self.states = states
        self.recovery: Recovering | None = None
        self.options: dict[Any, AttentionOptions] = {}
        self.crosses = False
        self._owner = weakref.ref(owner)
        self._geometry = geometry
        self._pass: Pass | None = None
        self._first: Touch | None = None  # where each pass begins
        self._turn = Turn("RemoteCache")

    @property
    def is_compiled(self) -> bool:
        """Whether the last pass came through torch.compile."""
        return self._pass is not None and self._pass.call.is_compiled

    def check_alone(self) -> None:
        """Raises InvalidRequest if another thread is in the middle of a pass."""
        if self._pass is not None:
            self._pass.check_alone()

    def touch(self, number: int, state: int, name: str) -> None:
        """A layer is about to read or change states of its own, in the pass under way or in a new one.

        Args:
            number: of the layer.
            state: number of the state.
            name: of the method of the cache.
        """
        touch = Touch(number, state, name)
        self._turn.begin()
        try:
            self.check_alone()
            self.see_end()
            now = self._pass
            if now is None or not now.goes_on_to(touch):
                self._take_back()
                self._check_first(touch)
                now = self._pass = Pass(call_with(self._owner()))
            self.states.note(number)
            now.touched.add(touch)
            now.last_touch = call_with(self._owner(), innermost=True)
        finally:
            self._turn.end()

    def crossed(self) -> None:
        """The last layer has attended to the encoder's output."""
        if self._pass is not None:
            self._pass.has_crossed = True
            self.see_end()

    def see_end(self) -> None:
        """Counts the pass under way if its last layer has done what it does: some have states, and tell no end."""
        now = self._pass
        if now is not None and now.is_finished:
            self._see_failure(now)
        if (
            now is None
            or now.is_finished
            or now.is_dead
            or not now.has_attended
            or (self.crosses and not now.has_crossed)
        ):
            return
        if not self.states.numbers or now.has_touched(self.states.numbers):
            self._finish(now)

    def _pass_of(self, number: int, query: torch.Tensor, mask: torch.Tensor | None, window: int) -> Pass:
        """The pass that a layer belongs to: the one under way, or a new one."""
        self.see_end()
        now = self._pass
        if now is not None and now.goes_on_with(number):
            if not now.is_open:
                self._open(now, number, query, mask, window)
            elif not now.knows(mask, window):
                now.check_mask(number, mask, window, read(mask, number, query.shape[2], window))
            return now
        self._take_back()
        self._check_first(Touch(number, 0, "attend"))
        now = Pass(call_with(self._owner()))
        if now.call.wants_weights:
            raise without_weights()
        self._open(now, number, query, mask, window)
        self._pass = now
        return now

    def _open(self, now: Pass, number: int, query: torch.Tensor, mask: torch.Tensor | None, window: int) -> None:
        """Adds the tokens of a pass to the rows."""
        batch_size, num_new = query.shape[0], query.shape[2]
        reading = read(mask, number, num_new, window)
        with self.lease.lock:
            parts = self.batch.extend(batch_size, num_new, *reading)
        now.open(ServedPass(self.session, parts), mask, window, reading, num_new)
        if self.recovery is not None:
            self.recovery.begin(num_new, is_causal=reading.blocks is None)

    def _check_first(self, touch: Touch) -> None:
        """Raises Unsupported where states stay here, and a pass begins elsewhere than the first one did."""
        self._first = self._first or touch
        if self.states.numbers and touch != self._first:
            rule = f"must begin at layer {self._first.number}: call the model as a whole, or reset() after an error"
            raise Unsupported(f"a pass begins at layer {touch.number}, but each pass with this cache {rule}")

    def _finish(self, now: Pass) -> None:
        self.batch.commit()
        self.states.commit()
        if self.recovery is not None:
            self.recovery.commit()
        now.is_finished = True
        if self.states.numbers or now.call.is_compiled:
            now.call.forget()  # else whoever comes next looks how it ended
        if now.last_touch is not None:
            now.last_touch.forget()

    def _see_failure(self, now: Pass) -> None:
        """Takes back a pass that counted, if the model's call was stopped behind its last layer: it gave no result."""
        if now.call.is_running:
            return
        has_failed = now.call.has_failed
        now.call.forget()
        if not has_failed or now.num_new > self.batch.num_columns:
            return
        length = self.batch.num_columns - now.num_new
        with self.lease.lock:
            self.batch.crop(length)  # copies no page: those of the pass are its row's own
            self.batch.works()
            if not length:
                self.batch.clear()
        if self.recovery is not None:
            self.recovery.crop(length)
        log.warning("a call of the model was stopped behind its last layer: its tokens are taken back")

    def _take_back(self) -> None:
        self.see_end()
        stopped = self._pass
        if self.batch.is_under_way or stopped is None or not stopped.is_open:
            self.states.take_back()
        else:
            self.states.commit()  # the batch did, and then something stopped us
        self._pass = None
        with self.lease.lock:
            if not self.batch.take_back():
                return
        at = stopped.numbers[-1] if stopped is not None and stopped.numbers else 0
        log.warning("a pass was stopped at layer %d of %d: its tokens are taken back", at, self._geometry.last_number)
