"""What a cell must give, in float64: of some requests and rows, so that it stays cheap."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnd_server.attention.backends.reference import reference_torch_attention
from attnd_server.attention.masks import visible
from benchmarks.kernel_cases import Case
from benchmarks.kernel_tensors import Tensors, as_slots
from benchmarks.report import WrongResult, refuse_wrong

# Rows of a sampled request that are computed: all, or the first, the middle and the last.
_ROWS = 32
_EDGE_ROWS = 8
FP8_LIMIT = 3e-3
"""Largest ||output - expected|| / ||expected|| over FP8 pages; rounding the output to bfloat16 gives 1.7e-3."""


@dataclass(frozen=True, eq=False)
class Expected:
    """Some rows of a layer's output.

    Attributes:
        rows: int64 `[num_rows]`.
        output: float64 `[num_rows, num_heads, head_dim]`.
    """

    rows: torch.Tensor
    output: torch.Tensor

    def check(
        self, what: str, output: torch.Tensor, limit: float | None = None, row_limit: float | None = None
    ) -> float:
        """The relative error of a layer's whole output.

        Args:
            what: its name in an error.
            output: `[num_tokens, num_heads, head_dim]`.
            limit: largest relative error; None is the row's.
            row_limit: largest relative error of a token and head; None is that of output's dtype.

        Raises:
            WrongResult: the error is past a limit, or a number is not finite anywhere, in rows without reference too.
        """
        if not output.isfinite().all():
            raise WrongResult(f"{what} has numbers that are not finite, or were never written")
        sampled = output[self.rows]
        refuse_wrong(what, sampled, self.output, row_limit)
        error = float((sampled.double() - self.output).norm() / self.output.norm())
        if limit is not None and not error <= limit:
            raise WrongResult(f"{what} has a relative error of {error:.2g}, but must have at most {limit:g}")
        return error


def sample(case: Case) -> list[tuple[int, int, int]]:
    """Requests, each with half-open ranges of its new tokens: the shortest, the longest, first, middle and last."""
    order = sorted(range(case.num_reqs), key=lambda request: (case.seq_lens[request], case.query_lens[request]))
    most_new = max(range(case.num_reqs), key=lambda request: case.query_lens[request])
    result = []
    for request in sorted({0, case.num_reqs // 2, case.num_reqs - 1, order[0], order[-1], most_new}):
        new = case.query_lens[request]
        if new <= _ROWS:
            result.append((request, 0, new))
        else:
            starts = (0, new // 2 - _EDGE_ROWS // 2, new - _EDGE_ROWS)
            result += [(request, start, start + _EDGE_ROWS) for start in starts]
    return result


def expected(case: Case, tensors: Tensors, layer: int, *, scaled: bool = True) -> Expected:
    """The reference of a layer.

    Args:
        case: the cell.
        tensors: its data.
        layer: index of the layer.
        scaled: whether FP8 pages hold numbers to be multiplied by the scales, or the numbers themselves.
    """
    metadata, device = case.metadata(), tensors.q.device
    rows, outputs = [], []
    for request, first, end in sample(case):
        start = int(case.cu_seqlens_q[request])
        seen = visible(metadata, request, 0, page_size=case.page_size, first_token=first, end_token=end).to(device)
        keys, values = _keys_and_values(case, tensors, layer, request, scaled)
        rows.append(torch.arange(start + first, start + end, device=device))
        outputs.append(_attention(case, tensors.q[rows[-1]], keys, values, seen))
    return Expected(torch.cat(rows), torch.cat(outputs))


def _keys_and_values(
    case: Case, tensors: Tensors, layer: int, request: int, scaled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all tokens of a request, `[seq_len, num_kv_heads, head_dim]`, float64 if the pages are FP8."""
    positions = torch.arange(case.context_lens[request])
    slots = case.page_tables[request, positions // case.page_size] * case.page_size + positions % case.page_size
    new = slice(int(case.cu_seqlens_q[request]), int(case.cu_seqlens_q[request + 1]))
    result = []
    of_layer = tensors.layers[layer]
    given = (tensors.k, of_layer.k, of_layer.k_scales), (tensors.v, of_layer.v, of_layer.v_scales)
    for tokens, pages, scales in given:
        context = as_slots(pages)[slots.to(pages.device)].view(pages.dtype)
        if scales is not None:
            context = context.double() * (scales.double()[:, None] if scaled else 1.0)
        result.append(torch.cat([context, tokens[new].to(context.dtype)]))
    return result[0], result[1]


def _attention(
    case: Case, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """float64 `[num_rows, num_heads, head_dim]`, one KV head at a time: a long context in float64 is large."""
    group = case.num_heads // case.num_kv_heads
    nowhere = torch.zeros(1, dtype=torch.int64, device=q.device)  # only ALiBi looks at positions
    return torch.cat(
        [
            reference_torch_attention(
                q[:, head * group : (head + 1) * group],
                keys[:, head, None],
                values[:, head, None],
                seen,
                nowhere,
                nowhere,
                case.scale,
                dtype=torch.float64,
            )[0]
            for head in range(case.num_kv_heads)
        ],
        dim=1,
    )
