"""Compares a sample with what its call should have computed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from attnd_server.attention.backends.naive import NaiveAttention
from attnd_server.attention.backends.reference import reference_torch_attention
from attnd_server.attention.masks import visible
from attnd_server.attention.tolerances import coarsest, lse_bounds, output_bounds, score_error
from attnd_server.observe.verify.representable import Sizes, fit, underflow
from attnd_server.observe.verify.sample import Sample

CPU = torch.device("cpu")


@dataclass
class Verdict:
    """How far a sample is from what it should be.

    Attributes:
        ratio: greatest error as a multiple of what is tolerated; infinite for a number that should be finite and is
            not, or that is not zero in a row that sees nothing.
        error: the greatest error itself.
        num_not_finite: numbers of the output that are NaN or infinite, also where the caller's own numbers make them.
        num_beyond: rows of heads that were not compared, because float32 does not hold what they are computed with.
        worst: index of the request in its step, row of its new tokens and query head with the greatest ratio.
    """

    ratio: float = 0.0
    error: float = 0.0
    num_not_finite: int = 0
    num_beyond: int = 0
    worst: tuple[int, int, int] | None = None

    @property
    def is_mismatch(self) -> bool:
        """Whether the call's result was wrong."""
        return self.ratio > 1


class NotWanted(Exception):
    """Nobody wants the verdict any more."""


def verify(sample: Sample) -> Verdict:
    """Computes a sample, which is on the host, in float64 and head by head, and compares.

    Operands are rounded as the cache's precision asks for. What float32 does not hold, because the caller's numbers are
    too large or none, is not compared.

    Raises:
        NotWanted: the sample's `is_wanted` says so, which is asked before each head.
    """
    verdict = Verdict()
    kernel = NaiveAttention(torch.float64)
    plan = kernel.plan(sample.config, sample.metadata, sample.options, CPU)
    done = 0
    for index, (start, end) in enumerate(pairwise(sample.metadata.cu_seqlens_q.tolist())):
        rows = sample.choice.rows[index]
        k, v = (None if tensor is None else tensor[start:end] for tensor in (sample.k, sample.v))
        keys, values = kernel.keys_and_values(plan, index, k, v, sample.pages)
        first_position, end_row = plan.first_positions[index], rows.first_row + rows.num_rows
        page_size, window = sample.config.page_size, sample.options.window
        seen = visible(sample.metadata, index, window, first_position, page_size, rows.first_row, end_row)
        num_valid = max(0, int(sample.metadata.valid_lens[index]) - rows.first_row)
        part = _Part(sample, slice(done, done + rows.num_rows), num_valid, seen, keys, values, first_position)
        for head in range(sample.options.num_heads):
            if not sample.is_wanted():
                raise NotWanted
            _compare_head(part, int(sample.metadata.context_lens[index]) + rows.first_row, head, index, verdict)
        done += rows.num_rows
    return verdict


@dataclass(frozen=True, eq=False)
class _Part:
    """The rows of one request.

    Attributes:
        sample: of which they are.
        rows: of the sample's q and output.
        num_valid: how many of the rows count; past them not even a sink does.
        seen: bool `[num_rows, num_keys]`.
        keys: `[num_keys, num_kv_heads, head_dim]`.
        values: likewise.
        first_position: of the keys.
    """

    sample: Sample
    rows: slice
    num_valid: int
    seen: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    first_position: int


def _compare_head(part: _Part, position: int, head: int, index: int, verdict: Verdict) -> None:
    """Compares one query head of rows, the first of which stands at `position`."""
    sample, options = part.sample, part.sample.options
    kv_head = head * sample.config.num_kv_heads // options.num_heads
    keys, values = (tensor[:, kv_head : kv_head + 1] for tensor in (part.keys, part.values))
    precision = sample.config.precision.dtype(sample.q.dtype)
    q = sample.q[part.rows, head : head + 1].to(precision)
    slopes, sinks = (None if x is None else x[head : head + 1] for x in (options.alibi_slopes, options.sinks))
    without = part.sample.metadata.without_sinks
    if without is not None and without[index]:
        sinks = None
    expected, expected_lse = reference_torch_attention(
        q,
        keys,
        values,
        part.seen,
        torch.arange(position, position + len(q)),
        torch.arange(part.first_position, part.first_position + len(keys)),
        options.scale,
        options.softcap,
        slopes,
        sinks,
        torch.float64,
    )
    expected_lse[part.num_valid :] = -torch.inf
    is_seen = part.seen.any(0)
    seen_keys, seen_values = keys[is_seen], values[is_seen]
    seen_sizes = Sizes.of(seen_keys, seen_values)
    sizes = seen_sizes if is_seen.all() else Sizes.of(keys, values)
    q_sizes = q.double().norm(dim=2, keepdim=True).nan_to_num(0.0, 0.0)  # [num_rows, 1, 1]
    key_size = _greatest(seen_keys.double().norm(dim=2))
    dots = abs(options.scale) * q_sizes * key_size
    span = position + len(q) - part.first_position
    bias = _greatest(slopes) * span + _greatest(sinks)
    dtype = coarsest(sample.q.dtype, precision)
    off = score_error(dots + options.softcap + bias, precision if sample.config.k_is_quantised else None)
    off += underflow(options, q_sizes, key_size, sample.config.head_dim)
    actual, blind = sample.output[part.rows, head : head + 1], ~part.seen.any(1)
    bounds = output_bounds(expected, dtype, sample.q.dtype, _greatest(seen_values), off)
    ratios, errors = _ratios(actual, expected, bounds.masked_fill(blind[:, None, None], 0), sample.q.dtype)
    fits = fit(q, seen_sizes, options, bias, precision)
    # What a row does not see may leave NaN all the same: a mask is added to its score.
    fits &= fit(q, sizes, options, bias, precision) | actual.isfinite().all(dim=2).squeeze(1)
    fits |= blind  # zeros, whatever the numbers are
    by_row = ratios.amax(dim=(1, 2))
    if sample.lse is not None:
        lse = sample.lse[part.rows, head : head + 1]
        lse_ratios, _ = _ratios(lse, expected_lse, lse_bounds(expected_lse, off[..., 0]), torch.float32)
        by_row = torch.maximum(by_row, lse_ratios.amax(dim=1))
    verdict.num_not_finite += int((~actual.isfinite()).sum())
    verdict.num_beyond += int((~fits).sum())
    verdict.error = max(verdict.error, float(errors[fits].max()) if fits.any() else 0.0)
    ratio, row = (float(each) for each in by_row.masked_fill(~fits, 0).max(0))
    if ratio > verdict.ratio:
        rows, group = sample.choice.rows[index], options.num_heads // sample.config.num_kv_heads
        verdict.ratio = ratio
        verdict.worst = rows.request, rows.first_row + int(row), sample.choice.first_kv_head * group + head


def _ratios(
    actual: torch.Tensor, expected: torch.Tensor, bounds: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The error of each number as a multiple of its bound, and the error itself; infinite where it makes no sense.

    An lse of -inf is right where it is expected. What else `dtype` has no finite number for, or that may be rounded to
    none, is not compared.
    """
    actual = actual.double()
    is_minus = expected == -math.inf
    errors = torch.where(is_minus & (actual == expected), 0.0, (actual - expected).abs())
    errors = errors.nan_to_num(math.inf, math.inf)
    ratios = torch.where(errors == 0, 0.0, errors / bounds).nan_to_num(math.inf, math.inf)
    is_compared = (expected.abs() + bounds <= torch.finfo(dtype).max) | is_minus
    return torch.where(is_compared, ratios, 0.0), torch.where(is_compared, errors, 0.0)


def _greatest(tensor: torch.Tensor | None) -> float:
    """The greatest size of a finite number; 0 if there is none."""
    if tensor is None or not tensor.numel():
        return 0.0
    return float(tensor.double().abs().nan_to_num(0.0, 0.0).max())
