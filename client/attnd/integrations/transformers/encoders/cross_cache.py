"""The keys and values of an encoder's output, stored once on a server and attended to by every pass of the decoder."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from attnd.errors import InvalidRequest, Unsupported
from attnd.integrations.model_session import ModelSession
from attnd.integrations.transformers.compiling import hidden
from attnd.integrations.transformers.leasing import Leasing
from attnd.integrations.transformers.marks import mark
from attnd.pages import PagedSequence, page_tables
from attnd.planes.call_threads import start_last
from attnd.planes.turns import Turn
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.step_metadata import StepMetadata


class RemoteCrossCache(Cache):
    """The part of a `RemotePair` that cross-attention asks. Rows are the encoder's; padding has no page.

    Attributes:
        lease: the server's memory.
        session: what its steps run on: never a cuda plane, whose steps have all their layers in a row.
        options: of the layers.
    """

    def __init__(self, lease: Leasing, num_layers: int, on_last: Callable[[], None]) -> None:
        """Takes over one share of the lease; holds nothing yet.

        Args:
            lease: one share of it.
            num_layers: of the decoder.
            on_last: is told when the last layer has attended.
        """
        super().__init__(layers=[_CrossLayer(self, number) for number in range(num_layers)])
        self.lease = lease
        self._on_last = on_last
        self.session = ModelSession(lease.cache)
        self.options: dict[Any, AttentionOptions] = {}
        self._rows: list[PagedSequence] = []
        self._pool_rows: list[PagedSequence] = []  # those that hold the pages: rows may come several times
        self._real: torch.Tensor | None = None  # bool [num_rows, num_tokens] on the host
        self._stored: set[int] = set()
        self._attended: set[int] = set()
        self._run: Any = None
        self._turn = Turn("RemoteCrossCache")
        self._end = weakref.finalize(self, start_last, partial(_end, self.session, lease, self._pool_rows))
        self._end.atexit = False

    @hidden
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Marks an encoder's keys and values; the attention that follows stores them."""
        layer: Any = self.layers[layer_idx]
        layer.take(key_states, value_states)
        return layer.keys, layer.values

    def attend(
        self, layer: int, query: torch.Tensor, encoder_mask: torch.Tensor | None, options: AttentionOptions
    ) -> torch.Tensor:
        """One layer: every query sees all of the encoder's real tokens.

        Args:
            layer: of the decoder.
            query: `[batch_size, num_heads, num_new, head_dim]`.
            encoder_mask: `[batch_size, num_tokens]`, not 0 for real tokens; None: all are.
            options: of the layer.

        Returns:
            `[batch_size, num_new, num_heads, head_dim_v]`.
        """
        self._turn.begin()
        try:
            self._store(layer, encoder_mask)
            if self._run is None or layer in self._attended:
                self._attended, self._run = set(), self._begin(query.shape[0], query.shape[2])
            self._attended.add(layer)
            q = query.transpose(1, 2).flatten(0, 1)
            output: torch.Tensor = self._run.attend(layer, q, None, None, options)
            if layer == len(self.layers) - 1:
                self._on_last()
        except BaseException:
            self._run = None
            raise
        finally:
            self._turn.end()
        return output.view(query.shape[0], query.shape[2], query.shape[1], output.shape[-1])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each row, padding included."""
        return 0 if self._real is None or layer_idx not in self._stored else self._real.shape[1]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was; all share their pages."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`, numbers or one bool for each."""
        self._select(torch.arange(len(self._rows))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row comes `repeats` times."""
        self._select([row for row in range(len(self._rows)) for _ in range(repeats)])

    def fork(self, on_last: Callable[[], None]) -> RemoteCrossCache:
        """Another with the same rows, and the same pages: nothing is ever written to them again."""
        self.lease.share()
        other = RemoteCrossCache(self.lease, len(self.layers), on_last)
        other._rows, other._real, other._stored = list(self._rows), self._real, set(self._stored)
        with self.lease.lock:
            for row in self._pool_rows:
                twin = PagedSequence(self.lease.pool)
                self.lease.pool.share(row.pages)
                twin.pages, twin.length = list(row.pages), row.length
                other._pool_rows.append(twin)
        for mine, its in zip(self.layers, other.layers, strict=True):
            its.copy_of(mine)  # type: ignore[union-attr]
        return other

    def reset(self) -> None:
        """Frees all pages."""
        self._free()
        self._rows, self._real, self._run = [], None, None
        self._stored.clear()
        self.options.clear()
        for layer in self.layers:
            layer.reset()

    def close(self) -> None:
        """Ends the stream, and gives back the share of the lease. Again is fine."""
        if self._end.detach() is not None:
            self.session.close()
            self._free()
            self.lease.release()

    def _store(self, layer: int, mask: torch.Tensor | None) -> None:
        """Stores a layer's keys and values, if they were not stored yet."""
        if layer in self._stored:
            return
        given: Any = self.layers[layer]
        if given.pending is None:
            raise InvalidRequest(
                f"layer {layer} has no keys of the encoder, but must: reset() the cache after an error"
            )
        key, value = given.pending
        batch_size, num_tokens = key.shape[0], key.shape[2]
        real = torch.ones((batch_size, num_tokens), dtype=torch.bool) if mask is None else (mask != 0).cpu()
        if real.shape != (batch_size, num_tokens):
            rule = f"must have {[batch_size, num_tokens]}, as the encoder's output"
            raise InvalidRequest(
                f"encoder_attention_mask has shape {list(real.shape)}, but {rule}",
                field="encoder_attention_mask",
            )
        if self._real is None:
            self._take_pages(real)
        elif not torch.equal(real, self._real):
            raise Unsupported(
                f"layer {layer} sees other tokens of the encoder than those before, but must see the same"
            )
        at = real.flatten().nonzero().squeeze(1).to(key.device)
        slots = [slot for row in self._rows for slot in row.slots(0, row.length)]
        k, v = (each.transpose(1, 2).flatten(0, 1)[at] for each in (key, value))
        self.lease.cache.store_kv(layer, slots, k, v)
        given.stored()
        self._stored.add(layer)

    def _take_pages(self, real: torch.Tensor) -> None:
        self._free()
        with self.lease.lock:
            self._pool_rows += [PagedSequence(self.lease.pool) for _ in range(len(real))]
            for row, length in zip(self._pool_rows, real.sum(1).tolist(), strict=True):
                row.extend(length)
        self._rows, self._real = list(self._pool_rows), real

    def _begin(self, batch_size: int, num_new: int) -> Any:
        if batch_size != len(self._rows):
            rule = "as many as the encoder's output had"
            raise InvalidRequest(f"batch size is {batch_size}, but must be {len(self._rows)}, {rule}")
        metadata = StepMetadata(
            query_lens=[num_new] * batch_size,
            context_lens=[row.length for row in self._rows],
            page_tables=page_tables(self._rows),
            kind="decode" if num_new == 1 else "prefill",
            cache_only=True,
        )
        return self.session.begin_apart([metadata])[0]

    def _select(self, indices: list[int]) -> None:
        self._run = None
        if self._real is not None:
            self._rows = [self._rows[index] for index in indices]
            self._real = self._real[indices]

    def _free(self) -> None:
        _free(self.lease, self._pool_rows)


class _CrossLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__
    """One layer. `keys` and `values` have no tokens, and the mark by which attention finds the cache."""

    supports_early_init = False

    def __init__(self, owner: RemoteCrossCache, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers gives it no types
        self._owner = weakref.ref(owner)
        self._index = index
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None

    def take(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keeps an encoder's keys and values until they are stored."""
        self.pending = key, value
        self.keys, self.values = key.new_empty((*key.shape[:2], 0, key.shape[3])), value[:, :, :0]
        mark(self.keys, self._owner, self._index)  # a reference: the layer belongs to the cache
        self.is_initialized = True

    def stored(self) -> None:
        """The server has them."""
        self.pending = None

    def copy_of(self, other: _CrossLayer) -> None:
        """Becomes like another."""
        if other.keys is not None and other.values is not None:
            self.take(other.keys, other.values)
            self.pending = other.pending

    def reset(self) -> None:
        """Forgets."""
        self.pending = self.keys = self.values = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the server has the memory."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See RemoteCrossCache."""
        owner = self._owner()
        assert owner is not None  # whoever asks a layer has its cache
        return owner.update(key_states, value_states, self._index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask."""
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        """See RemoteCrossCache."""
        owner = self._owner()
        return 0 if owner is None else owner.get_seq_length(self._index)

    def get_max_length(self) -> int:
        """-1: pages are the only limit."""
        return -1


def _free(lease: Leasing, rows: list[PagedSequence]) -> None:
    """Gives the pages of all rows back, and leaves the list without any."""
    with lease.lock:
        while rows:
            rows.pop().free()


def _end(session: ModelSession, lease: Leasing, rows: list[PagedSequence]) -> None:
    """What is left of a cache that nobody has any more."""
    session.close()
    _free(lease, rows)
    lease.release_quietly()
