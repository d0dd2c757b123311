"""The ways in which a model attends: by itself, with a RemoteCache passed by hand, or attached to a server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from transformers import DynamicCache

import attnd
from attnd.integrations import transformers as integration
from attnd.integrations.transformers import RemoteCache

MAX_TOKENS = 1024
PAGE_SIZE = 4  # small, so that sharing and cropping meet the borders of pages


class Way(Protocol):
    """How a behaviour calls a model."""

    def generate(self, model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        """`model.generate` with a cache of its own."""

    def cache(self, model: Any) -> Any:
        """For passes of `model(...)` one after another; None: the model makes one."""


class Local:
    """Attention of transformers' own."""

    def __init__(self, attention: str = "eager") -> None:
        self.attention = attention

    @contextlib.contextmanager
    def serving(self, model: Any) -> Iterator[None]:
        """While it is open, the model attends so."""
        model.set_attn_implementation(self.attention)
        yield

    def generate(self, model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        """See Way."""
        return model.generate(**inputs, **options)

    def cache(self, model: Any) -> Any:
        """See Way."""
        return DynamicCache(config=model.config.get_text_config(decoder=True))


class ByHand:
    """A RemoteCache, made and passed by the caller."""

    def __init__(self, client: attnd.Client) -> None:
        self._client = client
        self._caches = contextlib.ExitStack()

    @contextlib.contextmanager
    def serving(self, model: Any) -> Iterator[None]:
        """While it is open, the model attends so."""
        parts = getattr(model.config, "sub_configs", {})
        name = integration.attention.NAME
        model.set_attn_implementation({"text_config": name} if "text_config" in parts else name)
        with self._caches:
            yield
        model.set_attn_implementation("eager")

    def generate(self, model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        """See Way."""
        if not {"past_key_values", "cache_implementation", "use_cache"} & options.keys():
            options["past_key_values"] = self.cache(model)
        return model.generate(**inputs, **options)

    def cache(self, model: Any) -> Any:
        """See Way."""
        return self._caches.enter_context(
            RemoteCache(self._client, model.config, max_tokens=MAX_TOKENS, dtype=model.dtype, page_size=PAGE_SIZE)
        )


class Attached:
    """`attach`, and then as ever."""

    def __init__(self, client: attnd.Client) -> None:
        self._client = client

    @contextlib.contextmanager
    def serving(self, model: Any) -> Iterator[None]:
        """While it is open, the model attends so."""
        integration.attach(model, self._client, max_tokens=MAX_TOKENS, page_size=PAGE_SIZE)
        try:
            yield
        finally:
            integration.detach(model)
            model.set_attn_implementation("eager")

    def generate(self, model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        """See Way."""
        return model.generate(**inputs, **options)

    def cache(self, model: Any) -> Any:
        """See Way."""
        return None


def blind_attention(module: Any, query: Any, key: Any, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Sees the last token only: a family whose logits do not change with this tests nothing."""
    num_new = query.shape[2]
    last = value[:, :, -num_new:].repeat_interleave(query.shape[1] // value.shape[1], 1)
    return last.transpose(1, 2).contiguous(), None
