"""What 0.1.0 could not say, with what a server of today answers: one small step for each feature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.released.calls import inputs
from tests.released.plain import HEAD_DIM, HEADS, PAGE_SIZE, PlainCache, attend_row, error

# Request 0 goes on after 3 tokens, and request 1 after 4: pages 5, and 2 and 9.
CONTEXTS = {"query_lens": [3, 4], "context_lens": [0, 0], "page_tables": [[5, -1], [2, 9]]}
CONTEXT_SLOTS = [20, 21, 22, 8, 9, 10, 11]
STEP: dict[str, Any] = {
    "query_lens": [1, 2],
    "context_lens": [3, 4],
    "page_tables": [[5, -1], [2, 9]],
    "slot_mapping": [23, 36, 37],
}


@dataclass(frozen=True)
class Later:
    """A step.

    Attributes:
        field: that the refusal names.
        words: what the refusal calls it.
        says: what `StepMetadata` is given.
        rows: by row of the output, the token's position and what it sees: positions, and where K and V are from, a slot
            of the context or a new token's row; of other rows the output is 0.
    """

    field: str
    words: str
    says: Mapping[str, Any]
    rows: Mapping[int, tuple[int, list[tuple[int, str, int]]]] = field(default_factory=dict)

    def error(self, output: torch.Tensor, context: PlainCache, layer: int, qkv: tuple[Any, Any, Any]) -> float:
        """That of a server's output, as a part of what it may be."""
        q, k, v = qkv
        expected = torch.zeros(len(q), HEADS, HEAD_DIM).double()
        for row, (position, seen) in self.rows.items():
            keys = []
            for key_position, source, index in seen:
                key, value = context.kv[layer, index] if source == "slot" else (k[index].double(), v[index].double())
                keys.append((key_position, key, value))
            attend_row(position, q[row].double(), keys, {}, expected[row], torch.empty(HEADS).double())
        return error(output, expected, torch.float32)

    def inputs(self, seed: int) -> tuple[Any, Any, Any]:
        """q, k and v."""
        return inputs(dict(self.says), HEAD_DIM, torch.float32, seed)


def _context(first: int, slots: list[int]) -> list[tuple[int, str, int]]:
    return [(first + index, "slot", slot) for index, slot in enumerate(slots)]


FIRST, SECOND = CONTEXT_SLOTS[:3], CONTEXT_SLOTS[3:]
# Rows of STEP, as 0.1.0 would answer them.
ORDINARY = {
    0: (3, [*_context(0, FIRST), (3, "new", 0)]),
    1: (4, [*_context(0, SECOND), (4, "new", 1)]),
    2: (5, [*_context(0, SECOND), (4, "new", 1), (5, "new", 2)]),
}
LATER = {
    # Request 1 goes on where request 0 ends, whose token is in the page that both name.
    "store_first": Later(
        "store_first",
        "store-first steps",
        {**STEP, "page_tables": [[5, -1], [5, 9]], "store_first": True},
        {
            0: ORDINARY[0],
            1: (4, [*_context(0, FIRST), (3, "new", 0), (4, "new", 1)]),
            2: (5, [*_context(0, FIRST), (3, "new", 0), (4, "new", 1), (5, "new", 2)]),
        },
    ),
    "window": Later(
        "window",
        "windows of steps",
        {**STEP, "page_tables": [[5, -1], [-1, 9]], "context_lens": [3, 5], "slot_mapping": [23, 37, 38], "window": 2},
        {0: (3, ORDINARY[0][1][-2:]), 1: (5, [(4, "slot", 36), (5, "new", 1)]), 2: (6, [(5, "new", 1), (6, "new", 2)])},
    ),
    "attend_new": Later(
        "attend_new",
        "requests whose new tokens see their context alone",
        {**STEP, "attend_new": [1, 0]},
        {0: ORDINARY[0], 1: (4, _context(0, SECOND)), 2: (5, _context(0, SECOND))},
    ),
    "first_position": Later(
        "first_position",
        "contexts that begin at another position than 0",
        # Its first new token is at 12, the last of the prefix, and the second is behind that, at 13.
        {
            **STEP,
            "first_position": [0, 8],
            "mask": "prefix_full",
            "block_size": 4,
            "prefix_lens": [0, 13],
            "padded_prefix_lens": [0, 13],
        },
        {
            0: ORDINARY[0],
            1: (12, [*_context(8, SECOND), (12, "new", 1)]),
            2: (13, [*_context(8, SECOND), (12, "new", 1), (13, "new", 2)]),
        },
    ),
    "padding": Later(
        "context_lens",
        "rows that an engine padded its batch with",
        {**STEP, "context_lens": [3, -2], "slot_mapping": [23, -1, -1]},
        {0: ORDINARY[0]},
    ),
    "no new token": Later(
        "context_lens",
        "rows that an engine padded its batch with",
        {**STEP, "query_lens": [1, 0], "slot_mapping": [23], "kind": "decode"},
        {0: ORDINARY[0]},
    ),
}
assert PAGE_SIZE == 4
