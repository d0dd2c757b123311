"""What a part of a step costs torch's attention, and so which of its heads are computed at once."""

from __future__ import annotations

from dataclasses import dataclass

from attnd_server.attention.backends.gather import Part
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.attention.tiles import EXP_PRODUCTS, SCRATCH_BYTES, Heads, head_blocks

# Products of numbers in one call of torch, which nothing can end: a tenth of a second of a slow core. On a GPU it is a
# launch of a fraction of a millisecond.
MAX_PRODUCTS, MAX_GPU_PRODUCTS = 1 << 31, 1 << 32
# Keys of which any head fits: 2048 x 1024 elements x 32 bytes at most.
FEW_KEYS = 2048


@dataclass(frozen=True)
class PartCosts:
    """What memory and time depend on besides the part.

    Attributes:
        num_heads: query heads.
        num_kv_heads: KV heads.
        dims: elements of K and V of a head, together.
        gathered_bytes: of an element of K or V, that many are there while one is gathered.
        copied_bytes: of an element of K or V for each query head, which torch copies.
        score_bytes: of each row and key, where torch holds all scores.
        score_products: products that take as long as a score does beside its own.
        max_products: in one call of torch.
    """

    num_heads: int
    num_kv_heads: int
    dims: int
    gathered_bytes: int
    copied_bytes: int
    score_bytes: int
    score_products: int
    max_products: int

    def bytes_of_heads(self, num_reqs: int, num_rows: int, num_keys: int) -> tuple[int, int]:
        """Memory that a part takes for each KV head, and for each query head."""
        keys = num_reqs * num_keys
        return keys * self.dims * self.gathered_bytes, keys * (
            self.dims * self.copied_bytes + num_rows * self.score_bytes
        )

    def blocks(self, part: Part) -> list[Heads]:
        """The heads of a part that are computed together: all of a small one, and of one that is read in place."""
        if part.side_by_side is not None:
            return list(head_blocks(self.num_heads, self.num_kv_heads, self.num_heads))
        num_reqs, num_rows, num_keys = part.num_reqs, part.num_rows, part.num_keys
        of_kv_head, of_head = self.bytes_of_heads(num_reqs, num_rows, num_keys)
        group = self.num_heads // self.num_kv_heads
        most = SCRATCH_BYTES * group // max(1, of_kv_head + group * of_head)
        if most < group:
            most = (SCRATCH_BYTES - of_kv_head) // max(1, of_head)
        products = num_reqs * num_rows * num_keys * (self.dims + self.score_products) // (1 + part.is_causal)
        return list(head_blocks(self.num_heads, self.num_kv_heads, min(most, self.max_products // max(1, products))))


def part_costs(
    config: AttentionConfig, options: AttentionOptions, *, enable_gqa: bool, on_processor: bool = True
) -> PartCosts:
    """The costs of the parts of a step; `enable_gqa`: whether KV heads are not repeated for the query heads."""
    dtype = config.precision.dtype(config.dtype)
    holds_scores = config.head_dim != config.head_dim_v or not enable_gqa
    return PartCosts(
        num_heads=options.num_heads,
        num_kv_heads=config.num_kv_heads,
        dims=config.head_dim + config.head_dim_v,
        gathered_bytes=(config.dtype.itemsize + 2 * dtype.itemsize) + (8 if config.is_quantised else 0),
        # Torch repeats them for the query heads, or packs halves for processors that multiply tiles.
        copied_bytes=8 if holds_scores else dtype.itemsize if dtype.itemsize == 2 else 0,
        score_bytes=12 if holds_scores else 0,
        score_products=EXP_PRODUCTS if on_processor else 0,
        max_products=MAX_PRODUCTS if on_processor else MAX_GPU_PRODUCTS,
    )


def longest(metadata: AttentionMetadata, options: AttentionOptions) -> int:
    """An upper bound of the keys of a request in a part."""
    context_len = min(metadata.max_context_len, options.window or metadata.max_context_len)
    return context_len + max(metadata.query_lens, default=0)
