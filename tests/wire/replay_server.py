"""A server that answers as another one was recorded to, and keeps what it is asked."""

from __future__ import annotations

import mmap
import os
import socket
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from attnd.protocol.shm import sockets
from attnd.v1 import plane_pb2
from tests.wire.grpc_proxy import STATUS, Exchange
from tests.wire.shm_relay import REQUEST, TICKET_BYTES, Connection, Frame


class RecordedService(grpc.GenericRpcHandler):
    """Answers the requests of each RPC in their order, whatever they say.

    Attributes:
        asked: by RPC, the requests that came.
    """

    def __init__(self, exchanges: list[Exchange]) -> None:
        self.asked: dict[str, list[bytes]] = defaultdict(list)
        self._answers: dict[str, deque[Exchange]] = defaultdict(deque)
        for exchange in exchanges:
            self._answers[exchange.rpc].append(exchange)

    def service(self, details: Any) -> Any:
        rpc = details.method.rpartition("/")[2]

        def answer(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
            for request in requests:
                self.asked[rpc].append(request)
                exchange = self._answers[rpc].popleft()
                if exchange.reply is None:
                    context.set_trailing_metadata(((STATUS, exchange.status),))
                    context.abort(grpc.StatusCode[exchange.code], "as recorded")
                else:
                    yield exchange.reply

        return grpc.stream_stream_rpc_method_handler(answer)


class RecordedPlane:
    """The socket of one recorded connection.

    Attributes:
        ticket: that was shown.
        asked: frames that came, with the call's tensors in the region.
    """

    def __init__(self, connection: Connection, opened: plane_pb2.OpenPlaneResponse, folder: Path) -> None:
        """Listens in `folder`; `opened` is what OpenPlane was recorded to answer."""
        self.ticket = b""
        self.asked: list[Frame] = []
        self._recorded = connection
        self._num_bytes = opened.shm.num_bytes
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / Path(opened.shm.socket_path).name))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Waits until the client has hung up."""
        self._thread.join(timeout=20)
        self._listener.close()

    def _serve(self) -> None:
        accepted, _ = self._listener.accept()
        with accepted:
            self.ticket = accepted.recv(TICKET_BYTES, socket.MSG_WAITALL)
            descriptor = sockets.sealed_memory(self._num_bytes)
            region = mmap.mmap(descriptor, self._num_bytes)
            socket.send_fds(accepted, [self._recorded.answer], [descriptor])
            os.close(descriptor)
            replies = deque(frame for frame in self._recorded.frames if frame.sender == "server")
            for frame in self._recorded.frames:
                if frame.sender == "client":
                    asked = accepted.recv(REQUEST.size, socket.MSG_WAITALL)
                    asked += accepted.recv(REQUEST.unpack(asked)[0], socket.MSG_WAITALL)
                    tensors = {offset: region[offset : offset + len(data)] for offset, data in frame.region.items()}
                    self.asked.append(Frame(frame.sender, frame.kind, asked, tensors))
                    reply = replies.popleft()
                    for offset, data in reply.region.items():
                        region[offset : offset + len(data)] = data
                    accepted.sendall(reply.data)
