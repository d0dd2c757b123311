"""Options, files, streams and devices that are wrong: one line each, never a traceback, and what else works on."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import attnd
from attnd.errors import InvalidRequest
from attnd_server import build
from attnd_server.cli import main as cli
from attnd_server.config import ServerConfig
from attnd_server.observe.verify import Verifier
from tests.before_exec import after
from tests.certificates import Authority, needs_openssl
from tests.dying import GEOMETRY
from tests.servers import ServerProcess

PYTHON = sys.executable
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "160"}


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a shell makes of a command; `attnd` and `probe` in it are ours."""
    modules = {"attnd": "attnd_server", "probe": "attnd_server.health_probe"}
    functions = "".join(f'{name}() {{ "{PYTHON}" -m {module} "$@"; }}; ' for name, module in modules.items())
    return subprocess.run(
        ["bash", "-c", functions + command],
        capture_output=True,
        text=True,
        errors="replace",
        env=ENVIRONMENT | {"PATH": os.environ["PATH"]} | environment,
        timeout=120,
    )


def is_clean(result: subprocess.CompletedProcess[str]) -> bool:
    return not any(
        word in result.stdout + result.stderr for word in ("Traceback", "Exception ignored", "Error ignored")
    )


# --- numbers ---------------------------------------------------------------------------------------------------------

HUGE = ["9223372036854775808", "9" * 25, "9" * 5000]
COUNTS = ["--threads", "--max-step-tokens", "--max-connection-rpcs", "--max-sessions", "--max-caches", "--max-planes"]
SECONDS = ["--drain-s", "--keepalive-s", "--default-ttl-s", "--max-ttl-s", "--device-timeout-s"]


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["serve", *arguments])
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return " ".join(re.sub("[─│╭╮╰╯]", " ", result.output).split())


@pytest.mark.parametrize("option", COUNTS)
def test_counts_beyond_what_anything_can_hold(option: str) -> None:
    for value in [*HUGE, "2147483648", "1e400", "nan", "-1", "1.5", ""]:
        assert option in refusal(option, value)


@pytest.mark.parametrize("option", SECONDS)
def test_times_beyond_what_anything_can_hold(option: str) -> None:
    for value in [*HUGE, "1e400", "inf", "nan", "-1", "-inf", "1e10", ""]:
        assert option in refusal(option, value)


@pytest.mark.parametrize("option", ["--kv-bytes", "--region-bytes", "--cuda-region-bytes", "--principal-kv-bytes"])
def test_memory_beyond_what_anything_can_hold(option: str) -> None:
    for value in [*HUGE, "999EiB", "1048577TiB", "9999999999999999999TiB", "1e400", "-1", "nan", "8 gib"]:
        assert option in refusal(option, value)


def test_other_numbers() -> None:
    assert "threads is 1025, but must be at most 1024" in refusal("--threads", "1025")
    assert "keepalive_s is 86401, but must be at most 86400" in refusal("--keepalive-s", "86401")
    assert "numbers of users up to 4294967294" in refusal("--socket-uids", "1,4294967295")
    for value in ("nan", "1e400", "-0.1", "1.1"):
        assert "--verify" in refusal("--verify", value)
    with pytest.raises(InvalidRequest, match="keepalive_s is 90000, but must be at least 1 seconds, and at most 86400"):
        attnd.connect("localhost:1", keepalive_s=90_000)


NO_SECONDS = [float("nan"), float("inf"), -1, 1e10, 1e300, 10**400, "5", None, True]


@pytest.mark.parametrize("name", ["timeout_s", "connect_timeout_s", "keepalive_s"])
@pytest.mark.parametrize("value", NO_SECONDS, ids=ascii)
def test_timeouts_of_clients(name: str, value: object) -> None:
    async def main() -> None:
        await attnd.aio.connect("localhost:1", **{name: value})

    for connect in (lambda: attnd.connect("localhost:1", **{name: value}), lambda: asyncio.run(main())):
        with pytest.raises(InvalidRequest, match=f"^{name} is .*, but must be"):
            connect()


@pytest.mark.parametrize("value", NO_SECONDS, ids=ascii)
def test_timeouts_of_warm_ups(client: attnd.Client, server_address: str, value: Any) -> None:
    async def main() -> None:
        async with await attnd.aio.connect(server_address) as other:
            async with await other.create_cache(**GEOMETRY) as cache:
                await cache.warm_up(num_heads=2, max_reqs=1, timeout_s=value)

    with client.create_cache(**GEOMETRY) as cache:
        for warm_up in (
            lambda: cache.warm_up(num_heads=2, max_reqs=1, timeout_s=value),
            lambda: asyncio.run(main()),
        ):
            with pytest.raises(InvalidRequest, match=r"^timeout_s is .*, but must be"):
                warm_up()


@pytest.mark.parametrize("fraction", [5e-324, 1e-300, 1e-17])
def test_the_least_fractions_are_verified_hardly_ever(fraction: float) -> None:
    verifier = Verifier(fraction, torch.device("cpu"), build.DeviceFaults(torch.device("cpu")), refuses=False)
    verifier.close()


@pytest.mark.parametrize("level", ["INFO", "Debug", "warning"])
def test_choices_are_taken_in_any_case(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    from attnd_server import app
    from attnd_server.observe import logs

    levels: list[str] = []
    monkeypatch.setattr(app, "run_server", lambda config: 0)
    monkeypatch.setattr(logs, "setup", lambda level, log_format: levels.append(level))
    result = CliRunner().invoke(cli.app, ["serve"], env={"ATTND_LOG_LEVEL": level, "ATTND_VERIFY_ACTION": "LOG"})
    assert result.exit_code == 0, result.output
    assert levels == [level.lower()]


@pytest.mark.parametrize("command", [(), ("serve",), ("info",), ("top",), ("cache",), ("cache", "export")])
def test_flags_do_not_look_as_if_they_took_a_value(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    assert "<bool>" not in result.output
    assert "BOOLEAN" not in result.output


def test_version_is_an_option_too() -> None:
    asked = [CliRunner().invoke(cli.app, arguments) for arguments in (["--version"], ["version"])]
    assert [each.exit_code for each in asked] == [0, 0]
    assert asked[0].output == asked[1].output
    assert asked[0].output.startswith(f"attnd {attnd.__version__}, ")


# --- devices and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7", "cuda:99999999999999999999"])
def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidRequest, match=f"device is {name}, but must be auto, cpu or a GPU: torch finds no GPU"):
        build.build_service(ServerConfig(device=name))


def test_a_gpu_with_too_high_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert build.select_device("cuda:1") == torch.device("cuda", 1)
    assert build.select_device("auto") == build.select_device("cuda") == torch.device("cuda", 0)
    with pytest.raises(InvalidRequest, match=r"device is cuda:2, but must be auto, cpu or a GPU: cuda:0\.\.1 are"):
        build.select_device("cuda:2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_server_without_its_gpu_is_one_line() -> None:
    for result in (
        shell("attnd serve --port 0 --device cuda --log-format json"),
        shell("attnd serve --port 0 --log-format json", ATTND_DEVICE="cuda:3"),
    ):
        assert (result.returncode, result.stdout) == (1, "")
        assert is_clean(result), result.stderr
        (line,) = [json.loads(line) for line in result.stderr.splitlines() if '"error"' in line]
        assert line["event"].startswith("cannot serve: device is cuda")


@needs_openssl
def test_files_of_a_client(tmp_path: Path) -> None:
    junk, binary = tmp_path / "junk", tmp_path / "binary"
    junk.write_text("junk\n")
    binary.write_bytes(b"\xff\x00\xfe")
    (tmp_path / "folder").mkdir()
    made = Authority(tmp_path).issue("c", "/CN=c")
    other = Authority(tmp_path, "other")
    for options, message in (
        ({"tls_ca": tmp_path / "none"}, "ca is {tls_ca}, which cannot be read: No such file"),
        ({"tls_ca": tmp_path / "folder"}, "ca is {tls_ca}, which cannot be read: Is a directory"),
        ({"tls_ca": junk}, "ca is {tls_ca}, but must be certificates, PEM"),
        ({"tls_ca": binary}, "ca is {tls_ca}, but must be certificates, PEM"),
        (
            {"tls_ca": "system", "tls_client_cert": made.cert, "tls_client_key": junk},
            "must be a certificate and its key",
        ),
        ({"tls_ca": "system", "tls_client_cert": made.cert, "tls_client_key": other._own.key}, "must be a certificate"),
        ({"token_file": tmp_path / "none"}, "token_file is {token_file}, which cannot be read: No such file"),
        ({"token_file": binary}, "token must be characters of ASCII"),
    ):
        result = CliRunner().invoke(
            cli.app,
            ["info", "localhost:1", "--timeout-s", "0.2"],
            env={f"ATTND_{name.upper()}": str(path) for name, path in options.items()},
        )
        assert result.exit_code == 1, result.output
        assert message.format(**options) in result.stderr
        assert result.stderr.count("\n") == 1


def test_files_that_cannot_grow(client: attnd.Client, server_address: str, tmp_path: Path) -> None:
    """As on a full disk."""
    with client.create_cache(num_layers=1, num_kv_heads=1, head_dim=64, num_pages=64, dtype="float32") as cache:
        ones = torch.ones(1024, 1, 64)
        cache.store_kv(0, range(1024), ones, ones)
        command = [PYTHON, "-m", "attnd_server", "cache", "export", cache.ref.id.hex(), str(tmp_path / "new")]
        result = subprocess.run(
            after(
                "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))",
                [*command, "--address", server_address],
            ),
            capture_output=True,
            text=True,
            env=ENVIRONMENT | {"PYTHONDONTWRITEBYTECODE": "1"},  # which would be cut off, and stay
        )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("attnd cache export: ")
    assert "File too large" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- streams ---------------------------------------------------------------------------------------------------------

QUICK = ["--version", "version", "--help", "serve --help", "cache --help"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ServerProcess(tmp_path_factory.mktemp("server") / "log", "--device", "cpu") as server:
        yield server.address


@pytest.mark.parametrize(
    "command",
    [
        *QUICK,
        "info ADDRESS",
        "info ADDRESS --json",
        *(pytest.param(command, marks=pytest.mark.slow) for command in ("doctor ADDRESS", "top ADDRESS --once")),
    ],
)
def test_closed_and_full_streams(address: str, command: str) -> None:
    command = f"attnd {command.replace('ADDRESS', address)}"
    right = shell(command)
    assert right.returncode == 0, right.stderr
    for redirection, why in ((">&-", "Bad file descriptor"), (">/dev/full", "No space left on device")):
        result = shell(f"{command} {redirection}")
        assert result.returncode == 1
        assert result.stderr == f"attnd: the output cannot be written: {why}\n"
    for redirection in ("2>&-", "2>/dev/full", "<&-"):
        result = shell(f"{command} {redirection}")
        assert (result.returncode, bool(result.stdout), result.stderr) == (0, True, "")
    assert shell(f"{command} | head -c 0").stderr == ""
    assert shell(f"{command} >&- 2>&- <&-").returncode == 1


def test_streams_of_errors(address: str) -> None:
    for command in (
        "attnd info 127.0.0.1:1 --timeout-s 0.2",
        "attnd info h:99999",
        "probe 127.0.0.1:1",
        "attnd info --odd",
    ):
        for redirection in ("2>&-", "2>/dev/full", ">&- 2>&-", ">/dev/full"):
            result = shell(f"{command} {redirection}")
            assert result.returncode in (1, 2)
            assert is_clean(result), result.stderr
    for redirection in (">&-", "2>&-", ">/dev/full", "<&- >&- 2>&-"):
        assert shell(f"probe {address} {redirection}").returncode == 0


def test_a_token_that_cannot_be_shown_is_not_made(tmp_path: Path) -> None:
    for redirection in (">&-", ">/dev/full"):
        result = shell(f"attnd token alice {tmp_path}/tokens {redirection}")
        assert (result.returncode, result.stdout) == (1, "")
        assert is_clean(result), result.stderr
        assert (tmp_path / "tokens").read_text() == ""


@pytest.mark.parametrize(
    "environment",
    [
        {"LANG": "C", "TERM": "dumb"},
        {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1", "TERM": ""},
    ],
    ids=lambda each: "-".join(each),
)
def test_other_encodings(address: str, environment: dict[str, str]) -> None:
    with attnd.connect(address) as client:
        geometry = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 64, "num_pages": 1}
        with client.create_cache(**geometry, name="\u4e2d \u202e\x1b[2J :smile:"):
            result = shell(f"attnd info {address}", **environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\\u202e\\x1b[2J :smile:" in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("redirection", ["1", "2", "12"])
def test_a_server_serves_without_its_streams(tmp_path: Path, redirection: str) -> None:
    """Nobody can read its address, so the port is one that was free a moment ago."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    closed = " ".join(f"{number}>&-" for number in redirection)
    command = f'exec "{PYTHON}" -m attnd_server serve --device cpu --drain-s 0 --port {port} {closed}'
    process = subprocess.Popen(["bash", "-c", command], env=ENVIRONMENT | {"PATH": os.environ["PATH"]})
    try:
        with attnd.connect(f"127.0.0.1:{port}", connect_timeout_s=100) as client:
            assert client.capabilities().version == attnd.__version__
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_full_streams_of_a_server_are_no_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = f'--device cpu --drain-s 0 --port 0 --log-format json >/dev/full 2>"{log}"'
    command = f'exec "{PYTHON}" -m attnd_server serve {options}'
    process = subprocess.Popen(["bash", "-c", command], env=ENVIRONMENT | {"PATH": os.environ["PATH"]})
    try:
        deadline = time.monotonic() + 100
        while "standard output cannot be written to" not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (serving,) = [json.loads(line) for line in log.read_text().splitlines() if '"serving"' in line]
        attnd.connect(serving["address"]).close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()


def test_an_interrupt_has_no_traceback(address: str) -> None:
    """While it waits for a server that never answers: the exit code is that of a signal."""
    with subprocess.Popen(
        [PYTHON, "-m", "attnd_server", "info", "192.0.2.1:1", "--timeout-s", "100"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        deadline = time.monotonic() + 100
        # By now it has its own handler: gRPC's threads are there.
        while len(list(Path(f"/proc/{process.pid}/task").iterdir())) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert (out, err.strip()) == ("", "")
