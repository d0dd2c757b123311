"""Who gets a shm plane: tickets that open once, and a folder without leftovers."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from attnd.errors import Exhausted, InvalidRequest, PermissionDenied
from attnd_server.identity.quota import Quota
from attnd_server.planes.open_planes import PlaneTable
from attnd_server.planes.socket_folder import SocketFolder


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def table(max_planes: int = 2) -> PlaneTable:
    return PlaneTable("/somewhere/a.sock", 4096, max_planes)


def test_a_ticket_opens_once(pair: tuple[socket.socket, socket.socket]) -> None:
    planes = table()
    plane, other = planes.open("me"), planes.open("me")
    assert plane.id != other.id
    assert plane.ticket != other.ticket
    assert len(plane.ticket) == 32
    assert planes.claim(plane.ticket, pair[0]) is plane
    for ticket in (plane.ticket, b"", bytes(32), other.ticket[:31]):
        with pytest.raises(PermissionDenied, match="unknown, used or older"):
            planes.claim(ticket, pair[1])
    assert planes.claim(other.ticket, pair[1]) is other


def test_tickets_expire_and_open_planes_do_not(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("attnd_server.planes.open_planes.time", SimpleNamespace(monotonic=lambda: now))
    planes = table()
    kept, late = planes.open("me"), planes.open("me")
    planes.claim(kept.ticket, pair[0])
    now += PlaneTable.TICKET_S + 0.1
    assert len(planes) == 1
    with pytest.raises(PermissionDenied):
        planes.claim(late.ticket, pair[1])


def test_the_limit_counts_what_is_open_or_may_be_soon(pair: tuple[socket.socket, socket.socket]) -> None:
    planes = table(max_planes=2)
    first = planes.open("me")
    planes.claim(first.ticket, pair[0])
    planes.open("me")
    with pytest.raises(Exhausted, match="2 shm planes are open, which is the limit"):
        planes.open("you")
    planes.forget(first)
    assert planes.open("you").id == 3


def test_closing_ends_the_connection_of_ones_own_plane(pair: tuple[socket.socket, socket.socket]) -> None:
    planes = table()
    plane, unused = planes.open("me"), planes.open("me")
    planes.claim(plane.ticket, pair[0])
    for plane_id, principal in ((plane.id, "you"), (99, "me")):
        with pytest.raises(InvalidRequest, match=f"id is {plane_id}, but no such plane is open"):
            planes.close(plane_id, principal)
    planes.close(plane.id, "me")
    assert pair[1].recv(1) == b""
    planes.close(unused.id, "me")
    with pytest.raises(PermissionDenied):
        planes.claim(unused.ticket, pair[1])


def test_the_folder_and_the_socket_are_for_this_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with SocketFolder(str(folder)).listen(for_others=False) as listener:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(os.stat(listener.getsockname()).st_mode) == 0o600
    with SocketFolder(str(folder)).listen(for_others=True) as listener:
        assert stat.S_IMODE(os.stat(listener.getsockname()).st_mode) == 0o666


def test_a_new_server_removes_what_dead_ones_left_and_nothing_else(tmp_path: Path) -> None:
    folder = SocketFolder(str(tmp_path))
    folder.listen(for_others=False).close()  # as if it had been killed: the name stays
    (left,) = tmp_path.iterdir()
    (tmp_path / "attnd-note.sock").write_text("no socket")
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(str(tmp_path / "other.sock"))
    with folder.listen(for_others=False) as alive, folder.listen(for_others=False) as newest:
        names = {path.name for path in tmp_path.iterdir()}
        paths = {os.path.basename(listener.getsockname()) for listener in (alive, newest)}
        assert names == paths | {"attnd-note.sock", "other.sock"}
        assert left.name not in names


def test_a_path_that_is_too_long_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    with pytest.raises(OSError, match="too long"):
        SocketFolder(str(folder)).listen(for_others=False)
    assert list(folder.iterdir()) == []


def test_planes_are_sessions_of_their_principal(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("attnd_server.planes.open_planes.time", SimpleNamespace(monotonic=lambda: now))
    sessions = Quota("sessions", "are open", 3, 2, "close one")
    planes = PlaneTable("/somewhere/a.sock", 4096, 9, 9, sessions)
    kept, unused = planes.open("alice"), planes.open("alice", "GPU-1")
    with pytest.raises(Exhausted, match="2 sessions of this principal are open, but a principal's limit is 2"):
        planes.open("alice")
    planes.open("bob")
    with pytest.raises(Exhausted, match="3 sessions are open, but the server's limit is 3"):
        planes.open("bob")
    planes.claim(kept.ticket, pair[0])
    planes.close(unused.id, "alice")  # that nobody came for
    planes.close(kept.id, "alice")  # still there until its thread has seen the end
    assert sessions.count == 2
    for _ in range(2):
        planes.forget(kept)
    assert sessions.count == 1
    now += PlaneTable.TICKET_S + 0.1
    assert len(planes) == sessions.count == 0
