"""The rules by which other tests judge kernels fail for wrong results."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tests.attention import dense_attention
from tests.tolerances import assert_as_exact_as_plain

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def inputs(dtype: torch.dtype) -> Tensors:
    """q, k and v of a sequence of 40 tokens."""
    return torch.randn(40, 4, 64).to(dtype), torch.randn(40, 2, 64).to(dtype), torch.randn(40, 2, 64).to(dtype)


def plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention with every step rounded to the inputs' type."""
    keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = torch.einsum("nhd,shd->hns", q, keys) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~torch.ones(len(q), len(q)).tril().bool(), -torch.inf)
    return torch.einsum("hns,shd->nhd", scores.softmax(2), values)


def exactly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return dense_attention(q.double(), k.double(), v.double())


@HALVES
def test_an_exact_result_and_a_plain_one_pass(dtype: torch.dtype) -> None:
    given = inputs(dtype)
    plain, exact = plainly(*given), exactly(*given)
    for actual in (exact.to(dtype), plain, exact + 1.9 * (plain - exact)):
        assert_as_exact_as_plain(actual, plain, exact, dtype)


def without_its_last_key(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The last token does not see itself."""
    output = exactly(q, k, v)
    output[-1] = exactly(q[-1:], k[:-1], v[:-1])[0]
    return output


def with_one_number(number: float) -> Callable[..., torch.Tensor]:
    """Right but for one element."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        output = exactly(q, k, v)
        output[17, 2, 5] = number
        return output

    return attend


@HALVES
@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v: exactly(1.05 * q, k, v),
        lambda q, k, v: exactly(q, k.roll(1, 1), v),
        without_its_last_key,
        with_one_number(10.0),
        with_one_number(math.nan),
        with_one_number(math.inf),
    ],
    ids=["scale", "heads", "mask", "one", "nan", "inf"],
)
def test_a_wrong_result_fails(dtype: torch.dtype, wrong: Callable[..., torch.Tensor]) -> None:
    given = inputs(dtype)
    with pytest.raises(AssertionError, match=r"the error is|numbers are not finite"):
        assert_as_exact_as_plain(wrong(*given).to(dtype), plainly(*given), exactly(*given), dtype)


@HALVES
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_plain_computation_that_broke_down_excuses_nothing(dtype: torch.dtype, broken: float) -> None:
    given = inputs(dtype)
    plain, exact = plainly(*given), exactly(*given)
    plain[3, 1, 0] = broken
    with pytest.raises(AssertionError, match="a finite number"):
        assert_as_exact_as_plain(exact.to(dtype), plain, exact, dtype)
