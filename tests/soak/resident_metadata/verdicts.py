"""What the host says of blocks of metadata, and whether the GPU did the same with each. Knows no GPU."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from attnd.errors import InvalidRequest
from attnd.protocol.cuda.resident import CONTEXT_LENS, NUM_REQS
from attnd_server.attention.kernels.launch_shapes import HOPPER_KEYS
from attnd_server.attention.kernels.resident import state as words
from attnd_server.attention.metadata import REQUEST_COLUMNS, AttentionMetadata
from attnd_server.attention.resident import ResidentSizes
from attnd_server.service.validation import resident_step
from tests.hostile_metadata import CLASSES, NAMES, RIGHT, Blocks, Ints, config_of, hostile_blocks, limits_of

Rule = Callable[..., AttentionMetadata]

# What lies around each private buffer, and how much of it at least.
CANARY, CANARY_BYTES = 0xA5, 256
# Of `decode_items` and `items`, which are imported where Triton is.
STEP_HEADER, PREFETCHED = 4, 16
# Of all rounds through the classes one in so many rewrites blocks while they are copied.
ROUNDS = 4


class Plan(NamedTuple):
    """Which blocks there are.

    Attributes:
        seed: of all blocks.
        num_blocks: of a batch; all of them are of one class.
    """

    seed: int
    num_blocks: int

    def sizes(self, batch: int) -> ResidentSizes:
        """Of the batch's class."""
        return CLASSES[batch % len(CLASSES)]

    def is_rewritten(self, batch: int) -> bool:
        """Whether the worker writes others over its blocks meanwhile."""
        return batch // len(CLASSES) % ROUNDS == 1

    def blocks(self, batch: int) -> tuple[Blocks, Blocks | None, Ints]:
        """A batch's blocks, what each is rewritten to and back, and in which way they are spoilt."""
        random = np.random.default_rng([self.seed, batch])
        right, spoilt, ways = hostile_blocks(self.sizes(batch), random, self.num_blocks)
        if not self.is_rewritten(batch):
            return spoilt, None, ways
        # Of a block that was not spoilt, another right one.
        is_right = (ways == RIGHT)[:, None, None]
        others = [np.where(is_right, np.roll(a, 1, axis=0), b) for a, b in zip(right, spoilt, strict=True)]
        return right, Blocks(*others), ways


def written(plan: Plan, batch: int) -> tuple[Ints, Ints | None]:
    """A batch's blocks as they lie in memory, int32 `[num_blocks, numbers]`, and what they are rewritten to."""
    mine, theirs, _ = plan.blocks(batch)
    return _flat(mine), None if theirs is None else _flat(theirs)


def _flat(blocks: Blocks) -> Ints:
    return np.concatenate([each.reshape(len(each), -1) for each in blocks], axis=1)


class Layout(NamedTuple):
    """Where private buffers lie in the arena.

    Attributes:
        num_bytes: of the arena.
        fields: of each buffer, by its name in `Buffers`, the first byte, numpy's name of its type, and its shape.
    """

    num_bytes: int
    fields: dict[str, tuple[int, str, tuple[int, ...]]]

    def views(self, arena: Ints) -> dict[str, Ints]:
        """The buffers in an arena's bytes."""
        views = {}
        for name, (first, dtype, shape) in self.fields.items():
            end = first + int(np.prod(shape)) * np.dtype(dtype).itemsize
            views[name] = arena[first:end].view(dtype).reshape(shape)
        return views

    def overwritten(self, arena: Ints) -> list[int]:
        """Bytes of canaries that are not what they were."""
        is_wrong = arena != CANARY
        for view in self.views(is_wrong.view(np.uint8)).values():
            view[...] = 0
        return np.flatnonzero(is_wrong).tolist()


class Run(NamedTuple):
    """What the GPU made of a batch.

    Attributes:
        batch: its number.
        layout: of the arenas.
        num_before: steps and checks that came before it.
        arenas: uint8 `[num_blocks, layout.num_bytes]`, all private memory after each block.
    """

    batch: int
    layout: Layout
    num_before: int
    arenas: Ints


@dataclass
class Outcome:
    """What came of blocks.

    Attributes:
        verdicts: how many of each way to spoil them were accepted and refused.
        num_rewritten: that were rewritten meanwhile.
        num_mixed: of these, whose private copy is neither what they were nor what they were rewritten to.
        host_s: what the host's rule took, in seconds.
        disagreement: the first block that the GPU did not do with as the host says, whole; None: there is none.
    """

    verdicts: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_rewritten: int = 0
    num_mixed: int = 0
    host_s: float = 0.0
    disagreement: dict[str, Any] | None = None

    def add(self, other: Outcome) -> None:
        """Takes another batch's in."""
        self.verdicts.update(other.verdicts)
        self.num_rewritten += other.num_rewritten
        self.num_mixed += other.num_mixed
        self.host_s += other.host_s
        self.disagreement = self.disagreement or other.disagreement


def compare(plan: Plan, run: Run, rule: Rule = resident_step) -> Outcome:
    """Holds what the GPU did with a batch against the host's rule, up to the first block that differs."""
    outcome, sizes = Outcome(), plan.sizes(run.batch)
    config, limits = config_of(sizes), limits_of(sizes)
    mine, theirs, ways = plan.blocks(run.batch)
    before: dict[str, Ints] | None = None
    for index, arena in enumerate(run.arenas):
        views = run.layout.views(arena)
        views["page_tables"] = views["page_tables"].reshape(mine.tables[index].shape)
        private = views["lens"], views["page_tables"]
        worker = mine.lens[index], mine.tables[index]
        # Of a block that was rewritten nobody but the private copy knows what it was.
        asked = worker if theirs is None else private
        began = time.perf_counter()
        metadata, opinion = _opinion(rule, *asked, sizes, config, limits)
        outcome.host_s += time.perf_counter() - began
        wrong = _wrong_state(views["state"], run.num_before + index + 1, metadata)
        if touched := run.layout.overwritten(arena):
            wrong.append(f"bytes of canaries were overwritten: {touched}")
        if before is not None and _has_strayed(views, before, metadata, sizes):
            wrong.append("tags or marks have changed that are none of the step's")
        before = views
        if theirs is None:
            if not _is_copy(private, worker, sizes):
                wrong.append("the private copy is not what the worker wrote")
            if ways[index] == RIGHT and metadata is None:
                wrong.append("the block is right, and the host refuses it")
        else:
            outcome.num_rewritten += 1
            others = theirs.lens[index], theirs.tables[index]
            outcome.num_mixed += not (_is_copy(private, worker, sizes) or _is_copy(private, others, sizes))
        wrong += _not_refused(views) if metadata is None else _not_accepted(views, metadata, sizes)
        outcome.verdicts[NAMES[ways[index]], "refused" if metadata is None else "accepted"] += 1
        if wrong:
            gpu = "refused" if views["state"][words.REFUSED] else "accepted"
            outcome.disagreement = {"seed": plan.seed, "blocks of a batch": plan.num_blocks, "batch": run.batch}
            outcome.disagreement |= {"block": index, "class": sizes._asdict(), "way": NAMES[ways[index]]}
            outcome.disagreement |= {"wrong": wrong, "host": opinion, "gpu": gpu, **_lists("worker", worker)}
            if theirs is not None:
                outcome.disagreement |= _lists("rewritten to", others)
            outcome.disagreement |= {f"private {name}": view.tolist() for name, view in views.items()}
            break
    return outcome


def _opinion(rule: Rule, *args: Any) -> tuple[AttentionMetadata | None, str]:
    """The host's."""
    try:
        return rule(*args), "accepted"
    except InvalidRequest as refusal:
        return None, f"refused: {refusal}"


def _lists(whose: str, block: tuple[Ints, Ints]) -> dict[str, Any]:
    return {f"{whose} lens": block[0].tolist(), f"{whose} page_tables": block[1].tolist()}


def _is_copy(private: tuple[Ints, Ints], block: tuple[Ints, Ints], sizes: ResidentSizes) -> bool:
    """Whether all of a block that is in use was copied. What is no page there, and unused, may be page 0."""
    lens, tables = block
    if not np.array_equal(private[0], lens):
        return False
    context = np.maximum(lens[CONTEXT_LENS].astype(np.int64), 0)
    num_used = -(-(context + sizes.query_len) // sizes.page_size)
    is_used = np.arange(sizes.max_pages) < num_used[:, None]
    is_used &= (np.arange(sizes.max_reqs) < lens[NUM_REQS, 0])[:, None]
    is_page = (tables >= 0) & (tables < sizes.num_pages)
    return bool((~is_used | (private[1] == tables) | (~is_page & (private[1] == 0))).all())


def _wrong_state(state: Ints, number: int, metadata: AttentionMetadata | None) -> list[str]:
    """What is wrong with the private words after step `number`, the first of which found the check at 0."""
    expected = {
        "CAME": (words.CAME, 1),
        "REFUSED": (words.REFUSED, number if metadata is None else 0),
        "CHECK": (words.CHECK, number),
        "IS_WRONG": (words.IS_WRONG, 0),
        "STEP": (words.STEP, number),
        "NUM_REQS": (words.NUM_REQS, 0 if metadata is None else metadata.num_reqs),
    }
    return [
        f"state's {name} is {state[word]}, but must be {value}"
        for name, (word, value) in expected.items()
        if state[word] != value
    ]


def _has_strayed(
    views: dict[str, Ints], before: dict[str, Ints], metadata: AttentionMetadata | None, sizes: ResidentSizes
) -> bool:
    """Whether tags or marks have changed of what the step does not store, or if it is refused does not name."""
    slots, pages = (np.flatnonzero(views[name] != before[name]) for name in ("tags", "marks"))
    if metadata is None:
        named = views["page_tables"]
        return not (np.isin(slots // sizes.page_size, named).all() and np.isin(pages, named).all())
    assert metadata.slot_mapping is not None
    stored = metadata.slot_mapping.numpy()
    stored = np.sort(stored[stored >= 0])
    return not (np.array_equal(slots, stored) and np.array_equal(pages, np.unique(stored // sizes.page_size)))


def _not_refused(views: dict[str, Ints]) -> list[str]:
    """What a step that is refused has left, and must not have."""
    left = {
        "a token is stored": (views["slots"] != -1).any(),
        "a page counts as written": views["written"].any(),
        "a request is planned": views["step"][0] != 0,
    }
    return [text for text, is_so in left.items() if is_so]


def _not_accepted(views: dict[str, Ints], metadata: AttentionMetadata, sizes: ResidentSizes) -> list[str]:
    """What of an accepted step is not what the host makes of it."""
    assert metadata.slot_mapping is not None
    stored = metadata.slot_mapping.numpy()
    is_written = np.zeros(sizes.num_pages, np.uint8)
    is_written[stored[stored >= 0] // sizes.page_size] = 1
    wrong = other_than_the_hosts(views["step"], views["slots"], views["page_tables"], metadata, sizes)
    if not np.array_equal(views["written"], is_written):
        wrong.append("the pages that count as written differ from the host's")
    return wrong


def other_than_the_hosts(
    step: Ints, slots: Ints, page_tables: Ints, metadata: AttentionMetadata, sizes: ResidentSizes
) -> list[str]:
    """What of the numbers that launches go by is not what the host makes of an accepted step.

    Args:
        step: its header and the requests' columns.
        slots: of all tokens that a step may have.
        page_tables: `[max_reqs, max_pages]`.
        metadata: the host's.
        sizes: of the class.
    """
    n = metadata.num_reqs
    columns = step[STEP_HEADER : STEP_HEADER + n * len(REQUEST_COLUMNS)].reshape(len(REQUEST_COLUMNS), n)
    assert metadata.slot_mapping is not None
    stored, tables = metadata.slot_mapping.numpy(), page_tables[:n]
    starts, context = np.arange(sizes.max_pages) * sizes.page_size, metadata.context_lens.numpy()[:, None]
    is_page = (tables >= 0) & (tables < sizes.num_pages)
    # What kernels may bring close must be pages too.
    is_close = starts < context + HOPPER_KEYS + PREFETCHED * sizes.page_size
    differs = {
        "the number of requests": step[0] != n,
        "the pages of a row": step[1] != sizes.max_pages,
        "the requests' lengths": not np.array_equal(columns, metadata.columns),
        "the slots": not np.array_equal(slots[: len(stored)], stored),
        "the slots of requests that are not there": (slots[len(stored) :] != -1).any(),
        "the page tables": ((starts < context) & (tables != metadata.page_tables.numpy())).any(),
        "the page ids behind the contexts": (is_close & ~is_page).any(),
    }
    return [f"{text} differ from the host's" for text, is_so in differs.items() if is_so]
