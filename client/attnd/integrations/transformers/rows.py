"""The rows of a RemoteCache: their pages, the session that serves them, and the pass under way."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from attnd.errors import InvalidRequest
from attnd.integrations.model_session import ModelSession
from attnd.integrations.transformers.geometry import Geometry
from attnd.integrations.transformers.leasing import Leasing
from attnd.integrations.transformers.padded_batch import PaddedBatch
from attnd.integrations.transformers.passes import Pass
from attnd.integrations.transformers.recovering import Recovering
from attnd.integrations.transformers.running import call_with
from attnd.integrations.transformers.served_pass import ServedPass
from attnd.planes.call_threads import start_last
from attnd.planes.turns import Turn
from attnd.protocol.attention_options import AttentionOptions

log = logging.getLogger(__name__)

Copies = list[tuple[int, int]]
"""`(source, target)` of pages to copy."""


class Rows:
    """Rows whose tokens lie in the pages of a lease, and the passes of a model that add to them.

    A pass counts when its last layer has attended. One that was stopped before, by Ctrl-C or by any error, never was:
    what comes next takes its tokens back.

    Attributes:
        lease: the server's memory.
        session: what its steps run on.
        batch: which tokens there are.
        recovery: what computes lost KV again, if somebody asked for it.
        options: of the layers, made at their first calls; made anew with each prompt, as sinks may have changed.
    """

    def __init__(
        self,
        owner: object,
        geometry: Geometry,
        lease: Leasing,
        batch: PaddedBatch,
        plane: str,
        like: ModelSession | None = None,
    ) -> None:
        """Takes over one share of the lease.

        Args:
            owner: the cache that the model is given. When nobody has it any more, the share is given back.
            geometry: of the model.
            lease: one share of it.
            batch: its rows so far.
            plane: as of `ModelSession`.
            like: as of `ModelSession`.
        """
        self.lease = lease
        self.session = ModelSession(lease.cache, plane) if like is None else ModelSession(lease.cache, plane, like=like)
        self.batch = batch
        self.recovery: Recovering | None = None
        self.options: dict[Any, AttentionOptions] = {}
        self._owner = weakref.ref(owner)
        self._geometry = geometry
        self._plane = plane
        self._pass: Pass | None = None
        self._turn = Turn("RemoteCache")
        self._end = weakref.finalize(owner, start_last, partial(_end, self.session, lease, batch))
        self._end.atexit = False

    def attend(
        self,
        number: int,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """One layer of the pass under way, or of a new one.

        Args:
            number: of the module that attends.
            layer: of the server's cache.
            query: `[batch_size, num_heads, num_new, head_dim]`.
            key: `[batch_size, num_kv_heads, num_new, head_dim]`.
            value: `[batch_size, num_kv_heads, num_new, head_dim_v]`.
            mask: bool `[batch_size, num_columns]`, true for real tokens; None: all are real.
            options: of the layer.

        Returns:
            `[batch_size, num_new, num_heads, head_dim_v]`.
        """
        recovery = self.recovery
        if recovery is not None and recovery.is_computing:
            return recovery.served(number).attend(layer, query, key, value, options)
        self._turn.begin()
        try:
            now = self._pass_of(number, query, mask)
            now.check_window(number, options.window)
            now.numbers.append(number)

            def attend() -> torch.Tensor:
                return now.served.attend(layer, query, key, value, options)

            output = attend() if recovery is None else recovery.attend(now, attend)
            if number == self._geometry.last_number:
                self._finish(now)
        except BaseException:
            if self._pass is not None:
                self._pass.is_dead = True
            raise
        finally:
            self._turn.end()
        return output

    @property
    def is_compiled(self) -> bool:
        """Whether the last pass came through torch.compile."""
        return self._pass is not None and self._pass.call.is_compiled

    def check_alone(self) -> None:
        """Raises InvalidRequest if another thread is in the middle of a pass."""
        if self._pass is not None:
            self._pass.check_alone()

    def crop(self, num_columns: Callable[[], int]) -> None:
        """Keeps so many tokens of each row, padding included; asked for when a stopped pass was taken back."""

        def crop() -> Copies:
            length = num_columns()
            pages = self.batch.crop(length)
            if not length:
                self.options.clear()
            if self.recovery is not None:
                self.recovery.crop(length)
            return pages

        self._change(crop, self.batch)

    def select(self, indices: Callable[[], list[int]]) -> None:
        """Makes row `indices()[i]` row i; asked for when a stopped pass was taken back."""

        def select() -> Copies:
            chosen = indices()
            pages = self.batch.select(chosen)
            if self.recovery is not None:
                self.recovery.select(chosen)
            return pages

        self._change(select, self.batch)

    def fork(self, owner: object) -> Rows:
        """The same rows for another owner. Full pages are shared, partly filled ones copied on the server."""
        self.settle()
        with self.lease.lock:
            batch, pages = self.batch.fork()
            self.lease.share()
        other = Rows(owner, self._geometry, self.lease, batch, self._plane, self.session)
        self._change(lambda: pages, batch)
        if self.recovery is not None:
            other.recovery = self.recovery.fork(other, owner)
        return other

    def settle(self) -> None:
        """Takes back a pass that was stopped."""

        def nothing() -> Copies:
            self.batch.check()
            return []

        self._change(nothing, self.batch)

    def clear(self) -> None:
        """Forgets all rows. Helps after any error."""
        self._pass = None
        with self.lease.lock:
            self.batch.clear(None if self.lease.is_shared else self.lease.renew_pool())
        if self.recovery is not None:
            self.recovery.clear()
        self.options.clear()

    def close(self) -> None:
        """Ends the stream, and gives back the share of the lease. Again is fine."""
        if self.recovery is not None:
            self.recovery.close()
        if self._end.detach() is not None:
            self.session.close()
            with self.lease.lock:
                self.batch.clear()
            self.lease.release()

    def _pass_of(self, number: int, query: torch.Tensor, mask: torch.Tensor | None) -> Pass:
        """The pass that a layer belongs to: the one under way, or a new one."""
        now = self._pass
        if now is not None and now.goes_on_with(number):
            if not now.knows(mask):
                now.check_mask(number, mask, _on_host(mask))
            return now
        self._take_back()
        batch_size, num_new = query.shape[0], query.shape[2]
        real = _on_host(mask)
        call = call_with(self._owner())
        with self.lease.lock:
            parts = self.batch.extend(batch_size, num_new, real)
        now = Pass(call, ServedPass(self.session, parts), mask, real, num_new)
        if self.recovery is not None:
            self.recovery.begin(num_new)
        self._pass = now
        return now

    def _finish(self, now: Pass) -> None:
        now.served.finish()  # before anything is made of its last output
        self.batch.commit()
        if self.recovery is not None:
            self.recovery.commit()
        now.is_finished = True
        now.call.forget()

    def _take_back(self) -> None:
        stopped, self._pass = self._pass, None
        with self.lease.lock:
            if not self.batch.take_back():
                return
        at = stopped.numbers[-1] if stopped is not None and stopped.numbers else 0
        log.warning("a pass was stopped at layer %d of %d: its tokens are taken back", at, self._geometry.last_number)

    def _change(self, change: Callable[[], Copies], changed: PaddedBatch) -> None:
        """Changes rows between passes, and copies the pages that `change` returns; then `changed` is whole."""
        self._turn.begin()
        try:
            self.check_alone()
            self._take_back()
            with self.lease.lock:
                pages = change()
            if pages:
                self.session.settle()
                sources, targets = [source for source, _ in pages], [target for _, target in pages]
                copy = partial(self._copy, sources, targets)
                copy() if self.recovery is None else self.recovery.copy(copy)
            changed.works()
        finally:
            self._turn.end()

    def _copy(self, sources: list[int], targets: list[int]) -> None:
        self.lease.cache.copy_pages(sources, targets)


def _on_host(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask as it is read: one copy, instead of one for each question."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.dtype != torch.bool:
        rule = "must be [batch_size, num_columns] of bool: causal, with padding"
        raise InvalidRequest(
            f"attention_mask has shape {list(mask.shape)} of {mask.dtype}, but {rule}", field="attention_mask"
        )
    return mask.detach().cpu()


def _end(session: ModelSession, lease: Leasing, batch: PaddedBatch) -> None:
    """What is left of a cache that nobody has any more."""
    session.close()
    with lease.lock:
        batch.clear()
    lease.release_quietly()
