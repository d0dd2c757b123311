"""Going on with a transformers model after the server was lost: adopt what it restored, or compute the KV again.

A RemoteCache sees keys and values, and keeps neither. What they can be computed from again are the tokens, and these
only the model's `forward` is given. So that is wrapped while such a cache is open: each pass with it goes through
`Recovery.run`, which notes the tokens, and repeats the pass where the server went away.
"""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from attnd.errors import CacheLost, Disconnected, InvalidRequest
from attnd.integrations.transformers.padded_batch import NewTokens, PaddedBatch

if TYPE_CHECKING:
    from attnd.cache import Cache
    from attnd.session import Session

log = logging.getLogger(__name__)

CHOICES = ("raise", "recompute")
# Tokens of one pass that computes KV again, over all rows; a longer row makes a pass of its own longer.
PASS_TOKENS = 4_096
# How often one pass of the model is repeated, and seconds before that, at first and at the most: a server may be ending
# still, or die again.
MAX_REPEATS, PAUSE_S, MAX_PAUSE_S = 10, 0.1, 2.0
# Attribute of a model's `forward` that goes through `Recovery.run`: how many caches want it.
_NUM_WATCHERS = "_attnd_num_watchers"


class Leasing(Protocol):
    """What a RemoteCache leases: both attributes change where a cache is lost."""

    cache: Cache
    session: Session


class Recovery:
    """The tokens behind the KV of a RemoteCache, and how it comes back from them."""

    def __init__(self, cache: Leasing, batch: PaddedBatch, create: Callable[[], Cache]) -> None:
        """Of a cache without tokens.

        Args:
            cache: whose KV it is.
            batch: its rows.
            create: leases another like it.
        """
        self._cache = cache
        self._batch = batch
        self._create = create
        self._is_lost = False  # whether the rows' KV must be computed before anything else
        self._begun: NewTokens | None = None  # what the pass under way adds
        self._num_begun = 0  # and its columns, that are in the batch but not in the history
        self._repeats = False  # whether it is begun again, and its columns are new to the model once more
        self._again: tuple[int, NewTokens] | None = None  # first column and tokens of a pass that computes KV again
        self.clear()

    @property
    def num_columns(self) -> int:
        """Tokens of each row before the pass under way, padding included, as the model is to see it."""
        if self._again is not None:
            return self._again[0]
        return self._batch.num_columns - (self._num_begun if self._repeats else 0)

    def clear(self) -> None:
        """Forgets all tokens."""
        self._tokens: list[torch.Tensor] = []  # int64 [num_rows, num_columns] each
        self._positions: list[torch.Tensor] = []
        self._is_known = True
        self._begun, self._num_begun, self._repeats = None, 0, False

    def select(self, rows: Sequence[int]) -> None:
        """As `PaddedBatch.select`."""
        self._change(lambda tokens: tokens[list(rows)])

    def crop(self, num_columns: int) -> None:
        """As `PaddedBatch.crop`."""
        self._change(lambda tokens: tokens[:, :num_columns])

    def begin(self, extend: Callable[[], NewTokens], num_new: int) -> NewTokens:
        """The tokens of a pass that begins: of one that computes KV again, of one that is repeated, or new ones."""
        if self._again is not None:
            return self._again[1]
        if self._begun is None:
            self._begun, self._num_begun = extend(), num_new
        self._repeats = False
        return self._begun

    def run(self, forward: Callable[..., Any], given: dict[str, Any], call: Callable[[], Any]) -> Any:
        """One pass of the model, repeated if need be.

        Args:
            forward: the model's own.
            given: its arguments, by name.
            call: calls it with them.
        """
        self._begun, self._num_begun, self._repeats = None, 0, False

        def attempt() -> Any:
            self._compute_again(forward)
            return call()

        output = self._repeated(attempt)
        num_new = self._num_begun
        self._begun, self._num_begun = None, 0
        self._note(given.get("input_ids"), given.get("position_ids"), num_new)
        return output

    def copy(self, call: Callable[[], None]) -> None:
        """Copies pages; not if their KV is to be computed again, which goes to all of them."""

        def attempt() -> None:
            if not self._is_lost:
                call()

        self._repeated(attempt)

    def _repeated(self, attempt: Callable[[], Any]) -> Any:
        for number in range(MAX_REPEATS):
            try:
                return attempt()
            except (CacheLost, Disconnected) as lost:
                error = lost
            if isinstance(error, Disconnected):
                time.sleep(min(PAUSE_S * 2**number, MAX_PAUSE_S))
            self._recover(error)
        return attempt()

    def _recover(self, error: CacheLost | Disconnected) -> None:
        """Gets a server that has the cache, or another cache. Raises `error` where the tokens are not known."""
        cache = self._cache
        self._again = None
        self._repeats = self._begun is not None
        cache.session.close()
        try:
            cache.cache.adopt()  # waits for the server; where it was never away, nothing changes
            log.warning("the server is there again, with the cache: %s", error)
        except CacheLost:
            if not self._is_known:
                rule = "tokens came to the model as embeddings, or not through the model that the cache was given"
                error.args = (f"{error}; it cannot be computed again: {rule}",)
                raise error from None
            log.warning("the cache is lost, and computed again: %s", error)
            self._is_lost = True
            try:
                cache.cache = cache.session.cache = self._create()
            except Disconnected:
                pass  # away again: what is tried next says so, and brings us here once more

    def _compute_again(self, forward: Callable[..., Any]) -> None:
        """Stores the KV of all rows, into the pages that they have, if it is lost."""
        if not self._is_lost:
            return
        tokens = torch.cat(self._tokens, 1) if self._tokens else torch.empty(0, 0)
        positions = torch.cat(self._positions, 1) if self._tokens else tokens
        num_rows, num_columns = tokens.shape
        width = max(1, PASS_TOKENS // max(1, num_rows))
        only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(forward).parameters else {}
        repeats, self._repeats = self._repeats, False
        for first in range(0, num_columns, width):
            columns = slice(first, min(first + width, num_columns))
            self._again = first, self._batch.again(columns.start, columns.stop)
            forward(
                input_ids=tokens[:, columns],
                position_ids=positions[:, columns],
                attention_mask=self._batch.mask(columns.stop).to(tokens.device),
                past_key_values=self._cache,
                use_cache=True,
                **only_last,
            )
        self._again, self._repeats, self._is_lost = None, repeats, False

    def _note(self, tokens: torch.Tensor | None, positions: torch.Tensor | None, num_new: int) -> None:
        """Adds the tokens of a pass to those from which KV can be computed."""
        before = self._batch.num_columns - num_new
        if tokens is None or tokens.shape[1] != num_new or sum(each.shape[1] for each in self._tokens) != before:
            self._is_known = False
            return
        if positions is None:
            positions = torch.arange(before, before + num_new, device=tokens.device)[None]
        if positions.dim() != 2:
            self._is_known = False
            return
        self._tokens.append(tokens.detach().clone())
        self._positions.append(positions.detach().expand_as(tokens).clone())

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._tokens:
            self._tokens = [change(torch.cat(self._tokens, 1))]
            self._positions = [change(torch.cat(self._positions, 1))]


def check_choice(on_cache_lost: str, model: Any) -> None:
    """Raises InvalidRequest for an unknown choice, or one that lacks its model."""
    if on_cache_lost not in CHOICES:
        rule = f"must be one of {', '.join(CHOICES)}"
        raise InvalidRequest(f"on_cache_lost is {on_cache_lost!r}, but {rule}", field="on_cache_lost")
    if (on_cache_lost == "recompute") != (model is not None):
        raise InvalidRequest('model must be given with on_cache_lost="recompute", and only then', field="model")


def watch(model: Any) -> None:
    """Lets passes of `model` with a RemoteCache go through its `Recovery`, if it has one, until `unwatch`."""
    forward = model.forward
    if not hasattr(forward, _NUM_WATCHERS):
        forward = _watched(forward)
        setattr(forward, _NUM_WATCHERS, 0)
        model.forward = forward
    setattr(forward, _NUM_WATCHERS, getattr(forward, _NUM_WATCHERS) + 1)


def unwatch(model: Any) -> None:
    """Takes `watch` back, once for each time. Whatever wrapped `forward` meanwhile keeps it."""
    forward = model.forward
    if hasattr(forward, _NUM_WATCHERS):
        setattr(forward, _NUM_WATCHERS, getattr(forward, _NUM_WATCHERS) - 1)
        if not getattr(forward, _NUM_WATCHERS):
            model.forward = forward.__wrapped__
            if model.forward == MethodType(type(model).forward, model):
                del model.forward  # it is the class's


def _watched(forward: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(forward)
    rest = next((name for name, kind in signature.parameters.items() if kind.kind is kind.VAR_KEYWORD), "")

    @functools.wraps(forward)  # generate looks at its signature
    def watched(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind_partial(*args, **kwargs).arguments)
        given |= given.pop(rest, {})
        recovery = getattr(given.get("past_key_values"), "recovery", None)
        if recovery is None:
            return forward(*args, **kwargs)
        return recovery.run(forward, given, lambda: forward(*args, **kwargs))

    return watched
