"""Layer groups in a server of this process: what is refused, what is counted, what is kept for whom."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import attnd
from attnd.errors import CacheLost, EpochMismatch, Exhausted, InvalidRequest, Unsupported
from attnd.protocol import frames, requests
from attnd.protocol.regions import Region
from attnd.v1 import attention_pb2, cache_pb2, status_pb2, step_pb2, tensor_pb2
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.execution.step import Call
from attnd_server.inproc import PRINCIPAL, InprocTransport
from attnd_server.kv import limits, page_spaces
from attnd_server.kv.cache_shape import CacheShape
from attnd_server.kv.caches import CacheTable
from attnd_server.kv.page_space import SharedSpace
from attnd_server.kv.restored import Restored
from attnd_server.observe.counts import Metrics
from attnd_server.observe.prometheus import ServerCollector
from attnd_server.planes.cuda.session import CudaSession
from attnd_server.service import session as session_module
from attnd_server.service import validation
from attnd_server.service.kept_steps import BIG_STEP_ELEMENTS, bases_of, is_big, step_bytes
from attnd_server.service.replies import RegionReplies
from attnd_server.service.session import AttendSession
from tests.layer_groups import FULL, GROUPS, LATENT, NUM_HEADS, WINDOWED, Group, Worker, check, config, create, tensor
from tests.shared_calls import Waiting, waiting
from tests.unit.test_decode_graphs import serving

CPU = torch.device("cpu")


def shape(groups: tuple[Group, ...] = GROUPS, **changes: Any) -> CacheShape[Any]:
    return validation.cache_shape(config(groups, **changes))


def layers(*numbers: int) -> tensor_pb2.Tensor:
    return tensor(torch.tensor(numbers, dtype=torch.int32))


def changed(index: int, **fields: Any) -> cache_pb2.CacheConfig:
    """A cache of which one group says something else."""
    message = config()
    for field, value in fields.items():
        if isinstance(value, tensor_pb2.Tensor):
            getattr(message.groups[index], field).CopyFrom(value)
        elif value is None:
            message.groups[index].ClearField(field)
        else:
            setattr(message.groups[index], field, value)
    return message


def test_groups_have_all_that_they_say_and_what_all_have_in_common() -> None:
    checked = shape(backend=2, precision=2)
    assert checked.layers == ((0, 2, 5), (1, 4), (3,))
    assert not checked.is_flat
    assert checked.num_layers == 6
    assert checked.places == [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]
    full, windowed, latent = checked.groups
    assert [config.num_layers for config in checked.groups] == [3, 2, 1]
    assert (windowed.head_dim, windowed.head_dim_v, windowed.page_size, windowed.window) == (24, 8, 2, 5)
    assert (full.is_quantised, windowed.is_quantised, latent.is_quantised) == (False, True, False)
    assert (latent.latent, latent.head_dim, latent.head_dim_v) == (True, 40, 32)
    assert {config.backend.value for config in checked.groups} == {"naive"}
    assert {config.precision.value for config in checked.groups} == {"fp32"}


def test_a_cache_without_groups_is_one_that_is_told_so() -> None:
    flat = cache_pb2.CacheConfig(
        num_layers=3, num_kv_heads=2, head_dim=16, page_size=4, num_pages=12, dtype=tensor_pb2.DTYPE_FLOAT32
    )
    alone = validation.cache_shape(flat)
    grouped = shape((Group((0, 1, 2), 2, 16, 16, 4, 12),))
    assert alone.groups == grouped.groups
    assert alone.layers == grouped.layers
    assert (alone.is_flat, grouped.is_flat) == (True, False)
    assert alone != grouped  # they are told differently


REFUSED = {
    "given beside": (config(head_dim=16), "head_dim is 16, but must be absent where groups are given"),
    "scales beside": (config(k_scales=tensor(torch.ones(1))), "k_scales is given, but must be absent where groups"),
    "no layers": (config(num_layers=0), "num_layers is 0, but must be 1..1024"),
    "many layers": (config(num_layers=1025), "num_layers is 1025, but must be 1..1024"),
    "more groups than layers": (
        config(num_layers=2),
        "groups has 3 elements, but must have at most 2, as many",
    ),
    "a layer too few": (config(num_layers=7), "groups have no layer 6, but each of the 7 must be in one"),
    "a layer too many": (config(num_layers=5), r"groups[0].layers[2] is 5, but must be 0..4: the cache has 5 layers"),
    "negative": (
        changed(1, layers=layers(-1, 4)),
        "groups[1].layers[0] is -1, but must be 0..5: the cache",
    ),
    "twice": (
        changed(1, layers=layers(1, 2)),
        "groups[1].layers[1] is 2, but must be in one group, and",
    ),
    "falls": (
        changed(1, layers=layers(4, 1)),
        "groups[1].layers[1] is 1, but must be greater than 4, the",
    ),
    "equal": (
        changed(1, layers=layers(4, 4)),
        "groups[1].layers[1] is 4, but must be greater than 4, the",
    ),
    "absent": (changed(2, layers=None), "groups[2].layers is absent, but must be given"),
    "empty": (changed(2, layers=layers()), "groups[2].layers is empty, but must have at least one layer"),
    "many": (
        changed(2, layers=layers(*range(7))),
        "groups[2].layers has 7 elements, but must have at most 6",
    ),
    "floats": (changed(2, layers=tensor(torch.ones(1))), "groups[2].layers has dtype float32, but must be int32"),
    "head_dim": (changed(1, head_dim=23), "groups[1].head_dim is 23, but must be a multiple of 8"),
    "head_dim of no latent": (changed(0, head_dim=520), "groups[0].head_dim is 520, but must be 8..512"),
    "num_pages": (changed(1, num_pages=0), "groups[1].num_pages is 0, but must be 1..2147483647"),
    "page_size": (changed(2, page_size=0), "groups[2].page_size is 0, but must be 1..1024"),
    "scales": (
        changed(0, k_scales=tensor(torch.ones(1))),
        "groups[0].k_scales is given, but must be absent unless",
    ),
    "scale": (changed(1, k_scales=tensor(torch.zeros(1))), "groups[1].k_scales[0] is 0, but must be positive, finite"),
    "kv_dtype": (changed(1, kv_dtype=2), "groups[1].kv_dtype is DTYPE_FLOAT16, but must be DTYPE_FLOAT32 as dtype, or"),
    "latent heads": (changed(2, num_kv_heads=2), "groups[2].num_kv_heads is 2, but must be 1 of a latent"),
    "latent v": (changed(2, head_dim_v=48), "groups[2].head_dim_v is 48, but must be at most head_dim, 40"),
    "latent types": (changed(2, v_dtype=6), "groups[2].v_dtype is torch.float8_e4m3fn, but must be torch.float32"),
    "latent layout": (config(layout=2), "layout is distinct, but must be unified of a latent"),
    "dtype": (
        config(dtype=0),
        "dtype is DTYPE_UNSPECIFIED, but must be DTYPE_FLOAT32,",
    ),
    "kv_split": (
        config(kv_split=cache_pb2.KvSplit(chunk_size=3)),
        "kv_split.chunk_size is 3, but must be 0 or",
    ),
}


@pytest.mark.parametrize(("message", "text"), REFUSED.values(), ids=REFUSED)
def test_groups_are_refused(message: cache_pb2.CacheConfig, text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        validation.cache_shape(message)
    assert str(refused.value).startswith(text)
    assert refused.value.field.partition("[")[0] == text.partition(" ")[0].partition("[")[0]


def test_the_greatest_latent_head_and_window_are_taken() -> None:
    message = changed(2, head_dim=1024, head_dim_v=1024)
    message.groups[1].window = 2**32 - 1
    taken = validation.cache_shape(message)
    assert taken.groups[2].head_dim == 1024
    assert taken.groups[1].window == 2**32 - 1
    with pytest.raises(InvalidRequest, match=r"^groups\[2\]\.head_dim is 1032, but must be 8\.\.1024"):
        validation.cache_shape(changed(2, head_dim=1032))


def test_half_a_cache_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    table, taken = CacheTable(ServerConfig(), CPU, kv_bytes=1 << 20), []
    take = type(table._spaces).take

    def take_two(self: Any, config: Any) -> Any:
        if len(taken) == 2:
            raise torch.OutOfMemoryError("no more")
        taken.append(config)
        return take(self, config)

    monkeypatch.setattr(type(table._spaces), "take", take_two)
    with pytest.raises(Exhausted, match="no more"):
        table.create(shape(), principal="a", ttl_s=9, name="")
    assert len(taken) == 2
    assert not table._spaces._spaces
    assert not table._reserved
    assert table.num_bytes == 0


def test_pages_that_somebody_holds_outlive_the_cache_in_every_group() -> None:
    table = CacheTable(ServerConfig(), CPU, kv_bytes=1 << 20)
    cache = table.create(shape(), principal="a", ttl_s=9, name="")
    pages = [group.k_pages.view(torch.uint8) for group in cache.groups]
    with cache.held():
        for each in pages:
            each.fill_(7)
        table.delete(cache.info().cache, "a")
        other = table.create(shape(), principal="a", ttl_s=9, name="")
        assert not any(group.k_pages.view(torch.uint8).any() for group in other.groups)
        assert all((each == 7).all() for each in pages)
        with pytest.raises(CacheLost), cache.held():
            pass
    table.delete(other.info().cache, "a")
    assert not table._spaces._spaces


def test_an_epoch_is_used_up_by_a_page_of_any_group_that_it_had() -> None:
    table = CacheTable(ServerConfig(), CPU, kv_bytes=1 << 20)
    cache = table.create(shape(), principal="a", ttl_s=9, name="", restored=Restored(bytes(16), (5,)))
    cache.groups[0].mark_pages_written(torch.tensor([3]))
    cache.groups[1].mark_pages_written(torch.tensor([24]))
    cache.filled()
    ref = cache_pb2.CacheRef(id=cache.id, epoch=5)
    assert table.adopt(ref, "a") is cache
    cache.groups[1].mark_pages_written(torch.tensor([3]))  # page 3 of another group
    cache.groups[2].mark_pages_written(torch.tensor([3]))
    assert table.adopt(ref, "a") is cache
    cache.groups[1].mark_pages_written(torch.tensor([24]))
    with pytest.raises(EpochMismatch, match="stored into pages that it had"):
        table.adopt(ref, "a")


def test_the_room_of_a_step_is_that_of_all_its_groups() -> None:
    limits = ServerConfig()
    empty = step_bytes(step_pb2.Step(), limits, [0, 0, 0])
    assert empty == 3 * step_bytes(step_pb2.Step(), limits)
    step = step_pb2.Step(cu_seqlens_q=layers(0, 1, 2, 3, 4))
    lens = step_bytes(step, limits, [0, 0, 0])
    step.groups.add(page_tables=layers(*[0] * 4_000), slot_mapping=layers(*[0] * 100))
    delta = step_pb2.PageTableDelta(max_pages=1_000, base_step_id=7)
    step.groups.add(page_table_delta=delta)
    step.groups.add(tables_of=0)
    assert 16_000 + 16_000 + 800 <= step_bytes(step, limits, [0, 0, 0]) - lens < 45_000
    # A group that has another's tables has its own copy of them without what its window hides.
    with_windows = step_bytes(step, limits, [0, 0, 5])
    assert with_windows - step_bytes(step, limits, [0, 0, 0]) >= 16_000
    step.groups[2].window = 5
    assert step_bytes(step, limits, [0, 0, 0]) == with_windows
    step.groups[2].window = 0
    assert bases_of(step) == {7}
    step.groups[2].page_table_delta.base_step_id = 5
    assert bases_of(step) == {5, 7}
    # A few bytes that ask for the most in each of the groups.
    step.groups[2].ClearField("tables_of")
    for group in step.groups:
        group.page_table_delta.max_pages = 2**32 - 1
    tables = 4 * limits.max_page_table_elements
    assert 3 * tables <= step_bytes(step, limits, [0, 0, 0]) < 3 * tables + (1 << 20)
    # Groups that the cache has not are refused, and take nothing before.
    assert step_bytes(step, limits, [0]) < tables + (1 << 20)


@pytest.mark.parametrize("is_delta", [False, True])
def test_tables_are_big_together(is_delta: bool) -> None:
    def step(elements: int) -> step_pb2.Step:
        message = step_pb2.Step(cu_seqlens_q=layers(0, 1))
        for count in (BIG_STEP_ELEMENTS // 4, elements):
            if is_delta:
                message.groups.add(page_table_delta=step_pb2.PageTableDelta(max_pages=count // 2))
            else:
                message.groups.add(page_tables=tensor_pb2.Tensor(data=bytes(4 * count)))
        return message

    for_groups = 2 << 12
    assert not is_big(step(BIG_STEP_ELEMENTS // 4 * 3 - for_groups - 8))
    assert is_big(step(BIG_STEP_ELEMENTS // 4 * 3 + 2 - for_groups))


class Stream:
    """A stream of a worker with a cache of three groups, in this process."""

    def __init__(self, server: Waiting, seed: int, groups: tuple[Group, ...] = GROUPS) -> None:
        self.server = server
        self.cache = create(server.client, groups, backend="naive")
        self.session: AttendSession = server.service.open_session(PRINCIPAL)
        self.worker, self.step_id = Worker(seed, groups=groups), 0

    def opens(self, query_lens: list[int], **changes: Any) -> None:
        self.step_id += 1
        self.session.request(frames.step_request(self._message(query_lens, **changes)))

    def _message(self, query_lens: list[int], **changes: Any) -> step_pb2.Step:
        return self.worker.metadata(query_lens, **changes).to_message(self.step_id, self.cache.ref)

    def call(self, layer: int, query_lens: list[int]) -> tuple[Call, torch.Tensor]:
        """A call that waits to run, and its output in float64."""
        tensors = self.worker.tensors(layer, sum(query_lens))
        work = self.session.request(requests.attend_call(self.step_id, layer, *tensors, attnd.AttentionOptions()))
        assert isinstance(work, Call)
        return work, self.worker.expected(layer, query_lens, *tensors)

    def fills(self, query_lens: list[int]) -> None:
        self.opens(query_lens)
        for layer in range(sum(len(group.layers) for group in self.worker.groups)):
            work, expected = self.call(layer, query_lens)
            check(output_of(self.server.together([work])[0], layer), expected)
        self.worker.ends(query_lens)


def output_of(answer: bytes | BaseException, layer: int) -> torch.Tensor:
    assert isinstance(answer, bytes), answer
    reply = attention_pb2.AttendResponse.FromString(answer).call
    assert reply.layer == layer
    return torch.frombuffer(bytearray(reply.output.data), dtype=torch.float32).view(*reply.output.shape)


@pytest.fixture
def server() -> Iterator[Waiting]:
    with waiting() as running:
        yield running


def test_layers_of_like_groups_share_a_launch_whatever_caches_they_are_of(
    server: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "plan_ahead", lambda *_: None)  # which may wait before the calls
    groups = (FULL, Group((1, 4), 1, 24, 8, page_size=2, num_pages=25, window=5), LATENT)
    streams = [Stream(server, seed, groups) for seed in range(3)]
    for stream, query_lens in zip(streams, ([5, 8], [1, 3], [4, 4]), strict=True):
        stream.fills(query_lens)
        stream.opens([1, 1])
    for layers_of, launches in (((0, 2, 5), {4: 1}), ((1, 4, 1), {4: 1}), ((0, 1, 2), {1: 1, 2: 1})):
        calls = [stream.call(layer, [1, 1]) for stream, layer in zip(streams, layers_of, strict=True)]
        server.launches()
        answers = server.together([work for work, _ in calls])
        for answer, layer, (_, expected) in zip(answers, layers_of, calls, strict=True):
            check(output_of(answer, layer), expected)
        assert server.launches() == launches


def test_few_groups_are_made_ready_ahead(server: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose layers were called before, and not a thousand of them."""
    ahead: list[int] = []
    monkeypatch.setattr(session_module, "plan_ahead", lambda _, step, options: ahead.append(step.group.index))
    stream = Stream(server, 1, tuple(Group((layer,), 1, 8, 8, 4, 8) for layer in range(10)))
    stream.opens([1, 1])
    for layer in (0, 3, 9):
        stream.call(layer, [1, 1])
    assert ahead == []
    stream.opens([1, 1])
    assert ahead == [0, 3]
    for layer in range(10):
        stream.call(layer, [1, 1])
    stream.opens([1, 1])
    assert ahead[2:] == list(range(session_module.MAX_GROUPS_AHEAD))


def test_the_same_call_again_of_another_group_is_checked(server: Waiting) -> None:
    """On a shm plane, where the last call of a lane may be meant again."""
    alike = (Group((0, 2), 2, 16, 16, 4, 12), Group((1, 3), 2, 16, 16, 4, 12), Group((4,), 1, 16, 16, 4, 12))
    stream = Stream(server, 1, alike)
    stream.session = server.service.open_session(PRINCIPAL, RegionReplies(Region(1, mmap.mmap(-1, 1 << 12))))
    stream.opens([1, 1])
    first, _ = stream.call(0, [1, 1])
    again = stream.session.repeat(2, 1, 0)
    assert isinstance(again, Call)
    assert (again.step, again.layer) == (first.step, 1)
    assert again.q is first.q
    other = stream.session.repeat(3, 1, 0)
    assert isinstance(other, Call)
    assert other.step is not first.step
    assert (other.step.group.index, other.layer) == (1, 1)
    with pytest.raises(InvalidRequest, match=r"k has shape \[2, 2, 16\], but must be \[2, 1, 16\]"):
        stream.session.repeat(4, 1, 0)
    with pytest.raises(InvalidRequest, match=r"layer is 5, but the cache has layers 0\.\.4"):
        stream.session.repeat(5, 1, 0)
    with pytest.raises(InvalidRequest, match=r"call\.step_id is 9, but the stream's open steps are: 1"):
        stream.session.repeat(0, 9, 0)


def test_a_warm_up_is_of_one_group() -> None:
    with serving() as warm_server:
        client = warm_server.client
        with create(client, backend="naive") as cache, cache.session() as session:
            told = cache.warm_up(num_heads=NUM_HEADS, max_reqs=2, group=0)
            assert (told.num_graphs, told.reason) == (2 * len(FULL.layers), "")
            assert cache.warm_up(num_heads=NUM_HEADS, max_reqs=2, group=0).num_graphs == told.num_graphs
            captures = warm_server.captures
            assert captures.num_captures == 6
            worker = Worker(2)
            worker.runs(session, [5, 8])
            assert captures.replays == []
            worker.runs(session, [1, 1])
            assert len(captures.replays) == len(FULL.layers)
            cache.warm_up(num_heads=NUM_HEADS, max_reqs=2, group=1)
            assert captures.num_captures == 6 + 4
            worker.runs(session, [1, 1])
            assert len(captures.replays) == 2 * len(FULL.layers) + len(WINDOWED.layers)
            (held,) = warm_server.caches.all()
            assert held.num_graph_bytes > 0
        assert warm_server.executor.graphs.all() == []
        assert warm_server.caches.num_bytes == 0


def test_a_cuda_plane_refuses_a_cache_of_several_groups() -> None:
    service = build_service(ServerConfig(device="cpu", kv_bytes=1 << 20))
    try:
        table = service.caches
        cache = table.create(shape(), principal="alice", ttl_s=9, name="")
        channel: Any = SimpleNamespace(num_bytes=1 << 20, capture=None)
        session = CudaSession(service, "alice", channel, SimpleNamespace(), print)  # type: ignore[arg-type]
        step = Worker(1).metadata([1, 1]).to_message(1, cache.info().cache)
        message = attention_pb2.AttendRequest(cuda_step=attention_pb2.CudaStep(step=step, num_heads=4))
        with pytest.raises(Unsupported, match=r"the cache has 3 layer groups, but a cuda plane serves caches of one"):
            session._checked(message)
        assert service.step_room.num_bytes == 0
    finally:
        service.close()


def test_every_group_is_verified() -> None:
    service = build_service(ServerConfig(device="cpu", kv_bytes=1 << 20, verify=1.0, verify_action="refuse"))
    with attnd.Client(InprocTransport(service), timeout_s=60) as client:
        with create(client) as cache, cache.session() as session:
            worker = Worker(3)
            for query_lens in ([5, 8], [1, 1], [1, 7], [1, 1]):
                worker.runs(session, query_lens, gives_back=True)
        assert service.verifier is not None
        assert sum(sum(tally.ratios.counts) for tally in service.verifier.tallies.values()) == 4 * 6


def test_a_stranger_finds_neither_the_cache_nor_a_step_of_it() -> None:
    service = build_service(ServerConfig(device="cpu", kv_bytes=1 << 20))
    try:
        ref = service.caches.create(shape(), principal="alice", ttl_s=9, name="").info().cache
        step = Worker(1).metadata([1, 1]).to_message(1, ref)
        session = service.open_session("bob")
        with pytest.raises(CacheLost):
            session.request(frames.step_request(step))
        slots = tensor(torch.tensor([0], dtype=torch.int32))
        for layer in (0, 1, 3):
            read = attention_pb2.ReadKvRequest(cache=ref, layer=layer, slot_mapping=slots)
            with pytest.raises(CacheLost):
                service.kv.read_kv(read.SerializeToString(), "bob")
        for group in range(3):
            renew = cache_pb2.RenewCacheRequest(cache=ref, with_written_pages=True, group=group)
            with pytest.raises(CacheLost):
                service.kv.renew_cache(renew.SerializeToString(), "bob")
    finally:
        service.close()


def test_a_lease_that_ends_frees_every_group() -> None:
    table = CacheTable(ServerConfig(), CPU, kv_bytes=1 << 20)
    cache = table.create(shape(), principal="a", ttl_s=9, name="")
    assert table.num_bytes == shape().num_bytes > 0
    cache.expires_at = 0.0
    assert table.expire() == [cache]
    assert table.num_bytes == 0
    assert [group.pages for group in cache.groups] == [None] * 3
    assert not table._spaces._spaces


def test_pages_of_all_groups_are_told_together() -> None:
    service = build_service(ServerConfig(device="cpu", kv_bytes=1 << 20))
    try:
        cache = service.caches.create(shape(), principal="alice", ttl_s=9, name="")
        for group, pages in zip(cache.groups, ([1, 2], [24], [0]), strict=True):
            group.mark_pages_written(torch.tensor(pages))
        told = status_pb2.GetStatusResponse.FromString(service.unary["GetStatus"](b"", "alice"))
        (row,) = (each for each in told.principals if each.principal == "alice")
        assert (row.num_pages, row.num_pages_written, row.num_kv_bytes) == (12 + 25 + 7, 4, cache.num_bytes)
        told_pages = {
            sample.name: sample.value
            for metric in ServerCollector(Metrics(), service.executor, service.caches, service.config).collect()
            for sample in metric.samples
            if sample.name.startswith("attnd_pages")
        }
        assert told_pages == {"attnd_pages": 44, "attnd_pages_in_use": 4}
    finally:
        service.close()


def test_windows_do_not_keep_groups_out_of_one_space(server: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their calls share a launch with those that have the window as an option, and with no others."""
    monkeypatch.setattr(session_module, "plan_ahead", lambda *_: None)
    alike = (Group((0,), 2, 16, 16, 4, 12), Group((1,), 2, 16, 16, 4, 12, window=5), Group((2,), 2, 16, 16, 4, 12))
    streams = [Stream(server, seed, alike) for seed in range(2)]
    spaces = {group.pages.space.id for cache in server.service.caches.all() for group in cache.groups if group.pages}
    assert len(spaces) == 1
    for stream in streams:
        stream.fills([5, 8])
        stream.opens([1, 1])
    for layers_of, launches in (((0, 2), {2: 1}), ((1, 1), {2: 1}), ((0, 1), {1: 2})):
        calls = [stream.call(layer, [1, 1]) for stream, layer in zip(streams, layers_of, strict=True)]
        server.launches()
        answers = server.together([work for work, _ in calls])
        for answer, layer, (_, expected) in zip(answers, layers_of, calls, strict=True):
            check(output_of(answer, layer), expected)
        assert server.launches() == launches


def test_addresses_are_taken_for_a_few_geometries_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_spaces, "MAX_SHARED_SPACES", 2)
    table = CacheTable(ServerConfig(), CPU, kv_bytes=1 << 20)
    first, second = (table.create(shape(), principal="a", ttl_s=9, name="") for _ in range(2))

    def kinds() -> list[bool]:
        groups = [group for cache in (first, second) for group in cache.groups]
        return [isinstance(group.pages.space, SharedSpace) for group in groups if group.pages]

    assert kinds() == [True, True, False] * 2
    table.delete(first.info().cache, "a")
    first = table.create(shape(), principal="a", ttl_s=9, name="")
    assert kinds() == [True, True, False] * 2
    assert all(not group.k_pages.view(torch.uint8).any() for group in first.groups)


def test_groups_of_all_caches_have_a_limit() -> None:
    table = CacheTable(ServerConfig(max_caches=4, tokens="file"), CPU, kv_bytes=1 << 20)
    most = limits.GROUPS_PER_CACHE

    def create(principal: str, num_groups: int) -> None:
        groups = tuple(Group((layer,), 1, 8, 8, 1, 1) for layer in range(num_groups))
        table.create(shape(groups), principal=principal, ttl_s=9, name="")

    create("a", most)
    told = (
        f"groups has {most + 1} elements, but of a principal's {2 * most} layer groups {most} exist and {most} are free"
    )
    with pytest.raises(Exhausted, match=told) as refused:
        create("a", most + 1)
    assert refused.value.field == "groups"
    create("a", most)
    create("b", 2 * most)
    with pytest.raises(Exhausted, match=f"of the server's {4 * most} layer groups {4 * most} exist and 0 are free"):
        create("c", 1)
