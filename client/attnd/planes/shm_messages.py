"""The messages of a shm plane, and where their tensors lie: what the sync and the asyncio client share."""

from __future__ import annotations

from typing import Any

from attnd import requests, wire
from attnd.errors import InvalidRequest, ServerFault
from attnd.options import AttentionOptions
from attnd.planes import doorbell
from attnd.planes.lanes import Lanes, PlacedCall
from attnd.regions import Region, aligned
from attnd.tensors import Array
from attnd.v1 import attention_pb2, step_pb2


class ShmMessages:
    """Both ways between calls and bytes on the socket. Several calls may be under way, each in a lane of its own."""

    def __init__(self, region: Region, lanes: Lanes) -> None:
        """Nothing is under way in the lanes of `region`."""
        self._region = region
        self._lanes = lanes
        self._next: PlacedCall | None = None  # what is to be sent; None: a step
        self._last_replies: dict[int, requests.AttendReply] = {}  # by lane

    def step_request(self, step: step_pb2.Step) -> bytes:
        """What opens a step, for `send`."""
        self._next = None  # whatever call was made meanwhile and not sent
        return doorbell.request_bytes(wire.step_request(step))

    def call_request(self, step_id: int, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions) -> bytes:
        """Copies the tensors of a call into the region, and returns the call for `send`.

        Raises:
            InvalidRequest: it cannot be sent, or never fits.
            Exhausted: those under way leave no room for it.
        """
        arrays = requests.call_arrays(q, k, v)
        key = (options.encoded, *((name, array.dtype, array.shape) for name, array in arrays.items()))
        for name, array in arrays.items():
            if array.data.nbytes != array.num_bytes:  # an Array that somebody else made
                raise InvalidRequest(
                    f"{name} has {array.data.nbytes} bytes of data, but must have {array.num_bytes}", field=name
                )
        last = self._lanes.repeated(key)
        if last is not None:
            for view, array in zip(last.views, arrays.values(), strict=True):
                view[:] = array.data
            self._next = last
            return doorbell.repeated_call(layer, step_id, last.lane)
        lane, place = self._lanes.place(arrays, return_lse=options.return_lse)
        messages, views = self._region.placed(list(arrays.values()), place.start, "call")
        call = step_pb2.Call(step_id=step_id, layer=layer, options=options.message)
        for name, message in zip(arrays, messages, strict=True):
            getattr(call, name).CopyFrom(message)
        call.reply.id = self._region.id
        call.reply.offset = place.start
        if messages:
            call.reply.offset = aligned(messages[-1].region.offset + views[-1].nbytes)
        self._next = PlacedCall(lane, key, views, place)
        return doorbell.request_bytes(attention_pb2.AttendRequest(call=call).SerializeToString(), lane)

    def sent(self) -> None:
        """What `step_request` or `call_request` gave last is under way."""
        self._lanes.sent(self._next)

    def answer(self, reply: doorbell.Reply) -> requests.AttendReply:
        """What came from the server, which ends what was sent first. Its tensors are copies.

        Raises:
            ServerFault: the reply means nothing.
        """
        answer = self._repeated(reply) if not reply.message else requests.attend_reply(reply.message, self._region)
        if answer.kind == "going_away":
            return answer
        lane = self._lanes.answered()
        if answer.kind == "call":
            self._last_replies[lane] = answer
            copies = {name: _copied(array) for name, array in answer.tensors.items()}
            return answer._replace(tensors=copies)
        return answer

    def _repeated(self, reply: doorbell.Reply) -> requests.AttendReply:
        """What the server meant. Its message is the last one's of the lane, written over."""
        last = self._last_replies.get(self._lanes.oldest)
        if last is None:
            raise ServerFault("the server says that a reply is like the one before, but there was none")
        message = last.message
        message.layer, message.step_id = reply.layer, reply.step_id
        message.queue_us, message.copy_in_us = reply.queue_us, reply.copy_in_us
        message.kernel_us, message.copy_out_us = reply.kernel_us, reply.copy_out_us
        return last._replace(num_bytes=doorbell.REPLY_BYTES)

    def forget(self) -> None:
        """The plane has ended: nothing is under way, and nothing lies in the region."""
        self._next = None
        self._lanes.forget()
        self._last_replies.clear()
        self._region.close()


def _copied(array: Array) -> Array:
    """The next call may overwrite what lies in the region, and the caller may keep what it got."""
    return array._replace(data=memoryview(bytes(array.data)))
