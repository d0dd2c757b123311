"""The rows of a RemoteCache: their pages, the session that serves them, and the pass under way."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import torch

from attnd.integrations.model_session import ModelSession
from attnd.integrations.transformers.geometry import Geometry
from attnd.integrations.transformers.leasing import Leasing
from attnd.integrations.transformers.local.states import States
from attnd.integrations.transformers.padded_batch import PaddedBatch
from attnd.integrations.transformers.passes import Passes
from attnd.planes.call_threads import start_last
from attnd.protocol.attention_options import AttentionOptions

Copies = list[tuple[int, int]]
"""`(source, target)` of pages to copy."""


class Rows(Passes):
    """Rows whose tokens lie in the pages of a lease, and the passes of a model that add to them."""

    def __init__(
        self,
        owner: object,
        geometry: Geometry,
        lease: Leasing,
        batch: PaddedBatch,
        states: States,
        plane: str,
        like: ModelSession | None = None,
    ) -> None:
        """Takes over one share of the lease.

        Args:
            owner: the cache that the model is given. When nobody has it any more, the share is given back.
            geometry: of the model.
            lease: one share of it.
            batch: its rows so far.
            states: of layers that have them here.
            plane: as of `ModelSession`.
            like: as of `ModelSession`.
        """
        session = ModelSession(lease.cache, plane, like=like)
        super().__init__(owner, geometry, lease, session, batch, states)
        self._plane = plane
        self._end = weakref.finalize(owner, start_last, partial(_end, session, lease, batch))
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
            mask: see `masks.py`; None: causal, and all tokens are real.
            options: of the layer.

        Returns:
            `[batch_size, num_new, num_heads, head_dim_v]`.
        """
        recovery = self.recovery
        if recovery is not None and recovery.is_computing:
            return recovery.served(number).attend(layer, query, key, value, options)
        self._turn.begin()
        try:
            now = self._pass_of(number, query, mask, options.window)
            now.check_window(number, options.window)
            now.numbers.append(number)

            def attend() -> torch.Tensor:
                return now.served.attend(layer, query, key, value, options)

            output = attend() if recovery is None else recovery.attend(now, attend)
            if number == self._geometry.last_number:
                now.served.finish()  # before anything is made of its last output
                now.has_attended = True
                self.see_end()
        except BaseException:
            if self._pass is not None:
                self._pass.is_dead = True
            raise
        finally:
            self._turn.end()
        return output

    def crop(self, num_columns: Callable[[], int]) -> None:
        """Keeps so many tokens of each row, padding included; asked for when a stopped pass was taken back."""

        def crop() -> Copies:
            length = num_columns()
            num_removed = self.batch.num_columns - length
            self.states.check_crop(num_removed, length)
            pages = self.batch.crop(length)
            self.states.crop(num_removed)
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
            self.states.select(chosen)
            if self.recovery is not None:
                self.recovery.select(chosen)
            return pages

        self._change(select, self.batch)

    def fork(self, owner: object, states: States) -> Rows:
        """The same rows for another owner, whose states are made the same.

        Full pages are shared, partly filled ones copied on the server.
        """
        self.settle()
        with self.lease.lock:
            batch, pages = self.batch.fork()
            self.lease.share()
        other = Rows(owner, self._geometry, self.lease, batch, states, self._plane, self.session)
        self._change(lambda: pages, batch)
        self.states.copy_to(states)
        other._first = self._first
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
        self._pass = self._first = None
        with self.lease.lock:
            self.batch.clear(None if self.lease.is_shared else self.lease.renew_pool())
        self.states.clear()
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


def _end(session: ModelSession, lease: Leasing, batch: PaddedBatch) -> None:
    """What is left of a cache that nobody has any more."""
    session.close()
    with lease.lock:
        batch.clear()
    lease.release_quietly()
