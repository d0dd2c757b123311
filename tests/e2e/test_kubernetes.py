"""A server with the arguments and variables of its manifest for Kubernetes, and the manifest's probe."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml

import attnd
from attnd_server.identity.tokens import add_token
from tests.certificates import Authority, needs_openssl
from tests.servers import ROOT, ServerProcess

MANIFEST = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "statefulset.yaml").read_text())
(CONTAINER,) = MANIFEST["spec"]["template"]["spec"]["containers"]
POD = "attnd-0"
NAMES = "*.attnd.attnd.svc.cluster.local"

pytestmark = needs_openssl


@pytest.fixture
def secrets(tmp_path) -> tuple[Path, str]:
    """What docs/operating.md has one put into the Secret, with its mode in the pod, and the token of a principal."""
    folder = tmp_path / "secrets"
    folder.mkdir()
    made = tmp_path / "made"
    made.mkdir()
    authority = Authority(made)
    server = authority.issue("server", "/CN=attnd", f"DNS:{NAMES}")
    token = add_token(str(folder / "tokens"), "alice")
    for source, name in ((server.cert, "server.pem"), (server.key, "server.key"), (authority.ca, "ca.pem")):
        shutil.copy(source, folder / name)
    for path in folder.iterdir():
        path.chmod(0o440)
    return folder, token


@pytest.fixture
def environment(secrets, tmp_path, monkeypatch) -> None:
    """The manifest's variables, with folders of this test."""
    folders = {"/etc/attnd": str(secrets[0]), "/var/lib/attnd": str(tmp_path / "lib")}
    (tmp_path / "lib").mkdir()
    for variable in CONTAINER["env"]:
        value = variable.get("value", POD).replace("$(POD_NAME)", POD)
        for inside, outside in folders.items():
            value = value.replace(inside, outside)
        monkeypatch.setenv(variable["name"], value)
    monkeypatch.setenv("ATTND_KV_BYTES", "64MiB")
    monkeypatch.setenv("ATTND_DEVICE", "cpu")


def options() -> list[str]:
    """The manifest's arguments, with a port for metrics that the system picks."""
    return [re.sub(r":\d+$", ":0", word) for word in CONTAINER["args"]]


def probe(server: ServerProcess, kind: str) -> subprocess.CompletedProcess[str]:
    """What a probe of the manifest says."""
    program, *words = CONTAINER[kind]["exec"]["command"]
    assert program == "python"
    words = [word.replace("7411", str(server.port)) for word in words]
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([sys.executable, *words], env=known, capture_output=True, text=True)


def test_it_serves_by_tls_to_tokens_alone_and_the_probe_finds_it(secrets, environment, tmp_path):
    folder, token = secrets
    with ServerProcess(tmp_path / "log", *options()) as server:
        for kind in ("startupProbe", "readinessProbe"):
            result = probe(server, kind)
            assert (result.returncode, result.stderr) == (0, ""), kind
        address = f"localhost:{server.port}"
        shown = {"ca": str(folder / "ca.pem"), "server_name": NAMES.replace("*", POD)}
        with attnd.connect(address, credentials=attnd.Credentials(token, **shown)) as client:
            assert client.list_caches() == []
        # --insecure, which the metrics need, lets nobody in without a token or in the clear.
        with pytest.raises(attnd.Unauthenticated):
            attnd.connect(address, credentials=attnd.Credentials("another", **shown)).list_caches()
        with pytest.raises(attnd.Disconnected):
            attnd.connect(address).list_caches()
        port = re.search(r"metrics on \S+:(\d+)/", server.banner)[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert b"attnd_" in answer.read()


def test_its_caches_are_there_after_a_restart_of_the_pod(secrets, environment, tmp_path):
    folder, token = secrets
    credentials = attnd.Credentials(token, ca=str(folder / "ca.pem"), server_name=NAMES.replace("*", POD))
    with ServerProcess(tmp_path / "log", *options()) as server:
        client = attnd.connect(f"localhost:{server.port}", credentials=credentials)
        cache = client.create_cache(num_layers=1, num_kv_heads=1, head_dim=16, num_pages=2, dtype="float32")
        server.terminate()
        assert server.wait() == 0
        client.close()
    with (
        ServerProcess(tmp_path / "log", *options()) as server,
        attnd.connect(f"localhost:{server.port}", credentials=credentials) as client,
    ):
        assert len(client.list_caches()) == 1
        client.open_cache(cache.ref.id, epoch=cache.ref.epoch).delete()
