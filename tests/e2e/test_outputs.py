"""Calls as engines make them, on every plane of both clients: outputs in memory that the caller has, rows that lie
apart, and rows that only pad a batch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import attnd
from tests.attention import dense_attention
from tests.servers import ServerProcess

PAGE, HEAD_DIM, HEAD_DIM_V, NUM_HEADS, NUM_KV_HEADS = 4, 16, 8, 6, 2
GEOMETRY = {
    "num_layers": 2,
    "num_kv_heads": NUM_KV_HEADS,
    "head_dim": HEAD_DIM,
    "head_dim_v": HEAD_DIM_V,
    "num_pages": 32,
    "page_size": PAGE,
    "dtype": "float32",
}
LSE = attnd.AttentionOptions(return_lse=True)
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Attend = Callable[..., Any]
"""`attend(metadata, layer, q, k, v, options=..., out=...)`, one call of a step of its own."""


@pytest.fixture(scope="module")
def shm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("outputs")
    with ServerProcess(folder / "log", "--device", "cpu", "--socket-dir", str(folder / "sockets")) as process:
        yield process
        log = process.log
    assert "internal error" not in log, log


@contextmanager
def of_session(address: str, plane: str) -> Iterator[Attend]:
    with attnd.connect(address, plane=plane) as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            yield lambda metadata, *call, **more: session.step(metadata).attend(*call, **more)


@contextmanager
def submitted(address: str, plane: str) -> Iterator[Attend]:
    with attnd.connect(address, plane=plane) as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            yield lambda metadata, *call, **more: session.step(metadata).submit(*call, **more).wait()


@contextmanager
def unary(address: str, plane: str) -> Iterator[Attend]:
    with attnd.connect(address) as client, client.create_cache(**GEOMETRY) as cache:
        yield lambda metadata, *call, **more: getattr(client, metadata.kind)(cache, metadata, *call, **more)


@contextmanager
def of_tasks(address: str, plane: str) -> Iterator[Attend]:
    loop = asyncio.new_event_loop()

    def run(what: Awaitable[Any]) -> Any:
        return loop.run_until_complete(asyncio.wait_for(what, 60))

    client = run(attnd.aio.connect(address, plane=plane))
    cache = run(client.create_cache(**GEOMETRY))
    session = cache.session()

    async def attend(metadata: attnd.StepMetadata, *call: Any, **more: Any) -> Any:
        return await (await session.step(metadata)).attend(*call, **more)

    try:
        yield lambda *call, **more: run(attend(*call, **more))
    finally:
        run(session.close())
        run(cache.delete())
        run(client.close())
        loop.close()


@contextmanager
def unary_of_tasks(address: str, plane: str) -> Iterator[Attend]:
    loop = asyncio.new_event_loop()
    client = loop.run_until_complete(attnd.aio.connect(address))
    cache = loop.run_until_complete(client.create_cache(**GEOMETRY))
    try:
        yield lambda metadata, *call, **more: loop.run_until_complete(
            getattr(client, metadata.kind)(cache, metadata, *call, **more)
        )
    finally:
        loop.run_until_complete(client.close())
        loop.close()


WAYS = {
    "inline": (of_session, "inline"),
    "shm": (of_session, "shm"),
    "submit_inline": (submitted, "inline"),
    "submit_shm": (submitted, "shm"),
    "unary": (unary, ""),
    "aio_inline": (of_tasks, "inline"),
    "aio_shm": (of_tasks, "shm"),
    "aio_unary": (unary_of_tasks, ""),
    "inproc": (of_session, "inline"),
}


@pytest.fixture(params=WAYS)
def attend(request: pytest.FixtureRequest, shm_server: ServerProcess) -> Iterator[Attend]:
    way, plane = WAYS[request.param]
    with way("inproc://" if request.param == "inproc" else shm_server.address, plane) as attend:
        yield attend


def tensors(num_tokens: int) -> Tensors:
    sizes = (NUM_HEADS, HEAD_DIM), (NUM_KV_HEADS, HEAD_DIM), (NUM_KV_HEADS, HEAD_DIM_V)
    return tuple(torch.randn(num_tokens, *size) for size in sizes)  # type: ignore[return-value]


def prefill(num_tokens: int) -> attnd.StepMetadata:
    return attnd.StepMetadata([num_tokens], [0], [[5, 2, 7]], [20, 21, 22, 23, 8, 9, 10, 11, 28][:num_tokens])


def row(output: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(output)) if isinstance(output, np.ndarray) else torch.as_tensor(output)


OUTPUTS = {
    "dense": lambda shape: torch.full(shape, torch.nan),
    "rows_apart": lambda shape: torch.full((shape[0], 2, *shape[1:]), torch.nan)[:, 1],
    "heads_apart": lambda shape: torch.full((shape[0], shape[1], 2 * shape[2]), torch.nan)[..., 3 : 3 + shape[2]],
    "part_of_a_parameter": lambda shape: torch.nn.Parameter(torch.full((shape[0] + 2, *shape[1:]), torch.nan))[2:],
    "numpy": lambda shape: np.full(shape, np.nan, np.float32),
    "numpy_rows_apart": lambda shape: np.full((2 * shape[0], *shape[1:]), np.nan, np.float32)[::2],
}


@pytest.mark.parametrize("make", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("return_lse", [False, True], ids=["", "lse"])
def test_the_output_is_written_where_it_is_wanted_and_that_is_returned(
    attend: Attend, make: Callable[[tuple[int, ...]], Any], return_lse: bool
) -> None:
    for num_tokens in (PAGE, 1, PAGE + 1, PAGE - 1, PAGE - 1):
        q, k, v = tensors(num_tokens)
        out = make((num_tokens, NUM_HEADS, HEAD_DIM_V))
        given = attend(prefill(num_tokens), 1, q, k, v, LSE if return_lse else attnd.AttentionOptions(), out=out)
        if return_lse:
            given, lse = given
            expected_lse = attend(prefill(num_tokens), 1, q, k, v, LSE)[1]
            assert torch.equal(lse, expected_lse)
        assert given is out
        torch.testing.assert_close(row(out).detach(), dense_attention(q, k, v))
        base = row(out).detach()
        whole = base.as_strided((base.untyped_storage().nbytes() // 4,), (1,), 0)
        assert int(whole.isnan().sum()) == whole.numel() - base.numel()


def test_the_bits_are_those_of_an_output_of_its_own(attend: Attend) -> None:
    q, k, v = tensors(PAGE + 1)
    out = torch.empty(PAGE + 1, NUM_HEADS, HEAD_DIM_V)
    attend(prefill(PAGE + 1), 0, q, k, v, out=out)
    assert torch.equal(out, attend(prefill(PAGE + 1), 0, q, k, v))


def qkv(num_tokens: int) -> Tensors:
    """Slices of one projection."""
    sizes = (NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM_V)
    parts = torch.randn(num_tokens, sum(sizes)).split(sizes, 1)
    dims = (HEAD_DIM, HEAD_DIM, HEAD_DIM_V)
    q, k, v = (part.unflatten(1, (-1, dim)) for part, dim in zip(parts, dims, strict=True))
    return q, k, v


LOOSE = {
    "torch": lambda tensor: tensor,
    "numpy": lambda tensor: tensor.numpy(),
    "needs_gradients": lambda tensor: tensor.clone(memory_format=torch.preserve_format).requires_grad_(),
}


@pytest.mark.parametrize("make", LOOSE.values(), ids=LOOSE)
def test_rows_that_lie_apart_give_the_bits_of_dense_ones(attend: Attend, make: Callable[[torch.Tensor], Any]) -> None:
    for num_tokens in (PAGE + 1, PAGE, PAGE, 2):
        q, k, v = qkv(num_tokens)
        assert not any(each.is_contiguous() for each in (q, k, v))
        output = attend(prefill(num_tokens), 0, *map(make, (q, k, v)))
        assert not row(output).requires_grad
        expected = attend(prefill(num_tokens), 1, q.contiguous(), k.contiguous(), v.contiguous())
        assert torch.equal(row(output), expected)
        torch.testing.assert_close(expected, dense_attention(q, k, v))


def test_dense_and_loose_tensors_of_one_call(attend: Attend) -> None:
    for which in range(3):
        loose = qkv(PAGE)
        given = [each if index == which else each.contiguous() for index, each in enumerate(loose)]
        output = attend(prefill(PAGE), 0, *given)
        torch.testing.assert_close(output, dense_attention(*loose))


PADDED = {
    "torch": lambda tensor: tensor,
    "numpy": lambda tensor: tensor.numpy(),
    "array": lambda tensor: attnd.Array(1, tuple(tensor.shape), memoryview(tensor.contiguous().numpy().tobytes())),
}


def values(given: Any) -> torch.Tensor:
    if isinstance(given, attnd.Array):
        return torch.frombuffer(bytearray(given.data), dtype=torch.float32).view(given.shape)
    return torch.from_numpy(np.array(given)) if isinstance(given, np.ndarray) else torch.as_tensor(given)


@pytest.mark.parametrize("make", PADDED.values(), ids=PADDED)
@pytest.mark.parametrize("num_more", [1, 7])
def test_rows_past_the_tokens_are_not_sent_and_give_zeros(
    attend: Attend, make: Callable[[torch.Tensor], Any], num_more: int
) -> None:
    for num_tokens in (PAGE + 1, 1, 1):
        q, k, v = tensors(num_tokens + num_more)
        for each in (q, k, v):
            each[num_tokens:] = torch.nan
        metadata = prefill(num_tokens)
        output, lse = attend(metadata, 0, *map(make, (q, k, v)), LSE)
        assert type(output) is type(lse) is type(make(q))
        assert values(output).shape == (num_tokens + num_more, NUM_HEADS, HEAD_DIM_V)
        assert values(lse).shape == (num_tokens + num_more, NUM_HEADS)
        whole = attend(metadata, 1, q[:num_tokens], k[:num_tokens], v[:num_tokens], LSE)
        for given, expected, padding in zip((output, lse), whole, (0.0, -torch.inf), strict=True):
            assert torch.equal(values(given)[:num_tokens], expected)
            assert (values(given)[num_tokens:] == padding).all()


@pytest.mark.parametrize("make", [torch.from_numpy, np.asarray], ids=["torch", "numpy"])
def test_an_output_has_rows_for_the_tokens_or_for_all_of_q(attend: Attend, make: Callable[[np.ndarray], Any]) -> None:
    q, k, v = tensors(PAGE + 2)
    expected, expected_lse = attend(prefill(PAGE), 0, q[:PAGE], k[:PAGE], v[:PAGE], LSE)
    for num_rows in (PAGE, PAGE + 2):
        whole = np.full((2 * num_rows, NUM_HEADS, HEAD_DIM_V), np.nan, np.float32)
        out = make(whole)[::2]
        output, lse = attend(prefill(PAGE), 0, q, k, v, LSE, out=out)
        assert output is out
        assert torch.equal(values(out)[:PAGE], expected)
        assert torch.equal(lse[:PAGE], expected_lse)
        assert (values(out)[PAGE:] == 0).all()
        assert lse.shape == (num_rows, NUM_HEADS)
        assert (lse[PAGE:] == -torch.inf).all()
        assert np.isnan(whole[1::2]).all()


def test_more_rows_in_some_tensors_only_are_refused_as_they_are(attend: Attend) -> None:
    q, k, v = tensors(PAGE + 1)
    with pytest.raises(attnd.InvalidRequest, match=r"q has shape \[5, 6, 16\]"):
        attend(prefill(PAGE), 0, q, k[:PAGE], v[:PAGE])
    with pytest.raises(attnd.InvalidRequest, match=r"v has shape \[5, 2, 8\]"):
        attend(prefill(PAGE), 0, q[:PAGE], k[:PAGE], v)
    with pytest.raises(attnd.InvalidRequest, match=r"q has shape \[3, 6, 16\]"):
        attend(prefill(PAGE), 0, q[:3], k[:3], v[:3])


def test_rows_that_pad_steps_that_only_store_or_only_read(attend: Attend) -> None:
    q, k, v = tensors(PAGE + 2)
    store = attnd.StepMetadata([PAGE], [0], [[3]], range(12, 16), store_only=True)
    assert attend(store, 0, None, k, v) is None
    read = attnd.StepMetadata([PAGE], [PAGE], [[3]], cache_only=True)
    output = attend(read, 0, q, None, None)
    torch.testing.assert_close(output[:PAGE], dense_attention(q[:PAGE], k[:PAGE], v[:PAGE], causal=False))
    assert (output[PAGE:] == 0).all()


SHAPE = (PAGE, NUM_HEADS, HEAD_DIM_V)
REFUSED = {
    "list": (lambda: [0.0], r"out is a list, but must be a torch tensor or a numpy array"),
    "dtype": (lambda: torch.zeros(SHAPE).half(), "out has dtype float16, but must have float32, as the cache"),
    "numpy_dtype": (lambda: np.zeros(SHAPE), "out has dtype float64, but must have float32, as the cache"),
    "rows": (lambda: torch.zeros(PAGE + 1, *SHAPE[1:]), r"out has shape \[5, 6, 8\], but must have \[4, 6, 8\]"),
    "too_few_rows": (lambda: torch.zeros(1, *SHAPE[1:]), r"out has shape \[1, 6, 8\], but must have \[4, 6, 8\]"),
    "heads": (lambda: torch.zeros(PAGE, 2, 8), r"out has shape \[4, 2, 8\], but must have \[4, 6, 8\]"),
    "head_dim": (lambda: torch.zeros(PAGE, 6, 16), r"out has shape \[4, 6, 16\], but must have \[4, 6, 8\]"),
    "two_dimensions": (lambda: torch.zeros(PAGE, 48), r"out has shape \[4, 48\], but must have \[4, 6, 8\]"),
    "meta": (lambda: torch.empty(SHAPE, device="meta"), "out cannot be written to"),
    "one_row_for_all": (lambda: torch.zeros(1, *SHAPE[1:]).expand(SHAPE), "out cannot be written to"),
    "read_only": (lambda: np.broadcast_to(np.zeros(SHAPE[1:], np.float32), SHAPE), "out cannot be written to"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_an_output_that_cannot_be_is_refused_before_anything_is_sent(
    attend: Attend, make: Callable[[], Any], message: str
) -> None:
    q, k, v = tensors(PAGE)
    before = attend(attnd.StepMetadata([1], [PAGE], [[5]], cache_only=True), 0, q[:1], None, None)
    with pytest.raises(attnd.InvalidRequest, match=message) as caught:
        attend(prefill(PAGE), 0, q, k, v, out=make())
    assert caught.value.field == "out"
    after = attend(attnd.StepMetadata([1], [PAGE], [[5]], cache_only=True), 0, q[:1], None, None)
    assert torch.equal(before, after)  # nothing was stored


def test_a_step_that_only_stores_has_no_output(attend: Attend) -> None:
    _, k, v = tensors(PAGE)
    store = attnd.StepMetadata([PAGE], [0], [[3]], range(12, 16), store_only=True)
    with pytest.raises(attnd.InvalidRequest, match="out is given, but must be None in a store-only step"):
        attend(store, 0, None, k, v, out=torch.zeros(SHAPE))


@pytest.mark.parametrize("make", [torch.full, np.full], ids=["torch", "numpy"])
def test_an_error_leaves_the_output_as_it_was(attend: Attend, make: Any) -> None:
    q, k, v = tensors(PAGE)
    out = make(SHAPE, 7.0, dtype=torch.float32 if make is torch.full else np.float32)
    attend(prefill(PAGE), 0, q, k, v)
    for metadata, layer, given in (
        (prefill(PAGE), 2, (q, k, v)),
        (attnd.StepMetadata([PAGE], [0], [[99]], range(PAGE)), 0, (q, k, v)),
        (prefill(PAGE), 0, (q, k[:1], v)),
        (prefill(PAGE), 0, (q, None, v)),
    ):
        with pytest.raises(attnd.InvalidRequest):
            attend(metadata, layer, *given, out=out)
        assert (torch.as_tensor(out) == 7).all()


def test_what_refused_normal_steps_of_vllm_is_served(attend: Attend) -> None:
    q, k, v = tensors(2)
    for metadata in (
        attnd.StepMetadata([1, 0], [0, 0], [[1], [0]], [4, -1], kind="decode"),
        attnd.StepMetadata([1, 1], [0, -1], [[1], [0]], [4, -1], kind="decode"),
        attnd.StepMetadata(cu_seqlens_q=[0, 1, 2], seq_lens=[1, 0], page_tables=[[1], [0]], slot_mapping=[4, -1]),
    ):
        out = torch.full((2, NUM_HEADS, HEAD_DIM_V), torch.nan)
        output, lse = attend(metadata, 0, q, k, v, LSE, out=out)
        assert output is out
        torch.testing.assert_close(out[:1], dense_attention(q[:1], k[:1], v[:1]))
        assert (out[1] == 0).all()
        assert (lse[1] == -torch.inf).all()


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_calls_under_way_write_each_its_own_output(shm_server: ServerProcess, plane: str) -> None:
    with attnd.connect(shm_server.address, plane=plane) as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as session:
            outs = torch.full((3, 4, PAGE, NUM_HEADS, HEAD_DIM_V), torch.nan)
            for round_ in range(3):
                steps = [session.step(attnd.StepMetadata([PAGE], [0], [[page]])) for page in range(4)]
                given = [qkv(PAGE) for _ in steps]
                pairs = zip(steps, given, strict=True)
                calls = [step.submit(0, *each, out=outs[round_, index]) for index, (step, each) in enumerate(pairs)]
                for each in given:
                    for tensor in each:
                        tensor.fill_(torch.nan)  # they were sent
                for index in (2, 0, 3, 1):
                    assert calls[index].wait() is calls[index].wait()
                assert not outs[: round_ + 1].isnan().any()
                assert outs[round_ + 1 :].isnan().all()


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_a_call_that_its_task_gave_up_writes_nothing(shm_server: ServerProcess, plane: str) -> None:
    async def test() -> None:
        async with await attnd.aio.connect(shm_server.address, plane=plane) as client:
            async with await client.create_cache(**GEOMETRY) as cache, cache.session() as session:
                step = await session.step(prefill(PAGE))
                q, k, v = tensors(PAGE)
                ask, was_early = step.stream.ask, [True]

                async def asked(*request: Any) -> Any:
                    answer = await ask(*request)
                    was_early[0] = not answer.done()
                    call.cancel()  # once it waits for the answer
                    return answer

                while True:
                    out = torch.full(SHAPE, 7.0)
                    with pytest.MonkeyPatch.context() as patch:
                        patch.setattr(step.stream, "ask", asked)
                        call = asyncio.ensure_future(step.attend(0, q, k, v, out=out))
                        await asyncio.wait([call])
                    assert call.cancelled()
                    torch.testing.assert_close(await step.attend(1, q, k, v), dense_attention(q, k, v))
                    if was_early[0]:
                        break
                assert (out == 7).all()

    asyncio.run(asyncio.wait_for(test(), 60))
