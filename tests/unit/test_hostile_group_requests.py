"""Caches, calls and other requests that name layer groups, and are refused by a rule that they name."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from attnd.errors import Exhausted, InvalidRequest
from attnd.protocol.regions import Region
from attnd.v1 import attention_pb2, cache_pb2, step_pb2, tensor_pb2
from attnd_server.service.replies import RegionReplies
from tests.fuzz.hostile import Stream, hybrid, step, verdict
from tests.fuzz.pool import Pool
from tests.fuzz.tensors import ints
from tests.fuzz.world import CALLER, World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World() as made:
        yield made


@pytest.fixture
def pool(world: World) -> Pool:
    return hybrid(world)


def reals(*values: float) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(
        dtype=tensor_pb2.DTYPE_FLOAT32, shape=(len(values),), data=np.array(values, np.float32).tobytes()
    )


def zeros(*shape: int) -> tensor_pb2.Tensor:
    data = bytes(4 * int(np.prod(shape)))
    return tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT32, shape=shape, data=data)


def huge_layers() -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_INT32, shape=(2**31,), data=bytes(8))


def group(index: int, **fields: Any) -> Callable[[cache_pb2.CacheConfig], object]:
    """Changes of a layer group of a cache; None: the field goes."""

    def change(config: cache_pb2.CacheConfig) -> None:
        for field, value in fields.items():
            config.groups[index].ClearField(field)  # type: ignore[arg-type]
            if value is not None:
                config.groups[index].MergeFrom(cache_pb2.LayerGroup(**{field: value}))

    return change


def whole(**fields: Any) -> Callable[[cache_pb2.CacheConfig], object]:
    return lambda config: config.MergeFrom(cache_pb2.CacheConfig(**fields))


FP16, INT32 = tensor_pb2.DTYPE_FLOAT16, tensor_pb2.DTYPE_INT32
CACHES: dict[str, tuple[Callable[[cache_pb2.CacheConfig], object], str, str]] = {
    "falling": (group(0, layers=ints([2, 0])), "groups[0].layers", "layers[1] is 0, but must be greater than 2"),
    "twice": (group(0, layers=ints([0, 0])), "groups[0].layers", "layers[1] is 0, but must be greater than 0"),
    "in two": (
        group(1, layers=ints([2])),
        "groups[1].layers",
        "[0] is 2, but must be in one group, and is in groups[0]",
    ),
    "negative": (group(1, layers=ints([-1])), "groups[1].layers", "layers[0] is -1, but must be 0..4"),
    "past the last": (group(1, layers=ints([5])), "groups[1].layers", "layers[0] is 5, but must be 0..4"),
    "wide": (group(1, layers=ints([1], wide=True)), "groups[1].layers", "has dtype int64, but must be int32"),
    "reals": (group(1, layers=reals(1)), "groups[1].layers", "has dtype float32, but must be int32"),
    "huge": (group(1, layers=huge_layers()), "groups[1].layers", "has 8 bytes of data, but must have 8589934592"),
    "a square": (group(1, layers=ints([1], 1, 1)), "groups[1].layers", "has shape [1, 1], but must be [num_layers]"),
    "too many": (group(1, layers=ints([*range(6)])), "groups[1].layers", "has 6 elements, but must have at most 5"),
    "empty": (group(1, layers=ints([])), "groups[1].layers", "is empty, but must have at least one layer"),
    "absent": (group(1, layers=None), "groups[1].layers", "groups[1].layers is absent, but must be given"),
    "one missing": (group(0, layers=ints([0])), "groups", "groups have no layer 2, but each of the 5 must be in one"),
    "no layers": (whole(num_layers=2**32 - 1), "num_layers", "num_layers is 4294967295, but must be 1..1024"),
    "more groups": (
        lambda config: [config.groups.add() for _ in range(2)],
        "groups",
        "groups has 6 elements, but must",
    ),
    "thousands": (lambda config: [config.groups.add() for _ in range(60_000)], "", "a field beyond the 4096 that a"),
    "heads beside": (whole(num_kv_heads=2), "num_kv_heads", "is 2, but must be absent where groups are given"),
    "pages beside": (whole(num_pages=2), "num_pages", "num_pages is 2, but must be absent where groups are given"),
    "scales beside": (whole(k_scales=reals(1)), "k_scales", "k_scales is given, but must be absent where groups"),
    "no page size": (group(2, page_size=None), "groups[2].page_size", "page_size is 0, but must be 1..1024"),
    "no pages": (group(2, num_pages=None), "groups[2].num_pages", "num_pages is 0, but must be 1..2147483647"),
    "odd heads": (group(0, head_dim=12), "groups[0].head_dim", "head_dim is 12, but must be a multiple of 8"),
    "long heads": (group(0, head_dim=520), "groups[0].head_dim", "head_dim is 520, but must be 8..512"),
    "latent heads": (group(2, num_kv_heads=2), "groups[2].num_kv_heads", "is 2, but must be 1 of a latent cache"),
    "latent dims": (group(2, head_dim_v=32), "groups[2].head_dim_v", "is 32, but must be at most head_dim, 24"),
    "longest latent": (group(2, head_dim=1032), "groups[2].head_dim", "head_dim is 1032, but must be 8..1024"),
    "latent layout": (
        whole(layout=cache_pb2.LAYOUT_DISTINCT),
        "layout",
        "layout is distinct, but must be unified of a",
    ),
    "type of K": (group(0, kv_dtype=INT32), "groups[0].kv_dtype", "kv_dtype is DTYPE_INT32, but must be DTYPE_FLOAT32"),
    "type of V": (group(0, v_dtype=FP16), "groups[0].v_dtype", "v_dtype is DTYPE_FLOAT16, but must be DTYPE_FLOAT32"),
    "scales of reals": (
        group(0, k_scales=reals(1)),
        "groups[0].k_scales",
        "is given, but must be absent unless kv_dtype",
    ),
    "two scales": (group(1, k_scales=reals(1, 2)), "groups[1].k_scales", "k_scales has 2 elements, but must have 1"),
    "a scale of 0": (group(1, v_scales=reals(0)), "groups[1].v_scales", "v_scales[0] is 0, but must be positive"),
    "no scale": (group(1, v_scales=reals(float("nan"))), "groups[1].v_scales", "v_scales[0] is nan, but must be"),
}


@pytest.mark.parametrize(("change", "field", "text"), CACHES.values(), ids=CACHES)
def test_caches(
    world: World, pool: Pool, change: Callable[[cache_pb2.CacheConfig], object], field: str, text: str
) -> None:
    request = cache_pb2.CreateCacheRequest(config=pool.info.config)
    change(request.config)
    error = verdict(world, lambda: world.service.create_cache(request.SerializeToString(), CALLER))
    assert isinstance(error, InvalidRequest)
    assert (error.field, text in str(error)) == (field, True), str(error)


def test_a_cache_that_does_not_fit_takes_nothing(world: World, pool: Pool) -> None:
    request, used = cache_pb2.CreateCacheRequest(config=pool.info.config), pool.cache.num_bytes
    request.config.groups[3].num_pages = 2**31 - 1  # after three that fit
    before = sum(each.num_bytes for each in world.service.caches.all())
    for _ in range(3):
        work: Any = world.service.create_cache(request.SerializeToString(), CALLER)
        error = verdict(world, work)
        assert isinstance(error, Exhausted)
        assert "num_pages is 6 + 5 + 9 + 2147483647" in str(error)
    assert (sum(each.num_bytes for each in world.service.caches.all()), pool.cache.num_bytes) == (before, used)


# --- calls ---------------------------------------------------------------------------------------------------------


def call(layer: int, step_id: int = 1, **changes: Any) -> step_pb2.Call:
    """A call of a layer of the cache, of the shape that its group has; None leaves a field out."""
    head_dim, head_dim_v, heads = {1: (24, 8, 1), 3: (24, 0, 1), 4: (8, 8, 2)}.get(layer, (8, 16, 2))
    fields = {"q": zeros(1, 2, head_dim), "k": zeros(1, heads, head_dim), "v": zeros(1, heads, head_dim_v)} | changes
    if not head_dim_v and "v" not in changes:
        del fields["v"]
    return step_pb2.Call(
        step_id=step_id, layer=layer, **{name: each for name, each in fields.items() if each is not None}
    )


def options(**fields: Any) -> step_pb2.AttentionOptions:
    return step_pb2.AttentionOptions(**fields)


CALLS = {
    "no layer": (call(5), "layer", "layer is 5, but the cache has layers 0..4"),
    "no layer by far": (call(2**32 - 1), "layer", "layer is 4294967295, but the cache has layers 0..4"),
    "window of another": (call(1, options=options(window=4)), "window", "window is 4, but must be 0 or 5, that of"),
    "no window": (call(1, options=options(window=2**32 - 1)), "window", "window is 4294967295, but must be 0 or 5"),
    "latent with v": (
        call(3, v=zeros(1, 1, 16)),
        "v",
        "v is given, but must be absent: it is the first 16 elements of k",
    ),
    "latent without k": (call(3, k=None), "k", "k is absent, but must be given"),
    "latent with rows of v": (call(3, k=zeros(1, 1, 16)), "k", "k has shape [1, 1, 16], but must be [1, 1, 24]"),
    "k of another": (call(4, k=zeros(1, 1, 24)), "k", "k has shape [1, 1, 24], but must be [1, 2, 8]"),
    "v of another": (call(4, v=zeros(1, 2, 16)), "v", "v has shape [1, 2, 16], but must be [1, 2, 8]"),
    "q of another": (call(0, q=zeros(1, 2, 24)), "q", "q has shape [1, 2, 24], but must be [1, num_heads, 8]"),
    "no v": (call(1, v=None), "v", "v is absent, but must be given"),
    "a head of two": (call(0, q=zeros(1, 1, 8)), "q", "q has 1 heads, but must have a multiple of the cache's 2 KV"),
}


@pytest.mark.parametrize(("message", "field", "text"), CALLS.values(), ids=CALLS)
def test_calls(world: World, pool: Pool, message: step_pb2.Call, field: str, text: str) -> None:
    stream = Stream(world)
    stream.step(step(pool))
    request = attention_pb2.PrefillRequest(step=step(pool), call=message).SerializeToString()
    for send in (lambda: stream.call(message), lambda: world.service.prefill(request, CALLER)):
        error = verdict(world, send)
        assert isinstance(error, InvalidRequest)
        assert (error.field, text in str(error)) == (field, True), str(error)


def test_a_frame_that_repeats_a_call_does_so_in_its_group_alone(world: World, pool: Pool) -> None:
    session = world.service.open_session(CALLER, RegionReplies(Region(1, mmap.mmap(-1, 1 << 12))))
    session.request(attention_pb2.AttendRequest(step=step(pool)).SerializeToString())
    session.request(attention_pb2.AttendRequest(call=call(0)).SerializeToString(), lane=1)
    assert session.repeat(2, 1, 1).layer == 1  # type: ignore[attr-defined]
    for layer, text in {
        1: "q has shape [1, 2, 8], but must be [1, num_heads, 24]",
        3: "q has shape [1, 2, 8], but must be [1, num_heads, 24]",
        4: "v has shape [1, 2, 16], but must be [1, 2, 8]",
        5: "layer is 5, but the cache has layers 0..4",
        2**32 - 1: "layer is 4294967295, but the cache has layers 0..4",
    }.items():
        assert text in str(verdict(world, lambda layer=layer: session.repeat(layer, 1, 1)))  # type: ignore[misc]
    assert "there was no call in lane 0" in str(verdict(world, lambda: session.repeat(0, 1, 0)))
    assert session.repeat(2, 1, 1).layer == 1  # type: ignore[attr-defined]


# --- what names a group by its index -------------------------------------------------------------------------------

REQUESTS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "copy: no group": ("CopyPages", {"group": 4}, "group", "group is 4, but the cache has layer groups 0..3"),
    "copy: none by far": ("CopyPages", {"group": 2**32 - 1}, "group", "group is 4294967295, but the cache has layer"),
    "copy: a page of another": (
        "CopyPages",
        {"group": 1, "source_pages": ints([5])},
        "source_pages",
        "source_pages[0] is 5, but the cache has pages 0..4",
    ),
    "renew: no group": (
        "RenewCache",
        {"group": 4, "with_written_pages": True},
        "group",
        "group is 4, but the cache has",
    ),
    "renew: none asked for": ("RenewCache", {"group": 4}, "group", "group is 4, but the cache has layer groups 0..3"),
    "warm: no group": ("WarmUp", {"group": 4}, "group", "group is 4, but the cache has layer groups 0..3"),
    "warm: another window": (
        "WarmUp",
        {"group": 1, "options": options(window=6)},
        "window",
        "window is 6, but must be 0 or 5, that of the step or its layer group",
    ),
    "warm: heads": ("WarmUp", {"group": 0, "num_heads": 3}, "num_heads", "num_heads is 3, but must be a multiple of"),
}


@pytest.mark.parametrize(("method", "changes", "field", "text"), REQUESTS.values(), ids=REQUESTS)
def test_requests(world: World, pool: Pool, method: str, changes: dict[str, Any], field: str, text: str) -> None:
    valid: dict[str, Any] = {"cache": pool.info.cache}
    if method == "CopyPages":
        valid |= {"source_pages": ints([0]), "target_pages": ints([1])}
    elif method == "WarmUp":
        valid |= {"num_heads": 2, "query_len": 1, "max_reqs": 1}
    message_type = getattr(attention_pb2 if method == "WarmUp" else cache_pb2, f"{method}Request")
    request = message_type(**valid | changes).SerializeToString()
    error = verdict(world, lambda: world.service.unary[method](request, CALLER))
    assert isinstance(error, InvalidRequest)
    assert (error.field, text in str(error)) == (field, True), str(error)


@pytest.mark.parametrize(
    ("layer", "slot", "v", "text"),
    [
        (5, 0, None, "layer is 5, but the cache has layers 0..4"),
        (3, 0, zeros(1, 1, 16), "v is given, but must be absent"),
        (3, 18, None, "slot_mapping[0] is 18, but the cache has slots 0..17"),
        (1, 20, zeros(1, 1, 8), "slot_mapping[0] is 20, but the cache has slots 0..19"),
        (1, 0, zeros(1, 1, 16), "v has shape [1, 1, 16], but must be [1, 1, 8]"),
    ],
)
def test_kv_of_layers(world: World, pool: Pool, layer: int, slot: int, v: tensor_pb2.Tensor | None, text: str) -> None:
    names = {"cache": pool.info.cache, "layer": layer, "slot_mapping": ints([slot], wide=True)}
    request = attention_pb2.StoreKvRequest(**names, k=zeros(1, 1, 24), v=v).SerializeToString()
    assert text in str(verdict(world, lambda: world.service.kv.store_kv(request, CALLER)))
    if not text.startswith("v "):
        read = attention_pb2.ReadKvRequest(**names).SerializeToString()
        assert text in str(verdict(world, lambda: world.service.kv.read_kv(read, CALLER)))
