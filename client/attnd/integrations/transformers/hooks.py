"""Hooks on a model's decoder: what a pass is given, seen wherever the call comes from.

A hook is a function of this module and holds nothing, so that a model may be copied and pickled while it is watched.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from types import FrameType
from typing import Any, NamedTuple

import torch

from attnd.integrations.transformers.compiling import hidden
from attnd.integrations.transformers.running import RunningCall, cache_in


class Seen(NamedTuple):
    """What a decoder was given.

    Attributes:
        call: of the decoder.
        decoder: itself.
        ids: int64 `[batch_size, num_new]`; None: it was given embeddings.
        positions: int64 `[batch_size or 1, num_new]`; None: those that follow.
    """

    call: RunningCall
    decoder: torch.nn.Module
    ids: torch.Tensor | None
    positions: torch.Tensor | None


class _Watch:
    """Of one decoder: its hook, and how many want it."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.count = 0


_watched: weakref.WeakKeyDictionary[torch.nn.Module, _Watch] = weakref.WeakKeyDictionary()


def decoder_of(model: Any) -> torch.nn.Module:
    """The part of a model that has the layers with the cache."""
    decoder: torch.nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model
    return decoder


def watch(decoder: torch.nn.Module) -> None:
    """Has caches that the decoder is given see what else it is given, until `unwatch`."""
    watching = _watched.get(decoder)
    if watching is None:
        handle = decoder.register_forward_pre_hook(before_pass, with_kwargs=True)
        watching = _watched[decoder] = _Watch(handle)
    watching.count += 1


def unwatch(reference: weakref.ref[torch.nn.Module]) -> None:
    """Takes `watch` back, once for each time."""
    decoder = reference()
    watching = None if decoder is None else _watched.get(decoder)
    if decoder is None or watching is None:
        return
    watching.count -= 1
    if not watching.count:
        watching.handle.remove()
        del _watched[decoder]


@hidden
def before_pass(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The hook. Shows a RemoteCache the tokens that come with it."""
    given = arguments(decoder, args, kwargs)
    cache = cache_in(given)
    cache = getattr(cache, "self_attention_cache", cache)
    recovery = getattr(getattr(cache, "rows", None), "recovery", None)
    if recovery is not None:
        recovery.note(Seen(_call_of_module(), decoder, given.get("input_ids"), given.get("position_ids")))


def _call_of_module() -> RunningCall:
    """The module's call that runs its hooks now, and its `forward` afterwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != torch.nn.Module._call_impl.__code__.co_filename:
        frame = frame.f_back
    return RunningCall(frame)


def arguments(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a module is given, by name."""
    kind: Any = type(module)
    return dict(zip(_positional(kind), args, strict=False)) | kwargs


@functools.cache
def _positional(kind: Any) -> tuple[str, ...]:
    """Names of what a class's `forward` takes by position."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]
