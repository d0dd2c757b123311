"""The sending side of a plane's socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from attnd.protocol.shm import framing
from attnd.v1 import attention_pb2
from attnd_server.planes.socket_ends import end


class AnswerSocket:
    """What is sent on one socket, by several threads, a whole message at a time.

    Attributes:
        num_due: answers that are to be sent yet.
        is_under_way: whether something is that no answer is due for.
    """

    def __init__(self, connection: socket.socket) -> None:
        """Sends on `connection`, which blocks, and has a limit on how long sending may take."""
        self._socket = connection
        self._sending = threading.Lock()
        self._rest = b""  # of what was begun: it must go before anything else
        self.num_due = 0
        self.is_under_way: Callable[[], bool] = lambda: False

    def expect(self) -> None:
        """A request came, and its answer will be sent."""
        with self._sending:
            self.num_due += 1

    def send(self, answer: bytes) -> None:
        """Sends an answer, and before it the rest of others. Raises OSError: the client takes too long, or has gone."""
        with self._sending:
            rest, self._rest = self._rest, b""
            self._socket.sendall(rest + answer if rest else answer)
            self.num_due -= 1

    def send_now(self, answer: bytes) -> bool:
        """Sends an answer without waiting for the client.

        Returns:
            Whether it was sent. If not, `send` will send it, or its rest, before the next.

        Raises:
            OSError: the client has gone.
        """
        with self._sending:
            self._rest = self._rest + answer if self._rest else self._unsent(answer)
            if self._rest:
                return False
            self.num_due -= 1
            return True

    def going_away(self) -> None:
        """Says that the server drains, unless the client reads nothing."""
        message = attention_pb2.AttendResponse(going_away=attention_pb2.GoingAway(reason="the server is draining"))
        answer = framing.reply_bytes(message.SerializeToString())
        with self._sending:
            try:
                rest = b"" if self._rest else self._unsent(answer)
            except OSError:
                return  # whoever reads learns it too
            if 0 < len(rest) < len(answer):
                self._rest = rest

    def _unsent(self, answer: bytes) -> bytes:
        try:
            return answer[self._socket.send(answer, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return answer

    def end(self) -> None:
        """Ends the connection, whatever its threads do. From any thread."""
        end(self._socket)
