"""The small operations of a decode step that engines fuse: a norm with its residual, RoPE, SiLU; in Triton, in torch.

A worker of separate torch operations would spend a good part of its step on them, and attention would look cheap beside
it. So each is one kernel, as in vLLM. torch's are the specification, and run where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from benchmarks.report import TOLERANCES, refuse_wrong

EPSILON = 1e-5
"""Of the norms, as Llama has it."""
_SILU_TILE = 1024

Split = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Operations(NamedTuple):
    """The operations of one kind.

    Attributes:
        add_norm: adds a branch to the residual in place and returns RMSNorm of the sum: residual, branch, weight.
        rotate: q, k and v of one projection, q and k rotated: qkv, table, positions, query heads, KV heads; and where
            they are to be written, or None.
        silu_mul: silu(gate) * up of one projection `[num_tokens, 2 * ffn]`.
    """

    add_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, int, Split | None], Split]
    silu_mul: Callable[[torch.Tensor], torch.Tensor]


def _add_norm(residual: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    total = residual.float() + branch.float()
    residual.copy_(total)
    scaled = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPSILON)
    return (scaled * weight.float()).to(residual.dtype)


def _rotate(
    qkv: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    into: Split | None = None,
) -> Split:
    assert into is None
    heads = qkv.unflatten(1, (num_heads + 2 * num_kv_heads, -1)).float()
    low, high = heads.chunk(2, -1)
    cos, sin = table[positions][:, None].chunk(2, -1)
    rotated = torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(qkv.dtype)
    q, k, _ = rotated.split([num_heads, num_kv_heads, num_kv_heads], 1)
    v = heads[:, num_heads + num_kv_heads :].to(qkv.dtype)
    return q.contiguous(), k.contiguous(), v.contiguous()


def _silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


PLAIN = Operations(_add_norm, _rotate, _silu_mul)
"""In torch, computed in float32 and rounded where the kernels round."""


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm_kernel(normed, residual, branch, weight, num_columns, epsilon, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, N803
    """Grid: (tokens,)."""
    columns = tl.arange(0, COLUMNS)
    exists = columns < num_columns
    places = tl.program_id(0) * num_columns + columns
    total = tl.load(residual + places, mask=exists, other=0.0).to(tl.float32)
    total += tl.load(branch + places, mask=exists, other=0.0).to(tl.float32)
    tl.store(residual + places, total.to(residual.dtype.element_ty), mask=exists)
    mean = tl.sum(total * total, 0) / num_columns
    scaled = total / tl.sqrt(mean + epsilon) * tl.load(weight + columns, mask=exists, other=0.0).to(tl.float32)
    tl.store(normed + places, scaled.to(normed.dtype.element_ty), mask=exists)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_kernel(q, k, v, qkv, table, positions, num_heads, num_kv_heads, HALF: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, N803
    """Grid: (tokens, query heads and twice the KV heads)."""
    token, head = tl.program_id(0), tl.program_id(1)
    lanes = tl.arange(0, HALF)
    source = qkv + (token * (num_heads + 2 * num_kv_heads) + head) * (2 * HALF) + lanes
    low, high = tl.load(source).to(tl.float32), tl.load(source + HALF).to(tl.float32)
    of_position = table + tl.load(positions + token) * (2 * HALF) + lanes
    cos, sin = tl.load(of_position), tl.load(of_position + HALF)
    rotated_low, rotated_high = low * cos - high * sin, high * cos + low * sin
    kv_head = head - num_heads
    if head < num_heads:
        target = q + (token * num_heads + head) * (2 * HALF) + lanes
        tl.store(target, rotated_low.to(q.dtype.element_ty))
        tl.store(target + HALF, rotated_high.to(q.dtype.element_ty))
    elif kv_head < num_kv_heads:
        target = k + (token * num_kv_heads + kv_head) * (2 * HALF) + lanes
        tl.store(target, rotated_low.to(k.dtype.element_ty))
        tl.store(target + HALF, rotated_high.to(k.dtype.element_ty))
    else:
        target = v + (token * num_kv_heads + kv_head - num_kv_heads) * (2 * HALF) + lanes
        tl.store(target, low.to(v.dtype.element_ty))
        tl.store(target + HALF, high.to(v.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def _silu_mul_kernel(output, gate_up, num_columns, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, N803
    """Grid: (tokens, tiles of COLUMNS columns)."""
    token, columns = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = columns < num_columns
    source = gate_up + token * (2 * num_columns) + columns
    gate = tl.load(source, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(source + num_columns, mask=exists, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(output + token * num_columns + columns, result.to(output.dtype.element_ty), mask=exists)


def _fused_add_norm(residual: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    normed = torch.empty_like(residual)
    num_tokens, num_columns = residual.shape
    columns = triton.next_power_of_2(num_columns)
    _add_norm_kernel[(num_tokens,)](
        normed, residual, branch, weight, num_columns, EPSILON, COLUMNS=columns, num_warps=8
    )
    return normed


def _fused_rotate(
    qkv: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    into: Split | None = None,
) -> Split:
    num_tokens, head_dim = len(qkv), table.shape[1]
    heads = num_heads, num_kv_heads, num_kv_heads
    q, k, v = into or (qkv.new_empty(num_tokens, each, head_dim) for each in heads)
    grid = (num_tokens, num_heads + 2 * num_kv_heads)
    _rotate_kernel[grid](q, k, v, qkv, table, positions, num_heads, num_kv_heads, HALF=head_dim // 2, num_warps=1)
    return q, k, v


def _fused_silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    num_tokens, num_columns = len(gate_up), gate_up.shape[1] // 2
    output = gate_up.new_empty(num_tokens, num_columns)
    grid = (num_tokens, triton.cdiv(num_columns, _SILU_TILE))
    _silu_mul_kernel[grid](output, gate_up, num_columns, COLUMNS=_SILU_TILE, num_warps=4)
    return output


FUSED = Operations(_fused_add_norm, _fused_rotate, _fused_silu_mul)
"""In Triton. Tensors are dense, head dims twice a power of two."""


def refuse_wrong_kernels(dtype: torch.dtype, device: torch.device) -> None:
    """Raises WrongResult unless Triton's operations are torch's up to the rounding of their results."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    num_tokens, num_heads, num_kv_heads, head_dim = 3, 8, 2, 32
    branch, weight, residual = draw(num_tokens, 96), draw(96), draw(num_tokens, 96)
    residuals = [residual, residual.clone()]
    gate_up, qkv = draw(num_tokens, 200), draw(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    table, positions = torch.randn(50, head_dim, device=device), torch.tensor([0, 49, 7], device=device)
    results = []
    for kind, own in zip((PLAIN, FUSED), residuals, strict=True):
        normed = kind.add_norm(own, branch, weight)
        rotated = kind.rotate(qkv, table, positions, num_heads, num_kv_heads, None)
        results.append((own, normed, *rotated, kind.silu_mul(gate_up)))
    names = "residual", "norm", "q", "k", "v", "silu"
    for name, plain, fused in zip(names, *results, strict=True):
        refuse_wrong(f"the worker's own kernel for {name}", fused, plain.double(), TOLERANCES[dtype])
