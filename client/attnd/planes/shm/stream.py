"""The client's end of the shm plane: tensors in memory that the server shares, messages on a Unix socket."""

from __future__ import annotations

import math
import socket
import weakref
from typing import NamedTuple

from attnd import forks
from attnd.errors import AttndError, DeadlineExceeded, Disconnected
from attnd.planes.shm.lanes import Lanes
from attnd.planes.shm.messages import ShmMessages
from attnd.planes.tickets import show_ticket
from attnd.planes.transport import Stream
from attnd.protocol import requests
from attnd.protocol.head_dims import most_head_dim_v
from attnd.protocol.regions import Region
from attnd.protocol.shm import framing, sockets
from attnd.threads import TURN_S
from attnd.v1 import cache_pb2, plane_pb2


class Handshake(NamedTuple):
    """What a connection begins with.

    Attributes:
        connection: blocking, with nothing under way.
        region: the memory that came over it.
        lanes: of the region, all free.
        path: of the socket, for errors.
    """

    connection: socket.socket
    region: Region
    lanes: Lanes
    path: str

    def close(self) -> None:
        """Gives up the connection and the memory, whoever still holds this object."""
        self.connection.close()
        self.region.close()


def open_shm(
    plane: plane_pb2.OpenPlaneResponse, config: cache_pb2.CacheConfig, socket_dir: str, timeout_s: float
) -> ShmStream:
    """A stream over a plane that OpenPlane gave. Arguments and errors as `shake_hands`."""
    return ShmStream(*shake_hands(plane, config, socket_dir, timeout_s), timeout_s)


def shake_hands(
    plane: plane_pb2.OpenPlaneResponse, config: cache_pb2.CacheConfig, socket_dir: str, timeout_s: float
) -> Handshake:
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
    connection, (descriptor,), path = show_ticket(plane.shm.ticket, plane.shm.socket_path, socket_dir, 1, timeout_s)
    try:
        memory = sockets.map_memory(descriptor, plane.shm.num_bytes)
    except BaseException:
        connection.close()
        raise
    lanes = Lanes(plane.shm.num_bytes, most_head_dim_v(config))
    return Handshake(connection, Region(plane.id, memory), lanes, path)


class ShmStream(ShmMessages, Stream):
    """Implements `attnd.planes.transport.Stream`. Several calls may be under way, each in a lane of its own."""

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
        super().__init__(region, lanes)
        self._connection = connection
        self._path = path
        self._made = forks.generation
        weakref.finalize(self, connection.close)
        self._replies = framing.Replies(connection)
        self._set_timeout(timeout_s)

    def send(self, request: bytes) -> None:
        """Sends what `step_request` or `call_request` gave last."""
        try:
            self._connection.sendall(request)
        except BlockingIOError:
            raise DeadlineExceeded(f"the server took no message within {self._timeout_s:g} s") from None
        except OSError as error:
            raise hung_up(self._path, error) from None
        self.sent()

    def receive(self, timeout_s: float) -> requests.AttendReply:
        """The next message from the server. Its tensors are to be copied before the next call is made.

        Raises:
            DeadlineExceeded: none came in time. The stream is over then.
            Disconnected: the server hung up.
        """
        if timeout_s != self._timeout_s:
            self._set_timeout(timeout_s)
        turns = self._num_turns
        while True:
            try:
                reply = self._replies.receive()
            except AttndError:  # among them one that is an OSError too: a message that is not whole in its time
                raise
            except BlockingIOError:
                turns -= 1
                if not turns:
                    raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from None
            except OSError as error:
                raise hung_up(self._path, error) from None
            else:
                break
        if reply is None:
            raise hung_up(self._path, "end of file")
        return self.answer(reply)

    def _set_timeout(self, timeout_s: float) -> None:
        # An answer is waited for in turns: see `attnd.threads.taken`.
        self._num_turns = max(1, math.ceil(timeout_s / TURN_S))
        sockets.set_timeouts(self._connection, receive_s=timeout_s / self._num_turns, send_s=timeout_s)
        self._timeout_s = timeout_s

    def stop(self) -> None:
        """Ends both directions while another thread is inside, which closes."""
        if self._made == forks.generation:
            try:
                self._connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # ended already

    def close(self) -> None:
        """Ends the plane: the server learns it by the end of the socket."""
        self._connection.close()
        self.forget()  # steps that somebody keeps hold this object


def hung_up(path: str, reason: object) -> Disconnected:
    """The error for a connection that broke."""
    return Disconnected(f"no connection to the server at {path}: {reason}")
