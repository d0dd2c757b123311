"""What an Attend stream must do to caches, followed by its answers."""

from __future__ import annotations

import mmap
from collections import OrderedDict

from google.protobuf.message import DecodeError

from attnd.errors import AttndError
from attnd.protocol import frames
from attnd.protocol.regions import Region
from attnd.protocol.shm import framing
from attnd.protocol.tensors import ITEM_SIZES
from attnd.v1 import attention_pb2, step_pb2, tensor_pb2
from attnd_server.service.session import MAX_OPEN_STEPS
from tests.fuzz.world import World

# Of the memory that a shm plane shares.
REGION_BYTES = 1 << 16


class StreamModel:
    """What an Attend stream must do to the caches, by its answers.

    Attributes:
        steps: that are open, by id.
    """

    def __init__(self, world: World) -> None:
        """Of a stream that begins."""
        self.steps: OrderedDict[int, step_pb2.Step] = OrderedDict()
        self._world = world
        self._last_calls: dict[int, step_pb2.Call] = {}  # by lane

    def answered(
        self, request: attention_pb2.AttendRequest, reply: attention_pb2.AttendResponse, memory: bytes | None
    ) -> None:
        """Follows an answer; `memory` is what the region held before, of a plane that has one."""
        kind = reply.WhichOneof("message")
        if kind == "step":
            assert reply.step.step_id == request.step.id
            self.steps[request.step.id] = request.step
            if len(self.steps) > MAX_OPEN_STEPS:
                self.steps.popitem(last=False)
        elif kind == "call":
            assert (reply.call.step_id, reply.call.layer) == (request.call.step_id, request.call.layer)
            self._attended(request.call, memory)
        else:
            assert kind == "error"

    def answered_in_region(
        self, request: framing.Request, reply: attention_pb2.AttendResponse, is_repeated: bool, memory: bytes
    ) -> None:
        """Follows an answer on a shm plane; `is_repeated`: it was like the lane's last."""
        if request.message:
            message = parsed_request(request.message)
            if message.WhichOneof("message") == "call" and request.lane < 4 and _decodes(request.message):
                self._last_calls[request.lane] = message.call
        else:
            message = attention_pb2.AttendRequest()
            message.call.SetInParent()
            if request.lane in self._last_calls:
                call = self._last_calls[request.lane]
                call.layer, call.step_id = request.layer, request.step_id
                message.call.CopyFrom(call)
        if is_repeated:
            self._attended(message.call, memory)
        else:
            self.answered(message, reply, memory)

    def _attended(self, call: step_pb2.Call, memory: bytes | None) -> None:
        step = self.steps[call.step_id]
        self._world.attended(step, call, _elements(call.k, memory), _elements(call.v, memory))


def _elements(tensor: tensor_pb2.Tensor, memory: bytes | None) -> bytes:
    if not tensor.HasField("region"):
        return tensor.data
    assert memory is not None
    num_bytes = ITEM_SIZES[tensor.dtype]
    for extent in tensor.shape:
        num_bytes *= extent
    return memory[tensor.region.offset :][:num_bytes]


def parsed_request(data: bytes) -> attention_pb2.AttendRequest:
    """What protobuf makes of a message; an empty one, if nothing."""
    try:
        return attention_pb2.AttendRequest.FromString(data)
    except DecodeError:  # then it was refused
        return attention_pb2.AttendRequest()


def _decodes(data: bytes) -> bool:
    try:
        frames.ATTEND_REQUEST.decode(data, Region(1, mmap.mmap(-1, REGION_BYTES)))
    except AttndError:
        return False
    return True
