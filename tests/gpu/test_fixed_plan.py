"""Steps through a fixed plan, captured once, have the bits of a plan of their own, and write nothing but their rows."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from attnd_server.attention.backends.base import DecodeShape, FixedPlan
from attnd_server.attention.config import FP8
from attnd_server.attention.kv_split import KVSplitConfig
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from tests.gpu.test_triton import KERNELS, options
from tests.steps import BIDIRECTIONAL, BLOCK_CAUSAL, CAUSAL, PREFIX_FULL, Case, Request

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")]

KERNEL = KERNELS["triton_grouped"]
DEVICE = torch.device("cuda")
NUM_PAGES, NUM_REQS, MAX_CONTEXT_LEN = 4096, 6, 9000
UNTOUCHED = 7.0
LENS = [0, 1, 15, 16, 17, 127, 128, 129, 1000, 2048, 2049, 5000, 8192, MAX_CONTEXT_LEN]


def draw(base: Case, query_len: int, seed: int) -> Case:
    """A step of some requests, with pages of their own in no order."""
    numbers = random.Random(seed)
    pages = numbers.sample(range(NUM_PAGES), NUM_PAGES)
    requests = []
    for _ in range(numbers.randint(1, NUM_REQS)):
        context_len = numbers.choice([*LENS, numbers.randint(0, MAX_CONTEXT_LEN)])
        prefix_len = numbers.randint(0, context_len + query_len)
        request = Request(
            context_len=context_len,
            query_len=query_len,
            valid_len=numbers.choice([query_len, query_len, numbers.randint(0, query_len)]),
            pages=[pages.pop() for _ in range(-(-context_len // base.page_size))],
            mask=numbers.choice([CAUSAL, BLOCK_CAUSAL, BIDIRECTIONAL, PREFIX_FULL]),
            block_size=numbers.choice([1, 4, 32]),
            prefix_len=prefix_len,
            padded_prefix_len=prefix_len + numbers.randint(0, 150),
        )
        requests.append(request)
    columns = max(len(request.pages) for request in requests) + numbers.randint(0, 2)
    padded = [replace(request, pages=request.pages + [-1] * (columns - len(request.pages))) for request in requests]
    return replace(base, requests=padded, mask_prefix_hole=numbers.random() < 0.3)


@dataclass
class Bench:
    """A fixed plan with its tensors, captured; and what the same step gives without it."""

    case: Case
    options: AttentionOptions
    kv_split: KVSplitConfig
    plan: FixedPlan
    inputs: list[Any]  # q, k, v and the layer's pages
    output: torch.Tensor
    lse: torch.Tensor
    graph: torch.cuda.CUDAGraph

    def fill(self, case: Case) -> AttentionMetadata:
        """Fresh numbers for a step; NaN wherever nothing may look."""
        new, pages = self.inputs[:3], self.inputs[3][:2]
        for tensor in (*new, *pages):
            tensor.copy_(torch.randn(tensor.shape, device=DEVICE))
        for tensor in new:
            tensor[case.num_tokens :] = math.nan
        positions = torch.arange(case.page_size)
        is_unused = torch.ones(NUM_PAGES, case.page_size, dtype=torch.bool)
        for request in case.requests:
            num_pages = -(-request.context_len // case.page_size)
            used = torch.arange(num_pages)[:, None] * case.page_size + positions < request.context_len
            is_unused[request.pages[:num_pages]] = ~used
        for tensor in pages:
            raw, nan = (tensor, math.nan) if tensor.dtype is not FP8 else (tensor.view(torch.uint8), 0x7F)
            raw[is_unused.to(DEVICE)] = nan
        self.output.fill_(UNTOUCHED)
        self.lse.fill_(UNTOUCHED)
        return case.metadata()

    def expected(self, metadata: AttentionMetadata) -> tuple[torch.Tensor, torch.Tensor]:
        """What a plan of its own gives the step."""
        config = replace(self.case.config(), kv_split=self.kv_split)
        plan = KERNEL.plan(config, metadata, self.options, DEVICE)
        new = (tensor[: metadata.num_tokens] for tensor in self.inputs[:3])
        output, lse = KERNEL.run(plan, *new, *self.inputs[3:])
        assert lse is not None
        return output, lse

    def check(self, metadata: AttentionMetadata, output: torch.Tensor, lse: torch.Tensor) -> None:
        num_tokens = metadata.num_tokens
        for found, wanted in zip((output, lse), self.expected(metadata), strict=True):
            assert torch.equal(found[:num_tokens], wanted)
            assert (found[num_tokens:] == UNTOUCHED).all()
        assert output.isfinite().all()


def bench(case: Case, query_len: int, kv_split: KVSplitConfig) -> Bench:
    config, opts = replace(case.config(), kv_split=kv_split), options(case)
    plan = KERNEL.fixed_plan(config, DecodeShape(NUM_REQS, query_len, MAX_CONTEXT_LEN), opts, DEVICE)
    assert not isinstance(plan, str), plan
    num_rows = NUM_REQS * query_len
    shapes = [
        (num_rows, case.num_heads, case.head_dim),
        (num_rows, case.num_kv_heads, case.head_dim),
        (num_rows, case.num_kv_heads, case.head_dim_v),
        config.k_shape,
        config.v_shape,
    ]
    dtypes = [case.dtype] * 3 + [config.kv_dtype] * 2
    q, k, v, *pages = (
        torch.zeros(shape, dtype=dtype, device=DEVICE) for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    if config.is_quantised:
        pages += [torch.rand(case.num_kv_heads, device=DEVICE) + 0.5 for _ in range(2)]
    inputs = [q, k, v, LayerPages(*pages)]
    output = torch.zeros(num_rows, case.num_heads, case.head_dim_v, dtype=case.dtype, device=DEVICE)
    lse = torch.zeros(num_rows, case.num_heads, device=DEVICE)
    result = Bench(case, opts, kv_split, plan, inputs, output, lse, torch.cuda.CUDAGraph())
    metadata = result.fill(draw(case, query_len, seed=0))
    assert plan.refusal(metadata) is None
    plan.update(metadata)
    plan.launch(output, lse, *inputs)  # compiles
    result.check(metadata, output, lse)
    with torch.cuda.graph(result.graph):
        plan.launch(output, lse, *inputs)
    return result


PLAIN = Case([], num_kv_heads=2, group=4, head_dim=128, head_dim_v=128, num_pages=NUM_PAGES, dtype=torch.bfloat16)
CASES = {
    "plain": PLAIN,
    "one_head": replace(PLAIN, num_kv_heads=1, group=8, head_dim=64, head_dim_v=64, page_size=32),
    "options": replace(PLAIN, num_kv_heads=8, group=3, softcap=20.0, window=700, alibi=True, sinks=True),
    "fp8": replace(PLAIN, kv_dtype=FP8, v_dtype=None, k_scales=(0.5,), v_scales=(2.0,)),
    "wide": replace(PLAIN, group=1, head_dim=256, head_dim_v=256, dtype=torch.float16),
}
SPLITS = {
    "default": KVSplitConfig(),
    "own_length": KVSplitConfig(batch_invariant=True),
    "even": KVSplitConfig(batch_invariant=False),
    "few": KVSplitConfig(chunk_size=128, max_splits=5),
}


CELLS = [(case, "default", query_len) for case in CASES for query_len in (1, 5, 32) if (case, query_len) != ("fp8", 32)]
CELLS += [("plain", kv_split, query_len) for kv_split in SPLITS for query_len in (1, 5, 32) if kv_split != "default"]


@pytest.mark.parametrize(("case", "kv_split", "query_len"), CELLS)
def test_steps_one_after_the_other(case: str, kv_split: str, query_len: int) -> None:
    made = bench(CASES[case], query_len, SPLITS[kv_split])
    for seed in range(1, 11):
        metadata = made.fill(draw(CASES[case], query_len, seed))
        assert made.plan.refusal(metadata) is None
        made.plan.update(metadata)
        made.graph.replay()
        made.check(metadata, made.output, made.lse)


def test_updates_while_steps_are_queued() -> None:
    made = bench(PLAIN, 1, KVSplitConfig())
    # All read the same pages and tensors, and differ in their lengths.
    longest = made.fill(replace(PLAIN, requests=[Request(5000, 1, 1, list(range(313)))] * NUM_REQS))
    shorter = [
        replace(longest, context_lens=longest.context_lens - torch.arange(NUM_REQS) * 100 * order) for order in range(6)
    ]
    results = [(torch.empty_like(made.output), torch.empty_like(made.lse)) for _ in shorter]
    torch.cuda._sleep(400_000_000)
    for order, (metadata, result) in enumerate(zip(shorter, results, strict=True)):
        made.plan.update(shorter[0])  # replaced before anything runs
        made.plan.update(metadata)
        if order == 0:
            assert not torch.cuda.current_stream().query()  # nobody waited
        made.graph.replay()
        for target, source in zip(result, (made.output, made.lse), strict=True):
            target.copy_(source)
    for metadata, result in zip(shorter, results, strict=True):
        made.check(metadata, *result)
    assert not torch.equal(results[0][0], results[-1][0])


def test_the_largest_step_of_a_large_shape() -> None:
    shape = DecodeShape(300, 1, 40_000)
    config = replace(PLAIN.config(), num_pages=2600)
    opts = options(PLAIN)
    plan = KERNEL.fixed_plan(config, shape, opts, DEVICE)
    assert not isinstance(plan, str)
    pages = list(range(2500))
    lens = [40_000, 1, *random.Random(0).choices(range(3000), k=298)]
    tables = [pages[: -(-length // 16)] for length in lens]
    requests = [
        Request(length, 1, 1, table + [-1] * (2500 - len(table))) for length, table in zip(lens, tables, strict=True)
    ]
    metadata = replace(PLAIN, requests=requests).metadata()
    q, k, v = (torch.randn(300, heads, 128, device=DEVICE).bfloat16() for heads in (8, 2, 2))
    layer = LayerPages(*(torch.randn(2600, 16, 2, 128, device=DEVICE).bfloat16() for _ in range(2)))
    output, lse = torch.empty_like(q), torch.empty(300, 8, device=DEVICE)
    plan.update(metadata)
    plan.launch(output, lse, q, k, v, layer)
    wanted = KERNEL.run(KERNEL.plan(config, metadata, opts, DEVICE), q, k, v, layer)
    assert torch.equal(output, wanted[0])
    assert torch.equal(lse, wanted[1])


def test_what_has_no_fixed_plan() -> None:
    shape, opts = DecodeShape(4, 1, 100), options(PLAIN)
    plain = KERNEL.fixed_plan(replace(PLAIN, dtype=torch.float32).config(), shape, opts, DEVICE)
    assert plain == "Hopper's kernels do not serve this cache on this device"
    assert KERNEL.fixed_plan(PLAIN.config(), replace(shape, num_reqs=1025), opts, DEVICE) == (
        "num_reqs is 1025, but must be 1..1024"
    )
    assert KERNEL.fixed_plan(PLAIN.config(), replace(shape, query_len=257), opts, DEVICE) == (
        "query_len is 257, but must be 1..256"
    )
