"""Contexts that begin as late as they may, and windows as wide as they may be: the same bits as from position 0 on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnd

LAST = 2**30
MASKS: dict[str, dict[str, Any]] = {
    "causal": {"mask": "causal"},
    "block_causal": {"mask": "block_causal", "block_size": 4},
    "bidirectional": {"mask": "bidirectional"},
    "prefix_full": {"mask": "prefix_full", "block_size": 4},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("window", [0, 3, 2**31 - 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("store_first", [False, True])
def test_positions(server_address: str, mask: str, window: int, store_first: bool) -> None:
    generator = torch.Generator().manual_seed(window % 1_000)
    k, v = torch.randn(2, 8, 1, 8, generator=generator)
    q, new_k, new_v = torch.randn(3, 2, 1, 8, generator=generator)
    small = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "num_pages": 4, "page_size": 4, "dtype": "float32"}
    options = attnd.AttentionOptions(
        window=window, alibi_slopes=torch.tensor([-0.25]), backend="naive", return_lse=True
    )
    with (
        attnd.connect(server_address) as client,
        client.create_cache(**small) as cache,
        cache.session() as session,
    ):
        cache.store_kv(0, list(range(8)), k, v)
        found = []
        for first in (0, LAST - 4, LAST):
            lens = {"prefix_lens": [first + 2], "padded_prefix_lens": [first + 3]} if mask == "prefix_full" else {}
            step = attnd.StepMetadata(
                [2],
                [7],
                [[0, 1, 3]],
                [7, 12],
                first_position=[first],
                window=window,
                store_first=store_first,
                **MASKS[mask],
                **lens,
            )
            output, lse = session.step(step).attend(0, q, new_k, new_v, options)
            found.append(torch.cat([output.flatten(), lse.flatten()]))
        assert found[0].isfinite().all()
        assert [bool(torch.equal(each, found[0])) for each in found] == [True] * 3
        with pytest.raises(attnd.InvalidRequest, match=rf"first_position\[0\] is {LAST + 1}, but must be 0..{LAST}"):
            session.step(attnd.StepMetadata([2], [7], [[0, 1]], first_position=[LAST + 1])).attend(0, q, new_k, new_v)
