"""What `attnd doctor` has a server attend, and what must come back, in plain Python: a worker may have no torch."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from operator import mul

import attnd
from attnd.v1 import tensor_pb2

# Requests of a call, each with one new token after so many.
NUM_REQS, CONTEXT_LEN = (1, 16), 64
# Heads of an 8B model.
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
PAGE_SIZE = 16
PAGES_PER_REQUEST = -(-(CONTEXT_LEN + 1) // PAGE_SIZE)
_NEW_PAGE, _OFFSET = divmod(CONTEXT_LEN, PAGE_SIZE)
# Different values of the elements.
_NUM_VALUES = 1 << 12


class Case:
    """Random requests, each on pages of its own in random order.

    Attributes:
        num_pages: pages of the cache.
        page_tables: of each request.
        k: of all slots, then of the new tokens; float32, a row a token.
        v: likewise.
        q: of the new tokens.
    """

    def __init__(self) -> None:
        """Draws them."""
        most = max(NUM_REQS)
        self.num_pages = most * PAGES_PER_REQUEST
        pages = random.sample(range(self.num_pages), self.num_pages)
        self.page_tables = [
            pages[first : first + PAGES_PER_REQUEST] for first in range(0, len(pages), PAGES_PER_REQUEST)
        ]
        values = array("f", (random.gauss(0, 1) for _ in range(_NUM_VALUES)))
        num_tokens = self.num_pages * PAGE_SIZE + most
        self.k, self.v = (_drawn(values, num_tokens * NUM_KV_HEADS * HEAD_DIM) for _ in range(2))
        self.q = _drawn(values, most * NUM_HEADS * HEAD_DIM)

    @property
    def num_slots(self) -> int:
        """Those of all pages."""
        return self.num_pages * PAGE_SIZE

    def stored(self) -> tuple[range, attnd.Array, attnd.Array]:
        """All slots, and K and V of them."""
        return range(self.num_slots), _rows(self.k, 0, self.num_slots), _rows(self.v, 0, self.num_slots)

    def metadata(self, num_reqs: int) -> attnd.StepMetadata:
        """A decode step of the first requests."""
        tables = self.page_tables[:num_reqs]
        slots = [table[_NEW_PAGE] * PAGE_SIZE + _OFFSET for table in tables]
        return attnd.StepMetadata([1] * num_reqs, [CONTEXT_LEN] * num_reqs, tables, slots, kind="decode")

    def call(self, num_reqs: int) -> tuple[attnd.Array, attnd.Array, attnd.Array]:
        """Q, K and V of that step, `[num_reqs, heads, HEAD_DIM]`."""
        k, v = (_rows(part, self.num_slots, self.num_slots + num_reqs) for part in (self.k, self.v))
        return _rows(self.q, 0, num_reqs, NUM_HEADS), k, v

    def expected(self, num_reqs: int) -> list[float]:
        """What the step gives, `[num_reqs, NUM_HEADS, HEAD_DIM]` in a row, in float64."""
        output: list[float] = []
        group = NUM_HEADS // NUM_KV_HEADS
        for request, table in enumerate(self.page_tables[:num_reqs]):
            tokens = [table[index // PAGE_SIZE] * PAGE_SIZE + index % PAGE_SIZE for index in range(CONTEXT_LEN)]
            tokens.append(self.num_slots + request)
            for kv_head in range(NUM_KV_HEADS):
                k, v = ([_row(part, token, kv_head) for token in tokens] for part in (self.k, self.v))
                columns = list(zip(*v, strict=True))
                for head in range(kv_head * group, (kv_head + 1) * group):
                    q = self.q[(request * NUM_HEADS + head) * HEAD_DIM :][:HEAD_DIM]
                    output += _attended(q, k, columns)
        return output


def error_of(output: attnd.Array, expected: Sequence[float]) -> float:
    """How far `output` is from what is expected, relative to it; NaN if it is none."""
    given = array("f", bytes(output.data))
    if len(given) != len(expected):
        return math.nan
    return math.hypot(*map(float.__sub__, map(float, given), expected)) / math.hypot(*expected)


def _drawn(values: Sequence[float], number: int) -> array[float]:
    return array("f", random.choices(values, k=number))


def _rows(values: array[float], first: int, last: int, num_heads: int = NUM_KV_HEADS) -> attnd.Array:
    row = num_heads * HEAD_DIM
    data = memoryview(values)[first * row : last * row].cast("B")
    return attnd.Array(tensor_pb2.DTYPE_FLOAT32, (last - first, num_heads, HEAD_DIM), data)


def _row(values: array[float], token: int, kv_head: int) -> array[float]:
    first = (token * NUM_KV_HEADS + kv_head) * HEAD_DIM
    return values[first : first + HEAD_DIM]


def _attended(q: Sequence[float], k: Sequence[Sequence[float]], columns: Sequence[Sequence[float]]) -> list[float]:
    """Attention of one head; `columns` are V's by element."""
    scores = [sum(map(mul, q, key)) * HEAD_DIM**-0.5 for key in k]
    most = max(scores)
    weights = [math.exp(score - most) for score in scores]
    total = sum(weights)
    return [sum(map(mul, weights, column)) / total for column in columns]
