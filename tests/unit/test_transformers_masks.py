"""What is read out of the masks that transformers makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnd.errors import InvalidRequest, Unsupported

pytest.importorskip("transformers", reason="needs transformers")

from transformers import masking_utils as made

from attnd.integrations.transformers.attention import padding_mask
from attnd.integrations.transformers.masks import Reading, read

X = -1  # a token of no block


def mask(function: Callable[..., Any], real: list[list[int]], num_new: int | None = None) -> torch.Tensor:
    """As transformers asks for it; the last `num_new` columns are new."""
    attention_mask = torch.tensor(real, dtype=torch.bool)
    batch_size, num_columns = attention_mask.shape
    num_new = num_new or num_columns
    return padding_mask(
        batch_size=batch_size,
        q_length=num_new,
        kv_length=num_columns,
        q_offset=num_columns - num_new,
        kv_offset=0,
        mask_function=function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
    )


def ends(reading: Reading) -> list[list[int]]:
    assert reading.blocks is not None
    found: list[list[int]] = reading.blocks.tolist()
    return found


def blocks(*rows: list[int], window: int = 0, is_hidden: bool = True) -> Callable[..., Any]:
    """Causal, but for tokens of one block; the window hides tokens of the same block too, or not."""
    causal, block = made.causal_mask_function, made.blockwise_overlay(torch.tensor(rows))
    if not window:
        return made.or_masks(causal, block)
    if is_hidden:
        return made.and_masks(made.or_masks(causal, block), made.sliding_window_overlay(window))
    return made.or_masks(made.sliding_window_causal_mask_function(window), block)


def test_a_causal_mask() -> None:
    reading = read(mask(made.causal_mask_function, [[0, 1, 1, 1], [1, 1, 1, 1]]), 0, 4, 0)
    assert reading.blocks is None
    assert reading.real is not None
    assert reading.real.tolist() == [[False, True, True, True], [True] * 4]


def test_a_windowed_mask() -> None:
    windowed = mask(made.sliding_window_causal_mask_function(2), [[1] * 5])
    assert read(windowed, 0, 5, 2).blocks is None
    with pytest.raises(Unsupported, match="layer 7 token 2 of row 0 does not see token 0"):
        read(windowed, 7, 5, 0)
    with pytest.raises(Unsupported, match="token 1 of row 0 sees token 0"):
        read(windowed, 7, 5, 1)


def test_blocks_of_two_images() -> None:
    reading = read(
        mask(blocks([X, 0, 0, X, 1, 1, 1], [X, X, 0, 0, 0, X, X]), [[1] * 7, [0, 1, 1, 1, 1, 1, 1]]), 0, 7, 0
    )
    assert reading.blocks is not None
    assert reading.blocks.tolist() == [[0, 2, 2, 3, 6, 6, 6], [0, 1, 4, 4, 4, 5, 6]]


def test_padding_in_a_block_belongs_to_it() -> None:
    reading = read(mask(blocks([X, 0, 0, 0, 0, X]), [[1, 1, 0, 0, 1, 1]]), 0, 6, 0)
    assert ends(reading) == [[0, 4, 4, 4, 4, 5]]


def test_a_prefix() -> None:
    reading = read(mask(blocks([0, 0, 0, 0, X, X]), [[0, 1, 1, 1, 1, 1]]), 0, 6, 0)
    assert ends(reading) == [[0, 3, 3, 3, 4, 5]]


def test_the_rest_of_a_block_in_the_next_pass() -> None:
    reading = read(mask(blocks([X, 0, 0, 0, 0, X]), [[1] * 6], num_new=3), 0, 3, 0)
    assert ends(reading) == [[1, 1, 2]]
    reading = read(mask(blocks([X, 0, 0, 0, 0, X]), [[1] * 6], num_new=2), 0, 2, 0)
    assert reading.blocks is None  # its last token sees none behind itself


@pytest.mark.parametrize("is_hidden", [True, False])
def test_a_block_within_the_window(is_hidden: bool) -> None:
    reading = read(mask(blocks([X, X, X, 0, 0, 0, X], window=3, is_hidden=is_hidden), [[1] * 7]), 0, 7, 3)
    assert ends(reading) == [[0, 1, 2, 5, 5, 5, 6]]


def test_a_block_longer_than_the_window() -> None:
    hidden = mask(blocks([X, 0, 0, 0, 0, X], window=3), [[1] * 6])
    assert read(hidden, 0, 6, 3).blocks is not None
    with pytest.raises(Unsupported, match="token 4 of row 0 sees token 1, but calls know"):
        read(mask(blocks([X, 0, 0, 0, 0, X], window=3, is_hidden=False), [[1] * 6]), 0, 6, 3)


def test_masks_that_no_call_knows() -> None:
    apart = mask(blocks([0, X, 0, X]), [[1] * 4])
    with pytest.raises(Unsupported, match="token 0 of row 0 does not see token 1"):
        read(apart, 0, 4, 0)
    chunks = mask(made.chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.int64)), [[1] * 4])
    with pytest.raises(Unsupported, match="token 2 of row 0 does not see token 0"):
        read(chunks, 0, 4, 0)
    for other in (torch.ones(1, 1, 4, 4, dtype=torch.bool), torch.zeros(1, 1, 4, 4)):
        with pytest.raises(InvalidRequest, match=r"attention_mask has shape \[1, 1, 4, 4\]"):
            read(other, 0, 4, 0)
