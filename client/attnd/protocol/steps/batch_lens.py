"""How many tokens each request of a step has, new and cached, from either way of saying it."""

from __future__ import annotations

from array import array
from itertools import accumulate, compress, repeat
from operator import ge, gt, sub
from typing import Any, NamedTuple

from attnd.errors import InvalidRequest
from attnd.protocol.integers import elements_of, integers, packed
from attnd.protocol.tensors import Array, to_array


class BatchLens(NamedTuple):
    """The lengths of a step's requests, as they travel.

    Attributes:
        cu_seqlens_q: int32 `[num_reqs + 1]`, where the new tokens of each request start and where the last one's end.
        context_lens: int32 `[num_reqs]`, cached tokens.
        num_tokens: new tokens of all requests.
    """

    cu_seqlens_q: Array
    context_lens: Array
    num_tokens: int


def batch_lens(query_lens: Any, cu_seqlens_q: Any, context_lens: Any, seq_lens: Any) -> BatchLens:
    """The lengths of a step, of which either of each pair is None. Arguments as in `StepMetadata`.

    Raises:
        InvalidRequest: both of a pair are given or none, or they are not integers, or not one for each request.
    """
    _check_one_of("query_lens", query_lens, "cu_seqlens_q", cu_seqlens_q)
    _check_one_of("context_lens", context_lens, "seq_lens", seq_lens)
    if cu_seqlens_q is None:
        bounds = list(accumulate(elements_of(integers(query_lens, "query_lens"), "query_lens"), initial=0))
        starts = _starts(bounds)
    else:
        starts = integers(cu_seqlens_q, "cu_seqlens_q")
        bounds = elements_of(starts, "cu_seqlens_q")
    if not bounds:
        rule = "must have one more than there are requests"
        raise InvalidRequest(f"cu_seqlens_q has 0 elements, but {rule}", field="cu_seqlens_q")
    contexts = integers(context_lens, "context_lens") if seq_lens is None else _contexts(seq_lens, bounds)
    return BatchLens(starts, contexts, bounds[-1])


def query_lens_of(lens: BatchLens) -> list[int]:
    """New tokens of each request."""
    bounds = elements_of(lens.cu_seqlens_q, "cu_seqlens_q")
    return list(map(sub, bounds[1:], bounds))


def _starts(bounds: list[int]) -> Array:
    try:
        return to_array(array("i", bounds), "query_lens")
    except OverflowError:
        rule = f"must be at most {(1 << 31) - 1}"
        raise InvalidRequest(f"query_lens is {bounds[-1]} in all, but {rule}", field="query_lens") from None


def _contexts(seq_lens: Any, bounds: list[int]) -> Array:
    """Cached tokens of each request: all of them without the new ones."""
    seqs = elements_of(integers(seq_lens, "seq_lens"), "seq_lens")
    if len(seqs) != len(bounds) - 1:
        rule = f"must have {len(bounds) - 1}, one a request"
        raise InvalidRequest(f"seq_lens has {len(seqs)} elements, but {rule}", field="seq_lens")
    contexts = list(map(sub, seqs, map(sub, bounds[1:], bounds)))
    if contexts and min(contexts) < 0:  # rows that pad, or a mistake
        _check_seqs(seqs, contexts)
    return packed(contexts, "seq_lens")


def _check_seqs(seqs: list[int], contexts: list[int]) -> None:
    """Raises InvalidRequest where a request has fewer tokens than new ones, and not none."""
    for request in compress(range(len(seqs)), map(gt, map(bool, seqs), map(ge, contexts, repeat(0)))):
        least = seqs[request] - contexts[request]
        rule = f"must be at least {least}, its new tokens, or 0 for a row that pads"
        raise InvalidRequest(f"seq_lens[{request}] is {seqs[request]}, but {rule}", field="seq_lens")


def _check_one_of(first: str, first_value: Any, second: str, second_value: Any) -> None:
    if first_value is not None and second_value is not None:
        raise InvalidRequest(f"{first} and {second} are both given, but must be one of the two", field=first)
    if first_value is None and second_value is None:
        raise InvalidRequest(f"{first} and {second} are None, but one of the two must be given", field=first)
