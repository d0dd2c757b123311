"""How calls come together in one launch and their results go back, against the same in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from attnd_server.attention.backends.base import DecodeShape
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.metadata import REQUEST_COLUMNS, AttentionMetadata, AttentionOptions
from attnd_server.execution.joined import host_calls
from attnd_server.execution.joined.host_calls import HostCalls, rows_of
from attnd_server.execution.step import Call, Step
from tests import interpreter

pytestmark = pytest.mark.skipif(interpreter.reason_against() is not None, reason=str(interpreter.reason_against()))

HEADS, KV_HEADS, DIM, DIM_V, PAGE = 6, 2, 32, 16, 4
MAX_REQS, MAX_PAGES, MAX_CALLS = 16, 200, 5
NOTHING = -77  # what lies where nothing may be written


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[torch.device]:
    with interpreter.interpreter() as name:
        yield torch.device(name)


def step_of(context_lens: list[int], query_len: int, seed: int, *, stores: bool = True) -> AttentionMetadata:
    """Tables whose ends are -1, and every third token is not stored."""
    random = torch.Generator().manual_seed(seed)
    num_reqs, width = len(context_lens), max(-(-(length + query_len) // PAGE) for length in context_lens)
    tables = torch.randint(0, 1000, (num_reqs, width), generator=random, dtype=torch.int32)
    for request, length in enumerate(context_lens):
        tables[request, -(-length // PAGE) :] = -1
    slots = torch.randint(0, 4000, (num_reqs * query_len,), generator=random)
    slots[::3] = -1
    columns = {name: torch.randint(0, 50, (num_reqs,), generator=random) for name in REQUEST_COLUMNS}
    return AttentionMetadata(
        is_decode=True,
        num_tokens=num_reqs * query_len,
        cu_seqlens_q=torch.arange(num_reqs + 1) * query_len,
        page_tables=tables,
        slot_mapping=slots if stores else None,
        **{**columns, "context_lens": torch.tensor(context_lens)},
    )


class Launch:
    """A class of launches, and memory of the host that the device reaches, as a region of a session is."""

    def __init__(self, device: torch.device, query_len: int, return_lse: bool) -> None:
        from attnd_server.attention.kernels import joined

        config = AttentionConfig(
            num_layers=1, num_kv_heads=KV_HEADS, head_dim=DIM, head_dim_v=DIM_V, num_pages=2000, page_size=PAGE,
            dtype=torch.float32,
        )  # fmt: skip
        self.query_len = query_len
        options = AttentionOptions(num_heads=HEADS, scale=1.0, return_lse=return_lse)
        shape = DecodeShape(MAX_REQS, query_len, MAX_PAGES * PAGE)
        self.host = HostCalls(config, options, shape, max_calls=MAX_CALLS, max_pages=MAX_PAGES, device=device)
        num_tokens = MAX_REQS * query_len

        def room(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full(shape, NOTHING, dtype=dtype, device=device)

        self.tensors = joined.JoinedTensors(
            step=room(4 + len(REQUEST_COLUMNS) * MAX_REQS, dtype=torch.int32),
            page_tables=room(MAX_REQS, MAX_PAGES, dtype=torch.int32),
            slots=room(num_tokens, dtype=torch.int64),
            q=room(num_tokens, HEADS, DIM),
            k=room(num_tokens, KV_HEADS, DIM),
            v=room(num_tokens, KV_HEADS, DIM_V),
            output=torch.randn(num_tokens, HEADS, DIM_V, device=device),
            lse=torch.randn(num_tokens, HEADS, device=device) if return_lse else None,
        )
        self.region = torch.full((1 << 16,), float(NOTHING), pin_memory=device.type == "cuda")
        self.used = 0

    def placed(self, *shape: int) -> torch.Tensor:
        """A tensor in the region."""
        size = torch.Size(shape).numel()
        tensor = self.region[self.used : self.used + size].view(shape)
        self.used += size + 3
        return tensor

    def call(self, metadata: AttentionMetadata, kind: str) -> Call:
        """A call whose tensors lie in the region, in other memory, or there with rows that lie apart."""
        num_tokens = metadata.num_tokens
        shapes = (num_tokens, HEADS, DIM), (num_tokens, KV_HEADS, DIM), (num_tokens, KV_HEADS, DIM_V)
        given = [torch.randn(shape) for shape in shapes]
        into = at = None
        if kind == "region":
            placed = [self.placed(*shape) for shape in shapes]
            for here, tensor in zip(placed, given, strict=True):
                here.copy_(tensor)
            given = placed
            lse = None if self.tensors.lse is None else self.placed(num_tokens, HEADS)
            into = self.placed(num_tokens, HEADS, DIM_V), lse
            at = (*(each.data_ptr() for each in (*placed, into[0])), 0 if lse is None else lse.data_ptr())
        elif kind == "apart":
            given = [torch.cat([each, each], 1)[:, : each.shape[1]] for each in given]
        step = cast(Step, SimpleNamespace(metadata=metadata))
        return Call(step, 0, cast(AttentionOptions, None), *given, into=into, at=at)

    def run(self, calls: list[Call], first_pages: list[int], num_columns: int) -> list[host_calls.Output]:
        from attnd_server.attention.kernels import joined

        num_pages = max(-(-call.step.metadata.max_context_len // PAGE) for call in calls)
        rows = [rows_of(call.step.metadata, self.query_len, num_pages, MAX_PAGES) for call in calls]
        outputs = self.host.fill(calls, rows, first_pages, num_columns)
        said = self.host.as_device_sees()
        joined.take_calls(said, self.tensors, query_len=self.query_len, page_size=PAGE)
        joined.give_results(said, self.tensors)
        if self.tensors.step.is_cuda:
            torch.cuda.synchronize()
        return outputs

    def check(
        self, calls: list[Call], first_pages: list[int], num_columns: int, outputs: list[host_calls.Output]
    ) -> None:
        """Everything is where it belongs, and nothing else was written."""
        step, tables, slots, q, k, v, output, lse = (None if each is None else each.cpu() for each in self.tensors)
        num_reqs = sum(call.step.metadata.num_reqs for call in calls)
        assert step[:2].tolist() == [num_reqs, MAX_PAGES]
        columns = step[4 : 4 + len(REQUEST_COLUMNS) * num_reqs].view(-1, num_reqs)
        first, query_len = 0, self.query_len
        for call, first_page, (own_output, own_lse) in zip(calls, first_pages, outputs, strict=True):
            metadata = call.step.metadata
            end = first + metadata.num_reqs
            tokens = slice(first * query_len, end * query_len)
            for name, column in zip(REQUEST_COLUMNS, columns, strict=True):
                assert torch.equal(column[first:end], getattr(metadata, name).int()), name
            width = min(num_columns, metadata.page_tables.shape[1])
            expected = torch.zeros(metadata.num_reqs, num_columns, dtype=torch.int32)
            expected[:, :width] = metadata.page_tables[:, :width].clamp(min=0)
            assert torch.equal(tables[first:end, :num_columns], expected + first_page)
            own = metadata.slot_mapping
            own = torch.full((metadata.num_tokens,), -1) if own is None else own
            assert torch.equal(slots[tokens], torch.where(own < 0, -1, own + first_page * PAGE))
            for whole, tensor in ((q, call.q), (k, call.k), (v, call.v)):
                assert torch.equal(whole[tokens], tensor)
            assert torch.equal(output[tokens], own_output)
            assert (lse is None) == (own_lse is None)
            assert lse is None or torch.equal(lse[tokens], own_lse)
            if call.into is not None:
                assert own_output.data_ptr() == call.into[0].data_ptr()
            first = end
        assert (slots[num_reqs * query_len :] == -1).all()
        assert (tables[num_reqs:] == NOTHING).all()
        for whole in (q, k, v):
            assert (whole[num_reqs * query_len :] == NOTHING).all()


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("query_len", [1, 3])
def test_calls_come_together_wherever_their_tensors_lie(device: torch.device, query_len: int, return_lse: bool) -> None:
    torch.manual_seed(1)
    launch = Launch(device, query_len, return_lse)
    steps = [
        step_of([0, 1, 700], query_len, 1),
        step_of([PAGE], query_len, 2, stores=False),
        step_of([9] * 5, query_len, 3),
    ]
    calls = [launch.call(step, kind) for step, kind in zip(steps, ("region", "elsewhere", "apart"), strict=True)]
    first_pages = [0, 1_000_000, 77]
    outputs = launch.run(calls, first_pages, 190)
    launch.check(calls, first_pages, 190, outputs)
    if not return_lse:
        assert (launch.region[launch.used :] == NOTHING).all()


def test_who_comes_next_finds_nothing_of_who_came_before(device: torch.device) -> None:
    """Steps stay where they lie between launches; others take their places, and fewer requests come."""
    torch.manual_seed(2)
    launch = Launch(device, 1, return_lse=False)
    steps = [step_of([seed + 1] * (seed + 1), 1, seed) for seed in range(4)]
    rows = {id(step): rows_of(step, 1, 3, MAX_PAGES) for step in steps}
    for order in ([0, 1, 2], [0, 1, 2], [1, 0], [0, 1, 3], [2], [2, 1, 0, 3]):
        launch.tensors.page_tables.fill_(NOTHING)
        for whole in (launch.tensors.q, launch.tensors.k, launch.tensors.v):
            whole.fill_(NOTHING)
        calls = [launch.call(steps[index], "elsewhere") for index in order]
        first_pages = [1000 * index for index in order]
        from attnd_server.attention.kernels import joined

        outputs = launch.host.fill(calls, [rows[id(steps[index])] for index in order], first_pages, 3)
        said = launch.host.as_device_sees()
        joined.take_calls(said, launch.tensors, query_len=1, page_size=PAGE)
        joined.give_results(said, launch.tensors)
        if device.type == "cuda":
            torch.cuda.synchronize()
        launch.check(calls, first_pages, 3, outputs)


def test_the_numbers_of_both_sides_are_the_same() -> None:
    from attnd_server.attention.kernels import joined

    assert (len(REQUEST_COLUMNS), joined.CALL_FIELDS) == (host_calls.NUM_COLUMNS, host_calls.CALL_FIELDS)
    fields = (joined.FIRST_REQ, joined.Q, joined.K, joined.V, joined.OUTPUT, joined.LSE, joined.FIRST_PAGE)
    assert (*fields, joined.NUM_COLUMNS) == tuple(range(joined.CALL_FIELDS))


def test_results_of_a_sampled_call_go_where_nobody_else_writes(device: torch.device) -> None:
    launch = Launch(device, 1, return_lse=False)
    call = launch.call(step_of([5], 1, 9), "region")._replace(is_sampled=True)
    ((output, _),) = launch.run([call], [0], 2)
    start = launch.region.data_ptr()
    assert output.data_ptr() not in range(start, start + launch.region.nbytes)
