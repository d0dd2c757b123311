"""Going on with a transformers model after the server was lost: adopt what it restored, or compute the KV again.

A RemoteCache sees keys and values, and keeps neither. What they can be computed from again are the tokens, and these
only the model is given. A hook on its decoder, which every way of calling the model leads through, notes them. A pass
that the hook did not see makes the tokens unknown, and a loss is an error then.

The loss is noticed by a layer in the middle of a pass. Recovery runs the decoder from there, over the tokens before
the pass and those of the pass itself, and then the layer goes on: all that it does is to store, in the same slots, what
was stored before.
"""

from __future__ import annotations

import inspect
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attnd.errors import CacheLost, Disconnected, InvalidRequest, Unsupported
from attnd.integrations.transformers.hooks import Seen, decoder_of, unwatch, watch
from attnd.integrations.transformers.local.states import States
from attnd.integrations.transformers.served_pass import ServedPass

if TYPE_CHECKING:
    from attnd.integrations.transformers.one_pass import Pass
    from attnd.integrations.transformers.rows import Rows

log = logging.getLogger(__name__)

CHOICES = ("raise", "recompute")
# Tokens of one pass that computes KV again, over all rows; a longer row makes a pass of its own longer.
PASS_TOKENS = 4_096
# How often one layer is tried again, and seconds before that, at first and at the most: a server may be ending still,
# or die again.
MAX_REPEATS, PAUSE_S, MAX_PAUSE_S = 10, 0.1, 2.0


class _Tokens(NamedTuple):
    """Of a pass.

    Attributes:
        ids: int64 `[num_rows, num_columns]`.
        positions: likewise.
    """

    ids: torch.Tensor
    positions: torch.Tensor


class Recovery:
    """The tokens behind the KV of some rows, and how it comes back from them.

    Attributes:
        is_computing: whether the decoder runs to compute KV again.
        num_columns: while it does, tokens of each row before the pass that does.
    """

    def __init__(self, rows: Rows, owner: object, model: Any) -> None:
        """Of a cache without tokens.

        Args:
            rows: whose KV it is.
            owner: the cache that the model is given.
            model: whose decoder is watched until `close`.

        Raises:
            Unsupported: the model's KV does not come from its tokens alone.
        """
        if model.config.is_encoder_decoder:
            raise Unsupported('the model is an encoder-decoder, but on_cache_lost="recompute" needs a decoder alone')
        self._rows = weakref.ref(rows)
        self._owner = weakref.ref(owner)
        self._model = model
        self._decoder = decoder_of(model)
        self._generation = rows.lease.generation
        self._seen: Seen | None = None  # what the hook saw last
        self.is_computing = False
        self.num_columns = 0
        self._served: ServedPass | None = None  # of the pass that computes again
        self._numbers: set[int] = set()  # of its layers that have attended
        self.clear()
        self._unwatch = weakref.finalize(owner, unwatch, weakref.ref(self._decoder))
        self._unwatch.atexit = False
        watch(self._decoder)

    def close(self) -> None:
        """Stops watching. Again is fine."""
        self._unwatch()

    def clear(self) -> None:
        """Forgets all tokens."""
        self._tokens: list[_Tokens] = []
        self._is_known = True
        self._now: _Tokens | None = None  # of the pass under way; None: nobody saw them

    def fork(self, rows: Rows, owner: object) -> Recovery:
        """The same for a fork."""
        other = Recovery(rows, owner, self._model)
        other._tokens, other._is_known, other._generation = list(self._tokens), self._is_known, self._generation
        return other

    def select(self, rows: Sequence[int]) -> None:
        """As `PaddedBatch.select`."""
        self._change(lambda tokens: tokens[list(rows)])

    def crop(self, num_columns: int) -> None:
        """As `PaddedBatch.crop`."""
        self._change(lambda tokens: tokens[:, :num_columns])

    def note(self, seen: Seen) -> None:
        """What the decoder is given, just before it runs with the owner."""
        if not self.is_computing:
            self._seen = seen

    def begin(self, num_new: int, is_causal: bool) -> None:
        """A pass of so many columns begins: its tokens are those of the call that runs and was seen, if any.

        What is computed again is causal, so one whose tokens see later ones counts as not seen.
        """
        seen, self._seen = self._seen, None
        self._now = None
        if (
            not is_causal
            or seen is None
            or not seen.call.is_running
            or seen.ids is None
            or seen.ids.shape[1] != num_new
        ):
            return
        positions = seen.positions
        if positions is None:
            before = self._batch.num_columns
            positions = torch.arange(before, before + num_new, device=seen.ids.device)[None]
        if positions.dim() == 2:
            self._now = _Tokens(seen.ids.detach().clone(), positions.detach().expand_as(seen.ids).clone())
            self._decoder = seen.decoder

    def commit(self) -> None:
        """The pass is over, and counts."""
        if self._now is None:
            self._is_known = False
        else:
            self._tokens.append(self._now)
        self._now = None

    def attend(self, now: Pass, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A layer of a pass, again where the server went away.

        Raises:
            CacheLost: the KV has gone, and its tokens are not known.
            Disconnected: the server stays away.
        """
        is_first = len(now.numbers) == 1
        is_stored = True  # whether what the pass has stored in earlier layers is there

        def attempt() -> torch.Tensor:
            nonlocal is_stored
            if self._is_lost:
                self._compute(0)
            elif not is_stored:
                self._compute(self._batch.num_columns)
            is_stored = True
            return call()

        def recovered(error: CacheLost | Disconnected) -> None:
            nonlocal is_stored
            now.served.reopen()
            if not is_first:
                is_stored = False  # what was restored may lack it
                self._check_known(self._now is not None, error)

        output: torch.Tensor = self._repeated(attempt, recovered)
        return output

    def copy(self, call: Callable[[], None]) -> None:
        """Copies pages; not if their KV is to be computed again, which goes to all of them."""

        def attempt() -> None:
            if not self._is_lost:
                call()

        self._repeated(attempt, lambda error: None)

    def served(self, number: int) -> ServedPass:
        """The steps of the pass that computes again, for the layer `number`."""
        assert self._served is not None
        if number in self._numbers:
            raise InvalidRequest(f"layer {number} attends twice while KV is computed again, but must attend once")
        self._numbers.add(number)
        return self._served

    @property
    def _batch(self) -> Any:
        rows = self._rows()
        assert rows is not None  # they have us
        return rows.batch

    @property
    def _is_lost(self) -> bool:
        """Whether what the rows have stored is in a lease that was lost."""
        rows = self._rows()
        assert rows is not None
        return self._generation != rows.lease.generation

    def _repeated(self, attempt: Callable[[], Any], recovered: Callable[[CacheLost | Disconnected], None]) -> Any:
        for number in range(MAX_REPEATS):
            try:
                return attempt()
            except (CacheLost, Disconnected) as lost:
                error = lost
            if isinstance(error, Disconnected):
                time.sleep(min(PAUSE_S * 2**number, MAX_PAUSE_S))
            self._recover(error)
            recovered(error)
        return attempt()

    def _recover(self, error: CacheLost | Disconnected) -> None:
        """Gets a server that has the cache, or another cache. Raises `error` where the tokens are not known."""
        rows = self._rows()
        assert rows is not None
        rows.session.close()
        try:
            rows.lease.cache.adopt()  # waits for the server; where it was never away, nothing changes
            log.warning("the server is there again, with the cache: %s", error)
        except CacheLost:
            self._check_known(self._is_known, error)
            log.warning("the cache is lost, and computed again: %s", error)
            try:
                rows.lease.lease_again()
            except Disconnected:
                return  # away again: what is tried next says so, and brings us here once more

    def _check_known(self, is_known: bool, error: CacheLost | Disconnected) -> None:
        if not is_known:
            rule = "tokens came to the model as embeddings, or not through the decoder of the model that was given"
            error.args = (f"{error}; it cannot be computed again: {rule}",)
            raise error from None

    def _compute(self, start: int) -> None:
        """Stores the KV of the columns from `start` on, those of the pass under way included, into their pages."""
        rows, owner = self._rows(), self._owner()
        assert rows is not None
        generation = rows.lease.generation
        if rows.session.cache is not rows.lease.cache:  # leased again, for this cache or for a fork of it
            rows.session.close()
            rows.session.cache = rows.lease.cache
        under_way = [] if self._now is None or not rows.batch.is_under_way else [self._now]
        history = [*self._tokens, *under_way]
        parameters = inspect.signature(self._decoder.forward).parameters
        if history:
            ids = torch.cat([tokens.ids for tokens in history], 1)
            positions = torch.cat([tokens.positions for tokens in history], 1)
            width = max(1, PASS_TOKENS // max(1, len(ids)))
            try:
                self.is_computing = True
                for first in range(start, ids.shape[1], width):
                    columns = slice(first, min(first + width, ids.shape[1]))
                    self.num_columns, self._numbers = first, set()
                    self._served = ServedPass(rows.session, rows.batch.again(columns.start, columns.stop))
                    given = {
                        "input_ids": ids[:, columns],
                        "position_ids": positions[:, columns],
                        "attention_mask": rows.batch.mask(columns.stop).to(ids.device),
                        "past_key_values": owner,
                        "use_cache": True,
                    }
                    with torch.no_grad():
                        self._decoder(**{name: value for name, value in given.items() if name in parameters})
            finally:
                self.is_computing, self._served = False, None
        self._generation = generation

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._tokens:
            ids = change(torch.cat([tokens.ids for tokens in self._tokens], 1))
            positions = change(torch.cat([tokens.positions for tokens in self._tokens], 1))
            self._tokens = [_Tokens(ids, positions)]


def check_choice(on_cache_lost: str, model: Any) -> None:
    """Raises InvalidRequest for an unknown choice, or one that lacks its model."""
    if on_cache_lost not in CHOICES:
        rule = f"must be one of {', '.join(CHOICES)}"
        raise InvalidRequest(f"on_cache_lost is {on_cache_lost!r}, but {rule}", field="on_cache_lost")
    if (on_cache_lost == "recompute") != (model is not None):
        raise InvalidRequest('model must be given with on_cache_lost="recompute", and only then', field="model")


def check_states(states: States) -> None:
    """Raises Unsupported where layers keep states here, which would have to be computed again too."""
    if states.numbers:
        rule = 'on_cache_lost="recompute" needs a model whose layers all attend: use "raise"'
        raise Unsupported(f"the model has convolutions or recurrences, whose states stay here, but {rule}")
