"""What a worker says about one step: lengths, page tables, slots and masks, shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnd.errors import InvalidRequest
from attnd.protocol.packing import int32_tensor, slots_tensor, tensor, uint32
from attnd.protocol.page_table_deltas import SentPageTables
from attnd.protocol.steps.batch_lens import BatchLens, batch_lens
from attnd.protocol.steps.page_tables import page_tables_array
from attnd.protocol.steps.step_groups import StepGroup, group_messages
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

    Every array may be a sequence of ints, a numpy array, a torch tensor on any device, an `attnd.Array`, or what else
    has the buffer protocol; all of them give the same message, but int64 slots stay so. The server checks all values.

    Lengths are given as they are at hand: new tokens as `query_lens` or `cu_seqlens_q`, cached ones as `context_lens`,
    or as `seq_lens` together with the new ones.

    Attributes:
        query_lens: `[num_reqs]`, new tokens of each request; together the rows of q, k and v.
        context_lens: `[num_reqs]`, tokens of each request that are in its pages already; minus its new tokens for a row
            that only pads the batch, which gives zeros.
        page_tables: `[num_reqs, max_pages]`, page ids padded with -1: equally long rows, or a 2-D array.
        slot_mapping: `[num_tokens]`, where each new token is stored, `page * page_size + offset`; -1 is attended and
            not stored. More slots than tokens are cut off if they are -1. None: nothing is stored. May exceed 32 bits.
        kind: "prefill" for any lengths, "decode" where every request has the same number of new tokens, or none.
        mask: which new tokens a new token sees: "causal", "block_causal", "bidirectional" or "prefix_full"; or a
            sequence of these, one for each request.
        block_size: tokens of a diffusion block, for "block_causal" and "prefix_full".
        valid_lens: `[num_reqs]`, the first so many new tokens count; rows past them give zeros. None: all count.
        prefix_lens: `[num_reqs]`, positions; for "prefix_full" and the prefix hole.
        padded_prefix_lens: `[num_reqs]`, positions, at least prefix_lens.
        mask_prefix_hole: cached positions in `[prefix_lens[r], padded_prefix_lens[r])` are not seen.
        cache_only: new tokens are neither seen nor stored; calls carry q only.
        store_only: calls carry k and v only, and return nothing.
        store_first: all new tokens are stored, and then every key is read from pages, other requests' new ones too. A
            token whose slot is -1 is seen by nobody; FP8 pages give new tokens as they were rounded.
        window: tokens of the sliding window of every call; pages that it hides may be absent or another request's. 0:
            each call's own, and nothing is hidden from the step's check.
        attend_new: `[num_reqs]`, 1; or 0: the request's new tokens are stored, but see its context alone, and no sinks,
            because somebody else attends to the rest. None: all 1.
        first_position: `[num_reqs]`, position of the first token of each request's context. None: all 0.
        groups: of a cache with layer groups, what differs between them, in their order; then page_tables, slot_mapping
            and window are absent here.
        cu_seqlens_q: `[num_reqs + 1]`, where the new tokens of each request start and where the last one's end, instead
            of query_lens.
        seq_lens: `[num_reqs]`, cached and new tokens of each request together, instead of context_lens. 0 where there
            are new tokens: the row only pads the batch.
    """

    query_lens: Any = None
    context_lens: Any = None
    page_tables: Any = None
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
    store_first: bool = False
    window: int = 0
    attend_new: Any = None
    first_position: Any = None
    groups: Sequence[StepGroup] | None = None
    cu_seqlens_q: Any = None
    seq_lens: Any = None

    @property
    def lens(self) -> BatchLens:
        """The lengths of the requests, whichever way they are given. Raises InvalidRequest: in none, or in both."""
        return batch_lens(self.query_lens, self.cu_seqlens_q, self.context_lens, self.seq_lens)

    @property
    def num_tokens(self) -> int:
        """New tokens of all requests: the rows of q, k and v. Raises as `lens`."""
        return self.lens.num_tokens

    @property
    def num_reqs(self) -> int:
        """Requests of the step. Raises as `lens`."""
        return self.lens.cu_seqlens_q.shape[0] - 1

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
        lens = self.lens
        message = step_pb2.Step(
            id=step_id,
            cache=cache,
            kind=_named(KINDS, self.kind, "kind"),
            cu_seqlens_q=tensor(lens.cu_seqlens_q),
            context_lens=tensor(lens.context_lens),
            valid_lens=int32_tensor(self.valid_lens, "valid_lens"),
            mask=mask,
            masks=masks,
            block_size=uint32(self.block_size, "block_size"),
            prefix_lens=int32_tensor(self.prefix_lens, "prefix_lens"),
            padded_prefix_lens=int32_tensor(self.padded_prefix_lens, "padded_prefix_lens"),
            mask_prefix_hole=bool(self.mask_prefix_hole),
            cache_only=bool(self.cache_only),
            store_only=bool(self.store_only),
            store_first=bool(self.store_first),
            window=uint32(self.window, "window"),
            attend_new=int32_tensor(self.attend_new, "attend_new"),
            first_position=int32_tensor(self.first_position, "first_position"),
        )
        if self.groups is None:
            self._tell_tables(message, lens.num_tokens, sent_tables)
        else:
            self._check_no_tables()
            message.groups.extend(group_messages(self.groups, lens.num_tokens, step_id, sent_tables))
        return message

    def _tell_tables(self, message: step_pb2.Step, num_tokens: int, sent_tables: SentPageTables | None) -> None:
        """Puts page tables and slots into the message of a step without groups."""
        if self.page_tables is None:
            raise InvalidRequest("page_tables is None, but must be given where groups is not", field="page_tables")
        page_tables = page_tables_array(self.page_tables, "page_tables")
        slots = slots_tensor(self.slot_mapping, "slot_mapping", num_tokens)
        delta = None if sent_tables is None else sent_tables.delta(message.id, page_tables)
        if delta is None:
            message.page_tables.CopyFrom(tensor(page_tables))
        else:
            message.page_table_delta.CopyFrom(delta)
        if slots is not None:
            message.slot_mapping.CopyFrom(slots)

    def _check_no_tables(self) -> None:
        for field, value in (("page_tables", self.page_tables), ("slot_mapping", self.slot_mapping)):
            if value is not None:
                raise InvalidRequest(f"{field} is given, but must be absent where groups is given", field=field)
        if self.window != 0:
            rule = "must be 0 where groups is given"
            raise InvalidRequest(f"window is {self.window}, but {rule}", field="window")

    def _masks(self) -> tuple[step_pb2.Mask.ValueType, tensor_pb2.Tensor | None]:
        """One mask for all requests, or one for each."""
        if isinstance(self.mask, str) or not isinstance(self.mask, Sequence):
            return _named(MASKS, self.mask, "mask"), None
        try:
            numbers = list(map(MASKS.__getitem__, self.mask))
        except (KeyError, TypeError):
            numbers = [_named(MASKS, name, f"mask[{request}]") for request, name in enumerate(self.mask)]
        return step_pb2.MASK_UNSPECIFIED, int32_tensor(numbers, "mask")


def _named(numbers: dict[str, Any], name: Any, field: str) -> Any:
    number = numbers.get(name) if isinstance(name, str) else None
    if number is None:
        rule = f"must be one of {', '.join(numbers)}"
        raise InvalidRequest(f"{field} is {name!r}, but {rule}", field=field.partition("[")[0])
    return number
