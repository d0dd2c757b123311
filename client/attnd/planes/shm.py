"""The client's end of the shm plane: tensors in memory that the server shares, messages on a Unix socket."""

from __future__ import annotations

import os
import socket
from typing import Any

from attnd import requests, wire
from attnd.errors import AttndError, DeadlineExceeded, Disconnected, InvalidRequest, ServerFault, Unsupported
from attnd.options import AttentionOptions
from attnd.planes import doorbell, sockets
from attnd.planes.lanes import Lanes, PlacedCall
from attnd.regions import Region, aligned
from attnd.tensors import Array
from attnd.transport import Stream
from attnd.v1 import attention_pb2, cache_pb2, plane_pb2, step_pb2


def open_shm(
    plane: plane_pb2.OpenPlaneResponse, config: cache_pb2.CacheConfig, socket_dir: str, timeout_s: float
) -> ShmStream:
    """Connects to a plane that OpenPlane gave.

    Args:
        plane: the answer.
        config: of the cache whose calls it will carry.
        socket_dir: the folder of the server's sockets as this process sees it; "": as the server does.
        timeout_s: how long the server may take, in seconds.

    Raises:
        Unsupported: this process cannot reach the socket, or does not trust who listens; the message says why.
        AttndError: what the server answered.
    """
    path = plane.shm.socket_path
    if socket_dir:
        path = os.path.join(socket_dir, os.path.basename(path))
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(timeout_s)
        connect(connection, path)
        try:
            connection.sendall(plane.shm.ticket)
        except BrokenPipeError:
            pass  # refused before it was asked, and told why
        memory = sockets.map_memory(sockets.receive_memory(connection), plane.shm.num_bytes)
        connection.settimeout(None)
    except OSError as error:
        connection.close()
        raise Disconnected(f"the server at {path} hung up: {error}") from None
    except BaseException:
        connection.close()
        raise
    lanes = Lanes(plane.shm.num_bytes, config.head_dim_v or config.head_dim)
    return ShmStream(connection, Region(plane.id, memory), lanes, path, timeout_s)


def connect(connection: socket.socket, path: str) -> None:
    """Connects to the server's socket. Raises Unsupported: it cannot be reached, or a stranger listens."""
    try:
        connection.connect(path)
    except OSError as error:  # a path that is too long, too
        rule = "client and server must share the folder, which socket_dir names here if it lies elsewhere"
        raise Unsupported(f"socket {path} cannot be reached: {error}; {rule}", field="plane") from None
    user = sockets.peer_of(connection).user
    if user not in (os.geteuid(), 0):
        rule = f"must be this process' user {os.geteuid()} or root"
        raise Unsupported(f"user {user} listens at {path}, but {rule}", field="plane")


class ShmStream(Stream):
    """Implements `attnd.transport.Stream`. Several calls may be under way, each in a lane of its own."""

    plane = "shm"

    def __init__(self, connection: socket.socket, region: Region, lanes: Lanes, path: str, timeout_s: float) -> None:
        """Owns the connection.

        Args:
            connection: blocking, after the handshake.
            region: the memory that came over it.
            lanes: of the region, all free.
            path: of the socket, for errors.
            timeout_s: how long a message may take to be sent.
        """
        self._connection = connection
        self._region = region
        self._lanes = lanes
        self._path = path
        self._replies = doorbell.Replies(connection)
        self._set_timeout(timeout_s)
        self._next: PlacedCall | None = None  # what is to be sent; None: a step
        self._last_replies: dict[int, requests.AttendReply] = {}  # by lane

    def step_request(self, step: step_pb2.Step) -> bytes:
        """What opens a step, for `send`."""
        self._next = None  # whatever call was made meanwhile and not sent
        return doorbell.request_bytes(wire.step_request(step))

    def call_request(self, step_id: int, layer: int, q: Any, k: Any, v: Any, options: AttentionOptions) -> bytes:
        """Copies the tensors of a call into the region, and returns the call for `send`."""
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

    def send(self, request: bytes) -> None:
        """Sends what `step_request` or `call_request` gave last."""
        try:
            self._connection.sendall(request)
        except BlockingIOError:
            raise DeadlineExceeded(f"the server took no message within {self._timeout_s:g} s") from None
        except OSError as error:
            raise self._hung_up(error) from None
        self._lanes.sent(self._next)

    def receive(self, timeout_s: float) -> requests.AttendReply:
        """The next message from the server. Its tensors are copies.

        Raises:
            DeadlineExceeded: none came in time. The stream is over then.
            Disconnected: the server hung up.
        """
        if timeout_s != self._timeout_s:
            self._set_timeout(timeout_s)
        try:
            reply = self._replies.receive()
        except BlockingIOError:
            raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from None
        except OSError as error:
            raise self._hung_up(error) from None
        if reply is None:
            raise self._hung_up("end of file")
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

    def _set_timeout(self, timeout_s: float) -> None:
        sockets.set_timeouts(self._connection, receive_s=timeout_s, send_s=timeout_s)
        self._timeout_s = timeout_s

    def _hung_up(self, reason: object) -> AttndError:
        return Disconnected(f"no connection to the server at {self._path}: {reason}")

    def close(self) -> None:
        """Ends the plane: the server learns it by the end of the socket."""
        self._connection.close()
        # Steps that somebody keeps hold this object.
        self._next = None
        self._lanes.forget()
        self._last_replies.clear()
        self._region.close()


def _copied(array: Array) -> Array:
    """The next call may overwrite what lies in the region, and the caller may keep what it got."""
    return array._replace(data=memoryview(bytes(array.data)))
