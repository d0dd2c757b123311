"""The messages of a shm plane, and where their tensors lie: what the sync and the asyncio client share."""

from __future__ import annotations

from typing import Any, NamedTuple

from attnd.errors import InvalidRequest, ServerFault
from attnd.planes.shm.lanes import Lanes, PlacedCall
from attnd.protocol import frames, requests
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.regions import Region, aligned
from attnd.protocol.shm import framing, placed_tensors
from attnd.protocol.shm.placed_tensors import INPUTS, RESULTS, PlacedTensors, key_of
from attnd.v1 import attention_pb2, step_pb2


class LastReply(NamedTuple):
    """A reply to a call, of which later ones may only say what is new.

    Attributes:
        message: of the call.
        tensors: where its tensors lie.
    """

    message: Any
    tensors: PlacedTensors


class ShmMessages:
    """Both ways between calls and bytes on the socket. Several calls may be under way, each in a lane of its own."""

    def __init__(self, region: Region, lanes: Lanes) -> None:
        """Nothing is under way in the lanes of `region`."""
        self.room: int | None = region.num_bytes
        self._region = region
        self._lanes = lanes
        self._next: PlacedCall | None = None  # what is to be sent; None: a step
        self._wants_torch: dict[int, bool] = {}  # by lane, whether the tensors of its last call were torch's
        self._last_replies: dict[int, LastReply] = {}  # by lane

    def step_request(self, step: step_pb2.Step) -> bytes:
        """What opens a step, for `send`."""
        self._next = None  # whatever call was made meanwhile and not sent
        return framing.request_bytes(frames.step_request(step))

    def call_request(self, step_id: int, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions) -> bytes:
        """Copies the tensors of a call into the region, and returns the call for `send`.

        Raises:
            InvalidRequest: it cannot be sent, or never fits.
            Exhausted: those under way leave no room for it.
        """
        last = self._lanes.repeatable()
        if last is not None and last.options == options.encoded and last.tensors.fill_with_torch(q, k, v):
            return self._repeat(last, layer, step_id, is_torch=True)
        arrays = requests.call_arrays(q, k, v)
        for name, array in arrays.items():
            if array.data.nbytes != array.num_bytes:  # an Array that somebody else made
                raise InvalidRequest(
                    f"{name} has {array.data.nbytes} bytes of data, but must have {array.num_bytes}", field=name
                )
        if last is not None and last.options == options.encoded and key_of(last.tensors.arrays) == key_of(arrays):
            last.tensors.fill(arrays)
            return self._repeat(last, layer, step_id, is_torch=False)
        lane, place = self._lanes.place(arrays, return_lse=options.return_lse)
        call = step_pb2.Call(step_id=step_id, layer=layer, options=options.message)
        tensors = placed_tensors.place(self._region, arrays, place.start, "call", call, INPUTS)
        call.reply.id = self._region.id
        call.reply.offset = place.start + sum(aligned(array.num_bytes) for array in arrays.values())
        self._next, self._wants_torch[lane] = PlacedCall(lane, options.encoded, tensors, place), False
        return framing.request_bytes(attention_pb2.AttendRequest(call=call).SerializeToString(), lane)

    def _repeat(self, last: PlacedCall, layer: int, step_id: int, *, is_torch: bool) -> bytes:
        self._next, self._wants_torch[last.lane] = last, is_torch
        return framing.repeated_call(layer, step_id, last.lane)

    def sent(self) -> None:
        """What `step_request` or `call_request` gave last is under way."""
        self._lanes.sent(self._next)

    def answer(self, reply: framing.Reply) -> requests.AttendReply:
        """What came from the server, which ends what was sent first. Its tensors are copies.

        Raises:
            ServerFault: the reply means nothing.
        """
        if not reply.message:
            return self._repeated(reply)
        answer = requests.attend_reply(reply.message, self._region)
        if answer.kind == "going_away":
            return answer
        lane = self._lanes.answered()
        if answer.kind != "call":
            return answer
        tensors = PlacedTensors(answer.tensors, RESULTS)
        self._last_replies[lane] = LastReply(answer.message, tensors)
        return answer._replace(tensors=tensors.copies(as_torch=False))

    def _repeated(self, reply: framing.Reply) -> requests.AttendReply:
        """What the server meant. Its message is the last one's of the lane, written over."""
        lane = self._lanes.oldest
        last = self._last_replies.get(lane)
        if last is None:
            raise ServerFault("the server says that a reply is like the one before, but there was none")
        self._lanes.answered()
        message, tensors = last
        message.layer, message.step_id = reply.layer, reply.step_id
        message.queue_us, message.copy_in_us = reply.queue_us, reply.copy_in_us
        message.kernel_us, message.copy_out_us = reply.kernel_us, reply.copy_out_us
        copies = tensors.copies(as_torch=self._wants_torch[lane])
        return requests.AttendReply("call", message, copies, framing.REPLY_BYTES)

    def forget(self) -> None:
        """The plane has ended: nothing is under way, and nothing lies in the region."""
        self._next = None
        self._lanes.forget()
        self._last_replies.clear()
        self._region.close()
