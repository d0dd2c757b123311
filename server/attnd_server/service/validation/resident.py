"""The metadata of a resident step: what the GPU's check decides, decided by the rules of all other steps.

`attention/kernels/resident` accepts what is accepted here, and nothing else. The host asks here why a step was refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from attnd.protocol.cuda.resident import CONTEXT_LENS, NUM_REQS, STORED_LENS, VALID_LENS, VERSION, rounded
from attnd.v1 import attention_pb2, step_pb2, tensor_pb2
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.metadata import MOST_COLUMN, AttentionMetadata
from attnd_server.attention.resident import ResidentSizes
from attnd_server.config import ServerConfig
from attnd_server.service.validation.arrays import check_range, refuse, refuse_first
from attnd_server.service.validation.steps import step

_MASKS = {0: step_pb2.MASK_BIDIRECTIONAL, 1: step_pb2.MASK_CAUSAL}
Int32s = npt.NDArray[np.int32]


def resident_sizes(
    message: attention_pb2.ResidentSteps, config: AttentionConfig, limits: ServerConfig
) -> ResidentSizes:
    """What resident steps have in common.

    Raises:
        InvalidRequest: they would be more than a step may be, or there are none with such a mask.
    """
    query_len, max_reqs, max_pages = (int(getattr(message, name)) for name in ("query_len", "max_reqs", "max_pages"))
    for name, value, most in (
        ("query_len", query_len, limits.max_step_tokens),
        ("max_reqs", max_reqs, limits.max_step_reqs),
        ("max_pages", max_pages, limits.max_page_table_elements),
    ):
        if not 1 <= value <= most:
            refuse(name, f"{name} is {value}, but must be 1..{most}")
    max_reqs, max_pages = rounded(max_reqs), rounded(max_pages)
    if max_reqs > limits.max_step_reqs:
        rule = f"a step has at most {limits.max_step_reqs}"
        refuse(
            "max_reqs", f"max_reqs is {message.max_reqs}, for which there is room for {max_reqs} requests, but {rule}"
        )
    if max_reqs * query_len > limits.max_step_tokens:
        rule = f"a step has at most {limits.max_step_tokens} new tokens"
        refuse("max_reqs", f"max_reqs is {max_reqs} with {query_len} new tokens each, but {rule}")
    if max_reqs * max_pages > limits.max_page_table_elements:
        rule = f"page tables have at most {limits.max_page_table_elements} elements"
        refuse("max_pages", f"max_pages is {max_pages} for each of {max_reqs} requests, but {rule}")
    block_sizes = {
        step_pb2.MASK_CAUSAL: 1,
        step_pb2.MASK_BLOCK_CAUSAL: int(message.block_size),
        step_pb2.MASK_BIDIRECTIONAL: 0,
    }
    if message.mask not in block_sizes:
        rule = "must be MASK_CAUSAL, MASK_BLOCK_CAUSAL or MASK_BIDIRECTIONAL in resident steps"
        refuse("mask", f"mask is {message.mask or 'unspecified'}, but {rule}")
    if message.mask == step_pb2.MASK_BLOCK_CAUSAL and message.block_size < 1:
        refuse("block_size", "block_size is 0, but must be at least 1 for a block-causal mask")
    return ResidentSizes(
        max_reqs=max_reqs,
        max_pages=max_pages,
        query_len=query_len,
        page_size=config.page_size,
        num_pages=config.num_pages,
        max_context_len=limits.max_context_len,
        window=config.window,
        block_size=min(block_sizes[message.mask], MOST_COLUMN),
    )


def resident_step(
    lens: Int32s, page_tables: Int32s, sizes: ResidentSizes, config: AttentionConfig, limits: ServerConfig
) -> AttentionMetadata:
    """What a resident step asks for.

    Args:
        lens: int32 `[LENS_ROWS, max_reqs]`, any numbers.
        page_tables: int32 `[max_reqs, max_pages]`, any numbers; what lies past a request's tokens does not count.
        sizes: of the class.
        config: of the cache's layer group.
        limits: what one step may take.

    Raises:
        InvalidRequest: the step breaks a rule of step.proto, or is none that a GPU checks.
    """
    num_reqs, version = (int(value) for value in lens[NUM_REQS, :2])
    if version != VERSION:
        refuse("version", f"version is {version}, but must be {VERSION}, that of the metadata that this server reads")
    if not 1 <= num_reqs <= sizes.max_reqs:
        refuse("num_reqs", f"num_reqs is {num_reqs}, but must be 1..{sizes.max_reqs}, the most of these steps")
    context_lens, stored = (lens[row, :num_reqs].astype(np.int64) for row in (CONTEXT_LENS, STORED_LENS))
    check_range(stored, 0, sizes.query_len, "stored_lens", f"must be 0..{sizes.query_len}, a request's new tokens")
    num_covered = sizes.max_pages * sizes.page_size
    is_long = (stored > 0) & (context_lens >= 0) & (context_lens + stored > num_covered)
    if is_long.any():
        rule = f"page_tables covers {num_covered} tokens, and the context has {context_lens[int(is_long.argmax())]}"
        refuse_first(is_long, stored, "stored_lens", rule)
    used = _used_tables(page_tables[:num_reqs], context_lens, stored, sizes)
    message = step_pb2.Step(
        kind=step_pb2.STEP_KIND_DECODE,
        cu_seqlens_q=_int32(np.arange(num_reqs + 1) * sizes.query_len),
        context_lens=_int32(context_lens),
        valid_lens=_int32(lens[VALID_LENS, :num_reqs]),
        page_tables=_int32(used),
        slot_mapping=_int64(_slots(used, context_lens, stored, sizes)),
        mask=_MASKS.get(sizes.block_size, step_pb2.MASK_BLOCK_CAUSAL),
        block_size=sizes.block_size,
        window=sizes.window,
    )
    metadata = step(message, config, limits)
    if metadata.has_absent_pages(sizes.page_size):
        refuse("page_tables", "page_tables has -1 within a context, but every page of a resident step must be there")
    return metadata


def _used_tables(page_tables: Int32s, context_lens: Any, stored: Any, sizes: ResidentSizes) -> Int32s:
    """The page tables, with -1 past each request's context and what it stores."""
    num_used = -(-(np.maximum(context_lens, 0) + stored) // sizes.page_size)
    is_used = np.arange(page_tables.shape[1]) < num_used[:, None]
    return np.where(is_used, page_tables, -1).astype(np.int32)


def _slots(page_tables: Int32s, context_lens: Any, stored: Any, sizes: ResidentSizes) -> npt.NDArray[np.int64]:
    """The slot of each new token; -1 is not stored. Raises InvalidRequest: it would lie in no page."""
    tokens = np.arange(sizes.query_len)
    is_stored = tokens < stored[:, None]
    is_padded = context_lens == -sizes.query_len
    positions = np.where(is_padded, 0, np.maximum(context_lens, 0))[:, None] + tokens
    columns = np.minimum(positions // sizes.page_size, sizes.max_pages - 1)
    pages = np.take_along_axis(page_tables, columns, axis=1).astype(np.int64)
    wrong = is_stored & ~is_padded[:, None] & ((pages < 0) | (pages >= sizes.num_pages))
    if wrong.any():
        request, token = np.unravel_index(int(wrong.argmax()), wrong.shape)
        column, rule = columns[request, token], f"the cache has pages 0..{sizes.num_pages - 1}"
        message = (
            f"page_tables[{request}, {column}] is {pages[request, token]}, but {rule}, and a token is stored there"
        )
        refuse("page_tables", message)
    slots = np.where(is_padded[:, None], 0, pages * sizes.page_size) + positions % sizes.page_size
    return np.where(is_stored, slots, -1).ravel()


def _int32(values: Any) -> tensor_pb2.Tensor:
    return _tensor(np.ascontiguousarray(values, np.int32), tensor_pb2.DTYPE_INT32)


def _int64(values: Any) -> tensor_pb2.Tensor:
    return _tensor(np.ascontiguousarray(values, np.int64), tensor_pb2.DTYPE_INT64)


def _tensor(values: npt.NDArray[Any], dtype: tensor_pb2.Dtype.ValueType) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=dtype, shape=values.shape, data=values.tobytes())
