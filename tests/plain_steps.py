"""Steps as engines say them, in plain lines: an oracle of slots and positions that knows no server, and random steps.

`Plain` holds what lies in each slot of one layer. `refusal` says whether a step may be run, `attend` what it gives.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Slots = dict[int, tuple[np.ndarray, np.ndarray]]


@dataclass
class PlainStep:
    """A step in lists, by the names of `attnd.StepMetadata`; `owners` is its attend_new."""

    query_lens: list[int]
    context_lens: list[int]
    page_tables: list[list[int]]
    slots: list[int]
    store_first: bool = False
    window: int = 0
    owners: list[int] = field(default_factory=list)
    first_position: list[int] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    block_size: int = 1
    kind: str = "prefill"

    def sees(self, r: int, position: int, key: int, is_new: bool) -> bool:
        """Whether a token of request `r` at `position` sees the key at `key`."""
        if self.window and position - key >= self.window:
            return False
        if not is_new or self.masks[r] == "bidirectional":
            return True
        block = self.block_size if self.masks[r] == "block_causal" else 1
        return key < (position // block + 1) * block


def refusal(step: PlainStep, page_size: int) -> str:
    """The field that a step is refused for; "": none. Lengths and ids are in range."""
    stored = [slot for slot in step.slots if slot >= 0]
    if len(set(stored)) < len(stored):
        return "slot_mapping"
    for r, (context, table) in enumerate(zip(step.context_lens, step.page_tables, strict=True)):
        for j in range(context if step.query_lens[r] else 0):
            is_read = step.sees(r, context, j, False) and table[j // page_size] >= 0
            if is_read and not step.store_first and table[j // page_size] * page_size + j % page_size in stored:
                return "slot_mapping"
    return ""


def attend(
    step: PlainStep, q: Any, k: Any, v: Any, lies: Slots, page_size: int, scale: float, sinks: Any = None,
    rounded: Any = lambda x: x, slopes: Any = None,
) -> tuple[np.ndarray, np.ndarray, Slots]:  # fmt: skip
    """Output, lse and what lies in the slots then, float64. `rounded`: what pages make of k or v of a token."""
    q, k, v, group = q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), q.shape[1] // k.shape[1]
    output, lse = np.zeros((len(q), q.shape[1], v.shape[2])), np.full(q.shape[:2], -np.inf)
    after = {**lies, **{slot: (rounded(k[i]), rounded(v[i])) for i, slot in enumerate(step.slots) if slot >= 0}}
    cached, row = after if step.store_first else lies, 0
    for r, (length, context) in enumerate(zip(step.query_lens, step.context_lens, strict=True)):
        first, begin, row = step.first_position[r], row, row + length
        for i in range(length if context >= 0 else 0):
            position, keys = first + context + i, []
            for j in range(context):
                page = step.page_tables[r][j // page_size] if step.sees(r, position, first + j, False) else -1
                if page >= 0:
                    keys.append((first + j, *cached[page * page_size + j % page_size]))
            for n in range(length if step.owners[r] else 0):
                slot, at = step.slots[begin + n], first + context + n
                if step.sees(r, position, at, True) and (slot >= 0 or not step.store_first):
                    keys.append((at, *(after[slot] if step.store_first else (k[begin + n], v[begin + n]))))
            for head in range(q.shape[1]):
                slope = 0.0 if slopes is None else slopes[head]
                query = scale * q[begin + i, head]
                scores = [float(slope * (at - position) + query @ key[head // group]) for at, key, _ in keys]
                scores += [float(sinks[head])] if sinks is not None and step.owners[r] else []
                if max(scores, default=-math.inf) == -math.inf:
                    continue
                weights = np.exp(np.array(scores) - max(scores))
                lse[begin + i, head] = max(scores) + math.log(weights.sum())
                for weight, (_, _, value) in zip(weights / weights.sum(), keys, strict=False):
                    output[begin + i, head] += weight * value[head // group]
    return output, lse, after


def random_step(chance: random.Random, num_pages: int, page_size: int) -> PlainStep:
    """Any step of the new kinds, valid or one that stores what it may not."""
    is_decode = chance.random() < 0.5
    num_reqs, decode_len = chance.randint(1, 4), chance.choice([1, 1, 2, 4])
    lens = [decode_len if is_decode else chance.choice([0, 1, 1, 2, 5]) for _ in range(num_reqs)]
    lens = [0 if is_decode and chance.random() < 0.15 else length for length in lens]
    if not any(lens):
        lens[chance.randrange(num_reqs)] = decode_len
    contexts = [chance.choice([0, 1, page_size - 1, page_size, page_size + 1, 3 * page_size + 2]) for _ in lens]
    if lens[-1] and chance.random() < 0.15:  # a row that an engine padded its batch with
        contexts[-1] = -lens[-1]
    step = PlainStep(lens, contexts, [], [], chance.random() < 0.6, block_size=chance.choice([1, 2, 4]))
    step.kind = "decode" if is_decode else "prefill"
    step.owners = [int(chance.random() < 0.8) for _ in lens]
    step.first_position = [chance.choice([0, 0, 4, 12, 1 << 20]) for _ in lens]
    step.masks = [chance.choice(["causal", "causal", "block_causal", "bidirectional"]) for _ in lens]
    return with_pages(step, chance, num_pages, page_size, chance.choice([0, 0, 1, 3, page_size, 2 * page_size + 1]))


def with_pages(step: PlainStep, chance: random.Random, num_pages: int, page_size: int, window: int) -> PlainStep:
    """The same lengths with other pages, slots and window: another layer group's, say."""
    made = replace(step, page_tables=[], slots=[], window=window)
    columns = max(5, *(-(-context // page_size) for context in step.context_lens))
    pages = chance.sample(range(num_pages), num_pages)
    shared = [pages.pop() for _ in range(2)]  # a prefix that requests have in common
    for length, context in zip(step.query_lens, step.context_lens, strict=True):
        table = ((shared if chance.random() < 0.3 else []) + [pages.pop() for _ in range(columns)])[:columns]
        begin = max(context, 0) if context + length <= columns * page_size else 0
        slots = [table[p // page_size] * page_size + p % page_size for p in range(begin, begin + length)]
        if chance.random() < 0.1:  # another's page, perhaps behind the window
            slots = [chance.randrange(num_pages * page_size) for _ in slots]
        made.slots += [-1 if context < 0 or chance.random() < 0.15 else slot for slot in slots]
        hidden = max(0, context - window + 1) // page_size if window else 0
        junk = [-1, chance.randrange(num_pages), num_pages + 7, -(1 << 31)]
        made.page_tables.append([chance.choice([*junk, page]) if c < hidden else page for c, page in enumerate(table)])
        if chance.random() < 0.1:
            made.page_tables[-1][chance.randrange(columns)] = -1
    return made
