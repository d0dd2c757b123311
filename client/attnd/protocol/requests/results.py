"""What a call gives, and where that goes: memory of the caller's, or more rows than the step has tokens."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from attnd.errors import ServerFault
from attnd.protocol.attention_options import BACKEND_NAMES
from attnd.protocol.tensors import (
    ITEM_SIZES,
    Array,
    copy_array,
    empty_like,
    from_array,
    is_tensor,
)
from attnd.v1 import step_pb2

# Of rows past the step's tokens.
_PADDING = {"output": 0.0, "lse": -math.inf}


class Results(Protocol):
    """The tensors of a reply, where they are not in its message."""

    def copies(self, like: Any) -> dict[str, Any]:
        """Copies of all, by name, of the kind of thing that `like` is, on its device."""

    def copy_to(self, targets: Mapping[str, Any]) -> None:
        """Copies some, by name, to torch tensors or numpy arrays of their types and shapes."""


class Wanted(NamedTuple):
    """How a call's results are wanted.

    Attributes:
        like: q: what is made for them is of its kind, on its device.
        return_lse: whether lse is wanted too.
        num_rows: of the results, where these are more than the step has tokens; 0: as many.
        out: where the output goes; None: somewhere new.
    """

    like: Any
    return_lse: bool = False
    num_rows: int = 0
    out: Any = None


class Reply(NamedTuple):
    """What a call gave; times as `CallReply` has them."""

    output: Any
    backend: str
    queue_us: int
    copy_in_us: int
    kernel_us: int
    copy_out_us: int


def reply(
    message: step_pb2.CallReply, tensors: Mapping[str, Array], wanted: Wanted, results: Results | None = None
) -> Reply:
    """A call's result: the output, or `(output, lse)`, or None for a store-only step, as it is wanted.

    Args:
        message: of the reply.
        tensors: of the reply, by name.
        wanted: of the call.
        results: what copies the tensors, which then lie where they will not stay; None: they are in the message.

    Raises:
        ServerFault: the reply is not one to such a call. Nothing was written then.
    """
    output = _results(tensors, wanted, results) if "output" in tensors else None
    return Reply(
        output=output,
        backend=BACKEND_NAMES.get(message.backend, ""),
        queue_us=message.queue_us,
        copy_in_us=message.copy_in_us,
        kernel_us=message.kernel_us,
        copy_out_us=message.copy_out_us,
    )


def _results(tensors: Mapping[str, Array], wanted: Wanted, results: Results | None) -> Any:
    if wanted.return_lse and "lse" not in tensors:
        raise ServerFault("the server sent no lse, though it was asked for")
    if wanted.out is not None or wanted.num_rows:
        made = _in_rows(tensors, wanted, results)
    elif results is not None:
        made = results.copies(wanted.like)
    else:
        made = {name: from_array(tensors[name], wanted.like) for name in tensors}
    return (made["output"], made["lse"]) if wanted.return_lse else made["output"]


def _in_rows(tensors: Mapping[str, Array], wanted: Wanted, results: Results | None) -> dict[str, Any]:
    """Results in memory of the caller's, or with more rows than the step has tokens."""
    made, targets = {}, {}
    for name in ("output", "lse") if wanted.return_lse else ("output",):
        array, out = tensors[name], wanted.out if name == "output" else None
        shape = (wanted.num_rows or array.shape[0], *array.shape[1:])
        if out is None and not is_tensor(wanted.like):
            made[name] = _padded(array, shape, _PADDING[name])
            continue
        made[name] = out = empty_like(wanted.like, array.dtype, shape) if out is None else out
        if out.shape != shape or shape[0] < array.shape[0]:
            raise ServerFault(f"the server sent {name} of shape {list(array.shape)}, where {list(shape)} was expected")
        targets[name] = out.detach() if getattr(out, "requires_grad", False) else out
    for name, target in targets.items():
        num_tokens = tensors[name].shape[0]
        if len(target) > num_tokens:
            target[num_tokens:] = _PADDING[name]
            targets[name] = target[:num_tokens]
    if results is not None:
        results.copy_to(targets)
    else:
        for name, target in targets.items():
            copy_array(tensors[name], target)
    return made


def _padded(array: Array, shape: tuple[int, ...], padding: float) -> Array:
    """A copy of an array, with rows of 0 or, of lse, of -infinity behind its own."""
    num_more = (shape[0] - array.shape[0]) * math.prod(shape[1:])
    element = struct.pack("f", padding) if padding else bytes(ITEM_SIZES[array.dtype])
    return Array(array.dtype, shape, memoryview(bytes(array.data) + element * num_more))
