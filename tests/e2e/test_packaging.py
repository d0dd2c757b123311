"""What the wheel holds and asks for, and that it alone is a working client."""

import email
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import attnd
from attnd._version import __version__
from tests.servers import ROOT, ServerProcess

pytest.importorskip("hatchling", reason="building a wheel needs hatchling")

SMALL = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 16, "num_pages": 8, "dtype": "float32", "layout": "distinct"}


def output(*command, **options):
    """What `command` prints; its error if it fails."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    output(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=ROOT)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The Python of a fresh environment with the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("environment")
    output(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    output(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--constraint", constraints, wheel)
    return python


def test_name_and_version(wheel):
    assert wheel.name == f"attnd-{__version__}-py3-none-any.whl"


def test_holds_both_packages_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names} == {"attnd", "attnd_server", f"attnd-{__version__}.dist-info"}
    for name in ("attnd/py.typed", "attnd_server/py.typed", "attnd/v1/attention_pb2.py", "attnd/v1/attention_pb2.pyi"):
        assert name in names
    assert not [name for name in names if name.endswith(".pyc")]
    sources = {path.relative_to(ROOT / "server").as_posix() for path in (ROOT / "server").rglob("*.py")}
    assert sources <= names


def test_asks_for_grpc_and_protobuf_only(wheel):
    text = zipfile.ZipFile(wheel).read(f"attnd-{__version__}.dist-info/METADATA").decode()
    metadata = email.message_from_string(text)
    requirements = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.match(r"[\w-]+", line)[0] for line in requirements) == ["grpcio", "protobuf"]
    extras = {"torch", "cuda", "cli", "server", "transformers", "otel", "demo", "dev"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{extra}`" in readme for extra in extras)
    assert metadata["License-Expression"] == "Apache-2.0"


@pytest.mark.network
def test_installs_thin(environment):
    listing = output(sys.executable, "-m", "pip", "--python", environment, "list", "--format", "json")
    names = {package["name"].lower().replace("_", "-") for package in json.loads(listing)}
    assert names == {"attnd", "grpcio", "protobuf", "typing-extensions"}


@pytest.mark.network
def test_the_client_imports_alone(environment, tmp_path):
    program = (
        "import sys, attnd\n"
        "attnd.StepMetadata(query_lens=[1], context_lens=[0], page_tables=[[0]])\n"
        "print(attnd.__version__, {'torch', 'triton', 'numpy', 'attnd_server'} & set(sys.modules))"
    )
    assert output(environment, "-I", "-W", "error", "-c", program, cwd=tmp_path) == f"{__version__} set()\n"


@pytest.mark.network
def test_the_command_says_what_is_missing(environment, tmp_path):
    result = subprocess.run([environment.parent / "attnd"], capture_output=True, text=True, cwd=tmp_path, env={})
    assert result.returncode == 1
    assert re.fullmatch(
        r"attnd: \w+ is not installed, which comes with attnd\[cli\]; in a checkout: pip install '.\[cli\]'\n",
        result.stderr,
    )


@pytest.mark.network
def test_without_a_server_package_inproc_says_so(environment, tmp_path):
    program = (
        "import attnd\n"
        "try:\n"
        "    attnd.connect('inproc://')\n"
        "except (ImportError, attnd.errors.AttndError) as error:\n"
        "    print(type(error).__name__, error)"
    )
    assert "attnd[server]" in output(environment, "-I", "-c", program, cwd=tmp_path)


@pytest.fixture(scope="module")
def thin(wheel, tmp_path_factory) -> Path:
    """The commands of a fresh environment with the extra `cli` alone."""
    folder = tmp_path_factory.mktemp("thin")
    output(sys.executable, "-m", "venv", "--without-pip", folder)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet")
    output(*pip, "--constraint", ROOT / "constraints.txt", f"{wheel}[cli]")
    return folder / "bin"


@pytest.mark.network
def test_the_commands_run_without_torch_and_numpy(thin, tmp_path):
    program = "import importlib.util as u; print([n for n in ('torch', 'numpy', 'cachetools') if u.find_spec(n)])"
    assert output(thin / "python", "-I", "-c", program, cwd=tmp_path) == "[]\n"
    with ServerProcess(tmp_path / "log", "--device", "cpu", "--socket-dir", str(tmp_path / "sockets")) as server:
        at = server.address
        assert "naive" in output(thin / "attnd", "info", at, env={})
        assert json.loads(output(thin / "attnd", "info", "--json", at, env={}))["address"] == at
        assert "takes shm" in output(thin / "attnd", "doctor", at, env={})
        assert json.loads(output(thin / "attnd", "doctor", "--json", at, env={}))["planes"]["shm"]["works"]
        if "top" in output(thin / "attnd", "--help", env={}):
            assert output(thin / "attnd", "top", "--once", at, env={})
        with attnd.connect(at) as client, client.create_cache(**SMALL, name="thin") as cache:
            folder, address = tmp_path / "folder", ("--address", at)
            output(thin / "attnd", "cache", "export", cache.ref.id.hex(), folder, *address, env={})
            assert len(output(thin / "attnd", "cache", "import", folder, *address, env={}).strip()) == 32
    output(thin / "attnd", "token", "alice", tmp_path / "tokens", env={})
    assert output(thin / "attnd", "--version", env={}).startswith(f"attnd {__version__}, ")
    refused = subprocess.run([thin / "attnd", "serve"], capture_output=True, text=True, cwd=tmp_path, env={})
    assert (refused.returncode, refused.stdout) == (1, "")
    assert re.fullmatch(r"attnd: \w+ is not installed, which comes with attnd\[server\]; .*\n", refused.stderr)
