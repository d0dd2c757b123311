"""What a call computes, in float64 and one number at a time.

`sees` and `attend` are written from the definition alone and share no code with the server: positions, masks and pages
are plain integers and lists here. `check` compares a backend with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from attnd_server.attention.backends.base import AttentionKernel
from attnd_server.attention.config import FP8, Layout
from attnd_server.attention.kernels.pages import is_latent
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.metadata import AttentionOptions
from tests.steps import BIDIRECTIONAL, BLOCK_CAUSAL, CAUSAL, DTYPES, PREFIX_FULL, Case, Request, cases
from tests.tolerances import assert_close

__all__ = [
    "BIDIRECTIONAL",
    "BLOCK_CAUSAL",
    "CAUSAL",
    "DTYPES",
    "PREFIX_FULL",
    "Case",
    "Request",
    "Tensors",
    "attend",
    "cases",
    "check",
    "devices",
    "one_request",
    "options",
    "run",
    "sees",
    "tensors",
]


def devices() -> list[str]:
    """Where kernel tests run."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@dataclass
class Tensors:
    """The tensors of a case, on the host."""

    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    k_scales: torch.Tensor | None  # float32 [num_kv_heads], as v_scales; None: its pages are not FP8
    v_scales: torch.Tensor | None
    # K and V of each slot that something sees: float64 [num_kv_heads, head_dim].
    slots: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def pages(self) -> LayerPages:
        """The pages and scales, as backends take them."""
        return LayerPages(self.k_pages, self.v_pages, self.k_scales, self.v_scales)


def sees(case: Case, request: Request, row: int, key: int, is_new: bool) -> bool:
    """Whether new token `row` sees cached position `key`, or new token `key`."""
    position = request.context_len + row
    if row >= request.valid_len:
        return False
    key_position = request.context_len + key if is_new else key
    if case.window and position - key_position >= case.window:
        return False
    if not is_new:
        if case.mask_prefix_hole and request.prefix_len <= key < request.padded_prefix_len:
            return False
        return request.pages[key // case.page_size] != -1
    if case.cache_only or key >= request.valid_len or not request.is_key(key):
        return False
    if request.mask == CAUSAL:
        return key_position <= position
    if request.mask == BIDIRECTIONAL:
        return True
    if request.mask == PREFIX_FULL and position < request.prefix_len:
        return key_position < request.prefix_len
    if request.mask == PREFIX_FULL and position < request.padded_prefix_len:
        return key_position < request.padded_prefix_len
    return key_position < (position // request.block_size + 1) * request.block_size


def tensors(case: Case) -> Tensors:
    """Random tensors, with the poison wherever nothing looks: unseen slots and pages, and rows past the valid ones."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    config = case.config()
    q = normal(case.num_tokens, case.num_heads, case.head_dim)
    k = normal(case.num_tokens, case.num_kv_heads, case.head_dim)
    v = k[..., : case.head_dim_v] if case.latent else normal(case.num_tokens, case.num_kv_heads, case.head_dim_v)
    k_pages = _poisoned(case, config.k_shape, config.kv_dtype)
    result = Tensors(
        q=q,
        k=None if case.cache_only else k,
        v=None if case.cache_only else v,
        k_pages=k_pages,
        v_pages=k_pages[..., : case.head_dim_v] if case.latent else _poisoned(case, config.v_shape, config.v_dtype),
        alibi_slopes=torch.rand(case.num_heads, generator=generator) if case.alibi else None,
        sinks=torch.randn(case.num_heads, generator=generator) * 3 if case.sinks else None,
        k_scales=_scales(case, case.k_scales, config.kv_dtype),
        v_scales=_scales(case, config.v_scales, config.v_dtype),
    )
    if result.sinks is not None and case.num_heads > 1:
        result.sinks[1] = -torch.inf
    start = 0
    for request in case.requests:
        for key in range(request.context_len):
            if not any(sees(case, request, row, key, False) for row in range(request.query_len)):
                continue
            slot = request.pages[key // case.page_size] * case.page_size + key % case.page_size
            new_k, new_v = normal(case.num_kv_heads, case.head_dim), normal(case.num_kv_heads, case.head_dim_v)
            _write(case, result, slot, new_k, new_k[:, : case.head_dim_v] if case.latent else new_v)
        for tensor in (result.q, result.k, result.v):
            if tensor is not None:
                tensor[start + request.valid_len : start + request.query_len] = case.poison
        start += request.query_len
    return result


def _poisoned(case: Case, shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is FP8:  # it has no infinities
        return torch.full(shape, math.nan).to(FP8)
    return torch.full(shape, case.poison, dtype=case.dtype)


def _scales(case: Case, scales: tuple[float, ...], dtype: torch.dtype | None) -> torch.Tensor | None:
    if dtype is not FP8:
        return None
    return torch.tensor(scales if len(scales) > 1 else scales * case.num_kv_heads, dtype=torch.float32)


def _write(case: Case, result: Tensors, slot: int, k: torch.Tensor, v: torch.Tensor) -> None:
    """Puts K and V of a slot into the pages, and what they are worth there into `result.slots`."""
    (k, k_worth), (v, v_worth) = _stored(case, k, result.k_scales), _stored(case, v, result.v_scales)
    result.slots[slot] = k_worth, v_worth
    page, offset = divmod(slot, case.page_size)
    if case.layout is Layout.UNIFIED:
        result.k_pages[page, offset] = k
        result.v_pages[page, offset] = v
    else:
        for lane in range(8):
            result.k_pages[page, :, :, offset, lane] = k[:, lane::8]
        result.v_pages[page, :, :, offset] = v


def _stored(case: Case, tokens: torch.Tensor, scales: torch.Tensor | None) -> tuple[torch.Tensor, np.ndarray]:
    """K or V of tokens as pages hold it, and what that is worth."""
    if scales is None:
        return tokens, _operand(case, tokens)
    tokens = (tokens.float() / scales[:, None]).clamp(-448, 448).to(FP8)
    return tokens, (tokens.double() * scales[:, None]).numpy()


def _operand(case: Case, tensor: torch.Tensor) -> np.ndarray:
    """What a backend multiplies: the tensor, rounded to the precision that the cache asks for."""
    return tensor.to(case.precision.dtype(case.dtype)).double().numpy()


def attend(case: Case, given: Tensors) -> tuple[np.ndarray, np.ndarray]:
    """Output `[num_tokens, num_heads, head_dim_v]` and lse `[num_tokens, num_heads]`, float64."""
    output = np.zeros((case.num_tokens, case.num_heads, case.head_dim_v))
    lse = np.full((case.num_tokens, case.num_heads), -np.inf)
    q, k, v = (None if tensor is None else _operand(case, tensor) for tensor in (given.q, given.k, given.v))
    if case.store_first and given.k is not None and given.v is not None:
        (_, k), (_, v) = _stored(case, given.k, given.k_scales), _stored(case, given.v, given.v_scales)
    start = 0
    for request in case.requests:
        for row in range(request.query_len):
            keys: list[tuple[int, np.ndarray, np.ndarray]] = []  # position, K and V of what the row sees
            for position in range(request.context_len):
                if sees(case, request, row, position, False):
                    page = request.pages[position // case.page_size]
                    keys.append((position, *given.slots[page * case.page_size + position % case.page_size]))
            for new in range(request.query_len):
                if sees(case, request, row, new, True):
                    keys.append((request.context_len + new, k[start + new], v[start + new]))
            for head in range(case.num_heads if row < request.valid_len else 0):
                kv_head = head // case.group
                scores = []
                for key_position, key, _ in keys:
                    score = case.scale * float(np.dot(q[start + row, head], key[kv_head]))
                    if case.softcap:
                        score = case.softcap * math.tanh(score / case.softcap)
                    if given.alibi_slopes is not None:
                        score += float(given.alibi_slopes[head]) * (key_position - request.context_len - row)
                    scores.append(score)
                sink = -math.inf if given.sinks is None or not request.attend_new else float(given.sinks[head])
                largest = max([*scores, sink])
                if largest == -math.inf:
                    continue  # no key, and no sink
                denominator = sum(math.exp(score - largest) for score in scores) + math.exp(sink - largest)
                for score, (_, _, value) in zip(scores, keys, strict=True):
                    output[start + row, head] += math.exp(score - largest) / denominator * value[kv_head]
                lse[start + row, head] = largest + math.log(denominator)
        start += request.query_len
    return output, lse


def options(case: Case, given: Tensors) -> AttentionOptions:
    """The call's options."""
    return AttentionOptions(
        num_heads=case.num_heads,
        scale=case.scale,
        softcap=case.softcap,
        window=case.window,
        alibi_slopes=given.alibi_slopes,
        sinks=given.sinks,
        return_lse=case.return_lse,
    )


def run(kernel: AttentionKernel, case: Case, given: Tensors, device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output and lse of a kernel, on the host."""
    plan = kernel.plan(case.config(), case.metadata(), options(case, given), torch.device(device))
    output, lse = kernel.run(plan, *_on(device, given))
    assert output.dtype == case.dtype
    assert output.shape == (case.num_tokens, case.num_heads, case.head_dim_v)
    return output.cpu(), None if lse is None else lse.cpu()


def _on(device: str, given: Tensors) -> tuple[Any, Any, Any, LayerPages]:
    """q, k, v and pages on a device."""
    q, k, v, *pages = (
        None if tensor is None else tensor.to(device) for tensor in (given.q, given.k, given.v, *given.pages)
    )
    if is_latent(given.pages):  # as a cache has them
        k, v = (None, None) if k is None else (k, k[..., : given.v_pages.shape[3]])
        pages[1] = pages[0][..., : given.v_pages.shape[3]]
    return q, k, v, LayerPages(*pages)


def check_launch(kernel: AttentionKernel, case: Case, device: str) -> None:
    """Compares what a kernel writes into tensors full of NaN with what it returns."""
    given = tensors(case)
    plan = kernel.plan(case.config(), case.metadata(), options(case, given), torch.device(device))
    results = kernel.run(plan, *_on(device, given))
    written = [None if result is None else torch.full_like(result, math.nan) for result in results]
    kernel.launch(plan, *written, *_on(device, given))
    for actual, expected in zip(written, results, strict=True):
        assert (actual is None) == (expected is None)
        assert actual is None or torch.equal(actual, expected)


def check(kernel: AttentionKernel, case: Case, device: str) -> None:
    """Compares a kernel with the oracle; a kernel that does not support the case must give a reason."""
    given = tensors(case)
    reason = kernel.supports(case.config(), case.metadata(), options(case, given))
    if reason is not None:
        assert reason
        return
    output, lse = run(kernel, case, given, device)
    expected, expected_lse = attend(case, given)
    assert_close(output, expected, case.coarsest)
    assert (output[torch.from_numpy((expected == 0).all(2))] == 0).all()  # of rows that see no key
    assert (lse is not None) == case.return_lse
    if lse is not None:
        assert lse.dtype == torch.float32
        assert_close(lse, expected_lse, torch.float32)


def one_request(case: Case, index: int) -> tuple[Case, slice]:
    """The case with one of its requests alone, and that request's rows."""
    start = sum(request.query_len for request in case.requests[:index])
    request = case.requests[index]
    return replace(case, requests=[request]), slice(start, start + request.query_len)
