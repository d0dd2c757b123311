"""Results as messages."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Protocol

import torch

from attnd.errors import InvalidRequest
from attnd.protocol import frames
from attnd.protocol.regions import Region, aligned
from attnd.protocol.shm import framing, placed_tensors
from attnd.protocol.shm.placed_tensors import RESULTS, PlacedTensors
from attnd.protocol.tensors import DTYPES, Array, to_array, torch_tensor
from attnd.v1 import attention_pb2, backend_pb2, step_pb2, tensor_pb2
from attnd_server.attention.config import AttentionBackend
from attnd_server.execution.step import Call, Result

# The elements of an array that has none yet.
NOTHING = memoryview(b"")


class Replies(Protocol):
    """How the calls of one stream are answered.

    Attributes:
        plane: how its tensors travel.
        region: where tensors of its calls may lie; None: in messages only.
    """

    plane: str
    region: Region | None

    def answered(self, call: Call, message: step_pb2.Call, lane: int) -> Call:
        """A call of `lane` with what will encode its reply, and those of others that differ in the layer alone.

        Raises:
            InvalidRequest: its reply cannot lie where the message wants it.
        """

    def repeated(self, call: Call, lane: int) -> AttentionBackend | None:
        """The backend of the last reply of a lane, if it is of such a call whose results the device has put there.

        Then the next one may be said to be like it, where the device does the same.
        """


class InlineReplies:
    """Implements `Replies`: tensors travel in the message."""

    plane = "inline"
    region: Region | None = None

    def __init__(self, frame: frames.Frame) -> None:
        """Encodes as `frame`."""
        self._frame = frame

    def answered(self, call: Call, message: step_pb2.Call, lane: int = 0) -> Call:
        """The call with what will encode its reply."""
        if message.HasField("reply"):
            raise InvalidRequest(f"reply lies in region {message.reply.id}, but this plane is inline", field="reply")
        return call._replace(encode=self._encode, plane=self.plane)

    def repeated(self, call: Call, lane: int) -> AttentionBackend | None:
        """None: every reply is a message."""
        return None

    def _encode(self, call: Call, result: Result, queue_us: int, kernel_us: int) -> bytes:
        return self._frame.encode(call_reply(call, result, queue_us, kernel_us), reply_arrays(result))


class _LastReply(NamedTuple):
    """A reply to a call, and where its tensors lie: one with these places and this backend is said to be like it."""

    offset: int
    backend: AttentionBackend | None
    tensors: PlacedTensors
    into: object

    def takes(self, call: Call, result: Result) -> bool:
        """Whether the results are like those that lie there, and lie there now."""
        if call.into is not None and self.into is call.into and result.output is call.into[0]:
            return True  # the device has put them there
        return self.tensors.fill_with_torch(result.output, result.lse)


class RegionReplies:
    """Implements `Replies` for a shm plane: tensors lie in its region, and messages are for its socket."""

    plane = "shm"

    def __init__(self, region: Region, reach: range = range(0)) -> None:
        """Copies results to `region`, of which the device reads and writes the addresses `reach` of its own."""
        self.region: Region | None = region
        self._reach = reach
        self._memory = region
        self._last: dict[int, _LastReply] = {}  # by lane

    def answered(self, call: Call, message: step_pb2.Call, lane: int = 0) -> Call:
        """The call with what will encode its reply."""
        if not message.HasField("reply"):
            return call._replace(encode=partial(self._inline, lane), plane=self.plane)
        offset = message.reply.offset
        # Now, so that a call whose reply has no place does not run.
        into = None if call.q is None else self._into(call, call.q.shape[:2], message.reply)
        encode = partial(self._placed, lane, offset)
        return call._replace(encode=encode, into=into, plane=self.plane, at=self._addresses(call, into))

    def _into(
        self, call: Call, rows: tuple[int, ...], reply: tensor_pb2.Region
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The places of output and lse, for a GPU. Raises InvalidRequest: there are none."""
        config = call.step.group.config
        tensors = [Array(DTYPES[str(config.dtype).removeprefix("torch.")], (*rows, config.head_dim_v), NOTHING)]
        if call.options.return_lse:
            tensors.append(Array(tensor_pb2.DTYPE_FLOAT32, tuple(rows), NOTHING))
        place = tensor_pb2.Region(id=reply.id, offset=reply.offset)
        num_bytes = sum(aligned(each.num_bytes) for each in tensors[:-1]) + tensors[-1].num_bytes
        self._memory.view(place, num_bytes, "reply")
        if call.step.group.device.type != "cuda":
            return None
        _, views = self._memory.places(tensors, reply.offset, "reply")
        output, *lse = (torch_tensor(each._replace(data=view)) for each, view in zip(tensors, views, strict=True))
        return output, lse[0] if lse else None

    def repeated(self, call: Call, lane: int) -> AttentionBackend | None:
        """That of the last reply; see `Replies.repeated`."""
        last = self._last.get(lane)
        return last.backend if last is not None and call.at is not None and last.into is call.into else None

    def _addresses(
        self, call: Call, into: tuple[torch.Tensor, torch.Tensor | None] | None
    ) -> tuple[int, int, int, int, int] | None:
        """Where tensors and results lie, for a device that reaches all of them; see `Call.at`."""
        tensors = call.q, call.k, call.v
        if into is None or any(each is None or not each.is_contiguous() for each in tensors):
            return None
        q, k, v, output, lse = (0 if each is None else each.data_ptr() for each in (*tensors, *into))
        at = q, k, v, output, lse
        return at if all(each in self._reach for each in at if each) else None

    def _inline(self, lane: int, call: Call, result: Result, queue_us: int, kernel_us: int) -> bytes:
        self._last.pop(lane, None)
        reply = call_reply(call, result, queue_us, kernel_us)
        return framing.reply_bytes(frames.ATTEND_RESPONSE.encode(reply, reply_arrays(result)))

    def _placed(self, lane: int, offset: int, call: Call, result: Result, queue_us: int, kernel_us: int) -> bytes:
        last = self._last.get(lane)
        is_like = last is not None and last.offset == offset and last.backend is result.backend
        if last is not None and is_like and last.takes(call, result):
            if last.into is not call.into:  # once a step
                self._last[lane] = last._replace(into=call.into)
            times = (queue_us, result.copies.in_us, kernel_us, result.copies.out_us)
            return framing.repeated_reply(call.step.group.layer_numbers[call.layer], call.step.id, *times)
        arrays = reply_arrays(result, RESULTS)
        reply = call_reply(call, result, queue_us, kernel_us)
        tensors = placed_tensors.place(self._memory, arrays, offset, "reply", reply, RESULTS)
        self._last[lane] = _LastReply(offset, result.backend, tensors, call.into)
        return framing.reply_bytes(attention_pb2.AttendResponse(call=reply).SerializeToString())


def call_reply(call: Call, result: Result, queue_us: int, kernel_us: int) -> step_pb2.CallReply:
    """The reply to `call`, without its tensors."""
    backend = backend_pb2.BACKEND_UNSPECIFIED
    if result.backend is not None:
        backend = backend_pb2.Backend.Value(f"BACKEND_{result.backend.name}")
    return step_pb2.CallReply(
        step_id=call.step.id,
        layer=call.step.group.layer_numbers[call.layer],
        backend=backend,
        queue_us=queue_us,
        copy_in_us=result.copies.in_us,
        kernel_us=kernel_us,
        copy_out_us=result.copies.out_us,
    )


def reply_arrays(result: Result, names: tuple[str, ...] = ("lse", "output")) -> dict[str, Array]:
    """The reply's tensors that are present, by field, in the order of `names`."""
    tensors = {name: getattr(result, name) for name in names}
    return {name: to_array(tensor, name) for name, tensor in tensors.items() if tensor is not None}
