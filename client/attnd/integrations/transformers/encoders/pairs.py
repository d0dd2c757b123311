"""What an encoder-decoder is given: a cache for its self-attention, and one for the encoder's output."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import EncoderDecoderCache

from attnd.errors import InvalidRequest, Unsupported
from attnd.integrations.transformers.encoders.cross_cache import RemoteCrossCache
from attnd.integrations.transformers.geometry import geometry_of
from attnd.integrations.transformers.leasing import Leasing, pages_for
from attnd.integrations.transformers.remote_cache import RemoteCache

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from attnd.client import Client

_WHY_NO_CUDA = "an encoder-decoder attends to two caches in turn, and a cuda plane takes all layers of one in a row"


class RemotePair(EncoderDecoderCache):
    """Caches of an encoder-decoder, both on a server: `model.generate(..., past_key_values=pair)`.

    Attributes:
        is_for_one_pass: whether it is closed after a pass, by who has made it.
    """

    self_attention_cache: RemoteCache  # type: ignore[assignment]  # transformers thinks of its own
    cross_attention_cache: RemoteCrossCache  # type: ignore[assignment]

    def __init__(
        self,
        client: Client,
        config: PreTrainedConfig,
        *,
        max_tokens: int,
        dtype: torch.dtype,
        max_source_tokens: int | None = None,
        **options: Any,
    ) -> None:
        """Leases pages. Close it, or use it as a context manager; else the memory is freed when the object goes.

        Args:
            client: a connection.
            config: the model's.
            max_tokens: of the decoder: tokens of all rows (and beams) together, without padding.
            dtype: the model's: `model.dtype`.
            max_source_tokens: likewise of the encoder's output; None: as many as `max_tokens`.
            **options: what else `RemoteCache` takes, but for "recompute".

        Raises:
            InvalidRequest: the model is no encoder-decoder, or an option is out of its range.
            Unsupported: the model has layers that are not served.
            Exhausted: the server has not enough memory.
        """
        if options.get("model") is not None or options.get("on_cache_lost", "raise") != "raise":
            rule = 'must be "raise" for an encoder-decoder: its keys do not come from tokens alone'
            raise Unsupported(f"on_cache_lost is {options.get('on_cache_lost')!r}, but {rule}", field="on_cache_lost")
        decoder = decoder_config(config)
        own = RemoteCache(client, decoder, max_tokens=max_tokens, dtype=dtype, **options)
        try:
            geometry = geometry_of(decoder)
            page_size = own.rows.batch.pool.page_size
            source = max_tokens if max_source_tokens is None else max_source_tokens
            num_pages = pages_for(source, page_size, "max_source_tokens")
            taken = {
                key: value for key, value in options.items() if key in ("kv_dtype", "k_scales", "v_scales", "backend")
            }
            create = partial(
                client.create_cache,
                **geometry.of_cache(),
                num_pages=num_pages,
                page_size=page_size,
                dtype=dtype,
                name=options.get("name", "transformers"),
                **taken,
            )
            lease = Leasing(create, num_pages, page_size)
        except BaseException:
            own.close()
            raise
        super().__init__(own, RemoteCrossCache(lease, geometry.num_layers, _ends(own)))
        self.is_for_one_pass = False

    def crop(self, tokens_to_remove: int) -> None:
        """As `RemoteCache.crop`; the encoder's output stays."""
        self.self_attention_cache.crop(tokens_to_remove)

    def check_dynamic_cache(self, method: str) -> None:
        """Transformers asks before it changes rows; ours may be."""

    def fork(self) -> RemotePair:
        """Another pair with the same tokens; see `RemoteCache.fork`. The encoder's output is shared."""
        other = RemotePair.__new__(RemotePair)
        own = self.self_attention_cache.fork()
        EncoderDecoderCache.__init__(other, own, self.cross_attention_cache.fork(_ends(own)))
        other.is_updated = dict(self.is_updated)
        other.is_for_one_pass = False
        return other

    def close(self) -> None:
        """Frees the server's memory. Raises as `RemoteCache.close`."""
        self.cross_attention_cache.close()
        self.self_attention_cache.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> RemotePair:
        """See `fork`."""
        return self.fork()

    def __enter__(self) -> RemotePair:
        """The pair itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes."""
        self.cross_attention_cache.close()
        self.self_attention_cache.__exit__(kind, error, trace)


def _ends(own: RemoteCache) -> Callable[[], None]:
    """What tells a decoder's own cache that a pass is over. From here on it waits for that."""
    own.session.model.why_no_cuda = _WHY_NO_CUDA
    own.rows.crosses = True
    reference = weakref.ref(own.rows)

    def crossed() -> None:
        rows = reference()
        if rows is not None:
            rows.crossed()

    return crossed


def decoder_config(config: PreTrainedConfig) -> Any:
    """The configuration of an encoder-decoder's decoder, as of a model of its own.

    Raises:
        InvalidRequest: it is none.
        Unsupported: its attention adds a bias that calls cannot carry.
    """
    if not config.is_encoder_decoder:
        raise InvalidRequest("the model is no encoder-decoder, but must be: RemoteCache is for a decoder alone")
    if hasattr(config, "relative_attention_num_buckets"):
        raise Unsupported(f"a {config.model_type} model adds a bias by position to its scores, but calls carry none")
    decoder = copy.copy(config.get_text_config(decoder=True))
    decoder.is_encoder_decoder = False
    return decoder
