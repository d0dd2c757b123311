"""Calls of a step to bytes, and their answers to values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from attnd.errors import ServerFault
from attnd.protocol import frames
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.loose import Sendable, to_sendable
from attnd.protocol.regions import Region
from attnd.protocol.requests.results import Reply, Results, Wanted, reply
from attnd.protocol.step_metadata import StepMetadata
from attnd.protocol.tensors import Array
from attnd.v1 import cache_pb2, step_pb2

# Calls of one session that may be under way: those of two halves of a batch, and as many again. A shm plane has so many
# lanes (see ShmPlane in plane.proto), and a server reads so many requests of a stream ahead.
MAX_CALLS_UNDER_WAY = 4

DEFAULT_OPTIONS = AttentionOptions()


def timeout_ms(timeout_s: float) -> int:
    """A timeout as `Step.call_timeout_ms` has it: at least 1, and no more than its type holds."""
    return int(min(max(timeout_s * 1e3, 1), 2**32 - 1))


def attend_call(step_id: int, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions) -> bytes:
    """The AttendRequest of one call."""
    return frames.ATTEND_REQUEST.encode(*call_message(step_id, layer, q, k, v, options))


def unary_call(
    kind: str,
    metadata: StepMetadata,
    cache: cache_pb2.CacheRef,
    layer: int,
    q: Any,
    k: Any,
    v: Any,
    options: AttentionOptions,
) -> bytes:
    """The PrefillRequest or DecodeRequest of one call."""
    return unary_call_of(kind, metadata.to_message(0, cache), layer, q, k, v, options)


def unary_call_of(
    kind: str, step: step_pb2.Step, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions
) -> bytes:
    """As `unary_call`, of a step that is a message already."""
    frame = frames.DECODE_REQUEST if kind == "decode" else frames.PREFILL_REQUEST
    outer = frame.message_type(step=step).SerializeToString()
    return frame.encode(*call_message(0, layer, q, k, v, options), outer=outer)


def call_message(
    step_id: int, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions
) -> tuple[step_pb2.Call, dict[str, Sendable]]:
    """A call and its tensors."""
    return step_pb2.Call(step_id=step_id, layer=layer, options=options.message), call_arrays(q, k, v)


def call_arrays(q: Any, k: Any, v: Any) -> dict[str, Sendable]:
    """The tensors of a call that are present, by name."""
    return {name: to_sendable(value, name) for name, value in (("q", q), ("k", k), ("v", v)) if value is not None}


def unary_reply(kind: str, data: bytes, wanted: Wanted) -> Any:
    """The result in a PrefillResponse or DecodeResponse."""
    frame = frames.DECODE_RESPONSE if kind == "decode" else frames.PREFILL_RESPONSE
    message, tensors = frame.decode(data)
    return reply(message.reply, tensors, wanted).output


class AttendReply(NamedTuple):
    """A message from an Attend stream.

    Attributes:
        kind: the name of the field that is set: "step", "call", "error" or "going_away".
        message: the field.
        tensors: of a call, by name.
        num_bytes: what was received.
        results: what copies the tensors, where these lie in memory that the next call may use; else None.
    """

    kind: str
    message: Any
    tensors: Mapping[str, Array]
    num_bytes: int
    results: Results | None = None


def call_reply(answer: AttendReply, step_id: int, layer: int, wanted: Wanted) -> Reply:
    """The result in what answers a call, as `reply`. Raises ServerFault if it answers something else."""
    message = answer.message
    if answer.kind != "call" or (message.step_id, message.layer) != (step_id, layer):
        raise ServerFault(f"the server answered layer {layer} of step {step_id} with {answer.kind} {message}")
    return reply(message, answer.tensors, wanted, answer.results)


def taken(step_id: int, layer: int, wanted: Wanted, answer: AttendReply) -> Reply | AttendReply:
    """As `call_reply`, but an error is returned as it came."""
    return answer if answer.kind == "error" else call_reply(answer, step_id, layer, wanted)


def attend_reply(data: bytes, region: Region | None = None) -> AttendReply:
    """An AttendResponse, of a plane with `region` if it has one."""
    message, tensors = frames.ATTEND_RESPONSE.decode(data, region)
    kind = message.WhichOneof("message")
    if kind is None:
        raise ServerFault("the server sent an AttendResponse without a message")
    return AttendReply(kind, getattr(message, kind), tensors, len(data))
