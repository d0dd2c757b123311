"""A transformers model whose attention is served from here on, whoever calls it and with whatever cache."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.generic import ModelOutput

from attnd.errors import InvalidRequest, Unsupported
from attnd.integrations.transformers.attention import NAME
from attnd.integrations.transformers.compiling import hidden
from attnd.integrations.transformers.encoders.pairs import RemotePair
from attnd.integrations.transformers.hooks import arguments, decoder_of
from attnd.integrations.transformers.remote_cache import RemoteCache, check_client
from attnd.integrations.transformers.running import CACHE_NAMES, cache_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from attnd.client import Client

# By model, and by decoder. A copy of a model is not attached.
_attached: weakref.WeakKeyDictionary[torch.nn.Module, Attachment] = weakref.WeakKeyDictionary()


class Attachment:
    """A model that is attached. Made by `attach`; as a context manager it detaches at its end.

    Attributes:
        caches: those that it has made and that somebody has.
    """

    def __init__(self, model: PreTrainedModel, decoder: torch.nn.Module, make: Callable[..., Any]) -> None:
        """Changes nothing yet."""
        self.caches: weakref.WeakSet[Any] = weakref.WeakSet()
        self._model = weakref.ref(model)
        self._decoder: weakref.ref[Any] = weakref.ref(decoder)
        self._make = make
        self._handles: list[Any] = []
        self._before = ""

    def new_cache(self) -> Any:
        """A RemoteCache, or a RemotePair of an encoder-decoder, to give to several calls as `past_key_values`.

        Raises:
            InvalidRequest: the model has gone.
            AttndError: as `RemoteCache`.
        """
        model = self._model()
        if model is None:
            raise InvalidRequest("the model has gone, but a cache needs it")
        cache = self._make(model)
        self.caches.add(cache)
        return cache

    def detach(self) -> None:
        """Gives the model its own attention back, and closes the caches that were made for it. Again is fine."""
        model, decoder = self._model(), self._decoder()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for cache in list(self.caches):
            cache.close()
        if model is None or decoder is None or _attached.get(decoder) is not self:
            return
        del _attached[decoder]
        _attached.pop(model, None)
        vars(model).pop("generate", None)
        decoder.set_attn_implementation(self._before)

    def begin(self, model: Any, decoder: Any) -> None:
        """Attaches. For `attach`."""
        self._before = decoder.config._attn_implementation
        decoder.set_attn_implementation(NAME)
        if decoder.config._attn_implementation != NAME:
            rule = "must let its attention be chosen by set_attn_implementation"
            raise Unsupported(f"the model is a {type(model).__name__}, but {rule}")
        self._handles = [
            decoder.register_forward_pre_hook(_before_pass, prepend=True, with_kwargs=True),
            decoder.register_forward_hook(_after_pass, with_kwargs=True, always_call=True),
        ]
        _attached[decoder] = _attached[model] = self
        if hasattr(model, "generate"):
            kind: Any = type(model)
            model.generate = MethodType(_generating(kind), model)

    def __enter__(self) -> Attachment:
        """The attachment itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detaches."""
        self.detach()


def attach(
    model: PreTrainedModel, client: Client, *, max_tokens: int, on_cache_lost: str = "raise", **options: Any
) -> Attachment:
    """Has a server attend for a model, in `generate`, in pipelines, and in calls with or without a cache.

    Each `generate`, and each call of the model that comes without a cache, leases a cache of its own: `generate` frees
    it when it returns, unless its result has it, and a call when nobody has its result any more. Encoders, and the
    vision and audio parts of a model, stay where they are.

    Args:
        model: of transformers, in evaluation mode.
        client: a connection.
        max_tokens: of each cache, as of `RemoteCache`.
        on_cache_lost: likewise; "recompute" needs no `model` here.
        **options: what else `RemoteCache` takes.

    Returns:
        What detaches it, also as a context manager.

    Raises:
        InvalidRequest: the model is attached already, or an option is none.
        Unsupported: its attention cannot be served; the message says why.
    """
    decoder = decoder_of(model)
    if model in _attached or decoder in _attached:
        raise InvalidRequest("the model is attached already, but must not be: detach(model) first", field="model")
    check_client(client)
    known = set(RemoteCache.__init__.__kwdefaults__ or {}) - {"on_cache_lost", "model"}
    for name in sorted(set(options) - known):
        raise InvalidRequest(f"there is no option {name}, but only {', '.join(sorted(known))}")

    def make(model: PreTrainedModel) -> Any:
        given: dict[str, Any] = {"max_tokens": max_tokens, "dtype": model.dtype, "on_cache_lost": on_cache_lost}
        if model.config.is_encoder_decoder:
            return RemotePair(client, model.config, **given | options)
        watched = model if on_cache_lost == "recompute" else None
        return RemoteCache(client, model.config, model=watched, **given | options)

    make(model).close()  # what cannot be served is refused now
    attachment = Attachment(model, decoder, make)
    try:
        attachment.begin(model, decoder)
    except BaseException:
        attachment.detach()
        raise
    return attachment


def detach(model: PreTrainedModel) -> None:
    """Undoes `attach`. Raises InvalidRequest if the model is not attached."""
    attachment = _attached.get(model)
    if attachment is None:
        raise InvalidRequest("the model is not attached, but must be: attach(model, client, max_tokens=...)")
    attachment.detach()


@hidden
def _before_pass(
    decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The hook. Gives a pass that comes without a cache one."""
    attachment = _attached.get(decoder)
    if attachment is None:  # a copy of what is attached
        return None
    given = arguments(decoder, args, kwargs)
    config: Any = decoder.config
    name = next((name for name in CACHE_NAMES if given.get(name) is not None), CACHE_NAMES[0])
    cache = given.get(name)
    if isinstance(cache, RemoteCache | RemotePair):
        return None
    if cache is not None and cache.get_seq_length():
        rule = "must be a RemoteCache, or nothing: an attached model has its keys and values on the server"
        raise InvalidRequest(f"{name} is a {type(cache).__name__} with tokens, but {rule}", field=name)
    _check_one_prompt(given)
    remote = attachment.new_cache()
    keeps = given.get("use_cache")
    if not (getattr(config, "use_cache", True) if keeps is None else keeps):
        remote.is_for_one_pass = True
    index = list(given).index(name) if name in given and name not in kwargs else -1
    if index >= 0:
        return (*args[:index], remote, *args[index + 1 :]), kwargs
    return args, kwargs | {name: remote}


def _check_one_prompt(given: dict[str, Any]) -> None:
    """Raises Unsupported for several prompts in one row, which transformers tells by positions that begin again."""
    positions = given.get("position_ids")
    if given.get("attention_mask") is not None or positions is None or positions.dim() != 2:
        return
    if bool((positions.diff(dim=1) != 1).any()):
        rule = "each row must be one prompt: give each a row of its own, padded, with an attention_mask"
        raise Unsupported(f"position_ids begin again within a row, but {rule}", field="position_ids")


@hidden
def _after_pass(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The hook. Frees the cache of a pass that keeps none, and takes it out of the result; also where it failed."""
    given = arguments(decoder, args, kwargs)
    cache = cache_in(given)
    if not isinstance(cache, RemoteCache | RemotePair) or not cache.is_for_one_pass:
        return None
    cache.close()
    if isinstance(output, ModelOutput):
        return type(output)(**{name: value for name, value in output.items() if value is not cache})
    if isinstance(output, tuple):
        return tuple(value for value in output if value is not cache)
    return None


@functools.cache
def _generating(kind: Any) -> Any:
    """`generate` of a class, with a cache made for it and freed after it."""
    own = kind.generate

    @functools.wraps(own)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        attachment = _attached.get(self)
        if self.config.is_encoder_decoder:  # generate makes a pair, and the decoder's hook another in its place
            attachment = None
        if attachment is None or kwargs.get("past_key_values") is not None or not _wants_cache(self, args, kwargs):
            return own(self, *args, **kwargs)
        cache = attachment.new_cache()
        is_returned = False
        try:
            result = own(self, *args, **kwargs | {"past_key_values": cache})
            is_returned = getattr(result, "past_key_values", None) is not None
            return result
        finally:
            if not is_returned:
                cache.close()

    return generate


def _wants_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `generate` would make a cache. Raises Unsupported for one of a kind that makes no sense here."""
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None) or model.generation_config
    kind = kwargs.get("cache_implementation", getattr(config, "cache_implementation", None))
    if kind not in (None, "dynamic"):
        rule = "an attached model has its keys and values on the server: leave it out, or detach(model)"
        raise Unsupported(f"cache_implementation is {kind!r}, but {rule}", field="cache_implementation")
    use_cache = kwargs.get("use_cache")
    return (getattr(config, "use_cache", None) if use_cache is None else use_cache) is not False
