"""What is installed is locked with hashes, and what is known to be weak is not among it."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading

import pytest
import tomli
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.servers import ROOT

PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
LOCKS = ["requirements.lock", *(f"locks/{name}.lock" for name in ("build", "cuda", "protos", "server", "torch-cpu"))]
# What uv locks for systems that attnd does not run on.
ELSEWHERE = {"colorama", "httpx2-jsfetch"}
# Its generator is older than constraints.txt on purpose, see the Makefile.
OF_CONSTRAINTS = [name for name in LOCKS if name != "locks/protos.lock"]


def locked(name):
    """The requirements of a lock, each with its hashes."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            requirement, *hashes = line.split(" --hash=")
            found.append((Requirement(requirement), [each.strip() for each in hashes]))
    return found


def versions(requirements):
    """Pairs of a name and the one version that a requirement allows."""
    pins = set()
    for each in requirements:
        (specifier,) = each.specifier
        assert specifier.operator == "==", each
        pins.add((canonicalize_name(each.name), specifier.version))
    return pins


def direct(extra):
    """What an extra asks for, with what the extras of ours that it names ask for."""
    asked = []
    for each in map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]]):
        if each.name == "attnd":
            asked += [more for name in each.extras for more in direct(name)]
        else:
            asked.append(each)
    return asked


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return versions(Requirement(line) for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("name", LOCKS)
def test_everything_in_a_lock_has_hashes_and_no_address(name):
    packages = locked(name)
    assert packages
    for requirement, hashes in packages:
        assert hashes, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes)
    assert not re.search(r"//|--(extra-)?index|--find", (ROOT / name).read_text())


@pytest.mark.parametrize("name", OF_CONSTRAINTS)
def test_a_lock_has_the_versions_of_the_constraints(name):
    pins = versions(requirement for requirement, _ in locked(name) if requirement.name not in ELSEWHERE)
    assert {(package, version.removesuffix("+cpu")) for package, version in pins} <= constraints()


def test_no_constraint_is_left_over():
    names = {canonicalize_name(requirement.name) for name in LOCKS for requirement, _ in locked(name)}
    assert {name for name, _ in constraints()} <= names


@pytest.mark.parametrize(
    ("name", "extra"), [("requirements.lock", "dev"), ("locks/server.lock", "server"), ("locks/server.lock", "otel")]
)
def test_a_lock_has_what_its_extra_asks_for(name, extra):
    pins = versions(requirement for requirement, _ in locked(name))
    for asked in direct(extra):
        found = [version for pinned, version in pins if pinned == canonicalize_name(asked.name)]
        assert found, asked
        assert all(asked.specifier.contains(version) for version in found), asked


def test_torch_has_the_hashes_of_both_builds():
    (hashes,) = [hashes for requirement, hashes in locked("requirements.lock") if requirement.name == "torch"]
    (cpu,) = re.findall(r"^TORCH_CPU_HASHES := (\w+)$", (ROOT / "Makefile").read_text(), re.M)
    assert f"sha256:{cpu}" in hashes
    assert len(hashes) > 8  # PyPI's wheels for every Python and machine
    assert hashes == next(found for requirement, found in locked("locks/server.lock") if requirement.name == "torch")


def test_the_image_installs_nothing_without_a_hash_but_attnd():
    installs = re.findall(r"\binstall ((?:--\S+ +)[^\\&;]*)", DOCKERFILE.replace("\\\n", " "))
    of_pip = [each for each in installs if not each.startswith(("--directory", "--yes"))]
    assert len(of_pip) == 5
    assert [each.strip() for each in of_pip if "--require-hashes" not in each] == ["--prefix /code /wheels/*.whl"]
    assert re.search(r"^ARG BASE=(\S+)$", DOCKERFILE, re.M)
    assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.M)) == {"${BASE}", "packages", "code"}
    assert "!locks/" in (ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.parametrize(
    ("version", "is_let_in"),
    [
        # CVE-2025-4565 and CVE-2026-0994: recursion without limit.
        *((version, False) for version in ("5.29.1", "5.29.5", "6.30.2", "6.31.0", "6.31.1", "6.32.1", "6.33.4")),
        *((version, True) for version in ("5.29.6", "6.33.5", "6.33.6", "7.34.1", "7.36.2")),
    ],
)
def test_protobuf_is_above_the_versions_that_recurse_without_limit(version, is_let_in):
    (protobuf,) = [each for each in map(Requirement, PROJECT["dependencies"]) if each.name == "protobuf"]
    assert protobuf.specifier.contains(version) is is_let_in


class Weaknesses(http.server.BaseHTTPRequestHandler):
    """Tells of one weakness, in every version of click."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        found = {"id": "OSV-1", "affected": [{"package": asked["package"]}]}
        answer = json.dumps({"vulns": [found]} if asked["package"]["name"] == "click" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *words):
        """Says nothing."""


def audit(tmp_path, *options):
    command = [sys.executable, ROOT / "deploy" / "audit.py", "--cache-dir", tmp_path, *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_scan_fails_on_a_weak_version_and_names_it(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Weaknesses) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            result = audit(tmp_path, "--vulnerability-service", "osv", "--osv-url", url)
        finally:
            server.shutdown()
    assert result.returncode == 1, result.stderr
    (version,) = [version for name, version in constraints() if name == "click"]
    lines = result.stdout.splitlines()
    assert f"click {version} in requirements.lock: OSV-1, fixed in no version" in lines
    assert re.fullmatch(r"\d{3} versions scanned; weak: [1-9]; of packages that were not found: 0", lines[-1])


def test_a_scan_that_reaches_nobody_says_so_and_is_no_failure(tmp_path):
    result = audit(tmp_path, "--vulnerability-service", "osv", "--osv-url", "http://127.0.0.1:9")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("not scanned whole: the service did not answer for requirements.lock\n")


def test_a_scan_that_does_not_work_is_a_failure(tmp_path):
    result = audit(tmp_path, "--no-such-option")
    assert result.returncode == 1
    assert "pip-audit failed" in result.stderr
