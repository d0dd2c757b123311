"""attnd in Diffulex's place, inside of Diffulex. Needs torch and Diffulex only when it is called."""

from __future__ import annotations

import functools
from types import ModuleType, TracebackType
from typing import Any

from attnd.cache import Cache
from attnd.client import Client
from attnd.errors import InvalidRequest
from attnd.integrations.diffulex import metadata as ours
from attnd.integrations.diffulex import modules
from attnd.protocol import warming_up


def install(
    server: Client | Cache | str | None = None,
    *,
    num_pages: int | None = None,
    dtype: Any = None,
    plane: str = "",
) -> Installation:
    """Has Diffulex's models attend on a server: the one line that its runner changes.

    `attnd.Attention` takes the place of Diffulex's own, in every module that has it by now and in those that are
    imported later: install before the model is built. Metadata and warm-up state are Diffulex's from then on, so that
    what a runner has set there is what attnd's functions of these names say.

    With a `server`, a runner's `allocate_kv_cache` leases a cache on it instead of allocating one here, sets the
    config's `num_pages` to the pages of that, and attaches the model; the runner's `exit` frees it. Without, attach the
    model yourself: `attnd.attach(runner.model, session)`.

    Each process that builds a runner installs for itself. What Diffulex spawns imports the main module again: call it
    there, outside of `if __name__ == "__main__"`, and with an address. Calling it again changes the arguments alone.

    Args:
        server: an address, as `attnd.connect` takes it, where the first runner connects; a client; or a cache, for one
            runner. None: runners allocate as ever, and are not attached.
        num_pages: pages of a runner's cache. None: the config's `num_pages` if that is positive, else what
            `max_num_reqs` requests of `max_model_len` tokens take, or what the server has left if that is less.
        dtype: of q, k and v, as `CacheSpec` has it. None: the runner's `default_dtype`, else that of the parameters.
        plane: how tensors travel, as in `Cache.session`.

    Returns:
        What undoes it: `Installation.uninstall`, or the end of a `with` block.

    Raises:
        InvalidRequest: a server of another kind.
        Unsupported: Diffulex is not installed, or another one. It is a ModuleNotFoundError too.
    """
    global _installed
    kind = type(server)
    if server is not None and not issubclass(kind, Client | Cache | str):
        rule = "must be an address, a Client, a Cache or None"
        raise InvalidRequest(f"server is a {kind.__name__}, but {rule}", field="server")
    implementation, metadata = modules.attention_modules()
    if _installed is not None and not _installed.is_in(implementation, metadata):
        _installed.uninstall()
    if _installed is None:
        _installed = Installation(implementation, metadata)
    _installed.serve(server, num_pages, dtype, plane)
    return _installed


class Installation:
    """What `install` did. As a context manager it undoes it."""

    def __init__(self, implementation: ModuleType, metadata: ModuleType) -> None:
        """Puts attnd's class and Diffulex's state in each other's place."""
        from attnd.integrations.diffulex import attention

        self._implementation, self._metadata = implementation, metadata
        self._unchosen = attention.unchosen
        self._ours, self._theirs = attention.Attention, implementation.Attention
        self._serving: Any = None  # serving.Serving, which needs torch
        self._initialisers: dict[type, Any] = {}
        modules.replace_everywhere(self._theirs, self._ours)
        self._unchosen.add("triton")
        state = modules.TheirState(metadata)
        ours.fetch_from(state)
        warming_up.hold_in(state)

    def is_in(self, implementation: ModuleType, metadata: ModuleType) -> bool:
        """Whether it is in these modules, and nobody has undone it by hand."""
        is_here = (self._implementation, self._metadata) == (implementation, metadata)
        return is_here and implementation.Attention is self._ours

    def serve(self, server: Client | Cache | str | None, num_pages: int | None, dtype: Any, plane: str) -> None:
        """Has runners that are built from now on served by `server`. Arguments as `install`."""
        from attnd.integrations.diffulex.serving import Serving

        modules.replace_everywhere(self._theirs, self._ours)  # in what a stranger has imported meanwhile
        self._serving = None if server is None else Serving(server, num_pages, dtype, plane, self._theirs)
        if server is not None:
            for kind in modules.runner_classes():
                self._hook(kind)

    def attach(self, runner: Any) -> int:
        """Leases a cache for a runner and attaches its model, as its `allocate_kv_cache` does. Once for each runner.

        For runners that Diffulex's base class does not build.

        Args:
            runner: has a `model` with `attnd.Attention` layers, and a `config`.

        Returns:
            The number of pages of its cache.

        Raises:
            InvalidRequest: `install` was told no server, or the runner has no such model.
            AttndError: the server cannot be reached, or has no such cache to give.
        """
        if self._serving is None:
            raise InvalidRequest("server is None, but must be given to install() to attach a runner", field="server")
        return int(self._serving.attach(runner))

    def uninstall(self) -> None:
        """Gives Diffulex back what it had. Models that were built meanwhile keep attnd's layers: build them anew."""
        global _installed
        if _installed is self:
            _installed = None
            modules.replace_everywhere(self._ours, self._theirs)
            self._unchosen.discard("triton")
            for kind, initialiser in self._initialisers.items():
                if initialiser is None:
                    del kind.__init__  # type: ignore[misc]
                else:
                    kind.__init__ = initialiser  # type: ignore[misc]
            ours.fetch_from(None)
            warming_up.hold_in(None)

    def __enter__(self) -> Installation:
        """The installation itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Undoes it."""
        self.uninstall()

    def _hook(self, kind: type) -> None:
        """Lets runners of a class be served. The runner's own attribute hides the methods of subclasses too."""
        if kind in self._initialisers:
            return
        self._initialisers[kind] = vars(kind).get("__init__")
        initialise = kind.__init__  # type: ignore[misc]

        @functools.wraps(initialise)
        def served(runner: Any, *args: Any, **kwargs: Any) -> None:
            if self._serving is None:
                initialise(runner, *args, **kwargs)
                return
            runner.allocate_kv_cache = functools.partial(self.attach, runner)
            initialise(runner, *args, **kwargs)
            if getattr(runner, "model", None) is not None:
                self.attach(runner)  # if it allocated nothing by itself

        kind.__init__ = served  # type: ignore[misc]


_installed: Installation | None = None
