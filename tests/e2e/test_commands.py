"""The commands that ask a running server."""

import subprocess
import sys

import pytest

from attnd_server import health_probe
from tests.servers import ServerProcess


def attnd_command(*arguments):
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "COLUMNS": "160"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_info_shows_pages_in_use(client, server_address):
    with client.create_cache(num_layers=2, num_kv_heads=1, head_dim=64, num_pages=8, name="shown here"):
        result = attnd_command("attnd_server", "info", server_address)
    assert (result.returncode, result.stderr) == (0, "")
    assert "shown here" in result.stdout
    assert "0 of 8, 16 tokens each" in result.stdout
    assert "naive" in result.stdout


def test_info_without_a_server_is_one_line(tmp_path):
    with ServerProcess(tmp_path / "log") as server:
        address = server.address
    result = attnd_command("attnd_server", "info", address, "--timeout-s", "1")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("attnd info: ")
    assert address in result.stderr
    assert result.stderr.count("\n") == 1
    assert health_probe.failure(address, timeout_s=1).startswith(f"{address} does not answer: ")


@pytest.mark.usefixtures("server")
def test_probe(server_address):
    assert health_probe.failure(server_address) is None
    assert attnd_command("attnd_server.health_probe", server_address).returncode == 0
