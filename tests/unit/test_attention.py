"""`attnd.Attention` over a session that attends in plain torch and writes down what it was asked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import attnd
from attnd.errors import Disconnected, InvalidRequest
from attnd.integrations.diffulex import metadata as diffulex
from attnd.integrations.diffulex.attention import Attention, attach
from attnd.integrations.model_session import ModelSession
from attnd.protocol.step_metadata import StepMetadata
from attnd.v1 import backend_pb2, cache_pb2
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.inproc import InprocTransport
from tests.unit.plain import PlainCache

HEADS, KV_HEADS, DIM, SCALE, PAGE_SIZE = 4, 2, 8, 0.3, 4


class FakeSession:
    """What `Attention` uses of `attnd.Session`."""

    def __init__(self, num_layers: int = 3, **config: int) -> None:
        fields = {"num_kv_heads": KV_HEADS, "head_dim": DIM, "page_size": PAGE_SIZE, **config}
        config = cache_pb2.CacheConfig(num_layers=num_layers, **fields)
        self.warm_ups: list[dict] = []
        self.cache = SimpleNamespace(config=config, warm_up=lambda **shape: self.warm_ups.append(shape))
        self.layers = [PlainCache(64, PAGE_SIZE, KV_HEADS, DIM) for _ in range(num_layers)]
        self.steps: list[FakeStep] = []
        self.calls: list[SimpleNamespace] = []
        self.failures: list[Exception] = []

    def step(self, metadata: StepMetadata) -> FakeStep:
        assert isinstance(metadata, StepMetadata)
        message = metadata.to_message(len(self.steps) + 1, cache_pb2.CacheRef(id=b"0" * 16))
        self.steps.append(FakeStep(self, message))
        return self.steps[-1]


class FakeStep:
    def __init__(self, session: FakeSession, message) -> None:
        self.session = session
        self.message = message

    def attend(self, layer: int, q, k, v, options) -> torch.Tensor:
        call = {"step": self.message.id, "layer": layer, "q": q, "k": k, "v": v, "options": options.message}
        self.session.calls.append(SimpleNamespace(**call))
        if self.session.failures:
            raise self.session.failures.pop()
        return self.session.layers[layer].attend(self.message, q, k, v, options.scale)


class Model(nn.Module):
    """Three layers that pass their output on as the next query."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Identity(), _attention()) for _ in range(3))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            q = block[1](q, k, v)
        return q


def _attention(**changes) -> Attention:
    return Attention(**{"num_heads": HEADS, "head_dim": DIM, "scale": SCALE, "num_kv_heads": KV_HEADS, **changes})


def _tensors(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(num_tokens, HEADS * DIM), *torch.randn(2, num_tokens, KV_HEADS * DIM)


def _metadata(query_len: int, context_len: int = 0, **changes) -> StepMetadata:
    slots = range(context_len, context_len + query_len)
    return StepMetadata([query_len], [context_len], [list(range(8))], list(slots), **changes)


def _install(metadata: object) -> None:
    attnd.set_fetch_fn_for_attn_metadata(lambda: metadata)


@pytest.fixture(autouse=True)
def _ambient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(diffulex, "_fetch", None)
    torch.manual_seed(0)
    yield
    attnd.reset_warming_up()


def test_one_step_serves_all_layers() -> None:
    model, session = Model(), FakeSession()
    assert attach(model, session) == 3
    _install(_metadata(5))
    model(*_tensors(5))
    assert len(session.steps) == 1
    assert [(call.step, call.layer) for call in session.calls] == [(1, 0), (1, 1), (1, 2)]
    _install(_metadata(1, 5, kind="decode"))
    model(*_tensors(1))
    assert [(call.step, call.layer) for call in session.calls[3:]] == [(2, 0), (2, 1), (2, 2)]


def test_prefill_then_decode_equals_attention_over_everything() -> None:
    layer, session = _attention(), FakeSession()
    attach(layer, session)
    q, k, v = _tensors(7)
    _install(_metadata(6))
    first = layer(q[:6], k[:6], v[:6])
    _install(_metadata(1, 6, kind="decode"))
    last = layer(q[6:], k[6:], v[6:])
    expected = nn.functional.scaled_dot_product_attention(
        q.view(7, HEADS, DIM).transpose(0, 1),
        k.view(7, KV_HEADS, DIM).transpose(0, 1),
        v.view(7, KV_HEADS, DIM).transpose(0, 1),
        is_causal=True,
        scale=SCALE,
        enable_gqa=True,
    )
    torch.testing.assert_close(torch.cat([first, last]), expected.transpose(0, 1).reshape(7, -1))


def test_the_fetch_function_is_looked_up_when_the_layer_runs() -> None:
    model = Model()
    attach(model, FakeSession())
    current = [_metadata(2)]
    attnd.set_fetch_fn_for_attn_metadata(lambda: current[0])
    assert model(*_tensors(2)).shape == (2, HEADS * DIM)
    attnd.set_fetch_fn_for_attn_metadata(lambda: _metadata(3))
    assert model(*_tensors(3)).shape == (3, HEADS * DIM)


def test_metadata_that_is_changed_in_place_makes_another_step() -> None:
    model, session = Model(), FakeSession()
    attach(model, session)
    metadata = attnd.AttnMetaDataBase(
        cu_seqlens_q=[0, 4], context_lens=[0], page_tables=[[0, 1, -1]], slot_mapping=[0, 1, 2, 3], page_size=PAGE_SIZE
    )
    _install(metadata)
    model(*_tensors(4))
    metadata.cu_seqlens_q, metadata.context_lens, metadata.slot_mapping = [0, 1], [4], [4]
    model(*_tensors(1))
    assert [call.step for call in session.calls] == [1, 1, 1, 2, 2, 2]
    assert list(session.steps[1].message.context_lens.data) == [4, 0, 0, 0]


def test_a_diffulex_runner_runs_unchanged() -> None:
    layer, session = _attention(), FakeSession()
    attach(layer, session)
    metadata = attnd.AttnMetaDataBase(
        cu_seqlens_q=torch.tensor([0, 4], dtype=torch.int32),
        context_lens=torch.tensor([0], dtype=torch.int32),
        page_tables=torch.tensor([[0, -1]], dtype=torch.int32),
        slot_mapping=torch.full((4,), -1, dtype=torch.int32),
        page_size=PAGE_SIZE,
        block_size=4,
    )
    metadata.init_multi_block(valid_slices=torch.tensor([4]), status_table=torch.tensor([1]))
    _install(metadata)
    q, k, v = _tensors(4)
    expected = nn.functional.scaled_dot_product_attention(
        q.view(4, HEADS, DIM).transpose(0, 1),
        k.view(4, KV_HEADS, DIM).transpose(0, 1),
        v.view(4, KV_HEADS, DIM).transpose(0, 1),
        scale=SCALE,
        enable_gqa=True,
    )
    torch.testing.assert_close(layer(q, k, v), expected.transpose(0, 1).reshape(4, -1))


def test_geometry_of_diffulex_metadata_is_checked() -> None:
    layer, session = _attention(), FakeSession()
    attach(layer, session)
    _install(attnd.AttnMetaDataBase(cu_seqlens_q=[0, 1], page_size=32))
    with pytest.raises(InvalidRequest, match="page_size is 32, but must be 4 as in the cache"):
        layer(*_tensors(1))
    _install(attnd.AttnMetaDataBase(cu_seqlens_q=[0, 1], page_size=4, kv_cache_layout="distinct"))
    with pytest.raises(InvalidRequest, match="kv_cache_layout is 'distinct', but must be 'unified'"):
        layer(*_tensors(1))
    assert session.steps == []


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "in_heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_dtype(flat: bool, dtype: torch.dtype) -> None:
    layer = _attention()
    attach(layer, FakeSession())
    _install(_metadata(3))
    q, k, v = (tensor.to(dtype) for tensor in _tensors(3))
    if not flat:
        q, k, v = q.view(3, HEADS, DIM), k.view(3, KV_HEADS, DIM), v.view(3, KV_HEADS, DIM)
    output = layer(q, k, v)
    assert (output.shape, output.dtype) == ((3, HEADS * DIM), dtype)


def test_values_may_have_a_head_dim_of_their_own() -> None:
    layer, session = _attention(), FakeSession()
    session.layers[0].v = torch.zeros(64, KV_HEADS, 16, dtype=torch.float64)
    attach(layer, session)
    _install(_metadata(2))
    session.layers[0].attend = lambda step, q, k, v, scale: q.new_zeros(2, HEADS, v.shape[2])  # type: ignore[method-assign]
    q, k, _ = _tensors(2)
    assert layer(q, k, torch.randn(2, KV_HEADS * 16)).shape == (2, HEADS * 16)
    assert session.calls[0].v.shape == (2, KV_HEADS, 16)
    assert layer(q[:0], k[:0], torch.randn(0, KV_HEADS * 16)).shape == (0, HEADS * 16)


@pytest.mark.parametrize(
    ("name", "shape", "rule"),
    [
        ("q", (2, 30), "q has shape [2, 30], but must be [num_tokens, 4 * 8] or [num_tokens, 4, 8]"),
        ("q", (2, 64), "q has shape [2, 64], but must be [num_tokens, 4 * 8]"),
        ("k", (2, 4, 8), "k has shape [2, 4, 8], but must be [num_tokens, 2 * 8] or [num_tokens, 2, 8]"),
        ("v", (2, 15), "v has shape [2, 15], but must be [num_tokens, 2 * head_dim_v]"),
        ("v", (2, 2, 1, 8), "v has shape [2, 2, 1, 8]"),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...], rule: str) -> None:
    layer = _attention()
    attach(layer, FakeSession())
    tensors = dict(zip("qkv", _tensors(2), strict=True))
    tensors[name] = torch.zeros(shape)
    with pytest.raises(InvalidRequest) as caught:
        layer(**tensors)
    assert rule in str(caught.value)
    assert caught.value.field == name


def test_no_tokens_need_no_server() -> None:
    assert _attention()(*_tensors(0)).shape == (0, HEADS * DIM)


def test_a_mask_is_refused() -> None:
    for mask, what in ((torch.ones(1, 1), "a tensor"), ([torch.ones(1, 1)], "a list")):
        with pytest.raises(InvalidRequest, match=f"mask is {what}, but must be None") as caught:
            _attention()(*_tensors(1), mask=mask)
        assert caught.value.field == "mask"


def test_a_layer_that_is_not_attached_says_so_unless_warming_up() -> None:
    layer = _attention()
    with pytest.raises(InvalidRequest, match=r"must be: attnd\.attach\(model, session\)"):
        layer(*_tensors(2))
    attnd.set_warming_up(True)
    output = layer(*_tensors(2))
    assert torch.equal(output, torch.zeros(2, HEADS * DIM))


def test_zeros_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, session = _attention(), FakeSession()
    attnd.set_warming_up(True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        InvalidRequest, match=r"not attached while a CUDA graph is captured, but must be: attnd\.attach"
    ):
        layer(*_tensors(2))
    attach(layer, session)
    _install(_metadata(2))
    layer(*_tensors(2))
    assert len(session.calls) == 1


def test_an_attached_layer_runs_while_warming_up() -> None:
    layer, session = _attention(), FakeSession()
    attach(layer, session)
    attnd.set_warming_up(True)
    _install(_metadata(2))
    layer(*_tensors(2))
    assert len(session.calls) == 1


def test_the_server_warms_up_once_for_each_shape_of_decode_step() -> None:
    model, session = nn.ModuleList([_attention(), _attention(), _attention(sliding_window=4)]), FakeSession()
    attach(model, session)

    def forward(num_reqs: int, query_len: int, kind: str) -> None:
        context_lens, pages = [0] * num_reqs, [[]] * num_reqs
        _install(StepMetadata([query_len] * num_reqs, context_lens, pages, kind=kind))
        for layer in model:
            layer(*_tensors(num_reqs * query_len))

    forward(2, 1, "decode")
    assert session.warm_ups == []
    attnd.set_warming_up(True)
    for num_reqs, query_len, kind in ((2, 1, "decode"), (3, 4, "decode"), (3, 4, "prefill"), (2, 1, "decode")):
        forward(num_reqs, query_len, kind)
    shapes = [(warm["num_heads"], warm["query_len"], warm["max_reqs"]) for warm in session.warm_ups]
    assert shapes == [(HEADS, 1, 2)] * 2 + [(HEADS, 4, 3)] * 2
    assert [warm["options"].window for warm in session.warm_ups] == [0, 4, 0, 4]
    assert len(session.calls) == 15
    attnd.reset_warming_up()
    forward(1, 1, "decode")
    assert len(session.warm_ups) == 4


def test_options_travel_with_each_call() -> None:
    model = nn.ModuleList(
        [_attention(), _attention(attn_impl="naive", sliding_window=16), _attention(attn_impl="triton_grouped")]
    )
    session = FakeSession()
    attach(model, session)
    _install(_metadata(1))
    for layer in model:
        layer(*_tensors(1))
    options = [call.options for call in session.calls]
    assert [option.window for option in options] == [0, 16, 0]
    assert options[0].scale == pytest.approx(SCALE)
    assert [option.backend for option in options] == [
        backend_pb2.BACKEND_UNSPECIFIED,
        backend_pb2.BACKEND_NAIVE,
        backend_pb2.BACKEND_TRITON_GROUPED,
    ]


def test_cache_only_steps_send_queries_alone() -> None:
    layer, session = _attention(), FakeSession()
    attach(layer, session)
    _install(_metadata(4))
    layer(*_tensors(4))
    _install(StepMetadata([1], [4], [[0]], cache_only=True))
    layer(*_tensors(1))
    assert (session.calls[1].k, session.calls[1].v) == (None, None)
    _install(StepMetadata([1], [4], [[0]], store_only=True))
    with pytest.raises(InvalidRequest, match="store_only is True, but must be False"):
        layer(*_tensors(1))


def test_a_model_with_a_window_is_refused_before_anything_is_sent() -> None:
    model, session = nn.ModuleList([_attention(), _attention(sliding_window=6)]), FakeSession(num_layers=2)
    attach(model, session)
    metadata = attnd.AttnMetaDataBase(
        cu_seqlens_q=[0, 4], context_lens=[8], page_tables=[[0, 1]], slot_mapping=[4, 5, 6, 7], page_size=PAGE_SIZE
    )
    metadata.init_multi_block(status_table=[2])
    metadata.fdv2_cache_only = True
    _install(metadata)
    with pytest.raises(InvalidRequest, match="window is 6, but must be absent in a step with fdv2_cache_only"):
        model[0](*_tensors(4))
    assert session.steps == []


def test_a_failed_call_is_tried_again_with_another_step() -> None:
    model, session = Model(), FakeSession()
    attach(model, session)
    _install(_metadata(2))
    session.failures.append(Disconnected("the server is away"))
    with pytest.raises(Disconnected):
        model(*_tensors(2))
    model(*_tensors(2))
    assert [(call.step, call.layer) for call in session.calls] == [(1, 0), (2, 0), (2, 1), (2, 2)]


def test_a_layer_used_twice_has_one_number() -> None:
    shared = _attention()
    model = nn.Sequential(shared, _attention(), nn.Sequential(shared))
    assert attach(model, FakeSession(num_layers=2)) == 2
    assert [module.layer for module in (shared, model[1])] == [0, 1]
    assert "layer=1, num_heads=4" in repr(model)
    assert "not attached" in repr(_attention())


@pytest.mark.parametrize(
    ("session", "field", "message"),
    [
        (FakeSession(num_layers=2), "num_layers", "model has 3 attnd.Attention layers, but must have 1..2"),
        (FakeSession(num_kv_heads=1), "num_kv_heads", "num_kv_heads of layer 0 is 2, but must be 1 as in the cache"),
        (FakeSession(head_dim=64), "head_dim", "head_dim of layer 0 is 8, but must be 64 as in the cache"),
    ],
)
def test_a_model_that_does_not_fit_the_cache_is_not_attached(session: FakeSession, field: str, message: str) -> None:
    model = Model()
    with pytest.raises(InvalidRequest) as caught:
        attach(model, session)
    assert message in str(caught.value)
    assert caught.value.field == field
    assert all(module.layer is None for module in model.modules() if isinstance(module, Attention))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"model has 0 attnd\.Attention layers"):
        attach(nn.Linear(2, 2), FakeSession())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_impl": "cudnn"}, "attn_impl is 'cudnn', but must be one of auto, naive"),
        ({"num_kv_heads": 3}, "num_heads is 4, but must be a multiple of num_kv_heads, 3"),
        ({"num_kv_heads": 0}, "num_heads is 4, but must be a multiple of num_kv_heads, 0"),
    ],
)
def test_arguments_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _attention(**changes)
    assert message in str(caught.value)


def test_the_module_has_no_parameters() -> None:
    assert _attention().state_dict() == {}


def test_the_rest_of_the_client_does_not_load_torch() -> None:
    code = (
        "import sys, attnd; attnd.from_diffulex(attnd.AttnMetaDataBase(cu_seqlens_q=[0, 1]));"
        "assert not {'torch', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={"PYTHONPATH": os.pathsep.join(sys.path)})


@pytest.mark.parametrize("kind", ["cache", "session"])
def test_a_cache_is_served_in_as_many_steps_as_it_takes(kind: str) -> None:
    """Over a server whose steps have fewer tokens than the prompt."""
    service = build_service(ServerConfig(device="cpu", max_step_tokens=3))
    with attnd.Client(InprocTransport(service)) as client:
        geometry = {"num_kv_heads": KV_HEADS, "head_dim": DIM, "page_size": 4, "num_pages": 8}
        with client.create_cache(num_layers=1, dtype="float32", **geometry) as cache:
            layer = _attention()
            attach(layer, cache if kind == "cache" else ModelSession(cache))
            q, k, v = _tensors(9)
            outputs = []
            for context_len, num_new in ((0, 7), (7, 1), (8, 1)):
                slots = range(context_len, context_len + num_new)
                _install(attnd.StepMetadata([num_new], [context_len], [[0, 1, 2]], slots))
                outputs.append(layer(*(each[slots.start : slots.stop] for each in (q, k, v))))
    expected = nn.functional.scaled_dot_product_attention(
        q.view(9, HEADS, DIM).transpose(0, 1),
        k.view(9, KV_HEADS, DIM).transpose(0, 1),
        v.view(9, KV_HEADS, DIM).transpose(0, 1),
        is_causal=True,
        scale=SCALE,
        enable_gqa=True,
    )
    torch.testing.assert_close(torch.cat(outputs), expected.transpose(0, 1).reshape(9, -1))
