"""What a call takes: rows that engines pad their batches with are left out, and an `out` that is none is refused."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from attnd.errors import InvalidRequest
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.head_dims import head_dim_v_of
from attnd.protocol.requests.results import Wanted
from attnd.protocol.tensors import DTYPE_NAMES, Array, is_tensor, to_array, torch_dtype
from attnd.v1 import cache_pb2, step_pb2


class StepShape(NamedTuple):
    """What the calls of a step have in common.

    Attributes:
        num_tokens: rows of q, k and v.
        store_only: whether calls give nothing.
        config: of the cache.
    """

    num_tokens: int
    store_only: bool
    config: cache_pb2.CacheConfig


class CallTensors(NamedTuple):
    """The tensors of one call, and what is to become of its results."""

    q: Any
    k: Any
    v: Any
    wanted: Wanted


def step_shape(step: step_pb2.Step, config: cache_pb2.CacheConfig) -> StepShape:
    """What the calls of a step have in common, by its message."""
    bounds = step.cu_seqlens_q.data
    return StepShape(memoryview(bounds).cast("i")[-1] if bounds else 0, step.store_only, config)


def call_tensors(
    step: StepShape, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions, out: Any
) -> CallTensors:
    """The rows of a call's tensors that are sent, and how its results are wanted. Arguments as in `Step.attend`.

    Raises:
        InvalidRequest: `out` cannot take the output.
    """
    num_rows = _num_rows(k if q is None else q)
    if num_rows > step.num_tokens and all(each is None or _num_rows(each) == num_rows for each in (q, k, v)):
        named = (("q", q), ("k", k), ("v", v))
        q, k, v = (None if each is None else _first_rows(each, step.num_tokens, name) for name, each in named)
    else:
        num_rows = 0
    if out is not None:
        num_rows = _check_out(out, step, layer, q, num_rows)
    return CallTensors(q, k, v, Wanted(q, options.return_lse, num_rows, out))


def _num_rows(value: Any) -> int:
    shape = getattr(value, "shape", None)
    return shape[0] if shape else 0


def _first_rows(value: Any, num_rows: int, field: str) -> Any:
    if not isinstance(value, Array | memoryview):
        return value[:num_rows]
    array = to_array(value, field)
    size = array.data.nbytes // array.shape[0] * num_rows
    return Array(array.dtype, (num_rows, *array.shape[1:]), array.data[:size])


def _check_out(out: Any, step: StepShape, layer: int, q: Any, num_rows: int) -> int:
    """The rows of `out` where these are more than the step has tokens, else 0. Raises InvalidRequest."""
    if step.store_only:
        raise InvalidRequest("out is given, but must be None in a store-only step", field="out")
    shape: tuple[int, ...] = tuple(out.shape) if is_tensor(out) else ()
    q_shape: tuple[int, ...] = getattr(q, "shape", ())
    inner = (q_shape[1] if len(q_shape) == 3 else 0, head_dim_v_of(step.config, layer))
    if shape == (step.num_tokens, *inner) and _is_plain(out, step.config.dtype):
        return 0
    _check_type(out, step.config.dtype)
    rows = (step.num_tokens, num_rows or step.num_tokens)
    if len(shape) != 3 or shape[0] not in rows or any(b not in (0, a) for a, b in zip(shape[1:], inner, strict=True)):
        rule = f"must have {[step.num_tokens, *(each or 'any' for each in inner)]}"
        raise InvalidRequest(f"out has shape {list(shape)}, but {rule}", field="out")
    return 0 if shape[0] == step.num_tokens else num_rows


def _is_plain(out: Any, dtype: int) -> bool:
    """Whether it is a dense torch tensor of that type: what `_check_type` would not refuse, seen sooner."""
    torch = sys.modules.get("torch")
    return type(out) is getattr(torch, "Tensor", None) and (
        out.dtype is torch_dtype(dtype) and out.is_contiguous() and not out.is_meta
    )


def _check_type(out: Any, dtype: int) -> None:
    if not is_tensor(out):
        rule = "must be a torch tensor or a numpy array"
        raise InvalidRequest(f"out is a {type(out).__name__}, but {rule}", field="out")
    given, expected = str(out.dtype).removeprefix("torch."), DTYPE_NAMES.get(dtype)
    if given != expected:
        raise InvalidRequest(f"out has dtype {given}, but must have {expected}, as the cache", field="out")
    is_writable = out.flags.writeable if hasattr(out, "flags") else not out.is_meta and _are_apart(out)
    if not is_writable:
        raise InvalidRequest("out cannot be written to, but must be memory of its own for each element", field="out")


def _are_apart(out: Any) -> bool:
    """Whether no two elements of a torch tensor are one in memory because it was expanded."""
    return all(stride or extent < 2 for extent, stride in zip(out.shape, out.stride(), strict=True))
