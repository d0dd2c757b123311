"""Backend `xformers` over an emulated package against the oracle, and when the package is taken.

The emulation follows the documentation of `memory_efficient_attention_partial` and of the masks: heads come in groups,
`[1, num_tokens, num_kv_heads, group, head_dim]`, and lse is natural, `[1, num_kv_heads, group, num_tokens]`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from attnd_server.attention.backends import xformers
from attnd_server.attention.backends.xformers import Xformers, XformersAttention
from attnd_server.attention.config import FP8, Layout, PrecisionMode
from tests import oracle
from tests.oracle import BIDIRECTIONAL, CAUSAL, Case, Request

GPU = torch.device("cuda")  # only its type is looked at


@dataclass
class BlockDiagonalMask:
    q_seqlen: list[int]
    is_causal: bool = False

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int] | None = None, *, device: torch.device) -> Any:
        assert kv_seqlen is None
        return cls(q_seqlen)

    def make_causal(self) -> BlockDiagonalMask:
        return replace(self, is_causal=True)

    def keys(self) -> list[torch.Tensor]:
        """Rows of the keys that each request sees."""
        return list(torch.arange(sum(self.q_seqlen)).split(self.q_seqlen))


@dataclass
class PagedBlockDiagonalPaddedKeysMask:
    q_seqlen: list[int]
    kv_seqlen: list[int]
    block_tables: torch.Tensor
    page_size: int
    is_causal: bool = False

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: list[int],
        kv_seqlen: list[int],
        block_tables: torch.Tensor,
        page_size: int,
        *,
        device: torch.device,
    ) -> Any:
        assert len(q_seqlen) == len(kv_seqlen) == len(block_tables)
        assert max(kv_seqlen) <= block_tables.shape[1] * page_size
        assert block_tables.dtype == torch.int32
        assert page_size % 64 == 0
        return cls(q_seqlen, kv_seqlen, block_tables, page_size)

    def keys(self) -> list[torch.Tensor]:
        slots = self.block_tables.long()[:, :, None] * self.page_size + torch.arange(self.page_size)
        return [slot[:length] for slot, length in zip(slots.flatten(1), self.kv_seqlen, strict=True)]


PAGED_OPERATOR = object()


def partial(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert query.dim() == key.dim() == value.dim() == 5
    assert query.shape[2:] == key.shape[2:] == value.shape[2:]
    assert len(query) == len(key) == len(value) == 1
    assert sum(attn_bias.q_seqlen) == query.shape[1]
    assert min(attn_bias.q_seqlen) > 0
    assert (op is PAGED_OPERATOR) == isinstance(attn_bias, PagedBlockDiagonalPaddedKeysMask)
    assert query.dtype == key.dtype == value.dtype == torch.float16
    assert scale is not None
    assert scale > 0, "FlashAttention, which it calls, takes the greatest product for the greatest score"
    outputs, lses = [], []
    for rows, slots in zip(query[0].float().split(attn_bias.q_seqlen), attn_bias.keys(), strict=True):
        keys, values = key[0, slots].float(), value[0, slots].float()
        scores = scale * torch.einsum("nghd,sghd->ghns", rows, keys)
        if attn_bias.is_causal:
            scores = scores.masked_fill(torch.ones(len(rows), len(slots)).triu(1).bool(), -torch.inf)
        lse = scores.logsumexp(3)
        output = torch.einsum("ghns,sghd->nghd", (scores - lse[..., None]).exp(), values)
        # What comes out for no keys at all is not documented.
        outputs.append(output if len(slots) else torch.full_like(output, torch.nan))
        lses.append(lse if len(slots) else torch.full_like(lse, torch.nan))
    return torch.cat(outputs)[None], torch.cat(lses, dim=2)[None]


MASKS = SimpleNamespace(
    BlockDiagonalMask=BlockDiagonalMask, PagedBlockDiagonalPaddedKeysMask=PagedBlockDiagonalPaddedKeysMask
)
KERNEL = XformersAttention(Xformers(partial, MASKS, PAGED_OPERATOR))


def refusal(case: Case) -> str:
    return KERNEL.supports(case.config(), case.metadata(), oracle.options(case, oracle.tensors(case))) or ""


def step(requests: list[Request], **changes: Any) -> Case:
    return Case(requests, page_size=64, num_pages=8, dtype=torch.float16, return_lse=True, **changes)


MIXED = [Request(0, 3, 3, [-1, 99]), Request(100, 5, 5, [3, 1]), Request(64, 0, 0, [2, -1]), Request(20, 1, 1, [6, -1])]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=oracle.cases())
def test_any_step_that_it_supports(case: Case) -> None:
    changes = {"head_dim_v": case.head_dim, "softcap": 0.0, "alibi": False, "precision": PrecisionMode.AUTO}
    oracle.check(KERNEL, case.of_type(torch.float16, layout=Layout.UNIFIED, **changes), "cpu")


@pytest.mark.parametrize("cache_only", [False, True])
@pytest.mark.parametrize("mask", [CAUSAL, BIDIRECTIONAL])
def test_context_and_new_tokens(mask: str, cache_only: bool) -> None:
    case = step([replace(request, mask=mask) for request in MIXED], cache_only=cache_only, group=3)
    for changed in (
        case,
        replace(case, sinks=True),
        replace(case, return_lse=False),
        replace(case, requests=MIXED[:1]),
    ):
        assert refusal(changed) == ""
        oracle.check(KERNEL, changed, "cpu")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"page_size": 16, "requests": [Request(3, 1, 1, [1])]}, "page_size is 16, but must be a multiple of 64"),
        ({"dtype": torch.float32}, "dtype is torch.float32"),
        ({"softcap": 2.0}, "no softcap"),
        ({"alibi": True}, "alibi_slopes"),
        ({"window": 7}, "no window"),
        ({"head_dim": 40, "head_dim_v": 40}, "head_dim is 40 and head_dim_v 40"),
        ({"head_dim_v": 16}, "head_dim is 32 and head_dim_v 16"),
        ({"requests": [Request(9, 2, 1, [1])]}, "valid_lens"),
        ({"kv_dtype": FP8, "v_dtype": torch.float16}, "kv_dtype is torch.float8_e4m3fn"),
        ({"v_dtype": FP8}, "v_dtype is torch.float8_e4m3fn, but must be torch.float16 as dtype"),
        ({"latent": True, "num_kv_heads": 1}, "the cache is latent"),
    ],
)
def test_what_it_cannot_serve_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    assert refusal(step(MIXED)) == ""
    assert refusal(step(MIXED, window=105)) == "", "it hides nothing"
    assert reason in refusal(replace(step(MIXED), **changes))


def test_slots_must_fit_int32() -> None:
    case = step(MIXED)
    config = replace(case.config(), num_pages=2**25)
    reason = KERNEL.supports(config, case.metadata(), oracle.options(case, oracle.tensors(case)))
    assert reason == "the cache has 2147483648 slots, but must have less than 2147483648"


def package(is_available: bool) -> ModuleType:
    fmha = ModuleType("xformers.ops.fmha")
    fmha.memory_efficient_attention_partial = partial
    fmha.attn_bias = MASKS
    fmha.triton_splitk = SimpleNamespace(FwOp=SimpleNamespace(NAME="splitk", is_available=lambda: True))
    fmha.flash = SimpleNamespace(FwOp=SimpleNamespace(NAME="flash", is_available=lambda: is_available))
    return fmha


def install(monkeypatch: pytest.MonkeyPatch, fmha: ModuleType | None) -> None:
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", fmha)


def test_the_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fmha = package(True)
    install(monkeypatch, fmha)
    assert xformers.find(GPU, (9, 0)) == Xformers(partial, MASKS, fmha.triton_splitk.FwOp)


def test_reasons_for_having_none(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    assert "the package xformers cannot be loaded (" in str(xformers.find(GPU, (9, 0)))
    install(monkeypatch, ModuleType("xformers.ops.fmha"))
    assert "no attribute 'triton_splitk'" in str(xformers.find(GPU, (9, 0)))
    install(monkeypatch, package(False))
    assert xformers.find(GPU, (9, 0)) == "the package xformers has no flash for this torch"
    assert "compute capability is (7, 5)" in str(xformers.find(GPU, (7, 5)))
    assert "needs a CUDA device, but device is cpu" in str(xformers.find(torch.device("cpu"), (0, 0)))


@pytest.mark.parametrize("return_lse", [False, True])
def test_results_can_be_written_into_tensors_that_are_there(return_lse: bool) -> None:
    oracle.check_launch(KERNEL, replace(step(MIXED), return_lse=return_lse), "cpu")
