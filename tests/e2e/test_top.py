"""`attnd top` against real servers: on a terminal of 80 columns, for scripts, and while the server is away."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import torch

import attnd
from attnd.v1 import attention_pb2_grpc, capabilities_pb2, status_pb2
from attnd_server.identity.tokens import add_token
from tests.servers import ServerProcess, wait_for

GEOMETRY = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "page_size": 4, "dtype": "float32"}
Q, K, V = torch.ones(2, 4, 16), torch.ones(2, 2, 16), torch.ones(2, 2, 16)
PREFILL = attnd.StepMetadata(query_lens=[2], context_lens=[0], page_tables=[[0]], slot_mapping=[0, 1])
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Old(attention_pb2_grpc.AttentionServiceServicer):
    """Tells what it can do, and knows no other RPC."""

    def GetCapabilities(self, request: object, context: object) -> capabilities_pb2.GetCapabilitiesResponse:
        return capabilities_pb2.GetCapabilitiesResponse(version="0.1.0", epoch=5)


def environment(**more: str) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES", "COLORTERM")
    }
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TERM": "xterm-256color", **more}


class Terminal:
    """A command on a pseudo terminal.

    Attributes:
        text: all that it has written.
    """

    def __init__(self, *arguments: str, columns: int = 80, **more: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._before = termios.tcgetattr(theirs)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "attnd_server", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment(**more),
            start_new_session=True,
        )
        self._theirs = theirs
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            if not select.select([self._ours], [], [], 0.05)[0]:
                if self._process.poll() is not None:
                    return
                continue
            try:
                self.text += os.read(self._ours, 1 << 16).decode(errors="replace")
            except OSError:
                return

    def wait_for(self, text: str) -> None:
        wait_for(lambda: text in CODES.sub("", self.text), f"{text!r} does not come", timeout_s=60)

    def end(self, number: signal.Signals) -> int:
        """The exit code after a signal; the terminal is as it was."""
        self._process.send_signal(number)
        code = self._process.wait(60)
        self._reader.join(60)
        assert termios.tcgetattr(self._theirs) == self._before
        return code

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._reader.join(60)
        os.close(self._ours)
        os.close(self._theirs)


@contextmanager
def terminal(*arguments: str, columns: int = 80, **more: str) -> Iterator[Terminal]:
    made = Terminal(*arguments, columns=columns, **more)
    try:
        yield made
    finally:
        made.close()


def top(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "attnd_server", "top", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**more), timeout=120)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_the_terminal_as_it_was(server_address: str, number: signal.Signals) -> None:
    with terminal("top", server_address, "--interval", "0.2") as shown:
        shown.wait_for("calls wait")
        assert shown.end(number) == 0
        assert "\x1b[?1049h" in shown.text
        after = shown.text[shown.text.rindex("\x1b[?1049l") :]  # the screen of before is back
        assert shown.text.rindex("\x1b[?25h") > shown.text.rindex("\x1b[?25l")  # and so is the cursor
        assert "Traceback" not in after


def test_rows_and_rates_are_refreshed(server_address: str) -> None:
    with attnd.connect(server_address) as client, client.create_cache(**GEOMETRY) as cache, cache.session() as session:
        with terminal("top", server_address, "--interval", "0.2") as shown:
            shown.wait_for("principal")
            seen = len(shown.text)
            deadline = time.monotonic() + 60
            while not re.search(r"anybody +(inline|shm) .*[1-9]", CODES.sub("", shown.text[seen:])):
                assert time.monotonic() < deadline, shown.text[-2_000:]
                session.step(PREFILL).attend(0, Q, K, V)
            lines = CODES.sub("", shown.text.replace("\x1b[H", "\n")).replace("\r", "\n").split("\n")
            assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("more", "has_colours"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)], ids=str
)
def test_colours_are_for_terminals_that_want_them(server_address: str, more: dict[str, str], has_colours: bool) -> None:
    port = server_address.rpartition(":")[2]
    with terminal("top", f"127.0.0.1:{port}", "--interval", "0.2", "--once", **more) as shown:
        shown.wait_for("principal")
        shown._process.wait(60)
        shown._reader.join(60)
        colours = re.findall(r"\x1b\[(?:3[0-7]|38;)[0-9;]*m", shown.text)
        assert not colours  # nothing is wrong, so nothing is red
        assert ("\x1b[" in shown.text) is (has_colours or "TERM" not in more)


def test_a_script_gets_one_table_or_object(server_address: str) -> None:
    table = top(server_address, "--once", "--interval", "0.1", COLUMNS="80")
    assert (table.returncode, table.stderr) == (0, "")
    assert "\x1b" not in table.stdout
    assert max(map(len, table.stdout.splitlines())) <= 80
    assert table.stdout.count("principal") == 1
    told = json.loads(top(server_address, "--once", "--interval", "0.1", "--json").stdout)
    assert told["address"] == server_address
    assert [row["principal"] for row in told["principals"]] == ["anybody"]


def test_nobody_there_is_one_line() -> None:
    result = top("127.0.0.1:1", "--timeout-s", "0.3")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith("attnd top: ")


def test_tokens_say_whose_rows_are_shown(tmp_path: Path) -> None:
    for name in ("alice", "olga"):
        (tmp_path / name).write_text(add_token(str(tmp_path / "tokens"), name))
    options = ("--device", "cpu", "--tokens", str(tmp_path / "tokens"), "--operators", "olga")
    with ServerProcess(tmp_path / "log", *options) as server:
        token = (tmp_path / "alice").read_text()
        with attnd.connect(server.address, credentials=attnd.Credentials(token, tls=False)) as alice:
            with alice.create_cache(**GEOMETRY):
                shown = {
                    name: top(
                        server.address, "--once", "--interval", "0.1", "--token-file", str(tmp_path / name)
                    ).stdout
                    for name in ("alice", "olga")
                }
    assert "alice" in shown["olga"]
    assert "these are your own alone" not in shown["olga"]
    assert "olga" not in shown["alice"]
    assert "these are your own alone" in shown["alice"]


def test_a_server_that_comes_back_is_shown_again(tmp_path: Path) -> None:
    options = ("--device", "cpu", "--drain-s", "1")
    server = ServerProcess(tmp_path / "log", *options)
    command = [sys.executable, "-m", "attnd_server", "top", server.address, "--json", "--interval", "0.2"]
    process = subprocess.Popen(
        [*command, "--timeout-s", "1"], stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    assert process.stdout is not None
    try:
        first = json.loads(process.stdout.readline())
        assert first["trouble"] == ""
        port = server.port
        server.kill()
        server.stop()
        while not (away := json.loads(process.stdout.readline()))["trouble"]:
            pass
        assert away["epoch"] == first["epoch"]
        assert away["trouble"].startswith("no answer for ")
        with ServerProcess(tmp_path / "log", *options, port=port):
            while (again := json.loads(process.stdout.readline()))["trouble"]:
                pass
            assert again["epoch"] != first["epoch"]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def answering(servicer: Old) -> Iterator[str]:
    """The address of a server that is not ours."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    attention_pb2_grpc.add_AttentionServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def test_a_server_of_an_older_version_says_so() -> None:
    with answering(Old()) as address:
        result = top(address, "--once")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "attnd top: the server is of an older version and has no GetStatus\n"


class Once(Old):
    """Answers one GetStatus, and then knows nobody any more."""

    def __init__(self) -> None:
        self._answers = iter([status_pb2.GetStatusResponse()])

    def GetStatus(self, request: object, context: grpc.ServicerContext) -> status_pb2.GetStatusResponse:
        answer = next(self._answers, None)
        if answer is None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not known here any more")
        assert answer is not None
        return answer


def test_an_answer_that_does_not_come_a_second_time_is_told_and_fails() -> None:
    with answering(Once()) as address:
        result = top(address, "--once", "--interval", "0.1")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "attnd top: the token is not known here any more\n"
