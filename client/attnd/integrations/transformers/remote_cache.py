"""A transformers cache that keeps counts and page tables, while keys and values lie on a server."""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from attnd.errors import CacheLost, Unsupported
from attnd.integrations.transformers.geometry import geometry_of
from attnd.integrations.transformers.padded_batch import NewTokens, PaddedBatch
from attnd.integrations.transformers.recovery import Recovery, check_choice, unwatch, watch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from attnd.client import Client
    from attnd.protocol.attention_options import AttentionOptions
    from attnd.protocol.kv_split import KVSplit
    from attnd.session import Session
    from attnd.steps import Step
    from attnd.timings import Timings

# Attribute of a key that names the RemoteCache and the layer which it was given to.
OWNER = "_attnd_owner"


class RemoteCache(Cache):
    """A transformers cache whose keys and values lie on a server.

    Attributes:
        cache: the `attnd.Cache` that it leases.
        session: the stream that its steps run on.
        recovery: what computes lost KV again, if asked to.
        options: of the layers, made at their first calls; kept here so that `reset` forgets them.
    """

    def __init__(
        self,
        client: Client,
        config: PreTrainedConfig,
        *,
        max_tokens: int,
        dtype: torch.dtype,
        kv_dtype: object = None,
        page_size: int = 16,
        backend: str = "auto",
        kv_split: KVSplit | None = None,
        name: str = "transformers",
        on_cache_lost: str = "raise",
        model: PreTrainedModel | None = None,
    ) -> None:
        """Leases pages. Close it, or use it as a context manager.

        Args:
            client: a connection.
            config: the model's.
            max_tokens: tokens of all rows (and beams) together, without padding; each row takes whole pages.
            dtype: the model's: `model.dtype`.
            kv_dtype: "float8_e4m3fn" for pages of one byte per element, or None: pages have `dtype`.
            page_size: tokens per page.
            backend: the server's backend; "auto" is its choice.
            kv_split: how the server cuts the keys of a row into chunks; None is automatic.
            name: a label for people.
            on_cache_lost: what happens when the server goes away, or the cache has gone. "raise": the model raises
                `attnd.CacheLost` or `attnd.Disconnected`. "recompute": the pass waits for the server, as long as
                `attnd.connect` was told to; where that has restored the cache it is adopted, else another is leased and
                filled from the tokens so far; then the pass is repeated. Each time a warning is logged.
            model: for "recompute" and only there: the model that is called. Its `forward` is wrapped until `close`,
                to see the tokens.

        Raises:
            InvalidRequest: `on_cache_lost` and `model` do not go together.
            Unsupported: the model has layers that are not plain attention over their own keys and values.
            Exhausted: the server has not enough memory.
        """
        geometry = geometry_of(config.get_text_config(decoder=True))
        check_choice(on_cache_lost, model)
        super().__init__(layers=[_Layer(self, index) for index in range(geometry.num_layers)])
        num_pages = -(-max_tokens // page_size)
        create = partial(
            client.create_cache,
            **geometry._asdict(),
            num_pages=num_pages,
            page_size=page_size,
            dtype=dtype,
            kv_dtype=kv_dtype,
            backend=backend,
            kv_split=kv_split,
            name=name,
        )
        self.cache = create()
        self.session: Session = self.cache.session()
        self._batch = PaddedBatch(num_pages, page_size)
        self.recovery = None if model is None else Recovery(self, self._batch, create)
        self._watched_model = model
        if model is not None:
            watch(model)
        self.options: dict[Any, AttentionOptions] = {}
        self._step: Step | None = None
        self._positions: torch.Tensor | None = None  # of the step's tokens, see NewTokens
        self._last_module = geometry.num_layers  # layer index of the module that attended last
        self._unread: int | None = None  # layer whose keys no attention has read yet

    @property
    def num_pages_used(self) -> int:
        """Pages that hold tokens."""
        return self._batch.pool.num_used

    def timings(self) -> Timings:
        """Where the time of all calls so far went."""
        return self.session.timings()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Marks the new keys and values of a layer for the attention that follows, and gives them back.

        Raises:
            Unsupported: nothing read the last layer's: the model runs another attention than "attnd".
        """
        if self._unread is not None and layer_idx > self._unread:
            unread, self._unread = self._unread, None
            raise Unsupported(
                f'layer {unread} attended without the server, but a RemoteCache works with attention "attnd" only: '
                f'call model.set_attn_implementation("attnd")'
            )
        self._unread = layer_idx
        setattr(key_states, OWNER, (self, layer_idx))
        return key_states, value_states

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

        A step is opened by the first layer of each pass; its number in `module` tells, as `layer` is that of the keys,
        and several modules may share these.
        """
        self._unread = None
        batch_size, num_heads, num_new, _ = query.shape
        number = getattr(module, "layer_idx", layer)
        if number <= self._last_module:
            new = self._begin(batch_size, num_new, mask)
            self._step = None if new.metadata is None else self.session.step(new.metadata)
            self._positions = new.positions
        self._last_module = number
        shape = (batch_size, num_new, num_heads, value.shape[-1])
        if self._step is None:  # nothing but padding
            return query.new_zeros(shape)
        q, k, v = (_tokens(tensor) for tensor in (query, key, value))
        if self._positions is None:
            output: torch.Tensor = self._step.attend(layer, q, k, v, options)
            return output.view(shape)
        real = self._positions.to(query.device)
        padded = query.new_zeros((batch_size * num_new, *shape[2:]))
        padded[real] = self._step.attend(layer, q[real], k[real], v[real], options)
        return padded.view(shape)

    def _begin(self, batch_size: int, num_new: int, mask: torch.Tensor | None) -> NewTokens:
        def extend() -> NewTokens:
            return self._batch.extend(batch_size, num_new, mask)

        return extend() if self.recovery is None else self.recovery.begin(extend, num_new)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each row, padding included."""
        return self._batch.num_columns if self.recovery is None else self.recovery.num_columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask of a pass."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: pages are the only limit."""
        return -1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was. Full pages are shared, partly filled ones copied on the server."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`."""
        self._select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row comes `repeats` times."""
        num_rows = self._batch.num_rows
        self._select([row for row in range(num_rows) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens of each row; a positive number is the length to keep."""
        if tokens_to_remove <= 0:
            tokens_to_remove += self._batch.num_columns
        pages = self._batch.crop(tokens_to_remove)
        if self.recovery is not None:
            self.recovery.crop(tokens_to_remove)
        self._copy(pages)

    def reset(self) -> None:
        """Frees all pages; the next prompt may be of any batch size. Helps after an error too."""
        self._batch.clear()
        if self.recovery is not None:
            self.recovery.clear()
        self.options.clear()
        self._unread = None

    def close(self) -> None:
        """Ends the stream and frees the server's memory; a cache that has gone, or a server that is away, is fine."""
        if self._watched_model is not None:
            unwatch(self._watched_model)
            self._watched_model = None
        self.session.close()
        try:
            self.cache.delete()
        except (CacheLost, ConnectionError, TimeoutError):
            pass

    def __enter__(self) -> RemoteCache:
        """The cache itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.close()

    def __repr__(self) -> str:
        pool = self._batch.pool
        return f"RemoteCache(num_layers={len(self)}, pages={pool.num_used}/{pool.num_pages})"

    def _select(self, rows: list[int]) -> None:
        pages = self._batch.select(rows)
        if self.recovery is not None:
            self.recovery.select(rows)
        self._copy(pages)

    def _copy(self, pages: list[tuple[int, int]]) -> None:
        if not pages:
            return

        def copy() -> None:
            self.cache.copy_pages([source for source, _ in pages], [target for _, target in pages])

        if self.recovery is None:
            copy()
        else:
            self.recovery.copy(copy)


def _tokens(tensor: torch.Tensor) -> torch.Tensor:
    """`[B, H, T, D]` as `[B * T, H, D]`. Of one token of each row nothing changes places: one operation, not two."""
    return tensor.squeeze(2) if tensor.shape[2] == 1 else tensor.transpose(1, 2).flatten(0, 1)


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__
    """What transformers asks of each layer; all of them share the rows of one RemoteCache."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, owner: RemoteCache, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers gives it no types
        self._owner = owner
        self._index = index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the server has the memory."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See RemoteCache."""
        return self._owner.update(key_states, value_states, self._index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See RemoteCache."""
        return self._owner.get_mask_sizes(query_length, self._index)

    def get_seq_length(self) -> int:
        """See RemoteCache."""
        return self._owner.get_seq_length()

    def get_max_length(self) -> int:
        """See RemoteCache."""
        return self._owner.get_max_length()
