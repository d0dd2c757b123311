"""Recordings of the wire in files: bytes, and beside them for people what they say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import message_factory

from attnd.v1 import attention_pb2, error_pb2
from tests.wire.calls import Results
from tests.wire.grpc_proxy import Exchange
from tests.wire.messages import described
from tests.wire.shm_relay import ANSWER_BYTES, Connection, Frame

METHODS = attention_pb2.DESCRIPTOR.services_by_name["AttentionService"].methods_by_name


@dataclass
class Recording:
    """What went over the wire.

    Attributes:
        exchanges: of all RPCs, by the order of their requests.
        connections: of shm planes.
        results: what the client made of it.
    """

    exchanges: list[Exchange]
    connections: list[Connection]
    results: Results


def write(recording: Recording, folder: Path) -> None:
    """Writes a file for each RPC, one for shm planes, and one for the results."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, method in METHODS.items():
        exchanges = [_exchange(exchange, method) for exchange in recording.exchanges if exchange.rpc == name]
        assert exchanges, f"nothing was recorded of {name}: tests/wire/calls.py has no call of it"
        _write(folder / f"{name}.json", exchanges)
    _write(folder / "shm.json", [_connection(connection) for connection in recording.connections])
    _write(folder / "results.json", recording.results)


def read(folder: Path) -> Recording:
    """What `write` wrote."""
    exchanges = [
        _read_exchange(path.stem, item)
        for path in folder.glob("*.json")
        if path.stem not in ("shm", "results")
        for item in json.loads(path.read_text())
    ]
    connections = [_read_connection(item) for item in json.loads((folder / "shm.json").read_text())]
    results = json.loads((folder / "results.json").read_text())
    return Recording(sorted(exchanges, key=lambda exchange: exchange.order), connections, results)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def _exchange(exchange: Exchange, method: Any) -> dict[str, Any]:
    item: dict[str, Any] = {
        "order": exchange.order,
        "stream": exchange.stream,
        "request": exchange.request.hex(),
        "request_says": _says(method.input_type, exchange.request),
    }
    if exchange.reply is not None:
        reply = exchange.reply
        return item | {"reply": reply.hex(), "reply_says": _says(method.output_type, reply)}
    status = error_pb2.Status.FromString(exchange.status)
    error = error_pb2.Error.FromString(status.details[0].value)
    return item | {"code": exchange.code, "status": exchange.status.hex(), "status_says": described(error)}


def _read_exchange(rpc: str, item: dict[str, Any]) -> Exchange:
    reply = bytes.fromhex(item["reply"]) if "reply" in item else None
    request, status = bytes.fromhex(item["request"]), bytes.fromhex(item.get("status", ""))
    return Exchange(rpc, item["order"], item["stream"], request, reply, item.get("code", ""), status)


def _connection(connection: Connection) -> dict[str, Any]:
    item: dict[str, Any] = {"ticket": connection.ticket.hex(), "answer": connection.answer.hex()}
    if connection.answer[ANSWER_BYTES:]:
        item["answer_says"] = described(error_pb2.Error.FromString(connection.answer[ANSWER_BYTES:]))
    return item | {"frames": [_frame(frame) for frame in connection.frames]}


def _frame(frame: Frame) -> dict[str, Any]:
    item: dict[str, Any] = {
        "sender": frame.sender,
        "kind": frame.kind,
        "frame": frame.data.hex(),
        "numbers": frame.numbers,
    }
    if frame.message:
        name = "AttendRequest" if frame.sender == "client" else "AttendResponse"
        item["message_says"] = _says(attention_pb2.DESCRIPTOR.message_types_by_name[name], frame.message)
    return item | {"region": {str(offset): data.hex() for offset, data in frame.region.items()}}


def _read_connection(item: dict[str, Any]) -> Connection:
    frames = [
        Frame(
            frame["sender"],
            frame["kind"],
            bytes.fromhex(frame["frame"]),
            {int(offset): bytes.fromhex(data) for offset, data in frame["region"].items()},
        )
        for frame in item["frames"]
    ]
    return Connection(bytes.fromhex(item["ticket"]), bytes.fromhex(item["answer"]), frames)


def _says(descriptor: Any, data: bytes) -> dict[str, Any]:
    return described(message_factory.GetMessageClass(descriptor).FromString(data))
