"""What a worker says about one step: lengths, page tables, slots and masks, shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnd.errors import InvalidRequest
from attnd.protocol.packing import cumulated, int32_tensor, page_tables_array, slots_tensor, tensor, uint32
from attnd.protocol.page_table_deltas import SentPageTables
from attnd.v1 import cache_pb2, step_pb2, tensor_pb2

KINDS: dict[str, step_pb2.StepKind.ValueType] = {
    "prefill": step_pb2.STEP_KIND_PREFILL,
    "decode": step_pb2.STEP_KIND_DECODE,
}
MASKS: dict[str, step_pb2.Mask.ValueType] = {
    "causal": step_pb2.MASK_CAUSAL,
    "block_causal": step_pb2.MASK_BLOCK_CAUSAL,
    "bidirectional": step_pb2.MASK_BIDIRECTIONAL,
    "prefix_full": step_pb2.MASK_PREFIX_FULL,
}


@dataclass(frozen=True, eq=False)
class StepMetadata:
    """One forward pass over a batch of requests, as the worker sees it.

    Every array may be a sequence of ints, a numpy array, a torch tensor on any device, or an `attnd.Array`. Values
    travel as int32; int64 arrays are narrowed one element at a time, so hand over int32 where it counts. The server
    checks all values.

    Attributes:
        query_lens: `[num_reqs]`, new tokens of each request; together the rows of q, k and v.
        context_lens: `[num_reqs]`, tokens of each request that are in its pages already.
        page_tables: `[num_reqs, max_pages]`, page ids padded with -1: equally long rows, or a 2-D array.
        slot_mapping: `[num_tokens]`, where each new token is stored, `page * page_size + offset`; -1 is attended and
            not stored. None: nothing is stored. May exceed 32 bits.
        kind: "prefill" for any lengths, "decode" where every request has the same number of new tokens.
        mask: which new tokens a new token sees: "causal", "block_causal", "bidirectional" or "prefix_full"; or a
            sequence of these, one for each request.
        block_size: tokens of a diffusion block, for "block_causal" and "prefix_full".
        valid_lens: `[num_reqs]`, the first so many new tokens count; rows past them give zeros. None: all count.
        prefix_lens: `[num_reqs]`, positions; for "prefix_full" and the prefix hole.
        padded_prefix_lens: `[num_reqs]`, positions, at least prefix_lens.
        mask_prefix_hole: cached positions in `[prefix_lens[r], padded_prefix_lens[r])` are not seen.
        cache_only: new tokens are neither seen nor stored; calls carry q only.
        store_only: calls carry k and v only, and return nothing.
    """

    query_lens: Any
    context_lens: Any
    page_tables: Any
    slot_mapping: Any = None
    kind: str = "prefill"
    mask: str | Sequence[str] = "causal"
    block_size: int = 0
    valid_lens: Any = None
    prefix_lens: Any = None
    padded_prefix_lens: Any = None
    mask_prefix_hole: bool = False
    cache_only: bool = False
    store_only: bool = False

    def to_message(
        self, step_id: int, cache: cache_pb2.CacheRef, sent_tables: SentPageTables | None = None
    ) -> step_pb2.Step:
        """The wire's form of this step.

        Args:
            step_id: greater than that of every earlier step of the stream; any in unary requests.
            cache: the cache that the step reads and writes.
            sent_tables: page tables of the stream, which this step's may be told by; None: send it in full.

        Raises:
            InvalidRequest: a field holds what the wire cannot carry. Ranges are left to the server.
        """
        mask, masks = self._masks()
        page_tables = page_tables_array(self.page_tables, "page_tables")
        delta = None if sent_tables is None else sent_tables.delta(step_id, page_tables)
        return step_pb2.Step(
            id=step_id,
            cache=cache,
            kind=_named(KINDS, self.kind, "kind"),
            cu_seqlens_q=cumulated(self.query_lens, "query_lens"),
            context_lens=int32_tensor(self.context_lens, "context_lens"),
            page_tables=tensor(page_tables) if delta is None else None,
            page_table_delta=delta,
            slot_mapping=slots_tensor(self.slot_mapping, "slot_mapping"),
            valid_lens=int32_tensor(self.valid_lens, "valid_lens"),
            mask=mask,
            masks=masks,
            block_size=uint32(self.block_size, "block_size"),
            prefix_lens=int32_tensor(self.prefix_lens, "prefix_lens"),
            padded_prefix_lens=int32_tensor(self.padded_prefix_lens, "padded_prefix_lens"),
            mask_prefix_hole=bool(self.mask_prefix_hole),
            cache_only=bool(self.cache_only),
            store_only=bool(self.store_only),
        )

    def _masks(self) -> tuple[step_pb2.Mask.ValueType, tensor_pb2.Tensor | None]:
        """One mask for all requests, or one for each."""
        if isinstance(self.mask, str) or not isinstance(self.mask, Sequence):
            return _named(MASKS, self.mask, "mask"), None
        numbers = [int(_named(MASKS, name, f"mask[{request}]")) for request, name in enumerate(self.mask)]
        return step_pb2.MASK_UNSPECIFIED, int32_tensor(numbers, "mask")


def _named(numbers: dict[str, Any], name: Any, field: str) -> Any:
    number = numbers.get(name) if isinstance(name, str) else None
    if number is None:
        rule = f"must be one of {', '.join(numbers)}"
        raise InvalidRequest(f"{field} is {name!r}, but {rule}", field=field.partition("[")[0])
    return number
