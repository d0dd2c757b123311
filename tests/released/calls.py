"""Everything that 0.1.0 could say, by the public names of then: for its client, and for today's.

    PYTHONPATH=CLIENT:. python -m tests.released.calls ADDRESS

prints what came of it as JSON. What is attended is held against `tests.released.plain` in the same process.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import attnd
import attnd.aio
from tests.released.plain import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    NUM_LAYERS,
    NUM_PAGES,
    PAGE_SIZE,
    PlainCache,
    error,
)

GEOMETRY = {
    "num_layers": NUM_LAYERS,
    "num_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "num_pages": NUM_PAGES,
    "page_size": PAGE_SIZE,
}
# What a cache is given besides, and what K and V are worth in its pages.
CACHES: dict[str, tuple[dict[str, Any], torch.dtype, PlainCache]] = {
    "float32": ({"dtype": "float32", "renew": False}, torch.float32, PlainCache()),
    "fp8, distinct": (
        {
            "dtype": "float32",
            "layout": "distinct",
            "kv_dtype": "float8_e4m3fn",
            "k_scales": 0.25,
            "v_scales": [0.5, 0.5],
            "backend": "naive",
        },
        torch.float32,
        PlainCache(k_scale=0.25, v_scale=0.5),
    ),
    "bfloat16, wide v": (
        {
            "head_dim_v": 24,
            "dtype": "bfloat16",
            "precision": "fp32",
            "kv_split": attnd.KVSplit(chunk_size=16, max_splits=4, batch_invariant=True),
            "ttl_s": 30.0,
        },
        torch.bfloat16,
        PlainCache(head_dim_v=24),
    ),
}
PLAIN: dict[str, Any] = {}
EVERYTHING = {
    "scale": 0.4,
    "softcap": 3.0,
    "window": 5,
    "alibi_slopes": [0.5, 0.25, 0.125, 0.0, -0.25, 1.0],
    "sinks": [0.0, -1.0, 2.0, 0.5, 1.0, -3.0],
    "return_lse": True,
}
NARROW = {"window": 1, "return_lse": True, "backend": "naive"}

# Pages of four requests, and what the table has behind them.
PAGES = [[7, 2, 31, 12, 38], [19, 5, 0, 33, 24], [11, 3, 28, 20, 6], [30, 9, 14, 1, 26]]
TABLE = [pages + [-1] * 55 for pages in PAGES]
FIRST = [1, 3, 4, 5]  # tokens: one, a page without one, a page, and one more
NUM_NEXT = 6


@dataclass
class Findings:
    """What came of the calls.

    Attributes:
        version: of the client that made them.
        file: of its package.
        errors: of each output and each lse, as parts of what they may be, by where they were.
        refusals: class and text of what was refused, by what was asked.
        told: anything else.
    """

    version: str = attnd.__version__
    file: str = attnd.__file__
    errors: dict[str, float] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)


def slots(first: list[int], num_new: list[int]) -> list[int]:
    """Of so many tokens of each request behind its first ones."""
    return [
        PAGES[request][position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
        for request, (start, number) in enumerate(zip(first, num_new, strict=True))
        for position in range(start, start + number)
    ]


def steps() -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """What each step is called, what it says, and options of its layers."""
    zeros = [0] * 4
    prompts = {"query_lens": FIRST, "context_lens": zeros, "page_tables": TABLE, "slot_mapping": slots(zeros, FIRST)}
    yield "prompts", prompts, [PLAIN, EVERYTHING]
    held = FIRST
    for number in range(NUM_NEXT):  # their page tables are told by deltas
        step = {"query_lens": [1] * 4, "context_lens": held, "page_tables": TABLE, "kind": "decode"}
        yield f"next {number}", step | {"slot_mapping": slots(held, [1] * 4)}, [PLAIN, EVERYTHING]
        held = [length + 1 for length in held]
    lens = [2, 0, 1, 3]
    chunks = {"query_lens": lens, "context_lens": held, "page_tables": TABLE, "slot_mapping": slots(held, lens)}
    yield "chunks", chunks, [NARROW, EVERYTHING]
    held = [length + new for length, new in zip(held, lens, strict=True)]
    block: dict[str, Any] = {"query_lens": [2] * 4, "context_lens": held, "page_tables": TABLE, "kind": "decode"}
    yield (
        "blocks",
        block
        | {
            "slot_mapping": [-1 if index in (3, 6, 7) else slot for index, slot in enumerate(slots(held, [2] * 4))],
            "mask": ["block_causal", "bidirectional", "causal", "prefix_full"],
            "block_size": 4,
            "valid_lens": [2, 1, 2, 0],
            "prefix_lens": [0, 0, 0, 3],
            "padded_prefix_lens": [0, 0, 0, 6],
        },
        [PLAIN, EVERYTHING],
    )
    yield (
        "a prefix that fills",
        block
        | {
            "mask": "prefix_full",
            "block_size": 2,
            "prefix_lens": [held[0] + 1, 3, 0, held[3]],
            "padded_prefix_lens": [held[0] + 2, 5, held[2] + 1, held[3] + 1],
        },
        [PLAIN, NARROW],
    )
    yield (
        "holes",
        block
        | {
            "page_tables": [[TABLE[0][0], -1, *TABLE[0][2:]], *TABLE[1:]],
            "prefix_lens": [8, 2, 0, 3],
            "padded_prefix_lens": [8, 6, 0, 4],
            "mask_prefix_hole": True,
        },
        [PLAIN, EVERYTHING],
    )
    yield (
        "everybody",
        {
            "query_lens": [3, 5],
            "context_lens": [0, held[1]],
            "page_tables": [[-1] * 5, PAGES[1]],
            "mask": "bidirectional",
        },
        [PLAIN, NARROW],
    )
    stored = {"query_lens": [1] * 4, "context_lens": held, "page_tables": TABLE, "slot_mapping": slots(held, [1] * 4)}
    yield "store only", stored | {"store_only": True, "kind": "decode"}, [PLAIN, PLAIN]
    held = [length + 1 for length in held]
    cached = {"query_lens": [1, 2, 1, 3], "context_lens": held, "page_tables": TABLE, "cache_only": True}
    yield "cache only", cached, [PLAIN, EVERYTHING]


async def settled(value: Any) -> Any:
    """What asyncio's client has to be waited for, and the other gives at once."""
    return await value if inspect.isawaitable(value) else value


def inputs(step: dict[str, Any], head_dim_v: int, dtype: torch.dtype, seed: int) -> tuple[Any, Any, Any]:
    """q, k and v of a layer, as far as the step has them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, head_dim_v)
    num_tokens = sum(step["query_lens"])
    q, k, v = (torch.randn(num_tokens, *shape, generator=generator).to(dtype) for shape in shapes)
    if step.get("store_only"):
        return None, k, v
    return (q, None, None) if step.get("cache_only") else (q, k, v)


async def attend(found: Findings, client: Any, name: str, plane: str) -> None:
    """All steps of a cache of its own; `plane` is "" for requests that are whole in themselves."""
    more, dtype, model = CACHES[name]
    plain = PlainCache(model.head_dim_v, model.k_scale, model.v_scale)
    cache = await settled(client.create_cache(**GEOMETRY, **more, name=name))
    await _spoil(cache, plain, dtype)
    session = cache.session(plane=plane) if plane else None
    where = f"{type(client).__name__}, {plane or 'unary'}, {name}"
    for number, (step_name, said, options) in enumerate(steps()):
        metadata = attnd.StepMetadata(**said)
        step = None if session is None else await settled(session.step(metadata))
        for layer, each in enumerate(options):
            q, k, v = inputs(said, plain.head_dim_v, dtype, NUM_LAYERS * number + layer)
            told = attnd.AttentionOptions(**each)
            if step is not None:
                result = await settled(step.attend(layer, q, k, v, told))
            else:
                method = client.decode if said.get("kind") == "decode" else client.prefill
                result = await settled(method(cache, metadata, layer, q, k, v, told))
            expected = plain.attend(layer, said, q, k, v, each)
            place = f"{where}, {step_name}, layer {layer}"
            if said.get("store_only"):
                assert result is None, place
                continue
            output, lse = result if each.get("return_lse") else (result, None)
            assert output.dtype == dtype, place
            found.errors[place] = error(output, expected[0], dtype)
            if lse is not None:
                found.errors[f"{place}, lse"] = error(lse, expected[1], dtype)
    if session is not None:
        found.told[f"{where}, plane"] = session.plane
        if hasattr(session, "timings"):
            await _attend_two(found, session, plain, dtype, where)
        await settled(session.close())
    await _use_pages(found, cache, plain, dtype, where)
    await settled(cache.delete())


async def _spoil(cache: Any, plain: PlainCache, dtype: torch.dtype) -> None:
    """NaN in every slot: what is not stored is not to be read."""
    everywhere = list(range(NUM_PAGES * PAGE_SIZE))
    k, v = (
        torch.full((len(everywhere), KV_HEADS, dim), torch.nan, dtype=dtype) for dim in (HEAD_DIM, plain.head_dim_v)
    )
    for layer in range(NUM_LAYERS):
        assert await settled(cache.store_kv(layer, everywhere, k, v)) == len(everywhere)
        plain.store(layer, everywhere, k, v)


async def _attend_two(found: Findings, session: Any, plain: PlainCache, dtype: torch.dtype, where: str) -> None:
    """Two calls under way at a time, of a step whose page tables the server knows."""
    said = {"query_lens": [1] * 4, "context_lens": [6, 8, 9, 10], "page_tables": TABLE, "kind": "decode"}
    before = session.timings().bytes_sent
    step = session.step(attnd.StepMetadata(**said))
    found.told[f"{where}, bytes of a step"] = session.timings().bytes_sent - before
    qkv = [inputs(said, plain.head_dim_v, dtype, layer) for layer in range(NUM_LAYERS)]
    calls = [step.submit(layer, *each) for layer, each in enumerate(qkv)]
    for layer, call in enumerate(calls):
        expected, _ = plain.attend(layer, said, *qkv[layer], {})
        found.errors[f"{where}, under way, layer {layer}"] = error(call.wait(), expected, dtype)


async def _use_pages(found: Findings, cache: Any, plain: PlainCache, dtype: torch.dtype, where: str) -> None:
    """Everything that is done with a cache but attention."""
    at = [17, 0, 158, 63]
    generator = torch.Generator().manual_seed(99)
    k, v = (torch.randn(4, KV_HEADS, dim, generator=generator).to(dtype) for dim in (HEAD_DIM, plain.head_dim_v))
    found.told[f"{where}, stored"] = await settled(cache.store_kv(1, at, k, v))
    plain.store(1, at, k, v)
    await settled(cache.copy_pages([7, 4], [35, 36]))
    plain.copy([7, 4], [35, 36])
    for layer, read in ((1, at), (1, [35 * PAGE_SIZE, 36 * PAGE_SIZE + 1]), (0, [35 * PAGE_SIZE])):
        for each, expected in zip(
            await settled(cache.read_kv(layer, read, torch.empty(0))), plain.read(layer, read), strict=True
        ):
            found.errors[f"{where}, read {layer} {read} {len(found.errors)}"] = error(each, expected, dtype)
    await settled(cache.renew())
    info = await settled(cache.info())
    found.told[f"{where}, info"] = [info.name, info.config.num_pages, info.num_pages_written, info.ttl_s]
    found.told[f"{where}, written pages"] = len(await settled(cache.written_pages()))
    warm_up = await settled(cache.warm_up(num_heads=HEADS, max_reqs=2, query_len=1, max_context_len=12))
    found.told[f"{where}, graphs"] = warm_up.num_graphs


async def refuse(found: Findings, client: Any) -> None:
    """What is refused."""
    where = type(client).__name__

    async def refused(what: str, call: Callable[[], Any]) -> None:
        try:
            await settled(call())
        except attnd.AttndError as told:
            found.refusals[f"{where}, {what}"] = f"{type(told).__name__}: {told}"
        else:
            found.refusals[f"{where}, {what}"] = "not refused"

    cache = await settled(client.create_cache(**GEOMETRY, dtype="float32"))
    listed = await settled(client.list_caches())
    found.told[f"{where}, list"] = len(listed)
    one = {"query_lens": [1], "context_lens": [1], "page_tables": [[3]]}
    qkv = inputs(one, HEAD_DIM, torch.float32, 0)

    def asked(layer: int = 0, tensors: Any = qkv, options: Any = PLAIN, **changes: Any) -> Callable[[], Any]:
        metadata = attnd.StepMetadata(**(one | changes))
        return lambda: client.prefill(cache, metadata, layer, *tensors, attnd.AttentionOptions(**options))

    await refused("layer", asked(layer=9))
    await refused("page", asked(page_tables=[[NUM_PAGES]]))
    await refused("slot that is read", asked(slot_mapping=[3 * PAGE_SIZE]))
    await refused("slot twice", asked(query_lens=[2], tensors=[torch.cat([x, x]) for x in qkv], slot_mapping=[1, 1]))
    await refused("backend", asked(options={"backend": "flash_attn"}))
    await refused("type", asked(tensors=[x.half() for x in qkv]))
    session = cache.session()
    step = await settled(session.step(attnd.StepMetadata(**(one | {"context_lens": [5]}))))
    await refused("context that no page covers", lambda: step.attend(0, *qkv))
    await settled(session.close())
    await refused("head_dim", lambda: client.create_cache(**(GEOMETRY | {"head_dim": 7}), dtype="float32"))
    await refused("memory", lambda: client.create_cache(**(GEOMETRY | {"num_pages": 2**31 - 1}), dtype="float32"))
    await refused("another life", lambda: client.open_cache(cache.ref.id, epoch=cache.ref.epoch ^ 1))
    await settled(cache.delete())
    await refused("deleted", cache.info)
    await refused("deleted twice", cache.delete)
    await refused("deleted, attended", asked())


async def _make_calls(address: str) -> Findings:
    found = Findings()
    with attnd.connect(address) as client:
        found.told["server"] = client.capabilities().version
        for name in CACHES:
            for plane in ("inline", "shm"):
                await attend(found, client, name, plane)
        await attend(found, client, "float32", "")
        await refuse(found, client)
    async with await attnd.aio.connect(address) as other:
        await attend(found, other, "float32", "inline")
        await attend(found, other, "fp8, distinct", "shm")
        await attend(found, other, "bfloat16, wide v", "")
        await refuse(found, other)
    return found


def make_calls(address: str) -> Findings:
    """Makes them all, with both clients, on the planes inline and shm and in requests of their own."""
    return asyncio.run(_make_calls(address))


if __name__ == "__main__":
    print(json.dumps(asdict(make_calls(sys.argv[1]))))
