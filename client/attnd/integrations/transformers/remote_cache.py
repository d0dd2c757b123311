"""A transformers cache that keeps counts and page tables, while keys and values lie on a server."""

from __future__ import annotations

import inspect
import threading
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from attnd.errors import InvalidRequest, Unsupported
from attnd.integrations.model_session import ModelSession
from attnd.integrations.transformers.cache_layers import number_of
from attnd.integrations.transformers.compiling import hidden, leave_out
from attnd.integrations.transformers.geometry import Geometry, geometry_of
from attnd.integrations.transformers.leasing import Leasing, pages_for
from attnd.integrations.transformers.local.stateful_cache import StatefulCache
from attnd.integrations.transformers.local.states import States
from attnd.integrations.transformers.marks import mark as mark_key
from attnd.integrations.transformers.padded_batch import PaddedBatch
from attnd.integrations.transformers.recovery import Recovery, check_choice, check_states
from attnd.integrations.transformers.rows import Rows
from attnd.planes.choice import check_plane

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from attnd.cache import Cache as ServersCache
    from attnd.client import Client
    from attnd.protocol.attention_options import AttentionOptions
    from attnd.protocol.kv_split import KVSplit
    from attnd.timings import Timings


class RemoteCache(StatefulCache):
    """A transformers cache whose keys and values lie on a server.

    A pass of the model counts when its last layer has attended. One that was stopped before, by Ctrl-C or by any
    error, never was: what comes next takes its tokens back, and the pass may be run again. One pass at a time.

    Attributes:
        geometry: of the model.
        rows: which tokens there are, and what serves them.
        is_for_one_pass: whether it is closed after a pass, by who has made it.
    """

    def __init__(
        self,
        client: Client,
        config: PreTrainedConfig,
        *,
        max_tokens: int,
        dtype: torch.dtype,
        kv_dtype: object = None,
        k_scales: Any = None,
        v_scales: Any = None,
        page_size: int = 16,
        backend: str = "auto",
        kv_split: KVSplit | None = None,
        plane: str = "auto",
        name: str = "transformers",
        on_cache_lost: str = "raise",
        model: PreTrainedModel | None = None,
    ) -> None:
        """Leases pages. Close it, or use it as a context manager; else the memory is freed when the object goes.

        Args:
            client: a connection.
            config: the model's.
            max_tokens: tokens of all rows (and beams) together, without padding; each row takes whole pages.
            dtype: the model's: `model.dtype`.
            kv_dtype: "float8_e4m3fn" for pages of one byte per element, or None: pages have `dtype`.
            k_scales: of "float8_e4m3fn" pages, one number or one for each KV head; None is 1.
            v_scales: likewise.
            page_size: tokens per page.
            backend: the server's backend; "auto" is its choice.
            kv_split: how the server cuts the keys of a row into chunks; None is automatic.
            plane: how the tensors travel: "cuda", "shm", "inline", or "auto" for the fastest that can be had; see
                `ModelSession`. What it came to is in `session.plane`, and why in `session.refusals`.
            name: a label for people.
            on_cache_lost: what happens when the server goes away, or the cache has gone. "raise": the model raises
                `attnd.CacheLost` or `attnd.Disconnected`. "recompute": the pass waits for the server, as long as
                `attnd.connect` was told to; where that has restored the cache it is adopted, else another is leased and
                filled from the tokens so far; then the pass goes on. Each time a warning is logged.
            model: for "recompute" and only there: the model that is called. A hook on its decoder sees the tokens until
                `close`.

        Raises:
            InvalidRequest: `on_cache_lost` and `model` do not go together, or the client is not `attnd.connect`'s.
            Unsupported: the model has layers that are not served.
            Exhausted: the server has not enough memory.
        """
        check_choice(on_cache_lost, model)
        check_plane(plane)
        check_client(client)
        geometry = geometry_of(config.get_text_config(decoder=True))
        num_pages = pages_for(max_tokens, page_size)
        create = partial(
            client.create_cache,
            **geometry.of_cache(),
            num_pages=num_pages,
            page_size=page_size,
            dtype=dtype,
            kv_dtype=kv_dtype,
            k_scales=k_scales,
            v_scales=v_scales,
            backend=backend,
            kv_split=kv_split,
            name=name,
        )
        states = self._begin(geometry)
        if model is not None:
            check_states(states)
        lease = Leasing(create, num_pages, page_size)
        self.rows = Rows(self, geometry, lease, PaddedBatch(lease.pool), states, plane)
        if model is not None:
            self.rows.recovery = Recovery(self.rows, self, model)

    def _begin(self, geometry: Geometry) -> States:
        """What a new one and a fork have in common. Gives the states that stay here."""
        states = self.begin(geometry)
        self.is_for_one_pass = False
        self._unread: tuple[int, int] | None = None  # layer whose keys no attention has read yet, and its thread
        return states

    @property
    def cache(self) -> ServersCache:
        """The `attnd.Cache` that it leases; after a loss another one."""
        return self.rows.lease.cache

    @property
    def session(self) -> ModelSession:
        """What its steps run on."""
        return self.rows.session

    @property
    def num_pages_used(self) -> int:
        """Pages that hold tokens, those of forks included."""
        return self.rows.lease.pool.num_used

    def timings(self) -> Timings:
        """Where the time of all calls so far went."""
        return self.session.timings()

    @hidden
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Marks the new keys and values of a layer for the attention that follows, and gives them back.

        Raises:
            Unsupported: nothing read the last layer's: the model runs another attention than "attnd"; or these have
                another shape than the configuration let expect.
            InvalidRequest: another thread is in the middle of a pass.
        """
        self.rows.check_alone()
        if self._unread is not None and self._unread[1] != threading.get_ident():
            rule = "one pass at a time may use it: give each thread a RemoteCache of its own"
            raise InvalidRequest(f"another thread is in the middle of a pass with this cache, but {rule}")
        self._check_read()
        self.geometry.check(layer_idx, key_states, value_states)
        self._unread = layer_idx, threading.get_ident()
        mark_key(key_states, self, layer_idx)
        return key_states, value_states

    @property
    def unread(self) -> int | None:
        """The layer whose keys no attention has read yet; None: there is none."""
        return None if self._unread is None else self._unread[0]

    def was_read(self) -> None:
        """An attention function has found the keys of the last `update`."""
        self._unread = None

    def attend(
        self,
        module: torch.nn.Module,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """One layer: query `[B, H, T, D]`, key and value `[B, KVH, T, D]`, output `[B, T, H, Dv]`.

        A pass is begun by the first layer that attends; a layer's number in `module` tells, as `layer` is that of the
        keys, and several modules may share these.
        """
        number = number_of(module, layer)
        output = self.rows.attend(number, self.geometry.served[layer], query, key, value, mask, options)
        if self.rows.is_compiled:
            leave_out(module)
        return output

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each row, padding included, without those of a pass that has not reached its last layer."""
        recovery = self.rows.recovery
        if recovery is not None and recovery.is_computing:
            return recovery.num_columns
        self.rows.see_end()
        return self.rows.batch.num_columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask of a pass."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: pages are the only limit."""
        return -1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was. Full pages are shared, partly filled ones copied on the server."""
        self.rows.select(beam_idx.tolist)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`, numbers or one bool for each."""
        self.rows.select(lambda: torch.arange(self.rows.batch.num_rows)[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row comes `repeats` times."""
        self.rows.select(lambda: [row for row in range(self.rows.batch.num_rows) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens of each row; a positive number is the length to keep."""
        before = self.rows.batch
        self.rows.crop(lambda: tokens_to_remove + (before.num_columns if tokens_to_remove <= 0 else 0))

    def fork(self) -> RemoteCache:
        """Another cache with the same tokens: they share full pages, and go on apart. `copy.deepcopy` does the same.

        The pages are `max_tokens` of this one for both. Close it too, or let go of it.

        Raises:
            Exhausted: no page is free for the copy of one that is partly filled.
        """
        other = RemoteCache.__new__(RemoteCache)
        states = other._begin(self.geometry)
        other.rows = self.rows.fork(other, states)
        return other

    def reset(self) -> None:
        """Frees all pages; the next prompt may be of any batch size. Helps after an error too."""
        self.rows.clear()
        self._check_read()

    def close(self) -> None:
        """Ends the stream and frees the server's memory; a cache that has gone, or a server that is away, is fine.

        Raises:
            Unsupported: nothing has read the last layer's keys: the model ran another attention than "attnd".
        """
        self.rows.close()
        self._check_read()

    def __enter__(self) -> RemoteCache:
        """The cache itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        if kind is not None:
            self._unread = None  # that error is the one to tell
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteCache:
        """See `fork`."""
        return self.fork()

    def __repr__(self) -> str:
        pool = self.rows.lease.pool
        return f"RemoteCache(num_layers={len(self)}, pages={pool.num_used}/{pool.num_pages})"

    def _check_read(self) -> None:
        """Raises Unsupported if keys were given to the cache, and no attention has found them."""
        unread, self._unread = self._unread, None
        if unread is not None:
            raise Unsupported(
                f'layer {unread[0]} attended without the server, but a RemoteCache works with attention "attnd" only, '
                'and what came out is wrong: call model.set_attn_implementation("attnd"), and where that was done, the '
                "model's class does not heed it and cannot be served"
            )


def check_client(client: Any) -> None:
    """Raises InvalidRequest if a client is none, or is asyncio's."""
    create = getattr(client, "create_cache", None)
    if create is None or inspect.iscoroutinefunction(inspect.unwrap(create)):
        rule = "must be what attnd.connect gives, as models call attention without await"
        name = f"{type(client).__module__}.{type(client).__name__}"
        raise InvalidRequest(f"client is a {name}, but {rule}", field="client")
