"""The messages of a shm plane, and where their tensors lie: what the sync and the asyncio client share."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from attnd.errors import InvalidRequest, ServerFault
from attnd.planes.shm.lanes import Lanes, PlacedCall
from attnd.planes.shm.placed_results import PlacedResults
from attnd.protocol import frames, requests
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.loose import Sendable
from attnd.protocol.regions import Region, aligned
from attnd.protocol.shm import framing, placed_tensors
from attnd.protocol.shm.pinned_region import PinnedRegion
from attnd.protocol.shm.placed_tensors import INPUTS, RESULTS, PlacedTensors, gpu_of, key_of
from attnd.protocol.tensors import Array, without_elements
from attnd.v1 import attention_pb2, step_pb2

if TYPE_CHECKING:
    import torch


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
        self._pinned = PinnedRegion(region.memory)
        weakref.finalize(self, self._pinned.close).atexit = False
        self._lanes = lanes
        self._next: PlacedCall | None = None  # what is to be sent; None: a step
        self._gpus: dict[int, torch.device | None] = {}  # by lane, of the tensors of its last call; None: the host's
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
        self._pinned.await_reads()  # of results, before the server is told to write others there
        last = self._lanes.repeatable()
        if last is not None and last.options != options.encoded:
            last = None
        device = gpu_of(q, k, v)
        if device is not None:
            if last is not None and last.tensors.fill_from_gpu(q, k, v):
                return self._repeat(last, layer, step_id, device)
            return self._placed_from_gpu(step_id, layer, q, k, v, options, device)
        if last is not None and last.tensors.fill_with_torch(q, k, v):
            return self._repeat(last, layer, step_id, None)
        arrays = requests.call_arrays(q, k, v)
        for name, array in arrays.items():
            if isinstance(array, Array) and array.data.nbytes != array.num_bytes:  # an Array that somebody else made
                raise InvalidRequest(
                    f"{name} has {array.data.nbytes} bytes of data, but must have {array.num_bytes}", field=name
                )
        if last is not None and key_of(last.tensors.arrays) == key_of(arrays):
            last.tensors.fill(arrays)
            return self._repeat(last, layer, step_id, None)
        call, placed = self._place(step_id, layer, arrays, options, copies=True)
        return self._whole(call, placed, None)

    def _placed_from_gpu(
        self, step_id: int, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions, device: torch.device
    ) -> bytes:
        """As `call_request`, of tensors of a GPU that lie nowhere yet."""
        given = {"q": q, "k": k, "v": v}
        arrays: dict[str, Sendable] = {
            name: without_elements(value, name) for name, value in given.items() if value is not None
        }
        call, placed = self._place(step_id, layer, arrays, options, copies=False)
        self._pinned.pin(min(placed.place.stop, self._region.num_bytes))
        placed.tensors.fill_from_gpu(q, k, v)
        return self._whole(call, placed, device)

    def _place(
        self, step_id: int, layer: int, arrays: dict[str, Sendable], options: AttentionOptions, *, copies: bool
    ) -> tuple[step_pb2.Call, PlacedCall]:
        """A call, and a place in the region for its tensors and its reply."""
        lane, place = self._lanes.place(arrays, return_lse=options.return_lse)
        call = step_pb2.Call(step_id=step_id, layer=layer, options=options.message)
        tensors = placed_tensors.place(self._region, arrays, place.start, "call", call, INPUTS, copies=copies)
        call.reply.id = self._region.id
        call.reply.offset = place.start + sum(aligned(array.num_bytes) for array in arrays.values())
        return call, PlacedCall(lane, options.encoded, tensors, place)

    def _whole(self, call: step_pb2.Call, placed: PlacedCall, gpu: torch.device | None) -> bytes:
        self._next, self._gpus[placed.lane] = placed, gpu
        return framing.request_bytes(attention_pb2.AttendRequest(call=call).SerializeToString(), placed.lane)

    def _repeat(self, last: PlacedCall, layer: int, step_id: int, gpu: torch.device | None) -> bytes:
        self._next, self._gpus[last.lane] = last, gpu
        return framing.repeated_call(layer, step_id, last.lane)

    def sent(self) -> None:
        """What `step_request` or `call_request` gave last is under way."""
        self._lanes.sent(self._next)

    def answer(self, reply: framing.Reply) -> requests.AttendReply:
        """What came from the server, which ends what was sent first. Its tensors are to be copied at once.

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
        return answer._replace(results=self._results(lane, tensors))

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
        results = self._results(lane, tensors)
        return requests.AttendReply("call", message, tensors.arrays, framing.REPLY_BYTES, results)

    def _results(self, lane: int, tensors: PlacedTensors) -> PlacedResults:
        return PlacedResults(tensors, self._pinned, self._gpus.get(lane))

    def forget(self) -> None:
        """The plane has ended: nothing is under way, and nothing lies in the region."""
        self._next = None
        self._lanes.forget()
        self._last_replies.clear()
        self._pinned.close()
        self._region.close()
