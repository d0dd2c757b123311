"""Hopper's kernels against the specification in float64: masks, holes, lengths around tiles and pages, and poison."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnd_server import NaiveAttention, TritonPagedAttention
from attnd_server.attention.kv_split import KVSplitConfig
from attnd_server.attention.metadata import AttentionOptions
from tests.gpu.test_triton import KERNELS, arrays, options, step
from tests.sooner import launched_sooner
from tests.steps import BIDIRECTIONAL, BLOCK_CAUSAL, CAUSAL, PREFIX_FULL, Case, Request
from tests.tolerances import assert_as_exact_as_plain

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")]

NUM_PAGES = 512
KERNEL = KERNELS["triton_grouped"]
DEVICE = torch.device("cuda")
# Query heads of a KV head, head dims, and whether all options are on: one compilation each.
GEOMETRIES = [(4, 128, 128, False), (3, 64, 128, True), (8, 128, 64, False), (1, 256, 256, False), (6, 64, 64, True)]


@st.composite
def requests(draw: st.DrawFn, page_size: int) -> list[Request]:
    pages = list(range(NUM_PAGES))
    shuffler = random.Random(draw(st.integers(0, 2**16)))
    shuffler.shuffle(pages)
    lens = st.sampled_from([0, 1, 15, 16, 17, 33, 100, 127, 128, 129, 255, 300, 513, 700])
    same = draw(st.sampled_from([0, 0, 1, 5, 16, 32]))
    result = []
    for _ in range(draw(st.integers(1, 4))):
        context_len = draw(lens)
        query_len = same or draw(st.sampled_from([1, 2, 7, 16, 33, 64, 130, 300]))
        prefix_len = draw(st.integers(0, context_len + query_len))
        request = Request(
            context_len=context_len,
            query_len=query_len,
            valid_len=draw(st.sampled_from([query_len, query_len, query_len // 2, 0])),
            pages=[pages.pop() for _ in range(-(-context_len // page_size))],
            mask=draw(st.sampled_from([CAUSAL, BLOCK_CAUSAL, BIDIRECTIONAL, PREFIX_FULL])),
            block_size=draw(st.sampled_from([1, 4, 32])),
            prefix_len=prefix_len,
            padded_prefix_len=prefix_len + draw(st.integers(0, 150)),
        )
        if draw(st.integers(0, 9)) == 0:  # a page that is not there
            request = replace(request, pages=[-1 if shuffler.random() < 0.2 else page for page in request.pages])
        result.append(request)
    columns = max(len(request.pages) for request in result)
    return [replace(r, pages=r.pages + [-1] * (columns - len(r.pages))) for r in result]


def plain_case(lens: list[tuple[int, int]], head_dim: int, page_size: int) -> Case:
    """Causal requests of `(context_len, query_len)` without options, whose pages lie in no order."""
    pages = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(0)).tolist()
    columns = -(-max(context_len for context_len, _ in lens) // page_size)
    tables = [[pages.pop() for _ in range(-(-context_len // page_size))] for context_len, _ in lens]
    return Case(
        [
            Request(context_len, query_len, query_len, table + [-1] * (columns - len(table)), CAUSAL)
            for (context_len, query_len), table in zip(lens, tables, strict=True)
        ],
        num_kv_heads=2,
        group=4,
        head_dim=head_dim,
        head_dim_v=head_dim,
        num_pages=NUM_PAGES,
        page_size=page_size,
        dtype=torch.bfloat16,
        scale=head_dim**-0.5,
    )


def check_stand_in(case: Case, rounds: int = 2) -> None:
    """The same bits from the kernel of many rows, again and again, and from what stands in for it."""
    given_arrays, opts = arrays(case), replace(options(case), return_lse=False)
    plan = KERNEL.plan(case.config(), case.metadata(), opts, DEVICE)
    expected, _ = KERNEL.run(plan, *given_arrays)
    assert expected.isfinite().all()
    for round_ in range(rounds):
        with launched_sooner() as names:
            sooner, _ = KERNEL.run(plan, *given_arrays)
        assert names, "none of the requests has so many rows"
        again, _ = KERNEL.run(plan, *given_arrays)
        assert torch.equal(again, expected), f"round {round_} of the kernel itself"
        assert torch.equal(sooner, expected), f"round {round_}: {(sooner != expected).sum()} other elements"


def check(case: Case, kernel: TritonPagedAttention, opts: AttentionOptions) -> None:
    """At most twice the error of the plain computation; zeros, and the sink or -inf, where a row sees nothing.

    The same bits from what stands in for a kernel that is not there yet.
    """
    given_arrays = arrays(case)
    if case.cache_only:
        given_arrays[1] = given_arrays[2] = None
    start = 0
    for request in case.requests:  # what does not count must not matter
        for tensor in given_arrays[1:3]:
            if tensor is not None:
                tensor[start + request.valid_len : start + request.query_len] = math.nan
        start += request.query_len
    config, metadata = case.config(), case.metadata()
    output, lse = kernel.run(kernel.plan(config, metadata, opts, DEVICE), *given_arrays)
    with launched_sooner():
        sooner, sooner_lse = kernel.run(kernel.plan(config, metadata, opts, DEVICE), *given_arrays)
    assert torch.equal(sooner, output)
    assert torch.equal(sooner_lse, lse)
    specification = NaiveAttention(torch.float64)
    doubled = [None if tensor is None else tensor.double() for tensor in given_arrays[:3]]
    exact, exact_lse = specification.run(
        specification.plan(config, metadata, opts, DEVICE), *doubled, *given_arrays[3:]
    )
    plain = NaiveAttention(case.dtype)
    rough, _ = plain.run(plain.plan(config, metadata, opts, DEVICE), *given_arrays)
    blind = exact_lse == -math.inf
    assert torch.equal(lse == -math.inf, blind)
    assert not output[(exact == 0).all(2)].any()
    assert_as_exact_as_plain(output, rough, exact, case.dtype)
    assert (lse - exact_lse)[~blind].abs().sum() <= 1e-3 * max(1, int((~blind).sum()))


@pytest.mark.parametrize(("group", "head_dim", "head_dim_v", "with_options"), GEOMETRIES)
@pytest.mark.parametrize("page_size", [16, 32])
def test_any_step(page_size: int, group: int, head_dim: int, head_dim_v: int, with_options: bool) -> None:
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        drawn=requests(page_size),
        dtype=st.sampled_from([torch.bfloat16, torch.float16]),
        scale=st.sampled_from([head_dim**-0.5, 0.3, -0.1, 0.0]),
        chunk_size=st.sampled_from([0, 0, 128]),
        hole=st.booleans(),
        cache_only=st.sampled_from([False, False, False, True]),
        window=st.sampled_from([1, 100, 129, 5000, 2**30 + 1, 2**32 - 1]),
    )
    def any_step(
        drawn: list[Request],
        dtype: torch.dtype,
        scale: float,
        chunk_size: int,
        hole: bool,
        cache_only: bool,
        window: int,
    ) -> None:
        case = Case(
            drawn,
            num_kv_heads=2,
            group=group,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            num_pages=NUM_PAGES,
            page_size=page_size,
            dtype=dtype,
            scale=scale,
            softcap=20.0 if with_options else 0.0,
            window=window if with_options else 0,
            alibi=with_options,
            sinks=with_options,
            mask_prefix_hole=hole,
            cache_only=cache_only,
        )
        opts = options(case)
        split = KVSplitConfig(chunk_size)

        class Split(TritonPagedAttention):
            def plan(self, config, *args):
                return super().plan(replace(config, kv_split=split), *args)

        check(case, Split(), opts)

    any_step()


# Without options the scale of scores joins the product in the exponent: other sums are rounded than with them.
PLAIN = [(64, 16), (64, 32), (128, 16)]


@pytest.mark.parametrize(("head_dim", "page_size"), PLAIN)
def test_what_stands_in_has_the_bits_without_options(head_dim: int, page_size: int) -> None:
    """Prompts, later chunks of them, and both beside decodes, with lengths around pieces, tiles and pages."""
    draw = random.Random(head_dim + page_size)
    context_lens = [0, 1, 15, 16, 17, 31, 33, 64, 127, 128, 129, 255, 256, 300, 513]
    query_lens = [1, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 300]
    for example in range(40):
        # Every second step has no context; the first request of each has enough rows for the kernel of many.
        known = [0] if example % 2 else context_lens
        lens = [(draw.choice(known), draw.choice(query_lens)) for _ in range(draw.randint(0, 4))]
        check_stand_in(plain_case([(draw.choice(known), draw.choice(query_lens[1:])), *lens], head_dim, page_size))


@pytest.mark.parametrize(("head_dim", "page_size"), PLAIN)
@pytest.mark.parametrize("lens", [[(0, 16)], [(16, 16)], [(300, 32), (0, 16)]], ids=["prompt", "chunk", "both"])
def test_what_stands_in_has_the_bits_for_many_numbers(
    lens: list[tuple[int, int]], head_dim: int, page_size: int
) -> None:
    """Sums in another order differ in the last bit of few outputs: in none at all of many steps of one page."""
    case = plain_case(lens, head_dim, page_size)
    for _ in range(50):
        check_stand_in(case, rounds=1)


def test_hopper_takes_what_it_should() -> None:
    case = step([(4097, 1), (300, 32)])
    opts = options(case)
    launches = KERNEL.plan(case.config(), case.metadata(), opts, DEVICE).launches
    assert [launch.shape[:2] for launch in launches] == [(None, 16), (None, 128)]
    single = KERNEL.plan(replace(case, dtype=torch.float32).config(), case.metadata(), opts, DEVICE).launches
    assert all(launch.shape.tile is not None for launch in single)
