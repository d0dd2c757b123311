"""Brings a launch's requests together from where several calls have them, and takes its results back there.

A call of decode is a few addresses in the host's memory, which the GPU reads and writes by itself: q, k and v, output
and lse. What its step says of each request lies in a row of its own, as the step was planned once: lengths and masks,
slots, and the page table, with the page ids of its cache. So the host says of each call where things are, whoever
shares the launch, and one kernel makes a step of them all, in the page ids of the space in which their caches lie.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from attnd_server.attention.kernels.decode_items import STEP_HEADER
from attnd_server.attention.metadata import REQUEST_COLUMNS
from attnd_server.device.kernels.launch import launch_kernel

# What the host says of a call, int64: its first request, the addresses of its tensors, the page of the space that is
# page 0 of its layer, and how many columns of its rows' page tables are to be taken.
CALL_FIELDS = 8
(FIRST_REQ, Q, K, V, OUTPUT, LSE, FIRST_PAGE, NUM_COLUMNS) = range(CALL_FIELDS)

_HEADER = tl.constexpr(STEP_HEADER)
_NUM_COLUMNS_OF_STEP = tl.constexpr(len(REQUEST_COLUMNS))
_FIELDS = tl.constexpr(CALL_FIELDS)
_FIRST_REQ = tl.constexpr(FIRST_REQ)
_Q = tl.constexpr(Q)
_K = tl.constexpr(K)
_V = tl.constexpr(V)
_OUTPUT = tl.constexpr(OUTPUT)
_LSE = tl.constexpr(LSE)
_FIRST_PAGE = tl.constexpr(FIRST_PAGE)
_NUM_COLUMNS = tl.constexpr(NUM_COLUMNS)
# Programs of a request, words that one copies at once, and columns of a page table.
_PIECES = tl.constexpr(4)
_WORDS = tl.constexpr(1024)
_COLUMNS = tl.constexpr(128)
_NUMBERS = ["max_pages", "row_len", "query_len", "page_size", "q_words", "k_words", "v_words", "out_words", "lse_words"]


class JoinedCalls(NamedTuple):
    """What the host says of the calls of a launch, in its own memory at addresses that the device has too.

    Attributes:
        num_reqs: int32 `[1]`, requests of all calls together.
        calls: int64 `[most calls, CALL_FIELDS]`.
        call_of: uint8 `[max_reqs]`, the call of each request.
        rows: int32 `[max_reqs, row_len]`, of each request REQUEST_COLUMNS, the slot of each new token, and page ids;
            slots and page ids are those of its cache, no page id is -1, and a slot of -1 is not stored.
    """

    num_reqs: torch.Tensor
    calls: torch.Tensor
    call_of: torch.Tensor
    rows: torch.Tensor


class JoinedTensors(NamedTuple):
    """What a launch computes with, on the device.

    Attributes:
        step: int32, what `decode_items` takes.
        page_tables: int32 `[max_reqs, max_pages]`, the page ids of the space.
        slots: int64 `[max_reqs * query_len]`, slots of the space; -1 is not stored.
        q: `[max_reqs * query_len, num_heads, head_dim]`.
        k: `[max_reqs * query_len, num_kv_heads, head_dim]`.
        v: `[max_reqs * query_len, num_kv_heads, head_dim_v]`.
        output: `[max_reqs * query_len, num_heads, head_dim_v]`.
        lse: float32 `[max_reqs * query_len, num_heads]`, or None.
    """

    step: torch.Tensor
    page_tables: torch.Tensor
    slots: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    output: torch.Tensor
    lse: torch.Tensor | None


@triton.jit
def _on_host(address, local, num_words):
    """The words of a call's request at an address of the host's memory."""
    return address.to(tl.pointer_type(tl.int32)) + local * num_words


@triton.jit
def _copy(target, source, num_words, piece):
    """Copies a piece of the words of a request."""
    for first in tl.range(piece * _WORDS, num_words, _PIECES * _WORDS):
        words = first + tl.arange(0, _WORDS)
        tl.store(target + words, tl.load(source + words, mask=words < num_words), mask=words < num_words)


@triton.jit(do_not_specialize=_NUMBERS)
def _take_kernel(
    step, page_tables, slots, q, k, v, num_reqs, calls, call_of, rows,
    max_pages, row_len, query_len, page_size, q_words, k_words, v_words, TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid: (max_reqs, _PIECES). TOKENS: no fewer than query_len. Words are those of a request."""
    request, piece = tl.program_id(0), tl.program_id(1)
    num_there = tl.load(num_reqs)
    tokens = tl.arange(0, TOKENS)
    if request < num_there:
        call = calls + tl.load(call_of + request).to(tl.int32) * _FIELDS
        place, local = request.to(tl.int64), request - tl.load(call + _FIRST_REQ)
        _copy(q + place * q_words, _on_host(tl.load(call + _Q), local, q_words), q_words, piece)
        _copy(k + place * k_words, _on_host(tl.load(call + _K), local, k_words), k_words, piece)
        _copy(v + place * v_words, _on_host(tl.load(call + _V), local, v_words), v_words, piece)
        row = rows + place * row_len
        first_page = tl.load(call + _FIRST_PAGE)
        if piece == 0:
            for column in tl.static_range(_NUM_COLUMNS_OF_STEP):
                tl.store(step + _HEADER + column * num_there + request, tl.load(row + column))
            found = tl.load(row + _NUM_COLUMNS_OF_STEP + tokens, mask=tokens < query_len, other=-1).to(tl.int64)
            found = tl.where(found < 0, -1, found + first_page * page_size)
            tl.store(slots + request * query_len + tokens, found, mask=tokens < query_len)
        num_columns = tl.load(call + _NUM_COLUMNS).to(tl.int32)
        pages = row + _NUM_COLUMNS_OF_STEP + query_len
        for first in tl.range(piece * _COLUMNS, num_columns, _PIECES * _COLUMNS):
            columns = first + tl.arange(0, _COLUMNS)
            is_taken = (columns < num_columns) & (columns < max_pages)
            ids = tl.load(pages + columns, mask=is_taken, other=0) + first_page.to(tl.int32)
            tl.store(page_tables + place * max_pages + columns, ids, mask=is_taken)
    elif piece == 0:
        tl.store(slots + request * query_len + tokens, tl.full([TOKENS], -1, tl.int64), mask=tokens < query_len)
    if (request == 0) & (piece == 0):
        tl.store(step, num_there)
        tl.store(step + 1, max_pages)


@triton.jit(do_not_specialize=_NUMBERS)
def _give_kernel(output, lse, num_reqs, calls, call_of, out_words, lse_words):
    """Grid: (max_reqs, _PIECES). No words of lse: nobody asked for it."""
    request, piece = tl.program_id(0), tl.program_id(1)
    if request < tl.load(num_reqs):
        call = calls + tl.load(call_of + request).to(tl.int32) * _FIELDS
        place, local = request.to(tl.int64), request - tl.load(call + _FIRST_REQ)
        _copy(_on_host(tl.load(call + _OUTPUT), local, out_words), output + place * out_words, out_words, piece)
        _copy(_on_host(tl.load(call + _LSE), local, lse_words), lse + place * lse_words, lse_words, piece)


def take_calls(calls: JoinedCalls, tensors: JoinedTensors, *, query_len: int, page_size: int) -> None:
    """Makes the step of a launch of what its calls brought. Only launches, with the same arguments each time.

    Args:
        calls: read, on the device's way to the host's memory.
        tensors: written, but for the results. Slots of requests that there are not are -1.
        query_len: new tokens of each request.
        page_size: of the space.
    """
    max_reqs, max_pages = tensors.page_tables.shape
    q, k, v = (_words(each) for each in (tensors.q, tensors.k, tensors.v))
    with torch.cuda.device_of(tensors.step):
        launch_kernel(
            _take_kernel, (max_reqs, _PIECES.value),
            tensors.step, tensors.page_tables, tensors.slots, q, k, v, *calls,
            max_pages, calls.rows.shape[1], query_len, page_size,
            q.numel() // max_reqs, k.numel() // max_reqs, v.numel() // max_reqs,
            TOKENS=triton.next_power_of_2(query_len),
        )  # fmt: skip


def give_results(calls: JoinedCalls, tensors: JoinedTensors) -> None:
    """Takes the results of a launch to where its calls want them. Only launches, with the same arguments each time."""
    max_reqs = len(tensors.page_tables)
    output = _words(tensors.output)
    lse = output[:0] if tensors.lse is None else _words(tensors.lse)
    with torch.cuda.device_of(tensors.step):
        launch_kernel(
            _give_kernel, (max_reqs, _PIECES.value),
            output, lse, calls.num_reqs, calls.calls, calls.call_of,
            output.numel() // max_reqs, lse.numel() // max_reqs,
        )  # fmt: skip


def _words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.int32)
