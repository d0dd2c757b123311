"""Steps that schedulers of engines send every day: on every plane, with both clients, every backend of a processor."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import attnd
from tests.plain_steps import PlainStep, Slots, attend
from tests.servers import ServerProcess
from tests.tolerances import assert_close

PAGE, PAGES, DIM = 4, 8, 8
M = attnd.StepMetadata


class Example(NamedTuple):
    """A step as an engine says it, the same in plain lines, and the rows of q that it brings, padding included."""

    metadata: attnd.StepMetadata
    plain: PlainStep
    num_rows: int


def plain(lens: list[int], context: list[int], tables: list[list[int]], slots: list[int], **more: Any) -> PlainStep:
    usual = {"owners": [1] * len(lens), "first_position": [0] * len(lens), "masks": ["causal"] * len(lens)}
    return PlainStep(lens, context, tables, slots, **{**usual, **more})


EXAMPLES = {
    "a request reads pages that another fills in the same step": Example(
        M([4, 1], [0, 4], [[1, -1], [1, 2]], [4, 5, 6, 7, 8], store_first=True),
        plain([4, 1], [0, 4], [[1, -1], [1, 2]], [4, 5, 6, 7, 8], store_first=True),
        5,
    ),
    "a page behind the window is another's already": Example(
        M([1, 1], [8, 0], [[3, 4, 5], [3, -1, -1]], [20, 12], window=4),
        plain([1, 1], [8, 0], [[3, 4, 5], [3, -1, -1]], [20, 12], window=4),
        2,
    ),
    "padded rows without tokens": Example(
        M([1, 0], [0, 0], [[1], [0]], [4, -1], kind="decode"), plain([1, 0], [0, 0], [[1], [0]], [4]), 2
    ),
    "padded rows without tokens, and none of q": Example(
        M([1, 0], [0, 0], [[1], [0]], [4, -1], kind="decode"), plain([1, 0], [0, 0], [[1], [0]], [4]), 1
    ),
    "padded rows of length 0": Example(
        M([1, 1], [0, -1], [[1], [0]], [4, -1], kind="decode"), plain([1, 1], [0, -1], [[1], [0]], [4, -1]), 2
    ),
    "the same from running sums": Example(
        M(
            cu_seqlens_q=np.array([0, 1, 2], np.int32), seq_lens=torch.tensor([1, 0]), page_tables=[[1], [0]],
            slot_mapping=torch.tensor([4, -1]), kind="decode",
        ),
        plain([1, 1], [0, -1], [[1], [0]], [4, -1]),
        2,
    ),
    "a context that lies on two servers": Example(
        M([1, 1], [5, 6], [[3, 4], [5, 6]], [-1, 26], attend_new=[0, 1], first_position=[0, 1000], kind="decode"),
        plain([1, 1], [5, 6], [[3, 4], [5, 6]], [-1, 26], owners=[0, 1], first_position=[0, 1000]),
        2,
    ),
    "decodes first, prefills after": Example(
        M([1, 1, 3], [7, 3, 2], [[3, 4], [5, 1], [6, 2]], [19, 23, 26, 27, 8], store_first=True),
        plain([1, 1, 3], [7, 3, 2], [[3, 4], [5, 1], [6, 2]], [19, 23, 26, 27, 8], store_first=True),
        5,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("engines")
    with ServerProcess(folder / "log", "--device", "cpu", "--socket-dir", str(folder / "s")) as process:
        yield process.address
        assert "internal error" not in process.log


GEOMETRY: dict[str, Any] = {
    "num_layers": 1, "num_kv_heads": 1, "head_dim": DIM, "num_pages": PAGES, "page_size": PAGE, "dtype": "float32",
}  # fmt: skip


def answered(address: str, plane: str, metadata: attnd.StepMetadata, new: Any, stored: Any, options: Any) -> Any:
    """Twice, as a retry would be, and then what lies in the slots."""
    with attnd.connect(address) as client, client.create_cache(**GEOMETRY) as cache:
        cache.store_kv(0, range(PAGE * PAGES), *stored)
        session = cache.session() if plane == "inproc" else cache.session(plane=plane)
        first, again = (session.step(metadata).attend(0, *new, options) for _ in range(2))
        assert plane in ("inproc", session.plane)
        return first.clone(), again.clone(), cache.read_kv(0, range(PAGE * PAGES), new[0])


def answered_by_asyncio(
    address: str, plane: str, metadata: attnd.StepMetadata, new: Any, stored: Any, options: Any
) -> Any:
    async def run() -> Any:
        async with await attnd.aio.connect(address) as client, await client.create_cache(**GEOMETRY) as cache:
            await cache.store_kv(0, range(PAGE * PAGES), *stored)
            async with cache.session(plane=plane) as session:
                outputs = [(await (await session.step(metadata)).attend(0, *new, options)).clone() for _ in range(2)]
                assert session.plane == plane
                return *outputs, await cache.read_kv(0, range(PAGE * PAGES), new[0])

    return asyncio.run(run())


WAYS = {
    "inline": (answered, "inline"),
    "shm": (answered, "shm"),
    "inproc": (answered, "inproc"),
    "asyncio inline": (answered_by_asyncio, "inline"),
    "asyncio shm": (answered_by_asyncio, "shm"),
}


@pytest.mark.parametrize("backend", ["naive", "sdpa", "auto"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_right(address: str, name: str, way: str, backend: str) -> None:
    check(name, way, "inproc://" if way == "inproc" else address, backend)


def check(name: str, way: str, address: str, backend: str) -> None:
    """The output is right, a repeat gives the same, and every slot holds what it is to hold."""
    metadata, step, num_rows = EXAMPLES[name]
    ask, plane = WAYS[way]
    new, stored = torch.randn(3, num_rows, 1, DIM), torch.randn(2, PAGE * PAGES, 1, DIM)
    options = attnd.AttentionOptions(backend=backend)
    first, again, found = ask(address, plane, metadata, new, stored, options)
    q, k, v = new[:, : sum(step.query_lens)].double().numpy()
    lies: Slots = {slot: (stored[0, slot].double().numpy(), stored[1, slot].double().numpy()) for slot in range(32)}
    expected, _, after = attend(step, q, k, v, lies, PAGE, DIM**-0.5)
    rest = np.zeros((num_rows - len(expected), 1, DIM))
    assert_close(first, np.concatenate([expected, rest]), torch.float32)
    assert torch.equal(first, again)
    for part, tensor in enumerate(found):
        assert torch.equal(tensor, torch.from_numpy(np.stack([after[slot][part] for slot in range(32)])).float())


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
def test_a_store_first_result_depends_on_the_batch_through_the_pages_of_its_table_alone(backend: str) -> None:
    """Bit for bit; sdpa promises no bits between batches."""
    k, v = torch.randn(2, PAGE * PAGES, 1, DIM)
    new = torch.randn(3, 6, 1, DIM)
    whole = M([4, 1, 1], [0, 4, 3], [[1, -1], [1, 2], [6, -1]], [4, 5, 6, 7, 8, 27], store_first=True)
    without_last = M([4, 1], [0, 4], [[1, -1], [1, 2]], [4, 5, 6, 7, 8], store_first=True)
    alone = M([1], [4], [[1, 2]], [8], store_first=True)

    def row(metadata: attnd.StepMetadata, tensors: torch.Tensor, index: int, pages: torch.Tensor) -> torch.Tensor:
        with attnd.connect("inproc://") as client, client.create_cache(**GEOMETRY, backend=backend) as cache:
            cache.store_kv(0, range(PAGE * PAGES), pages, v)
            output: torch.Tensor = cache.session().step(metadata).attend(0, *tensors)
            return output[index].clone()

    def same(one: torch.Tensor, other: torch.Tensor) -> bool:
        return torch.equal(one, other) if backend == "naive" else torch.allclose(one, other, atol=1e-6)

    in_batch = row(whole, new, 4, k)
    assert same(in_batch, row(without_last, new[:, :5], 4, k))
    other = new.clone()
    other[:, 5] += 1  # a request whose page the table does not name
    assert same(in_batch, row(whole, other, 4, k))
    there = k.clone()
    there[4:8] = new[1, :4]  # what the other request would have stored
    v[4:8] = new[2, :4]
    assert same(in_batch, row(alone, new[:, 4:5], 0, there))
    other[:, :4] += 1  # a request whose page it does
    assert not torch.allclose(in_batch, row(whole, other, 4, k))


@pytest.mark.parametrize("layout", ["unified", "distinct"])
@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
def test_a_store_first_call_that_fails_has_stored_nothing(
    monkeypatch: pytest.MonkeyPatch, layout: str, kv_dtype: str | None
) -> None:
    from attnd_server.attention.backends import naive

    def fail(*_: object) -> None:
        raise MemoryError("no memory left")

    metadata = M([4, 1], [0, 4], [[1, -1], [1, 2]], [4, 5, -1, 7, 8], store_first=True)
    k, v = torch.randn(2, PAGE * PAGES, 1, DIM)
    with (
        attnd.connect("inproc://") as client,
        client.create_cache(**GEOMETRY, layout=layout, kv_dtype=kv_dtype) as cache,
    ):
        cache.store_kv(0, range(PAGE * PAGES), k, v)
        before = cache.read_kv(0, range(PAGE * PAGES), k)
        session, options = cache.session(), attnd.AttentionOptions(backend="naive")
        with monkeypatch.context() as patched:
            patched.setattr(naive, "reference_torch_attention", fail)
            with pytest.raises(attnd.Exhausted):
                session.step(metadata).attend(0, *torch.randn(3, 5, 1, DIM), options)
        for old, found in zip(before, cache.read_kv(0, range(PAGE * PAGES), k), strict=True):
            assert torch.equal(old, found)
        session.step(metadata).attend(0, *torch.randn(3, 5, 1, DIM), options)
        assert not torch.equal(before[0], cache.read_kv(0, range(PAGE * PAGES), k)[0])
