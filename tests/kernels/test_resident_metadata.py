"""A resident step's metadata: the GPU's check decides as the host's validation does, whatever a worker writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from attnd.errors import InvalidRequest
from attnd.protocol.cuda.resident import CONTEXT_LENS, LENS_ROWS, NUM_REQS, STORED_LENS, VALID_LENS, VERSION
from attnd_server.attention.kernels.resident import state as words
from attnd_server.attention.metadata import REQUEST_COLUMNS, AttentionMetadata
from attnd_server.attention.resident import ResidentSizes
from attnd_server.config import ServerConfig
from attnd_server.service.validation import resident_step
from tests import interpreter
from tests.hostile_metadata import config_of
from tests.soak.resident_metadata.verdicts import STEP_HEADER, other_than_the_hosts

pytestmark = pytest.mark.skipif(interpreter.reason_against() is not None, reason=str(interpreter.reason_against()))

PAGE = 4
LIMITS = ServerConfig(max_context_len=64)
# What a private table holds before: numbers that are no page, so that one which is read is found out.
GARBAGE = 1 << 29


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[str]:
    with interpreter.interpreter() as device:
        yield device


def sizes_of(query_len: int = 2, window: int = 0, block_size: int = 1, max_reqs: int = 8) -> ResidentSizes:
    return ResidentSizes(max_reqs, 8, query_len, PAGE, 16, LIMITS.max_context_len, window, block_size)


class Class:
    """Buffers of a class, the worker's memory, and the host's opinion."""

    def __init__(self, sizes: ResidentSizes, device: str) -> None:
        from attnd_server.attention.kernels.resident.metadata import make_buffers

        self.sizes, self.config, self.device = sizes, config_of(sizes), device
        step = torch.zeros(STEP_HEADER + len(REQUEST_COLUMNS) * sizes.max_reqs, dtype=torch.int32, device=device)
        table = torch.full((sizes.max_reqs * sizes.max_pages + 64,), GARBAGE, dtype=torch.int32, device=device)
        self.buffers = make_buffers(sizes, step, table)
        self.lens = torch.zeros(LENS_ROWS, sizes.max_reqs, dtype=torch.int32, device=device)
        self.tables = torch.zeros(sizes.max_reqs, sizes.max_pages, dtype=torch.int32, device=device)

    def write(self, lens: np.ndarray[Any, Any], tables: np.ndarray[Any, Any]) -> None:
        """As a worker does."""
        self.lens.copy_(torch.from_numpy(lens))
        self.tables.copy_(torch.from_numpy(tables))

    def take(self, number: int = 1, came: bool = True) -> None:
        state = self.buffers.state
        state[words.CAME] = int(came)
        if came:
            state[words.STEP] = number
        from attnd_server.attention.kernels.resident.metadata import take_step

        take_step(self.sizes, self.buffers, self.lens, self.tables)

    def word(self, index: int) -> int:
        return int(self.buffers.state[index])

    def verdict(self) -> AttentionMetadata | None:
        """The host's, on the private copy; None: it refuses."""
        sizes = self.sizes
        tables = self.buffers.page_tables[: sizes.max_reqs * sizes.max_pages].cpu().numpy()
        tables = tables.reshape(sizes.max_reqs, sizes.max_pages)
        try:
            return resident_step(self.buffers.lens.cpu().numpy(), tables, sizes, self.config, LIMITS)
        except InvalidRequest:
            return None

    def check_accepted(self, metadata: AttentionMetadata) -> None:
        """What the launches after it go by is the step that the host made of it."""
        sizes = self.sizes
        table = self.buffers.page_tables[: sizes.max_reqs * sizes.max_pages].view(sizes.max_reqs, sizes.max_pages)
        found = (each.cpu().numpy() for each in (self.buffers.step, self.buffers.slots, table))
        assert other_than_the_hosts(*found, metadata, sizes) == []

    def check_empty(self) -> None:
        assert int(self.buffers.step[0]) == 0
        assert bool((self.buffers.slots == -1).all())


def lens_of(sizes: ResidentSizes, *requests: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    lens = np.zeros((LENS_ROWS, sizes.max_reqs), np.int32)
    lens[NUM_REQS, :2] = len(requests), VERSION
    for index, numbers in enumerate(requests):
        lens[CONTEXT_LENS:, index] = numbers
    return lens


def tables_of(sizes: ResidentSizes, *rows: list[int]) -> np.ndarray[Any, Any]:
    tables = np.full((sizes.max_reqs, sizes.max_pages), -1, np.int32)
    for index, row in enumerate(rows):
        tables[index, : len(row)] = row
    return tables


# Of two new tokens, in pages of 4 of 16: lengths (context, valid, stored), tables, and whether it is right.
CASES = [
    ("plain", [(5, 2, 2), (0, 2, 2)], [[1, 2], [3]], True),
    ("a page boundary between the new tokens", [(7, 2, 2)], [[1, 2, 3]], True),
    ("attended and not stored", [(6, 2, 0)], [[1, 2]], True),
    ("the first is stored", [(8, 2, 1)], [[1, 2, 3]], True),
    ("a padded row", [(-2, 2, 0), (4, 2, 2)], [[], [1, 2]], True),
    ("a padded row that stores", [(-2, 2, 1)], [[1]], False),
    ("a page shared as context", [(6, 2, 2), (6, 2, 2)], [[1, 2], [1, 3]], True),
    ("a slot twice", [(4, 2, 2), (4, 2, 2)], [[1, 2], [3, 2]], False),
    ("a slot of another's context", [(4, 2, 2), (6, 2, 2)], [[1, 2], [3, 2]], False),
    ("beside another's context in its page", [(6, 2, 2), (10, 2, 2)], [[1, 2], [3, 2, 4]], False),
    ("behind another's context in its page", [(6, 2, 2), (6, 2, 0)], [[1, 2], [3, 2]], True),
    ("a slot of its own context", [(8, 2, 2)], [[1, 2, 1]], False),
    ("a page past the last", [(5, 2, 2)], [[1, 16]], False),
    ("no page in the context", [(5, 2, 0)], [[-1, 2]], False),
    ("no page for what is stored", [(4, 2, 2)], [[1, -1]], False),
    ("no page for what is not stored", [(4, 2, 0)], [[1, -1]], True),
    ("rubbish past the tokens", [(4, 2, 2)], [[1, 2, 1 << 30, -7]], True),
    ("a negative context", [(-1, 2, 0)], [[1]], False),
    ("a context past the table", [(33, 2, 0)], [[1] * 8], False),
    ("a stored token past the table", [(31, 2, 2)], [[1, 2, 3, 4, 5, 6, 7, 8]], False),
    ("the last slot of the table", [(30, 2, 2)], [[1, 2, 3, 4, 5, 6, 7, 8]], True),
    ("a context beyond 2^31", [((1 << 31) - 1, 2, 2)], [[1]], False),
    ("too many valid", [(4, 3, 2)], [[1, 2]], False),
    ("negative valid", [(4, -1, 2)], [[1, 2]], False),
    ("too many stored", [(4, 2, 3)], [[1, 2]], False),
    ("negative stored", [(4, 2, -1)], [[1, 2]], False),
    ("more are stored than count", [(4, 1, 2)], [[1, 2]], True),
    ("as many requests as there may be", [(1, 2, 2)] * 8, [[page] for page in range(8)], True),
]


@pytest.mark.parametrize(("lens", "tables", "is_right"), [each[1:] for each in CASES], ids=[each[0] for each in CASES])
def test_the_gpu_decides_as_the_host(device: str, lens: Any, tables: Any, is_right: bool) -> None:
    sizes = sizes_of()
    ours = Class(sizes, device)
    ours.write(lens_of(sizes, *lens), tables_of(sizes, *tables))
    ours.take(number=7)
    metadata = ours.verdict()
    assert (metadata is not None) == is_right
    assert ours.word(words.REFUSED) == (0 if is_right else 7)
    if metadata is None:
        ours.check_empty()
        assert not bool(ours.buffers.written.any())
    else:
        ours.check_accepted(metadata)
        slots = metadata.slot_mapping
        assert slots is not None
        assert set(ours.buffers.written.nonzero().ravel().tolist()) == set((slots[slots >= 0] // PAGE).tolist())


@pytest.mark.parametrize("number", [0, -1, 9, 1 << 30, -(1 << 31)])
def test_a_number_of_requests_that_there_cannot_be(device: str, number: int) -> None:
    ours = Class(sizes_of(), device)
    lens = lens_of(ours.sizes, *[(1, 2, 2)] * 8)
    lens[NUM_REQS, 0] = number
    ours.write(lens, tables_of(ours.sizes, *[[page] for page in range(8)]))
    ours.take()
    assert ours.verdict() is None
    assert ours.word(words.REFUSED) == 1
    ours.check_empty()


def test_another_version(device: str) -> None:
    ours = Class(sizes_of(), device)
    lens = lens_of(ours.sizes, (1, 2, 2))
    lens[NUM_REQS, 1] = VERSION + 1
    ours.write(lens, tables_of(ours.sizes, [1]))
    ours.take()
    assert ours.verdict() is None
    ours.check_empty()


def test_a_launch_that_was_revoked_leaves_nothing(device: str) -> None:
    ours = Class(sizes_of(), device)
    ours.write(lens_of(ours.sizes, (1, 2, 2)), tables_of(ours.sizes, [1]))
    ours.take(number=1)
    ours.take(came=False)
    ours.check_empty()
    assert ours.word(words.REFUSED) == 0
    assert ours.word(words.STEP) == 1
    ours.take(number=2)
    assert int(ours.buffers.step[0]) == 1


def test_a_refusal_stays_until_it_is_taken_back(device: str) -> None:
    ours = Class(sizes_of(), device)
    ours.write(lens_of(ours.sizes, (-1, 2, 2)), tables_of(ours.sizes, [1]))
    ours.take(number=3)
    ours.write(lens_of(ours.sizes, (1, 2, 2)), tables_of(ours.sizes, [1]))
    ours.take(number=4)
    ours.check_empty()
    assert int(ours.buffers.lens[CONTEXT_LENS, 0]) == -1  # for the host, which says what was wrong
    assert ours.word(words.REFUSED) == 3
    assert not bool(ours.buffers.written.any())
    ours.buffers.state[words.REFUSED] = 0
    ours.take(number=5)
    assert ours.word(words.REFUSED) == 0
    assert int(ours.buffers.step[0]) == 1


def test_what_the_window_hides_is_not_read(device: str) -> None:
    ours = Class(sizes_of(window=5), device)
    # Of 14 tokens the first new one sees the last 4: pages 0 to 1 are hidden, one of them is nobody's.
    lens = lens_of(ours.sizes, (14, 2, 2), (4, 2, 2))
    ours.write(lens, tables_of(ours.sizes, [7, 1 << 20, 3, 4], [9, 7]))
    ours.take()
    metadata = ours.verdict()
    assert metadata is not None
    assert ours.word(words.REFUSED) == 0
    ours.check_accepted(metadata)


def random_step(sizes: ResidentSizes, random: np.random.Generator) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Mostly right: half of the steps have one thing changed, or their pages shared at random."""
    n = int(random.integers(1, sizes.max_reqs + 1))
    most = sizes.max_pages * PAGE
    lens = np.zeros((LENS_ROWS, sizes.max_reqs), np.int32)
    lens[NUM_REQS, :2] = n, VERSION
    lens[CONTEXT_LENS] = random.integers(0, most // random.integers(1, 9) - sizes.query_len, sizes.max_reqs)
    lens[VALID_LENS] = random.integers(0, sizes.query_len + 1, sizes.max_reqs)
    lens[STORED_LENS] = random.integers(0, sizes.query_len + 1, sizes.max_reqs)
    tables = random.integers(0, sizes.num_pages, (sizes.max_reqs, sizes.max_pages)).astype(np.int32)
    if random.random() < 0.7:  # pages of their own for what is stored
        own = random.permutation(sizes.num_pages)
        rest, own = own[: sizes.num_pages // 2], own[sizes.num_pages // 2 :]
        tables = random.choice(rest, tables.shape).astype(np.int32)
        for request in range(n):
            first = lens[CONTEXT_LENS, request] // PAGE
            for offset in range(min(2, sizes.max_pages - first)):
                tables[request, first + offset] = own[(2 * request + offset) % len(own)]
    if random.random() < 0.3:
        row, column = random.integers(0, LENS_ROWS), random.integers(0, n)
        lens[row, column] = random.choice([-(1 << 31), -5, -sizes.query_len, -1, 0, 3, 63, 65, 1 << 20, (1 << 31) - 1])
    if random.random() < 0.2:
        tables[random.integers(0, n), random.integers(0, sizes.max_pages)] = random.choice([-2, -1, 16, 1 << 30])
    return lens, tables


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("query_len", [1, 3])
def test_random_steps_get_the_verdict_of_the_host(device: str, query_len: int, window: int) -> None:
    sizes = sizes_of(query_len, window, block_size=query_len, max_reqs=4 if device == "cpu" else 8)
    ours, random = Class(sizes, device), np.random.default_rng(100 * query_len + window)
    counts = [0, 0]
    for number in range(1, 50 if device == "cpu" else 5000):
        ours.write(*random_step(sizes, random))
        ours.take(number)
        metadata = ours.verdict()
        counts[metadata is not None] += 1
        assert ours.word(words.REFUSED) == (0 if metadata is not None else number)
        if metadata is None:
            ours.check_empty()
            ours.buffers.state[words.REFUSED] = 0
        else:
            ours.check_accepted(metadata)
    assert min(counts) > 5, counts
