"""The running softmax of attention over tiles of keys: device functions that the attention and the merge kernel share.

Scores are in units of log2, so that exp2 does; everything is float32. A row's state is `(accumulator, row_max,
row_sum)`: the sum of `exp2(score - row_max) * v`, the greatest score so far, and the sum of `exp2(score - row_max)`.
Algorithm: "Online normalizer calculation for softmax" (arXiv 1805.02867), as in FlashAttention (arXiv 2205.14135).
"""

import triton
import triton.language as tl

LOG2E = 1.4426950408889634
# Of float32: what is greater is inf there, and 0 * inf is NaN; less is no normal number.
_MOST, _LEAST = 3.4028234663852886e38, 2.0**-126


def log2_numbers(scale: float, softcap: float) -> tuple[float, float]:
    """What q.k is multiplied with, and tanh. Softcap's tanh(x) is made of exp2(2 x log2(e)).

    A softcap is never 0 here, which says that there is none: scores are as good as 0 then, whatever q.k was.
    """
    if not softcap:
        return _float32(LOG2E * scale), 0.0
    return _float32(2 * LOG2E * scale / softcap), max(_float32(LOG2E * softcap), _LEAST)


def _float32(number: float) -> float:
    return 0.0 if abs(number) < _LEAST else min(max(number, -_MOST), _MOST)


@triton.jit
def score(q, k, positions, keys, slopes, scale, softcap, OPTIONS: tl.constexpr):
    """Scores `[rows, keys]` in units of log2. The caller has put log2(e) into `scale`, `softcap` and `slopes`.

    OPTIONS: there may be a softcap or ALiBi; without, neither is looked at.
    """
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if OPTIONS:
        if softcap != 0.0:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1) saturates where exp overflows or vanishes; `scale` makes 2 x log2(e).
            scores = softcap * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
        scores += slopes[:, None] * (keys[None, :] - positions[:, None]).to(tl.float32)
    return scores


@triton.jit
def rebase(row_max, tile_max):
    """The new maximum of each row, what to subtract from scores, and the factor for what was summed up so far."""
    new_max = tl.maximum(row_max, tile_max)
    # A row that has seen nothing has -inf, and -inf - -inf is NaN: subtract 0 instead, and exp2(-inf) is 0.
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    return new_max, base, tl.exp2(row_max - base)


@triton.jit
def attend(accumulator, row_max, row_sum, scores, visible, v, v_scale, MASK: tl.constexpr, SCALED: tl.constexpr):
    """Takes one tile of keys into the state of each row.

    Args:
        accumulator: float32 `[rows, head_dim_v]`.
        row_max: float32 `[rows]`.
        row_sum: float32 `[rows]`.
        scores: float32 `[rows, keys]`, in units of log2; finite.
        visible: bool `[rows, keys]`.
        v: `[keys, head_dim_v]`, zero where no row sees the key: 0 * NaN would be NaN.
        v_scale: what v is to be multiplied with; not read without SCALED.
        MASK: whether anything may be hidden; without it, all is taken as visible.
        SCALED: whether v has a scale.
    """
    if MASK:
        scores = tl.where(visible, scores, float("-inf"))
    row_max, base, decay = rebase(row_max, tl.max(scores, 1))
    weights = tl.exp2(scores - base[:, None])
    row_sum = row_sum * decay + tl.sum(weights, 1)
    if SCALED:
        weights = weights * v_scale
    accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision="ieee")
    return accumulator, row_max, row_sum


@triton.jit
def finish(accumulator, row_max, row_sum, sink, SINKS: tl.constexpr):
    """Output and lse (in units of log2) of each row; zeros for a row that saw nothing, and the sink for its lse.

    Args:
        accumulator: float32 `[rows, head_dim_v]`.
        row_max: float32 `[rows]`.
        row_sum: float32 `[rows]`; 0 marks a row that saw nothing.
        sink: float32 `[rows]`, in units of log2, or -inf for none; not read without SINKS.
        SINKS: whether exp2(sink) joins the denominator.
    """
    saw = row_sum != 0.0  # true for NaN as well: who sends NaN gets NaN
    counts = saw
    if SINKS:
        counts = saw | (sink != float("-inf"))
        row_max, base, decay = rebase(tl.where(saw, row_max, float("-inf")), sink)
        row_sum = row_sum * decay + tl.exp2(sink - base)
        accumulator = accumulator * decay[:, None]
    denominator = tl.where(counts, row_sum, 1.0)
    output = tl.where(saw[:, None], accumulator / denominator[:, None], 0.0)
    return output, tl.where(counts, row_max + tl.log2(denominator), float("-inf"))
