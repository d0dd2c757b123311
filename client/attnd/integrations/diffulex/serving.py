"""How a runner of Diffulex comes to its cache on a server. Needs torch."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from attnd.cache import Cache
from attnd.client import Client, connect
from attnd.errors import AttndError, InvalidRequest
from attnd.integrations.diffulex.attention import Attention, attach


class Serving:
    """A server, and what its caches are to be. Arguments as of `install`.

    Args:
        server: an address, a client or a cache.
        num_pages: of a runner's cache, or None.
        dtype: of q, k and v, or None.
        plane: of sessions.
        local: the class of layers that would attend in this process.
    """

    def __init__(
        self, server: Client | Cache | str, num_pages: int | None, dtype: Any, plane: str, local: type
    ) -> None:
        self._server = server
        self._num_pages = num_pages
        self._dtype = dtype
        self._plane = plane
        self._local = local

    def attach(self, runner: Any) -> int:
        """As `Installation.attach`."""
        session = getattr(runner, "attnd_session", None)
        if session is None:
            layers = self._layers(runner)
            is_lent = isinstance(self._server, Cache)
            cache = self._server if isinstance(self._server, Cache) else self._lease(runner, layers)
            try:
                session = cache.session(plane=self._plane)
                attach(runner.model, session)
            except BaseException:
                if not is_lent:
                    cache.delete()
                raise
            runner.attnd_session = session
            _free_at_exit(runner, session, None if is_lent else cache)
        num_pages = session.cache.config.num_pages
        for name in ("num_pages", "num_kvcache_blocks"):  # which older ones have
            if hasattr(getattr(runner, "config", None), name):
                setattr(runner.config, name, num_pages)
        return int(num_pages)

    def _layers(self, runner: Any) -> list[Attention]:
        model = getattr(runner, "model", None)
        if not isinstance(model, torch.nn.Module):
            raise InvalidRequest(f"model of the runner is {model!r}, but must be a torch module", field="model")
        layers = []
        for name, module in model.named_modules():
            if isinstance(module, self._local) and not isinstance(module, Attention):
                rule = "must be attnd.Attention: call install() before the model's module is imported"
                raise InvalidRequest(f"{name} of the model attends in this process, but {rule}", field="model")
            if isinstance(module, Attention):
                layers.append(module)
        if not layers:
            raise InvalidRequest("model has 0 attnd.Attention layers, but must have one at least", field="model")
        return layers

    def _lease(self, runner: Any, layers: list[Attention]) -> Cache:
        if isinstance(self._server, str):
            self._server = connect(self._server)
        assert isinstance(self._server, Client)
        dtype = _dtype_of(runner) if self._dtype is None else self._dtype
        geometry: dict[str, Any] = {
            "num_layers": len(layers),
            "num_kv_heads": layers[0].num_kv_heads,
            "head_dim": layers[0].head_dim,
            "page_size": _named(runner, ("page_size", "kv_cache_page_size"), 32),
            "dtype": dtype,
            "layout": _named(runner, ("kv_cache_layout",), "unified"),
            "name": "diffulex",
        }
        num_pages = self._num_pages or max(0, _named(runner, ("num_pages",), 0))
        if not num_pages:
            num_pages = _num_pages(runner, self._server, geometry)
        return self._server.create_cache(num_pages=num_pages, **geometry)


def _named(runner: Any, names: tuple[str, ...], default: Any) -> Any:
    """The first of some names that the runner or its config has."""
    for owner in (runner, getattr(runner, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if value is not None:
                return value
    return default


def _dtype_of(runner: Any) -> torch.dtype:
    dtype = getattr(runner, "default_dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    parameters = (each.dtype for each in runner.model.parameters() if each.dtype.is_floating_point)
    return next(parameters, torch.get_default_dtype())


def _num_pages(runner: Any, client: Client, geometry: dict[str, Any]) -> int:
    """Pages for as many requests as the runner has at most, or as the server has memory for.

    Raises:
        InvalidRequest: the config does not say how many these are.
    """
    num_reqs = _named(runner, ("max_num_reqs", "max_num_seqs"), None)
    max_model_len = _named(runner, ("max_model_len",), None)
    if num_reqs is None or max_model_len is None:
        rule = "must be given to install() where the config has no max_num_reqs and max_model_len"
        raise InvalidRequest(f"num_pages is None, but {rule}", field="num_pages")
    wanted = num_reqs * -(-max_model_len // geometry["page_size"])
    itemsize = torch.empty(0, dtype=_torch_dtype(geometry["dtype"])).element_size()
    elements = 2 * geometry["num_layers"] * geometry["num_kv_heads"] * geometry["head_dim"] * geometry["page_size"]
    free = max(device.num_bytes_limit - device.num_bytes_used for device in client.capabilities().devices)
    return int(max(1, min(wanted, free // (elements * itemsize))))


def _torch_dtype(dtype: Any) -> torch.dtype:
    named: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return named


def _free_at_exit(runner: Any, session: Any, cache: Cache | None) -> None:
    """Has the runner's `exit`, if it has one, end the session too, and the lease if it is the runner's."""
    leave = getattr(runner, "exit", None)
    if not callable(leave):
        return

    def leave_and_free(*args: Any, **kwargs: Any) -> Any:
        try:
            return leave(*args, **kwargs)
        finally:
            with suppress(AttndError):  # the server may have gone, or the lease
                session.close()
                if cache is not None:
                    cache.delete()

    runner.exit = leave_and_free
