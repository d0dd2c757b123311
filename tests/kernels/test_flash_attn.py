"""Backend `flash_attn` over emulated packages against the oracle, and which package it takes."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from attnd_server.attention.backends import flash_libraries
from attnd_server.attention.backends.flash_attn import FlashAttention
from attnd_server.attention.config import FP8, Layout, PrecisionMode
from tests import flash_emulation, oracle
from tests.oracle import BIDIRECTIONAL, BLOCK_CAUSAL, CAUSAL, PREFIX_FULL, Case, Request

LIBRARIES = flash_emulation.libraries()
PACKAGES = pytest.mark.parametrize("package", LIBRARIES)
GPU = torch.device("cuda")  # only its type is looked at


def refusal(case: Case, package: str = "flash_attn_3") -> str:
    kernel = FlashAttention(LIBRARIES[package])
    return kernel.supports(case.config(), case.metadata(), oracle.options(case, oracle.tensors(case))) or ""


def check(case: Case, package: str, is_supported: bool = True) -> None:
    """Compares with the oracle if the case is supported, as most must be."""
    assert not (is_supported and refusal(case, package))
    if case.window and not math.isfinite(case.poison):
        case = replace(case, poison=1e4)  # the packages multiply by zero what a window hides
    oracle.check(FlashAttention(LIBRARIES[package]), case, "cpu")


def step(requests: list[Request], **changes: Any) -> Case:
    """A case that flash-attn 2 serves too."""
    return Case(requests, page_size=256, num_pages=8, dtype=torch.float16, return_lse=True, **changes)


NONE, SKIPPED = Request(0, 3, 3, [-1, 99]), Request(256, 0, 0, [2, -1])  # without context, without new tokens
MIXED = [NONE, Request(300, 5, 5, [3, 1]), SKIPPED, Request(20, 1, 1, [6, -1])]
# Contexts that fill their pages, as flash-attn 3 and 4 want large ones.
FULL = [NONE, Request(512, 5, 5, [3, 1]), SKIPPED, Request(256, 1, 1, [6, -1])]
DECODE = [Request(512, 1, 1, [3, 1]), Request(256, 1, 1, [6, -1])]


@PACKAGES
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=oracle.cases())
def test_any_step_that_it_supports(package: str, case: Case) -> None:
    half = case.of_type(torch.float16, precision=PrecisionMode.AUTO, layout=Layout.UNIFIED, alibi=False)
    check(half, package, is_supported=False)


@PACKAGES
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=oracle.cases())
def test_plain_steps_are_supported(package: str, case: Case) -> None:
    requests = [
        replace(
            request,
            mask=CAUSAL,
            valid_len=request.query_len,
            context_len=request.context_len if package != "flash_attn_2" else 0,
            pages=[page if page >= 0 else 150 for page in request.pages],
            keys=(),
            attend_new=True,
        )
        for request in case.requests
    ]
    plain = {"alibi": False, "window": 0, "mask_prefix_hole": False, "head_dim_v": case.head_dim}
    plain |= {"kv_dtype": None, "v_dtype": None, "k_scales": (1.0,), "v_scales": (1.0,), "latent": False}
    changed = replace(case, requests=requests, dtype=torch.float16, precision=PrecisionMode.AUTO, **plain)
    check(replace(changed, layout=Layout.UNIFIED), package)


@PACKAGES
@pytest.mark.parametrize("cache_only", [False, True])
@pytest.mark.parametrize("mask", [CAUSAL, BIDIRECTIONAL])
def test_context_and_new_tokens(mask: str, cache_only: bool, package: str) -> None:
    requests = MIXED if package == "flash_attn_2" else FULL
    requests = [replace(request, mask=mask) for request in requests]
    check(step(requests, cache_only=cache_only), package)
    check(step(requests, cache_only=cache_only, softcap=3.0, sinks=True), package)
    check(replace(step(requests, cache_only=cache_only), return_lse=False), package)


@PACKAGES
@pytest.mark.parametrize("window", [2, 3, 200, 256, 257])
def test_a_window_over_decode(window: int, package: str) -> None:
    check(step(DECODE, window=window), package)


@PACKAGES
@pytest.mark.parametrize("mask", [CAUSAL, BIDIRECTIONAL])
@pytest.mark.parametrize("window", [6, 7, 40, 600])
def test_a_window_over_blocks(window: int, mask: str, package: str) -> None:
    requests = [Request(512, 5, 5, [3, 1], mask), Request(256, 5, 5, [6, -1], mask), Request(0, 5, 5, [-1, -1], mask)]
    check(step(requests, window=window), package)
    check(step(requests, window=window, cache_only=True), package)


@PACKAGES
@pytest.mark.parametrize("mask", [CAUSAL, BIDIRECTIONAL])
@pytest.mark.parametrize("window", [0, 1, 4, 30])
def test_prefill_without_context(window: int, mask: str, package: str) -> None:
    check(step([Request(0, 17, 17, [], mask), Request(0, 1, 1, [], mask)], window=window), package)


def test_blocks_that_see_each_other() -> None:
    check(step([Request(256, 32, 32, [4], BLOCK_CAUSAL, 32)]), "flash_attn_3")
    check(step([Request(256, 6, 6, [4], PREFIX_FULL, 1, 262, 270)]), "flash_attn_3")
    check(step([Request(256, 6, 6, [4], PREFIX_FULL, 1, 100, 256)]), "flash_attn_3")
    assert "masks" in refusal(step([Request(256, 33, 33, [4], BLOCK_CAUSAL, 32)]))
    assert "masks" in refusal(step([Request(256, 6, 6, [4], PREFIX_FULL, 1, 100, 257)]))


@pytest.mark.parametrize("request_", [Request(0, 0, 0, []), Request(256, 0, 0, [1])])
def test_no_new_tokens_at_all(request_: Request) -> None:
    check(step([request_]), "flash_attn_3")
    check(step([]), "flash_attn_3")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "dtype is torch.float32"),
        ({"precision": PrecisionMode.FP32}, "precision is fp32"),
        ({"layout": Layout.DISTINCT}, "layout is distinct"),
        ({"alibi": True}, "alibi_slopes"),
        ({"head_dim_v": 16}, "head_dim_v is 16"),
        ({"head_dim": 264, "head_dim_v": 264}, "head_dim is 264, but must be at most 256"),
        ({"requests": [Request(256, 2, 1, [1])]}, "valid_lens"),
        ({"requests": [Request(256, 1, 1, [-1])]}, "page_tables has -1"),
        ({"requests": [Request(256, 1, 1, [1], CAUSAL, 1, 3, 5)], "mask_prefix_hole": True}, "prefix hole"),
        ({"requests": [Request(0, 2, 2, []), Request(0, 2, 2, [], BIDIRECTIONAL)]}, "masks"),
        ({"requests": [*DECODE, Request(0, 2, 2, [1, 1])], "window": 9}, "equally many new tokens"),
        ({"window": 1}, "window is 1, but must be more than the 1 new tokens"),
        ({"requests": [Request(255, 1, 1, [1])]}, "past the context's end"),
        ({"v_dtype": FP8}, "v_dtype is torch.float8_e4m3fn, but must be torch.float16 as dtype"),
        ({"latent": True, "num_kv_heads": 1}, "the cache is latent"),
    ],
)
def test_what_it_cannot_serve_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    assert refusal(step(DECODE)) == ""
    assert reason in refusal(replace(step(DECODE), **changes))


def test_limits_of_single_packages() -> None:
    small = Case([Request(20, 1, 1, [4, 2])], dtype=torch.float16)
    assert refusal(small, "flash_attn_2") == "flash-attn: page_size is 16, but must be a multiple of 256"
    assert refusal(small, "flash_attn_3") == ""
    assert refusal(small, "flash_attn_4") == ""
    latent = replace(small, head_dim=192, head_dim_v=128)
    assert refusal(latent, "flash_attn_3") == ""
    assert "head_dim_v is 128" in refusal(latent, "flash_attn_4")


def test_quantised_pages_are_refused_where_they_are_read() -> None:
    kernel = FlashAttention(LIBRARIES["flash_attn_3"])
    for case, is_refused in ((step(DECODE), True), (step([Request(0, 4, 4, [])]), False)):
        config = replace(case.config(), kv_dtype=FP8, v_dtype=None)
        reason = kernel.supports(config, case.metadata(), oracle.options(case, oracle.tensors(case)))
        assert ("kv_dtype is torch.float8_e4m3fn" in (reason or "")) == is_refused


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """All three packages, installed; None in `sys.modules` is one that is not."""
    modules = {name: ModuleType(name) for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface")}
    modules["flash_attn"].flash_attn_varlen_func = flash_emulation.varlen_2
    modules["flash_attn.cute"].flash_attn_varlen_func = flash_emulation.varlen_4
    modules["flash_attn_interface"].flash_attn_varlen_func = flash_emulation.varlen_3
    modules["flash_attn_interface"].flash_attn_with_kvcache = flash_emulation.with_kvcache_3
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


def found(capability: tuple[int, int]) -> str:
    library = flash_libraries.find(GPU, capability)
    return library if isinstance(library, str) else library.package


@pytest.mark.usefixtures("packages")
def test_the_newest_package_that_runs_on_the_device() -> None:
    assert [found((major, 0)) for major in (8, 9, 10, 12)] == [
        "flash-attn",
        "flash-attn-4",
        "flash-attn-4",
        "flash-attn",
    ]
    assert "flash-attn is for major compute capabilities 8, 9, 10, 11, 12, not 7" in found((7, 5))


def test_what_is_absent_is_passed_over(packages: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    assert found((9, 0)) == "flash-attn-3"
    assert found((10, 0)) == "flash-attn"
    del packages["flash_attn_interface"].flash_attn_with_kvcache
    assert found((9, 0)) == "flash-attn"
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    reason = found((9, 0))
    assert "flash-attn-4 cannot be loaded (" in reason
    assert "no attribute 'flash_attn_with_kvcache'" in reason
    assert "flash-attn cannot be loaded (" in reason


def test_a_package_that_is_too_old(packages: dict[str, ModuleType]) -> None:
    packages["flash_attn"].flash_attn_varlen_func = lambda q, k, v, cu_seqlens_q, window_size: None
    assert "is too old: it has no block_table and no softcap" in found((8, 0))


def test_blackwell_has_smaller_heads(packages: dict[str, ModuleType]) -> None:
    for capability, most in (((9, 0), 256), ((10, 0), 128)):
        library = flash_libraries.find(GPU, capability)
        assert not isinstance(library, str)
        assert library.head_dims_refusal(most, most) is None
        assert library.head_dims_refusal(most + 8, most + 8) == f"head_dim is {most + 8}, but must be at most {most}"


def test_a_processor_has_none() -> None:
    assert "need a CUDA device, but device is cpu" in str(flash_libraries.find(torch.device("cpu"), (0, 0)))


@pytest.mark.parametrize("return_lse", [False, True])
def test_results_can_be_written_into_tensors_that_are_there(return_lse: bool) -> None:
    oracle.check_launch(FlashAttention(LIBRARIES["flash_attn_3"]), replace(step(FULL), return_lse=return_lse), "cpu")
