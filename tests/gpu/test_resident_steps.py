"""Resident steps through a real server on another GPU: the bits of the backend in process, refusals, other work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attnd
from attnd.planes.cuda.resident import ResidentSteps
from tests.e2e.test_examples import numbers, printed
from tests.gpu import devices
from tests.servers import ServerProcess

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(devices.reason_against()), reason=devices.reason_against())]

PAGE, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 16, 8, 2, 64, 3
PAGES_OF_REQUEST, NUM_REQS = 20, 6
GEOMETRY: dict[str, Any] = {
    "num_layers": LAYERS,
    "num_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "dtype": torch.bfloat16,
    "page_size": PAGE,
    "num_pages": PAGES_OF_REQUEST * NUM_REQS,
    "ttl_s": 600,
    "backend": "triton_grouped",  # auto may choose cuDNN in process, and not in a server with cuda planes
}
TABLES = torch.randperm(PAGES_OF_REQUEST * NUM_REQS, generator=torch.Generator().manual_seed(7)).view(NUM_REQS, -1)
DEVICE = f"cuda:{devices.WORKER}"
# Seconds: longer than anything here should take.
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def inproc() -> Iterator[attnd.Client]:
    with attnd.connect("inproc://") as client:
        yield client


def number_of(what: str, default: int) -> int:
    """How often something is done: for the record more often than each time."""
    return int(os.environ.get(f"ATTND_TEST_{what}", str(default)))


def steps_of(session: Any, **more: Any) -> ResidentSteps:
    steps = session.resident(HEADS, max_reqs=NUM_REQS, max_pages=PAGES_OF_REQUEST, **more)
    assert isinstance(steps, ResidentSteps)
    steps.page_tables.copy_(TABLES)
    return steps


def tokens(num_tokens: int) -> list[torch.Tensor]:
    shapes = ((num_tokens, HEADS, HEAD_DIM), (num_tokens, KV_HEADS, HEAD_DIM), (num_tokens, KV_HEADS, HEAD_DIM))
    return [torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for shape in shapes]


def slots(context_lens: list[int], query_len: int, stored: list[int]) -> list[int]:
    found = []
    for request, (length, count) in enumerate(zip(context_lens, stored, strict=True)):
        for token in range(query_len):
            position = length + token
            slot = int(TABLES[request, position // PAGE]) * PAGE + position % PAGE
            found.append(slot if token < count else -1)
    return found


class Pair:
    """A session with resident steps, and one in process that computes the same by messages."""

    def __init__(self, ours: Any, theirs: Any, query_len: int = 1, **more: Any) -> None:
        self.query_len = query_len
        self.session, self.reference = ours, theirs
        self.steps = steps_of(ours, query_len=query_len, **more)
        self.mask = {"mask": more.get("mask", "causal"), "block_size": more.get("block_size", 0)}

    def both(self, context_lens: list[int], stored: list[int], calls: list[list[torch.Tensor]]) -> None:
        """One step on each; the same bits."""
        n = len(context_lens)
        self.steps.context_lens[:n].copy_(torch.tensor(context_lens))
        self.steps.stored_lens[:n].copy_(torch.tensor(stored))
        self.steps.begin(n)
        outputs = [self.steps.attend(layer, *call) for layer, call in enumerate(calls)]
        self.steps.finish()
        self.check(context_lens, stored, calls, outputs)

    def check(
        self, context_lens: list[int], stored: list[int], calls: list[list[torch.Tensor]], outputs: list[torch.Tensor]
    ) -> None:
        n = len(context_lens)
        metadata = attnd.StepMetadata(
            [self.query_len] * n,
            context_lens,
            TABLES[:n],
            slots(context_lens, self.query_len, stored),
            kind="decode",
            **self.mask,
        )
        reference = self.reference.step(metadata)
        for layer, (call, output) in enumerate(zip(calls, outputs, strict=True)):
            expected = reference.attend(layer, *(each.cpu() for each in call))
            assert torch.equal(output.cpu(), expected), f"layer {layer} of {context_lens}"


def test_outputs_are_those_of_inproc_bit_for_bit(client: attnd.Client, inproc: attnd.Client) -> None:
    with (
        client.create_cache(**GEOMETRY) as one,
        inproc.create_cache(**GEOMETRY) as other,
        one.session(plane="cuda") as ours,
        other.session() as theirs,
    ):
        pair = Pair(ours, theirs)
        lengths = [0, 1, PAGE - 1, PAGE, 2 * PAGE - 2, 37]
        for step in range(40):
            n = 1 + step % NUM_REQS
            pair.both(lengths[:n], [1] * n, [tokens(n) for _ in range(LAYERS)])
            lengths[:n] = [length + 1 for length in lengths[:n]]
        assert ours.timings().resident == 40
        assert ours.timings().backend == "triton_grouped"
        assert one.written_pages() == other.written_pages()
        for layer in range(LAYERS):
            kept = [cache.read_kv(layer, range(GEOMETRY["num_pages"] * PAGE), torch.empty(0)) for cache in (one, other)]
            assert all(torch.equal(*each) for each in zip(*kept, strict=True))


def test_a_graph_advances_the_lengths_itself(client: attnd.Client, inproc: attnd.Client) -> None:
    with (
        client.create_cache(**GEOMETRY) as one,
        inproc.create_cache(**GEOMETRY) as other,
        one.session(plane="cuda") as ours,
        other.session() as theirs,
    ):
        pair = Pair(ours, theirs)
        steps, n, count = pair.steps, 4, 50
        calls = [tokens(n) for _ in range(LAYERS)]
        kept = torch.empty(count, LAYERS, n, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
        number = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        lengths = [5, 0, 15, 16]
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            steps.context_lens[:n].copy_(torch.tensor(lengths))
            stream.synchronize()
            with devices.capturing(graph, stream):
                steps.begin(n)
                outputs = [steps.attend(layer, *call) for layer, call in enumerate(calls)]
                kept.index_copy_(0, number, torch.stack(outputs)[None])
                steps.context_lens[:n].add_(1)
                number.add_(1)
            for _ in range(count):
                graph.replay()
            steps.finish()
        assert steps.num_done == count
        for step in range(count):
            pair.check([length + step for length in lengths], [1] * n, calls, list(kept[step]))


def test_very_many_steps(client: attnd.Client) -> None:
    """None hangs, is lost or comes twice: each request's only token sees itself, and is another one in each step."""
    count, n, together = number_of("STEPS", 20_000), 4, 100
    with client.create_cache(**GEOMETRY) as cache, cache.session(plane="cuda") as session:
        steps = steps_of(session)
        q, k, _ = tokens(n)
        number, wrong = (torch.zeros(1, dtype=torch.int64, device=DEVICE) for _ in range(2))
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

        def step() -> None:
            number.add_(1)
            v = (number % 251).to(torch.bfloat16).expand(n, KV_HEADS, HEAD_DIM)
            steps.begin(n)
            for layer in range(LAYERS):
                wrong.add_((steps.attend(layer, q, k, v + layer) != v[:, :1] + layer).any())

        with torch.cuda.stream(stream):
            step()
            steps.finish()
            with devices.capturing(graph, stream):
                for _ in range(together):
                    step()
            for round_ in range(count // together):
                graph.replay()
                if round_ % 10 == 9:
                    steps.finish()
            steps.finish()
        assert steps.num_done == int(number) == 1 + count // together * together
        assert not int(wrong)


def test_the_example_of_two_halves(server: ServerProcess) -> None:
    """Both halves are sessions of one cache."""
    example, alone = printed("two_halves", server.address), printed("two_halves")
    assert example[-1] == "resident steps: 40 of 40"
    torch.testing.assert_close(numbers(example[:4]), numbers(alone[1:5]), atol=0.3, rtol=0)


@pytest.mark.parametrize(("mask", "block_size"), [("causal", 0), ("block_causal", 4), ("bidirectional", 0)])
def test_blocks_of_which_some_tokens_are_stored(
    client: attnd.Client, inproc: attnd.Client, mask: str, block_size: int
) -> None:
    with (
        client.create_cache(**GEOMETRY) as one,
        inproc.create_cache(**GEOMETRY) as other,
        one.session(plane="cuda") as ours,
        other.session() as theirs,
    ):
        pair = Pair(ours, theirs, query_len=4, mask=mask, block_size=block_size)
        lengths = [0, 12, 16]
        for step in range(12):
            stored = [step % 5, 4, 0]
            pair.both(lengths, stored, [tokens(4 * 3) for _ in range(LAYERS)])
            lengths = [length + count for length, count in zip(lengths, stored, strict=True)]


def test_a_refusal_stays_until_it_was_told(client: attnd.Client) -> None:
    with client.create_cache(**GEOMETRY) as cache, cache.session(plane="cuda") as session:
        steps = steps_of(session)

        def step(n: int = 2) -> None:
            steps.begin(n)
            for layer in range(LAYERS):
                steps.attend(layer, *tokens(n))

        step()
        steps.finish()
        assert sorted(cache.written_pages()) == sorted(TABLES[:2, 0].tolist())
        steps.page_tables[1, 0] = 1 << 20
        step()
        steps.page_tables[1, 0] = int(TABLES[1, 0])
        steps.context_lens.fill_(PAGE)  # would write another page
        step()
        with pytest.raises(
            attnd.InvalidRequest, match=r"page_tables\[1, 0\] is 1048576, but the cache has pages 0..119"
        ):
            steps.finish()
        assert sorted(cache.written_pages()) == sorted(TABLES[:2, 0].tolist())
        step()
        steps.finish()
        assert sorted(cache.written_pages()) == sorted(TABLES[:2, :2].ravel().tolist())


def test_other_steps_and_copies_between(client: attnd.Client, inproc: attnd.Client) -> None:
    with (
        client.create_cache(**GEOMETRY) as one,
        inproc.create_cache(**GEOMETRY) as other,
        one.session(plane="cuda") as ours,
        other.session() as theirs,
    ):
        pair = Pair(ours, theirs)
        for start in range(0, 3 * PAGE, PAGE):
            # A prefill by message, then resident steps that read it, then a copy of the page, which the next one reads.
            prefill = attnd.StepMetadata([PAGE], [start], TABLES[:1], slots([start], PAGE, [PAGE]), kind="prefill")
            calls = [tokens(PAGE) for _ in range(LAYERS)]
            step = ours.step(prefill, num_heads=HEADS)
            outputs = [step.attend(layer, *call) for layer, call in enumerate(calls)]
            step.finish()
            expected = theirs.step(prefill)
            for layer, call in enumerate(calls):
                assert torch.equal(outputs[layer].cpu(), expected.attend(layer, *(each.cpu() for each in call)))
            pair.both([start + PAGE], [0], [tokens(1) for _ in range(LAYERS)])
            for cache in (one, other):
                cache.copy_pages([int(TABLES[0, start // PAGE])], [int(TABLES[1, start // PAGE])])
            pair.both([start + PAGE, start + PAGE], [0, 0], [tokens(2) for _ in range(LAYERS)])
            time.sleep(0.1 * (start > 0))  # parked meanwhile


def test_a_cache_that_is_deleted_gives_its_memory_back(client: attnd.Client) -> None:
    cache = client.create_cache(**GEOMETRY)
    with cache.session(plane="cuda") as session:
        steps = steps_of(session)

        def step() -> None:
            steps.begin(1)
            for layer in range(LAYERS):
                steps.attend(layer, *tokens(1))
            steps.finish()

        def steps_until_it_fails() -> None:
            for _ in range(100):
                step()
                time.sleep(0.01)

        step()
        cache.delete()
        with pytest.raises(attnd.AttndError):
            steps_until_it_fails()


def test_idle_sessions_hold_up_nobody(client: attnd.Client) -> None:
    """New kernels, caches, warm-ups and planes come as if nobody had resident steps."""
    caches = [client.create_cache(**GEOMETRY) for _ in range(8)]
    sessions = [cache.session(plane="cuda") for cache in caches]
    try:
        for session in sessions:
            steps = steps_of(session)
            steps.begin(2)
            for layer in range(LAYERS):
                steps.attend(layer, *tokens(2))
            steps.finish()
        with client.create_cache(**{**GEOMETRY, "head_dim": 128, "page_size": 32}) as new, new.session() as theirs:
            new.warm_up(num_heads=HEADS, max_reqs=2)
            step = theirs.step(attnd.StepMetadata([3], [0], [[0]], range(3)))
            q, k, v = torch.randn(3, HEADS, 128), torch.randn(3, KV_HEADS, 128), torch.randn(3, KV_HEADS, 128)
            for layer in range(LAYERS):
                step.attend(layer, *(each.to(torch.bfloat16) for each in (q, k, v)))
    finally:
        for session in sessions:
            session.close()
        for cache in caches:
            cache.delete()


def test_inputs_and_outputs_in_place_have_the_same_bits(client: attnd.Client, inproc: attnd.Client) -> None:
    with (
        client.create_cache(**GEOMETRY) as one,
        inproc.create_cache(**GEOMETRY) as other,
        one.session(plane="cuda") as ours,
        other.session() as theirs,
    ):
        pair = Pair(ours, theirs)
        lengths = [3, 20, 0]
        for _ in range(20):
            calls = [tokens(len(lengths)) for _ in range(LAYERS)]
            pair.steps.context_lens[: len(lengths)].copy_(torch.tensor(lengths))
            pair.steps.begin(len(lengths))
            outputs = []
            for layer, call in enumerate(calls):
                inputs = pair.steps.inputs(layer, len(lengths))
                for there, here in zip(inputs, call, strict=True):
                    there.copy_(here)
                outputs.append(pair.steps.attend(layer, *inputs, copies=False).clone())
            pair.steps.finish()
            pair.check(lengths, [1] * len(lengths), calls, outputs)
            lengths = [length + 1 for length in lengths]


def test_a_copy_of_pages_is_there_for_the_next_step(client: attnd.Client) -> None:
    with client.create_cache(**GEOMETRY) as cache, cache.session(plane="cuda") as session:
        steps = steps_of(session)
        q, k, v = tokens(1)
        for source in (0, 1):  # two pages with different tokens
            store = attnd.StepMetadata(
                [PAGE], [0], [[source]], range(source * PAGE, (source + 1) * PAGE), store_only=True
            )
            step = session.step(store, num_heads=HEADS)
            for layer in range(LAYERS):
                step.attend(layer, None, *tokens(PAGE)[1:])
            step.finish()
        steps.stored_lens.fill_(0)
        steps.context_lens.fill_(PAGE)

        def read(page: int) -> torch.Tensor:
            steps.page_tables[0, 0] = page
            steps.begin(1)
            output = [steps.attend(layer, q, k, v) for layer in range(LAYERS)]
            steps.finish()
            return torch.stack(output)

        expected = [read(0), read(1)]
        assert not torch.equal(*expected)
        for round_ in range(number_of("COPIES", 300)):
            cache.copy_pages([round_ % 2], [5])
            assert torch.equal(read(5), expected[round_ % 2]), f"round {round_}"


def test_hostile_metadata_reaches_nobody_elses_pages(client: attnd.Client) -> None:
    """Random numbers, written again and again while the GPU takes them, by a stream that knows no order."""
    random = torch.Generator(DEVICE).manual_seed(3)
    with (
        client.create_cache(**GEOMETRY) as canary,
        client.create_cache(**GEOMETRY) as cache,
        canary.session(plane="inline") as filling,
        cache.session(plane="cuda") as session,
    ):
        num_slots = GEOMETRY["num_pages"] * PAGE
        table = [list(range(GEOMETRY["num_pages"]))]
        step = filling.step(attnd.StepMetadata([num_slots], [0], table, range(num_slots), store_only=True))
        for layer in range(LAYERS):
            step.attend(layer, None, *(each.cpu() for each in tokens(num_slots)[1:]))
        before = [canary.read_kv(layer, range(num_slots), torch.empty(0)) for layer in range(LAYERS)]
        steps = steps_of(session)
        other = torch.cuda.Stream()
        num_refused = num_served = 0
        for round_ in range(400):
            wild = torch.randint(-(1 << 31), (1 << 31) - 1, (2, NUM_REQS), generator=random, device=DEVICE)
            near = torch.randint(-3, PAGES_OF_REQUEST * PAGE + 3, (2, NUM_REQS), generator=random, device=DEVICE)
            steps.context_lens.copy_((wild if round_ % 3 == 0 else near)[0])
            steps.stored_lens.copy_((wild if round_ % 5 == 0 else near % 3)[1])
            pages = torch.randint(
                -2, GEOMETRY["num_pages"] + 2, steps.page_tables.shape, generator=random, device=DEVICE
            )
            steps.page_tables.copy_(pages if round_ % 2 else pages.clamp(0, GEOMETRY["num_pages"] - 1))
            torch.cuda.current_stream().synchronize()
            with torch.cuda.stream(other):
                for _ in range(20):
                    steps.page_tables.random_(-(1 << 31), (1 << 31) - 1)
            steps.begin(NUM_REQS)
            for layer in range(LAYERS):
                steps.attend(layer, *tokens(NUM_REQS))
            other.synchronize()
            try:
                steps.finish()
                num_served += 1
            except attnd.InvalidRequest:
                num_refused += 1
        assert num_refused > 100, (num_refused, num_served)
        after = [canary.read_kv(layer, range(num_slots), torch.empty(0)) for layer in range(LAYERS)]
        for one, two in zip(before, after, strict=True):
            assert all(torch.equal(*each) for each in zip(one, two, strict=True))
        # And the session is as good as before.
        steps.page_tables.copy_(TABLES)
        steps.context_lens.fill_(0)
        steps.stored_lens.fill_(1)
        steps.begin(2)
        for layer in range(LAYERS):
            q, k, v = tokens(2)
            output = steps.attend(layer, q, k, v)
        steps.finish()
        assert torch.equal(output, v.repeat_interleave(HEADS // KV_HEADS, dim=1))


WORKER = """
import sys, torch, attnd
torch.cuda.set_device(torch.cuda.device_count() - 1)
heads, layers = 8, 3
client = attnd.connect(sys.argv[1], timeout_s=30)
cache = client.create_cache(num_layers=layers, num_kv_heads=2, head_dim=64, dtype="bfloat16", num_pages=64, ttl_s=5)
session = cache.session(plane="cuda")
steps = session.resident(heads, max_reqs=4, max_pages=8)
steps.page_tables.copy_(torch.arange(32).view(4, 8))
shape = lambda h: torch.randn(4, h, 64, dtype=torch.bfloat16, device="cuda")
calls = [(shape(heads), shape(2), shape(2)) for _ in range(layers)]
for number in range(1 << 30):
    steps.context_lens.fill_(number % 100)
    steps.begin(4)
    for layer, call in enumerate(calls):
        steps.attend(layer, *call)
    if number % 10 == 0:
        steps.finish()
        print(number, flush=True)
"""


def test_workers_that_are_killed_leave_their_planes(client: attnd.Client, server: ServerProcess) -> None:
    command = [sys.executable, "-c", WORKER, server.address]
    for round_ in range(number_of("CRASHES", 5)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            try:
                assert worker.stdout is not None
                for _ in range(3 + round_ % 5):
                    assert worker.stdout.readline().strip().isdecimal()
            finally:
                worker.send_signal(signal.SIGKILL)
        with client.create_cache(**GEOMETRY) as cache, cache.session(plane="cuda") as session:
            steps = steps_of(session)
            steps.begin(1)
            for layer in range(LAYERS):
                q, k, v = tokens(1)
                output = steps.attend(layer, q, k, v)
            steps.finish()
            assert torch.equal(output, v.repeat_interleave(HEADS // KV_HEADS, dim=1))
