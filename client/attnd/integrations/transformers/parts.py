"""A forward pass of a padded batch, as the steps that a server attends one after the other in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, groupby, zip_longest
from typing import NamedTuple

import torch

from attnd.pages import PagedSequence, page_tables
from attnd.protocol.step_metadata import StepMetadata

# A step with at most so many new tokens in each row is a decode step: servers may prepare these, one per length.
MAX_DECODE_TOKENS = 32


@dataclass(frozen=True)
class Part:
    """Some tokens of a pass.

    Attributes:
        metadata: the step that attends them.
        positions: int64 `[num_tokens]`, where they lie among the `batch_size * num_new` of the pass; None: they are all
            of them.
    """

    metadata: StepMetadata
    positions: torch.Tensor | None


class _Run(NamedTuple):
    """Tokens of one row that are attended in one step.

    Attributes:
        row: of the batch.
        columns: theirs among the new ones, rising.
        context: real tokens of the row before them.
        mask: "causal", or "bidirectional": they see each other.
        slots: where they are stored; None: they are padding, see the context only, and are seen by nobody.
    """

    row: int
    columns: list[int]
    context: int
    mask: str
    slots: list[int] | None


def parts_of(
    rows: Sequence[PagedSequence],
    lengths: Sequence[int],
    slots: Sequence[Sequence[int]],
    num_new: int,
    new: torch.Tensor | None,
    blocks: torch.Tensor | None,
) -> list[Part]:
    """The steps of a pass, in order.

    Padding has no slot and nobody sees it, but eager attention gives its rows an output all the same, and of padding on
    the right somebody may sample: so its queries attend to what is before it, in a step that reads pages only.

    Args:
        rows: with the pages of the new tokens.
        lengths: tokens of each row before the pass.
        slots: of each row's new real tokens.
        num_new: columns of the pass.
        new: bool `[num_rows, num_new]` on the host, true for real tokens; None: all are.
        blocks: as in `PaddedBatch.extend`.
    """
    if blocks is None and (new is None or bool(new.all())):
        runs = [
            _Run(row, list(range(num_new)), length, "causal", list(own))
            for row, (length, own) in enumerate(zip(lengths, slots, strict=True))
        ]
        return [Part(_step(rows, runs), None)]
    real = torch.ones((len(rows), num_new), dtype=torch.bool) if new is None else new
    each = [
        _runs(row, real[row].tolist(), None if blocks is None else blocks[row].tolist(), length, own)
        for row, (length, own) in enumerate(zip(lengths, slots, strict=True))
    ]
    stored = [[run for run in runs if run.slots is not None] for runs in each]
    parts = [[run for run in runs if run is not None] for runs in zip_longest(*stored)]
    parts.append([run for runs in each for run in runs if run.slots is None and run.context])
    return [Part(_step(rows, runs), _positions(runs, num_new)) for runs in parts if runs]


def _runs(row: int, real: list[bool], blocks: list[int] | None, length: int, slots: Sequence[int]) -> list[_Run]:
    """One row's runs: real tokens as far as they have one mask, and padding as far as nothing real lies between."""
    ends = list(range(len(real))) if blocks is None else blocks
    runs: list[_Run] = []
    taken = 0
    for end, group in groupby(compress(range(len(real)), real), key=lambda column: _block(column, ends)):
        columns = list(group)
        own = list(slots[taken : taken + len(columns)])
        runs.append(_Run(row, columns, length + taken, "causal" if end < 0 else "bidirectional", own))
        taken += len(columns)
    for is_real, group in groupby(range(len(real)), key=lambda column: real[column]):
        columns = list(group)
        if not is_real:
            runs.append(_Run(row, columns, length + sum(real[: columns[0]]), "causal", None))
    return runs


def _block(column: int, ends: list[int]) -> int:
    """The end of the block that a column is in; -1: it sees itself and those before it."""
    is_inside = ends[column] > column or (column > 0 and ends[column - 1] >= column and ends[column] == column)
    return ends[column] if is_inside else -1


def _step(rows: Sequence[PagedSequence], runs: Sequence[_Run]) -> StepMetadata:
    query_lens = [len(run.columns) for run in runs]
    is_decode = query_lens[0] <= MAX_DECODE_TOKENS and query_lens.count(query_lens[0]) == len(query_lens)
    masks = [run.mask for run in runs]
    is_padding = runs[0].slots is None
    return StepMetadata(
        query_lens=query_lens,
        context_lens=[run.context for run in runs],
        page_tables=page_tables([rows[run.row] for run in runs]),
        slot_mapping=None if is_padding else [slot for run in runs for slot in run.slots or ()],
        kind="decode" if is_decode else "prefill",
        mask=masks[0] if len(set(masks)) == 1 else masks,
        cache_only=is_padding,
    )


def _positions(runs: Sequence[_Run], num_new: int) -> torch.Tensor:
    return torch.tensor([run.row * num_new + column for run in runs for column in run.columns])
