"""Half of a client of a shm plane: sends what it is told to, and reads when it is told to."""

from __future__ import annotations

import socket

import torch

import attnd
from attnd.protocol import frames, requests
from attnd.protocol.regions import Region
from attnd.protocol.shm import framing, sockets
from attnd.v1 import attention_pb2, plane_pb2

DECODE = attnd.StepMetadata([1], [0], [[0]], [0], kind="decode")
# The first call again; of a cache with 2 KV heads of 16.
AGAIN = framing.repeated_call(0, 1, 0)
_Q = torch.ones(1, 2, 16)


class RawClient:
    """One plane of a server.

    Attributes:
        socket: connected, with a timeout of 20 s.
        region: the memory that came over it.
        replies: what comes from it.
    """

    def __init__(self, client: attnd.Client, cache: attnd.Cache) -> None:
        """Has made a step with one call, and so may send that call again."""
        plane = plane_pb2.OpenPlaneResponse.FromString(client.transport.unary("OpenPlane", b"", 10))
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(plane.shm.socket_path)
        self.socket.sendall(plane.shm.ticket)
        (descriptor,) = sockets.receive_memories(self.socket, 1)
        self.region = Region(plane.id, sockets.map_memory(descriptor, plane.shm.num_bytes))
        self.replies = framing.Replies(self.socket)
        step = frames.step_request(DECODE.to_message(1, cache.ref))
        call = requests.attend_call(1, 0, _Q, _Q, _Q, attnd.AttentionOptions())
        for kind, message in (("step", step), ("call", call)):
            self.socket.sendall(framing.request_bytes(message))
            assert self.answer() == kind

    def answer(self) -> str | None:
        """What is answered next, always as a message: the call gives its output no place in the region."""
        reply = self.replies.receive()
        assert reply is not None
        return attention_pb2.AttendResponse.FromString(reply.message).WhichOneof("message")

    def send_until_nobody_reads(self, message: bytes) -> int:
        """Sends a message until the server takes no more; returns how often it was sent as a whole."""
        num_sent = 0
        self.socket.settimeout(0.2)
        try:
            while True:
                self.socket.sendall(message)
                num_sent += 1
        except TimeoutError:
            return num_sent
        finally:
            self.socket.settimeout(20)

    def close(self) -> None:
        self.socket.close()
        self.region.close()
