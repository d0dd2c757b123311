"""Which backend serves a step, and what is said when none does; the names that the package exports."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

import attnd_server
from attnd.errors import Unsupported
from attnd_server.attention import ops as dispatcher
from attnd_server.attention.auto_choice import CHOICES, Choice, StepKind, kind_of, orders_for
from attnd_server.attention.backends import flash_libraries, xformers
from attnd_server.attention.backends.triton import attention as triton
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.kv_split import KVSplitConfig
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.attention.ops import TritonAttentionOps
from tests import oracle
from tests.oracle import Case, Request
from tests.tolerances import assert_close

CASE = Case([Request(20, 1, 1, [4, 2])])
PLAIN = AttentionOptions(num_heads=CASE.num_heads, scale=CASE.scale)
SOFTCAP = replace(PLAIN, softcap=3.0)


@pytest.fixture
def ops() -> TritonAttentionOps:
    return TritonAttentionOps("cpu")


def chosen(ops: TritonAttentionOps, options: AttentionOptions, config: AttentionConfig | None = None) -> str:
    return ops.choose(config or CASE.config(), CASE.metadata(), options).backend.value


def test_every_backend_is_on_or_says_why_not(ops: TritonAttentionOps) -> None:
    states = dict(ops.states())
    assert set(states) == set(AttentionBackend) - {AttentionBackend.AUTO}
    assert states[AttentionBackend.NAIVE] is None
    assert states[AttentionBackend.SDPA] is None
    assert "flash-attn" in states[AttentionBackend.FLASH_ATTN]
    assert "xformers" in states[AttentionBackend.XFORMERS]


@pytest.mark.parametrize("backend", [AttentionBackend.TRITON, AttentionBackend.TRITON_GROUPED])
def test_triton_says_itself_whether_it_is_available(backend: AttentionBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "availability", lambda device: f"{device} is too old")
    ops = TritonAttentionOps("cpu")
    assert dict(ops.states())[backend] == "cpu is too old"
    with pytest.raises(Unsupported, match=f"{backend.value} is off: cpu is too old"):
        chosen(ops, replace(PLAIN, backend=backend))
    monkeypatch.setattr(triton, "availability", lambda device: None)
    ops = TritonAttentionOps("cpu")
    assert dict(ops.states())[backend] is None
    assert chosen(ops, PLAIN) == "sdpa", "auto never takes Triton's interpreter"


def test_auto_takes_the_fastest_that_supports_the_step(ops: TritonAttentionOps) -> None:
    assert chosen(ops, PLAIN) == "sdpa"
    assert chosen(ops, SOFTCAP) == "naive"


@pytest.mark.parametrize(
    ("module", "backend"),
    [(flash_libraries, AttentionBackend.FLASH_ATTN), (xformers, AttentionBackend.XFORMERS)],
)
def test_an_optional_backend_is_on_if_its_package_is_found(
    module: ModuleType, backend: AttentionBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find", lambda device, capability: SimpleNamespace(package="some"))
    ops = TritonAttentionOps("cpu")
    assert dict(ops.states())[backend] is None
    with pytest.raises(Unsupported, match=f"{backend.value} cannot serve it: .*dtype is torch.float32"):
        chosen(ops, replace(PLAIN, backend=backend))
    monkeypatch.setattr(module, "find", lambda device, capability: f"nothing for {device} {capability}")
    assert dict(TritonAttentionOps("cpu").states())[backend] == "nothing for cpu (0, 0)"


@pytest.mark.parametrize(
    ("lens", "kind"),
    [
        ([(20, 1), (0, 1)], StepKind.DECODE),
        ([], StepKind.PREFILL),
        ([(20, 5), (0, 1)], StepKind.BLOCKS),
        ([(20, 256), (20, 256)], StepKind.BLOCKS),
        ([(0, 32), (0, 32)], StepKind.BLOCKS),
        ([(0, 32), (0, 31)], StepKind.PREFILL),
        ([(0, 257), (0, 257)], StepKind.EVEN_PREFILL),
        ([(0, 4096)], StepKind.EVEN_PREFILL),
        ([(0, 4097)], StepKind.PREFILL),
        ([(20, 257), (0, 1)], StepKind.CHUNKED),
        ([(20, 257), (20, 257)], StepKind.CHUNKED),
    ],
)
def test_kinds_of_steps(lens: list[tuple[int, int]], kind: StepKind) -> None:
    case = Case([Request(context_len, query_len, query_len, [1, 2]) for context_len, query_len in lens])
    assert kind_of(CASE.config(), case.metadata(), PLAIN, torch.device("cpu")) is kind


@pytest.mark.parametrize(
    ("config", "valid_len", "options"),
    [
        (CASE.config(), 256, PLAIN),
        (CASE.config(), 257, replace(PLAIN, window=256)),
        (replace(CASE.config(), kv_split=KVSplitConfig(batch_invariant=True)), 257, PLAIN),
    ],
    ids=["a token does not count", "a window", "bits must not depend on the batch"],
)
def test_prompts_of_one_length_are_even_only_if_torch_needs_no_mask_and_may_serve_them(
    config: AttentionConfig, valid_len: int, options: AttentionOptions
) -> None:
    metadata = Case([Request(0, 257, valid_len, [1, 2])] * 2).metadata()
    assert kind_of(config, metadata, options, torch.device("cpu")) is StepKind.PREFILL
    # float32 has no kernel on a GPU that does without all scores.
    even = Case([Request(0, 257, 257, [1, 2])] * 2).metadata()
    assert kind_of(CASE.config(), even, PLAIN, torch.device("cuda")) is StepKind.PREFILL


@pytest.mark.parametrize(("is_on", "kind"), [(True, StepKind.EVEN_PREFILL), (False, StepKind.PREFILL)])
def test_prompts_of_one_length_are_even_on_a_gpu_only_while_cudnn_is_on(
    is_on: bool, kind: StepKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: is_on)
    config = replace(CASE, dtype=torch.bfloat16).config()
    even = Case([Request(0, 257, 257, [1, 2])] * 2).metadata()
    assert kind_of(config, even, PLAIN, torch.device("cuda")) is kind
    assert kind_of(config, even, PLAIN, torch.device("cpu")) is StepKind.EVEN_PREFILL


def test_the_first_row_of_the_table_that_fits_the_device_holds() -> None:
    naive, sdpa, flash = (AttentionBackend.NAIVE,), (AttentionBackend.SDPA,), (AttentionBackend.FLASH_ATTN,)
    choices = (
        Choice("cuda", (9, 0), StepKind.DECODE, flash),
        Choice("cuda", (0, 0), StepKind.DECODE, sdpa),
        Choice("cuda", (0, 0), StepKind.PREFILL, sdpa),
        Choice("cpu", (0, 0), StepKind.DECODE, naive),
    )
    cuda = torch.device("cuda")
    assert orders_for(cuda, (8, 9), choices) == {StepKind.DECODE: sdpa, StepKind.PREFILL: sdpa}
    assert orders_for(cuda, (10, 0), choices) == {StepKind.DECODE: flash, StepKind.PREFILL: sdpa}
    assert orders_for(torch.device("cpu"), (0, 0), choices) == {StepKind.DECODE: naive}
    with pytest.raises(ValueError, match="device is meta, but must be of type cpu or cuda"):
        orders_for(torch.device("meta"), (0, 0), choices)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_table_has_every_kind_and_ends_with_what_serves_everything(device: str) -> None:
    orders = orders_for(torch.device(device), (0, 0))
    assert set(orders) == set(StepKind)
    assert {order[-1] for order in orders.values()} == {AttentionBackend.NAIVE}


def test_auto_looks_the_kind_of_the_step_up(monkeypatch: pytest.MonkeyPatch) -> None:
    naive_decode = Choice("cpu", (0, 0), StepKind.DECODE, (AttentionBackend.NAIVE,))
    orders = orders_for(torch.device("cpu"), (0, 0), (naive_decode, *CHOICES))
    monkeypatch.setattr(dispatcher, "orders_for", lambda device, capability: orders)
    ops = TritonAttentionOps("cpu")
    assert chosen(ops, PLAIN) == "naive"
    blocks = Case([Request(20, 4, 4, [4, 2])])
    assert ops.choose(CASE.config(), blocks.metadata(), PLAIN).backend is AttentionBackend.SDPA


def test_auto_may_be_told_what_to_choose_among(ops: TritonAttentionOps) -> None:
    config, metadata = CASE.config(), CASE.metadata()
    naive = (AttentionBackend.NAIVE,)
    assert ops.choose(config, metadata, PLAIN, naive).backend is AttentionBackend.NAIVE
    assert ops.plan(config, metadata, PLAIN, naive).backend is AttentionBackend.NAIVE
    with pytest.raises(Unsupported, match="can serve this step: none of triton, triton_grouped is chosen on cpu"):
        ops.choose(config, metadata, PLAIN, (AttentionBackend.TRITON, AttentionBackend.TRITON_GROUPED))


def test_the_call_names_a_backend_before_the_cache(ops: TritonAttentionOps) -> None:
    config = replace(CASE.config(), backend=AttentionBackend.NAIVE)
    assert chosen(ops, PLAIN, config) == "naive"
    assert chosen(ops, replace(PLAIN, backend=AttentionBackend.SDPA), config) == "sdpa"


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (AttentionBackend.SDPA, "sdpa cannot serve it: .*softcap"),
        (AttentionBackend.XFORMERS, "xformers is off: .*package xformers"),
        (AttentionBackend.FLASH_ATTN, "flash_attn is off: .*packages flash-attn-4, flash-attn-3, flash-attn"),
    ],
)
def test_a_named_backend_that_cannot_is_an_error_with_the_reason(
    ops: TritonAttentionOps, backend: AttentionBackend, reason: str
) -> None:
    options = replace(SOFTCAP, backend=backend)
    with pytest.raises(Unsupported, match=reason) as error:
        ops.plan(CASE.config(), CASE.metadata(), options)
    assert error.value.field == "backend"
    assert str(error.value).startswith(f"backend is {backend.value}, but must be")


def test_a_context_that_a_kernel_cannot_hold_is_refused(
    ops: TritonAttentionOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    sdpa = ops.choose(CASE.config(), CASE.metadata(), PLAIN)
    monkeypatch.setattr(sdpa, "supports_context_length", lambda num_tokens: num_tokens < 20)
    assert chosen(ops, PLAIN) == "naive"
    with pytest.raises(Unsupported, match="a context of 20 tokens"):
        chosen(ops, replace(PLAIN, backend=AttentionBackend.SDPA))


def test_attend_computes_and_names_the_backend(ops: TritonAttentionOps) -> None:
    given = oracle.tensors(CASE)
    metadata: AttentionMetadata = CASE.metadata()
    output, lse, backend = ops.attend(CASE.config(), metadata, PLAIN, given.q, given.k, given.v, given.pages)
    assert_close(output, oracle.attend(CASE, given)[0], torch.float32)
    assert lse is None
    assert backend is AttentionBackend.SDPA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_on_a_gpu() -> None:
    ops = TritonAttentionOps("cuda")
    state = dict(ops.states())[AttentionBackend.TRITON_GROUPED]
    assert chosen(ops, PLAIN) == ("sdpa" if state else "triton_grouped")


def test_exports() -> None:
    names = attnd_server.__all__
    assert names == sorted(names)
    assert dir(attnd_server) == names
    for name in names:
        assert getattr(attnd_server, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = attnd_server.nothing


def test_importing_the_package_loads_neither_torch_nor_triton() -> None:
    code = "import attnd_server, sys; assert not {'torch', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
