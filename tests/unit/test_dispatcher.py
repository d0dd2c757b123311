"""Which backend serves a step, and what is said when none does; the names that the package exports."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import attnd_server
from attnd.errors import Unsupported
from attnd_server.backends import triton
from attnd_server.config import AttentionBackend, AttentionConfig
from attnd_server.dispatcher import TritonAttentionOps
from attnd_server.metadata import AttentionMetadata, AttentionOptions
from tests import oracle
from tests.oracle import Case, Request
from tests.tolerances import assert_close

CASE = Case([Request(20, 1, 1, [4, 2])])
PLAIN = AttentionOptions(scale=CASE.scale)
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


def test_the_call_names_a_backend_before_the_cache(ops: TritonAttentionOps) -> None:
    config = replace(CASE.config(), backend=AttentionBackend.NAIVE)
    assert chosen(ops, PLAIN, config) == "naive"
    assert chosen(ops, replace(PLAIN, backend=AttentionBackend.SDPA), config) == "sdpa"


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (AttentionBackend.SDPA, "sdpa cannot serve it: .*softcap"),
        (AttentionBackend.XFORMERS, "xformers is off: .*package xformers"),
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
    output, lse, backend = ops.attend(
        CASE.config(), metadata, PLAIN, given.q, given.k, given.v, given.k_pages, given.v_pages
    )
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
