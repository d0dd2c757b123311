"""A fixed plan holds the step that it was given last, and says which steps it takes. What it computes: `tests/gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")  # the columns of an item are its constants

from attnd_server.attention.backends.base import DecodeShape
from attnd_server.attention.backends.naive import NaiveAttention
from attnd_server.attention.backends.sdpa import SdpaAttention
from attnd_server.attention.backends.triton.attention import TritonPagedAttention
from attnd_server.attention.backends.triton.hopper_schedule import hopper_schedule
from attnd_server.attention.backends.triton.work import Rows, request_table
from attnd_server.attention.backends.window import SlidingWindowAttention
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.kernels import items as columns
from attnd_server.attention.kernels.launch_shapes import HOPPER_KEYS
from attnd_server.attention.kv_split import KVSplitConfig
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from tests import interpreter

if TYPE_CHECKING:
    from attnd_server.attention.backends.triton.fixed_plan import FixedTritonPlan

pytestmark = pytest.mark.skipif(interpreter.reason_against() is not None, reason=str(interpreter.reason_against()))

PAGE_SIZE, GROUP, NUM_GROUPS = 16, 4, 2
SHAPE = DecodeShape(num_reqs=4, query_len=2, max_context_len=3000)
OPTIONS = AttentionOptions(num_heads=GROUP * NUM_GROUPS, scale=0.1)


def test_hopper_kernels_serve_k_and_v_of_one_type_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnd_server.attention.backends.triton import launches
    from attnd_server.attention.backends.triton.fixed_plan import make_fixed_plan

    gpu, fp8 = torch.device("cuda"), torch.float8_e4m3fn
    monkeypatch.setattr(launches, "_hopper_kernels_load", lambda device: True)
    plain = AttentionConfig(num_layers=1, num_kv_heads=1, head_dim=128, num_pages=9)
    others = [
        replace(plain, v_dtype=fp8),
        replace(plain, kv_dtype=fp8),  # V stays what it was
        replace(plain, latent=True),
    ]
    for config, fits in (
        (plain, True),
        (replace(plain, kv_dtype=fp8, v_dtype=None), True),
        *((c, False) for c in others),
    ):
        assert launches.fits_hopper(config, torch.bfloat16, gpu) == fits
    for config in others:
        reason = make_fixed_plan(config, SHAPE, OPTIONS, True, gpu)
        assert reason == "Hopper's kernels do not serve this cache on this device"


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[torch.device]:
    with interpreter.interpreter() as name:
        yield torch.device(name)


def config_of(kv_split: KVSplitConfig) -> AttentionConfig:
    return AttentionConfig(1, NUM_GROUPS, 64, num_pages=1000, page_size=PAGE_SIZE, kv_split=kv_split)


def metadata_of(context_lens: list[int], query_len: int = SHAPE.query_len, **changes: Any) -> AttentionMetadata:
    """A step with pages of its own for each request, and more columns than it needs."""
    num_reqs = len(context_lens)
    num_pages = -(-max(context_lens, default=0) // PAGE_SIZE) + 2
    zeros = torch.zeros(num_reqs, dtype=torch.int64)
    fields: dict[str, Any] = {
        "is_decode": True,
        "num_tokens": num_reqs * query_len,
        "cu_seqlens_q": torch.arange(num_reqs + 1) * query_len,
        "context_lens": torch.tensor(context_lens, dtype=torch.int64),
        "page_tables": torch.randperm(num_reqs * num_pages, dtype=torch.int32).view(num_reqs, num_pages),
        "slot_mapping": None,
        "valid_lens": zeros + query_len,
        "block_sizes": zeros + 1,
        "prefix_lens": zeros,
        "padded_prefix_lens": zeros,
        "hole_starts": zeros,
        "hole_ends": zeros,
    }
    return AttentionMetadata(**fields | changes)


def make(device: torch.device, kv_split: KVSplitConfig | None = None, window: int = 0) -> FixedTritonPlan:
    # Only here: whether kernels are interpreted is decided when they load.
    from attnd_server.attention.backends.triton.fixed_plan import FixedTritonPlan
    from attnd_server.attention.backends.triton.launches import Keys, LaunchShape

    config = config_of(kv_split or KVSplitConfig())
    return FixedTritonPlan(config, SHAPE, replace(OPTIONS, window=window), LaunchShape(None, 16, True, Keys()), device)


def check_holds(plan: FixedTritonPlan, metadata: AttentionMetadata, device: torch.device) -> None:
    """The items are those of the host, but for the place of page tables, which are those of the step."""
    from attnd_server.attention.backends.triton.launches import multiprocessors

    config, options = plan.plan.config, plan.plan.options
    num_pages = -(-metadata.max_context_len // PAGE_SIZE)
    used = metadata.page_tables[:, :num_pages].numpy()
    rows = Rows(GROUP, NUM_GROUPS, 16, HOPPER_KEYS, multiprocessors(device))
    expected = hopper_schedule(
        request_table(metadata, used, PAGE_SIZE), config.kv_split, options.window, rows
    ).items.copy()
    (launch,) = plan.plan.launches
    items = launch.items.cpu().numpy()[: len(expected)].copy()
    for each in (items, expected):
        each[:, columns.PARTIAL_ROW.value] = 0
    assert sorted(items.tolist()) == sorted(expected.tolist())
    on_device = plan.plan.page_tables.cpu().numpy()
    for item in items:
        request, table = item[columns.Q_ROW.value] // SHAPE.query_len, item[columns.TABLE.value]
        assert np.array_equal(on_device[table : table + num_pages], used[request])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    steps=st.lists(st.lists(st.integers(0, SHAPE.max_context_len), min_size=0, max_size=4), min_size=1, max_size=4),
    batch_invariant=st.sampled_from([None, True, False]),
    window=st.sampled_from([0, 0, 500]),
)
def test_any_steps_in_turn(
    device: torch.device, steps: list[list[int]], batch_invariant: bool | None, window: int
) -> None:
    plan = make(device, KVSplitConfig(batch_invariant=batch_invariant), window)
    for context_lens in filter(None, steps):
        metadata = metadata_of(context_lens)
        assert plan.refusal(metadata) is None
        plan.update(metadata)
        check_holds(plan, metadata, device)


def test_page_ids_may_be_int64_and_lie_anywhere(device: torch.device) -> None:
    plan, metadata = make(device), metadata_of([100, 3000])
    strided = metadata.page_tables.long().repeat_interleave(2, 1)[:, ::2]
    plan.update(replace(metadata, page_tables=strided))
    check_holds(plan, metadata, device)


REFUSED = {
    "prefill": (metadata_of([5, 6], is_decode=False), "not a decode step"),
    "cache_only": (metadata_of([5, 6], cache_only=True), "not a decode step"),
    "store_only": (metadata_of([5, 6], store_only=True), "not a decode step"),
    "too_many": (metadata_of([5] * 5), "it has 5 requests, but must have at most 4"),
    "query_len": (metadata_of([5, 6], query_len=3), "it has 6 new tokens, but must have 2 for each request"),
    "too_long": (metadata_of([5, 3001]), "a context has 3001 tokens, but must have at most 3000"),
    "absent": (metadata_of([17, 0], page_tables=torch.tensor([[0, -1], [-1, -1]])), "page_tables has -1"),
}


@pytest.mark.parametrize(("metadata", "reason"), REFUSED.values(), ids=REFUSED)
def test_steps_that_do_not_fit(device: torch.device, metadata: AttentionMetadata, reason: str) -> None:
    assert reason in str(make(device).refusal(metadata))


def test_what_engines_say_keeps_the_plan_where_every_new_token_is_a_key(device: torch.device) -> None:
    plan = make(device, window=5)
    for changes in ({"store_first": True}, {"store_first": True, "reads_stored": True}, {"window": 5}):
        assert plan.refusal(metadata_of([40, 3], **changes)) is None
    for changes in (
        {"seen_new": torch.zeros(2 * SHAPE.query_len, dtype=torch.bool)},
        {"without_sinks": torch.ones(2) > 0},
    ):
        assert "no keys, or requests without sinks" in str(plan.refusal(metadata_of([40, 3], **changes)))


def test_pages_past_the_context_may_be_absent(device: torch.device) -> None:
    metadata = metadata_of([16, 0], page_tables=torch.tensor([[0, -1], [-1, -1]]))
    plan = make(device)
    assert plan.refusal(metadata) is None
    plan.update(metadata)
    check_holds(plan, metadata, device)


@pytest.mark.parametrize("context_len", [0, 1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 3 * PAGE_SIZE])
def test_absent_pages_are_found_within_the_context_only(context_len: int) -> None:
    for absent in range(4):
        tables = torch.tensor([[0, 1, 2, 3], [-1 if page == absent else page for page in range(4)]])
        metadata = metadata_of([64, context_len], page_tables=tables)
        assert metadata.has_absent_pages(PAGE_SIZE) == (absent * PAGE_SIZE < context_len)
    assert not metadata_of([64, context_len]).has_absent_pages(PAGE_SIZE)


def test_memory_is_counted(device: torch.device) -> None:
    plan = make(device)
    (launch,) = plan.plan.launches
    assert launch.num_partial_rows
    (output, lse), tables = plan.plan.partials[0], SHAPE.num_reqs * -(-SHAPE.max_context_len // PAGE_SIZE) * 4
    assert plan.plan.page_tables.nbytes == tables
    assert plan.num_bytes >= output.nbytes + lse.nbytes + launch.items.nbytes + tables


@pytest.mark.parametrize(
    "kernel",
    [
        NaiveAttention(),
        SdpaAttention(),
        TritonPagedAttention(AttentionBackend.TRITON),
        SlidingWindowAttention(TritonPagedAttention(AttentionBackend.TRITON), 100),
    ],
    ids=lambda kernel: type(kernel).__name__,
)
def test_others_say_why_they_have_none(kernel: Any) -> None:
    reason = kernel.fixed_plan(config_of(KVSplitConfig()), SHAPE, OPTIONS, torch.device("cpu"))
    assert isinstance(reason, str)
    assert reason


def test_a_cpu_has_none() -> None:
    reason = TritonPagedAttention().fixed_plan(config_of(KVSplitConfig()), SHAPE, OPTIONS, torch.device("cpu"))
    assert reason == "Hopper's kernels do not serve this cache on this device"
