"""Diffulex's modules, by the names that are looked for in them. It need not be there to import this."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

from attnd.errors import Unsupported


class NoDiffulex(Unsupported, ModuleNotFoundError):
    """Diffulex is not installed, or not the one that is known here."""

    def __init__(self, message: str, name: str | None = None) -> None:
        """Args: `name`, of the module that is missing."""
        super().__init__(message)
        self.name = name


def attention_modules() -> tuple[ModuleType, ModuleType]:
    """`diffulex.attention.attn_impl` and `diffulex.attention.metadata`.

    Raises:
        NoDiffulex: they are not there.
    """
    try:
        implementation, metadata = (import_module(f"diffulex.attention.{name}") for name in ("attn_impl", "metadata"))
    except ModuleNotFoundError as error:
        rule = "install() needs Diffulex and what that needs: install them first; attnd.Attention alone does without"
        raise NoDiffulex(f"{error.name} is not installed, but {rule}", name=error.name) from error
    if not hasattr(implementation, "Attention"):
        raise NoDiffulex("diffulex.attention.attn_impl has no Attention, but must have one: it is another Diffulex")
    return implementation, metadata


def loaded() -> Iterator[ModuleType]:
    """Diffulex's modules that were imported so far."""
    for name, module in list(sys.modules.items()):
        if module is not None and (name == "diffulex" or name.startswith("diffulex.")):
            yield module


def replace_everywhere(old: Any, new: Any) -> None:
    """Puts `new` under every name that an imported module of Diffulex has for `old`."""
    for module in loaded():
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)


def runner_classes() -> list[type]:
    """Classes that allocate a KV cache, without those that inherit from another of them."""
    try:
        import_module("diffulex.engine.model_runner")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("diffulex"):
            raise
    values = [value for module in loaded() for value in vars(module).values() if isinstance(value, type)]
    found = {value for value in values if "allocate_kv_cache" in vars(value)}
    return [each for each in found if not found & set(each.__mro__[1:])]


class TheirState:
    """What `diffulex.attention.metadata` holds for the process: the fetch function, and whether it is warming up."""

    def __init__(self, module: ModuleType) -> None:
        """Of that module. It is asked each time, because it rebinds its names."""
        self.module = module

    def fetch_fn(self) -> Callable[[], Any] | None:
        """The function that is installed, if any."""
        fetch = getattr(self.module, "fetch_attn_metadata", None)
        return fetch if callable(fetch) else None

    def set_fetch_fn(self, fn: Callable[[], Any]) -> None:
        """Installs one."""
        self._call_or_set("set_fetch_fn_for_attn_metadata", "fetch_attn_metadata", fn)

    def is_warming_up(self) -> bool:
        """Whether the runner is."""
        asked = getattr(self.module, "is_warming_up", None)
        return bool(asked() if callable(asked) else getattr(self.module, "WARMING_UP", False))

    def set_warming_up(self, is_warming_up: bool) -> None:
        """Says whether it is."""
        self._call_or_set("set_warming_up", "WARMING_UP", is_warming_up)

    def _call_or_set(self, function: str, name: str, value: Any) -> None:
        setter = getattr(self.module, function, None)
        if callable(setter):
            setter(value)
        else:
            setattr(self.module, name, value)
