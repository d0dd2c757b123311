"""Decode steps that a session takes as resident ones by itself: the bits of the backend in process, whatever comes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attnd
from attnd.integrations.model_session import ModelSession
from tests.gpu import devices
from tests.gpu.test_resident_steps import DEVICE, GEOMETRY, HEADS, LAYERS, NUM_REQS, PAGE, TABLES, slots, tokens

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(devices.reason_against()), reason=devices.reason_against()),
]

# Seconds: longer than anything here should take.
PATIENCE_S = 30.0
LATE = "there are no resident steps yet: their kernels are on their way to the GPU"
Call = list[torch.Tensor]


class Pair:
    """A session on the cuda plane, and one in process; the same steps on both."""

    def __init__(self, client: attnd.Client) -> None:
        self.inproc = attnd.connect("inproc://")
        self.ours, self.theirs = (each.create_cache(**GEOMETRY) for each in (client, self.inproc))
        self.session: Any = self.ours.session(plane="cuda")
        self.reference = self.theirs.session()

    def until_resident(self, metadata: attnd.StepMetadata) -> int:
        """Repeats a step until it is a resident one: kernels may be on their way. Returns how many were resident."""
        deadline = time.monotonic() + PATIENCE_S
        while self.step(metadata):
            assert time.monotonic() < deadline, self.session.by_message
            time.sleep(0.05)
        return int(self.session.timings().resident)

    def step(self, metadata: attnd.StepMetadata, *, finishes: bool = True) -> str:
        """One step, compared bit for bit; why ours went by message."""
        step = self.session.step(metadata, num_heads=HEADS)
        why: str = self.session.by_message
        calls = new_calls(metadata.num_tokens)
        outputs = [step.attend(layer, *call) for layer, call in enumerate(calls)]
        if finishes:
            step.finish()
        self.check(metadata, calls, outputs)
        return why

    def check(self, metadata: attnd.StepMetadata, calls: list[Call], outputs: list[torch.Tensor]) -> None:
        expected = self.reference.step(metadata)
        for layer, (call, output) in enumerate(zip(calls, outputs, strict=True)):
            assert torch.equal(output.cpu(), expected.attend(layer, *(each.cpu() for each in call))), f"layer {layer}"

    def close(self) -> None:
        """Also compares all that was stored."""
        self.session.close()
        every = range(GEOMETRY["num_pages"] * PAGE)
        for layer in range(LAYERS):
            kept = [cache.read_kv(layer, every, torch.empty(0)) for cache in (self.ours, self.theirs)]
            assert all(torch.equal(*each) for each in zip(*kept, strict=True)), f"KV of layer {layer}"
        self.ours.delete()
        self.inproc.close()


@pytest.fixture
def pair(client: attnd.Client) -> Iterator[Pair]:
    made = Pair(client)
    yield made
    made.close()


def new_calls(num_tokens: int) -> list[Call]:
    return [tokens(num_tokens) for _ in range(LAYERS)]


def decode(lengths: list[int], query_len: int = 1, stored: int | None = None, **more: Any) -> attnd.StepMetadata:
    """Requests at so many cached tokens, in tables that are as long as they must be."""
    n, stored = len(lengths), query_len if stored is None else stored
    columns = -(-(max(lengths) + query_len) // PAGE)
    where = slots(lengths, query_len, [stored] * n)
    return attnd.StepMetadata([query_len] * n, lengths, TABLES[:n, :columns], where, kind="decode", **more)


def prefill(lengths: list[int]) -> attnd.StepMetadata:
    n, total = len(lengths), sum(lengths)
    where = [
        slot for r, length in enumerate(lengths) for slot in slots([0] * (r + 1), length, [length] * (r + 1))[-length:]
    ]
    assert len(where) == total
    return attnd.StepMetadata(lengths, [0] * n, TABLES[:n], where, kind="prefill")


def test_a_loop_of_decode_steps(pair: Pair) -> None:
    """Requests come and go, contexts grow over pages, and room is made for them twice."""
    lengths = [0, 1, PAGE - 1, PAGE, 2 * PAGE - 2, 37]
    pair.step(prefill([5, 3]))
    before, said = pair.until_resident(decode(lengths[:1])), []
    for step in range(60):
        n = 1 + step % NUM_REQS
        said.append(pair.step(decode(lengths[:n])))
        lengths[:n] = [length + 1 for length in lengths[:n]]
    assert {why for why in said if why} <= {LATE}  # where there is to be more room
    assert pair.session.timings().resident == before + said.count("")
    lengths[0] = 17 * PAGE
    pair.until_resident(decode(lengths))
    assert pair.session.timings().backend == "triton_grouped"


def test_blocks_and_drafts_and_prefill_between(pair: Pair) -> None:
    lengths, by_message = [4, 30, 16], []
    before = pair.until_resident(decode(lengths, 4, mask="block_causal", block_size=4))
    for turn in range(40):
        if turn % 13 == 5:
            by_message.append(pair.step(prefill([7, 1, 19])))
        blocks = {"mask": "block_causal", "block_size": 4} if turn < 20 else {"mask": "bidirectional"}
        by_message.append(pair.step(decode(lengths, 4, stored=turn % 5, **blocks)))
        lengths = [(length + turn % 5) % (15 * PAGE) for length in lengths]
    assert before + by_message.count("") == pair.session.timings().resident
    assert by_message.count("") >= 25 or LATE in by_message


def test_a_graph_of_the_worker_serves_steps_of_either_kind(pair: Pair) -> None:
    """It was captured in a resident step, and is replayed in such, in steps by message, and after others were made."""
    n, lengths = 3, [9, 0, 31]
    pair.until_resident(decode(lengths))
    calls = new_calls(n)
    graph = torch.cuda.CUDAGraph()
    step = pair.session.step(decode(lengths))
    assert pair.session.by_message == ""
    with devices.capturing(graph, torch.cuda.Stream(DEVICE)):
        outputs = [step.attend(layer, *call) for layer, call in enumerate(calls)]
    kinds = []
    for position in range(24):
        lengths = [length + 1 for length in lengths]
        if position:
            pair.session.uses_resident_steps = position % 4 != 3
            step = pair.session.step(decode(lengths))
            kinds.append(pair.session.by_message)
        else:
            lengths = [length - 1 for length in lengths]
        if position == 12:
            graph.replay()
            step.finish()
            pair.check(decode(lengths), calls, outputs)
            pair.session.uses_resident_steps = True
            pair.step(decode([length + PAGE * 10 for length in lengths]))  # with more pages: others are made
            continue
        for call in calls:
            for tensor in call:
                tensor.normal_()
        graph.replay()
        step.finish()
        pair.check(decode(lengths), calls, outputs)
    assert kinds.count("uses_resident_steps is False") == 6
    assert kinds.count("") + kinds.count(LATE) == 17
    assert kinds.count("") >= 9  # before others were made


def test_a_worker_that_tells_steps_ahead(pair: Pair) -> None:
    """The step that comes behind a resident one goes by message, and waits for it on the server."""
    lengths = [3, 21]
    pair.until_resident(decode(lengths))
    for _ in range(10):
        first, second = decode(lengths), decode([length + 1 for length in lengths])
        step = pair.session.step(first)
        ahead = pair.session.step(second)
        assert pair.session.by_message == "a step before it is not finished"
        for opened, metadata in ((step, first), (ahead, second)):
            calls = new_calls(2)
            outputs = [opened.attend(layer, *call) for layer, call in enumerate(calls)]
            opened.finish()
            pair.check(metadata, calls, outputs)
        lengths = [length + 2 for length in lengths]
    assert pair.session.timings().resident >= 2


def test_a_step_that_nobody_finishes_is_done_all_the_same(pair: Pair) -> None:
    lengths = [3, 21]
    pair.until_resident(decode(lengths))
    for _ in range(30):
        pair.step(decode(lengths), finishes=False)
        lengths = [length + 1 for length in lengths]
    assert pair.session.timings().resident > 2


def test_a_refusal_ends_neither_plane_nor_graph(pair: Pair) -> None:
    pair.until_resident(decode([5, 6]))
    plane = pair.session._plane
    # The first request's new token is in the second one's context.
    wrong = attnd.StepMetadata([1, 1], [5, 6], TABLES[[0, 0]], [*slots([5], 1, [1]), -1], kind="decode")
    step = pair.session.step(wrong)
    assert pair.session.by_message == ""
    for layer, call in enumerate(new_calls(2)):
        step.attend(layer, *call)
    with pytest.raises(attnd.InvalidRequest, match="must not be a slot that request 1 of the step reads"):
        step.finish()
    assert pair.step(decode([5, 6])) == ""
    assert pair.session._plane is plane


def test_a_prompt_as_large_as_the_region_leaves_the_metadata_alone(pair: Pair) -> None:
    """Its tensors would lie where that of resident steps does."""
    pair.until_resident(decode([5, 6]))
    session, most = pair.session, 1
    while session.fits(most + 1024, HEADS):
        most += 1024
    assert not session.fits(most + 1024, HEADS)
    pages = GEOMETRY["num_pages"]
    length = min(most, pages * PAGE)
    metadata = attnd.StepMetadata([length], [0], [TABLES.ravel().tolist()], None, kind="prefill")
    pair.step(metadata)
    assert pair.step(decode([5, 6])) == ""


def test_passes_of_a_model(client: attnd.Client) -> None:
    with client.create_cache(**GEOMETRY) as cache:
        session = ModelSession(cache)

        def run(length: int) -> None:
            begun = session.begin(decode([length, length + 3]))
            for layer, call in enumerate(new_calls(2)):
                begun.attend(layer, *call, attnd.AttentionOptions())
            begun.finish()

        deadline = time.monotonic() + PATIENCE_S
        while not (before := session.timings().resident) and time.monotonic() < deadline:
            run(0)
        for length in range(12):
            run(length)
        assert session.plane == "cuda", session.refusals
        assert session.timings().resident == before + 12
        session.close()


@torch.no_grad()
def test_generation_by_transformers(client: attnd.Client) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from attnd.integrations.transformers import RemoteCache

    shape = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(3)
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=3, head_dim=64, eos_token_id=None, **shape)
    model = transformers.LlamaForCausalLM(config).to(DEVICE).bfloat16().eval()
    model.set_attn_implementation("attnd")
    ids = torch.randint(2, 60, (3, 11), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))

    def generated(plane: str) -> tuple[torch.Tensor, int]:
        """Tokens, and how many steps were resident."""
        more = {"max_tokens": 1024, "dtype": model.dtype, "page_size": 16, "plane": plane}
        with RemoteCache(client, model.config, **more) as cache:
            out = model.generate(ids, past_key_values=cache, max_new_tokens=24, do_sample=False, min_new_tokens=24)
            assert cache.session.plane == plane, cache.session.refusals
            return out, cache.session.timings().resident

    expected, _ = generated("shm")
    deadline = time.monotonic() + PATIENCE_S
    while True:
        tokens_, num_resident = generated("cuda")
        assert torch.equal(tokens_, expected)
        if num_resident >= 20:
            break
        assert time.monotonic() < deadline  # kernels may be on their way
