"""The commands of a worker without torch and numpy: against a real server, in a process that cannot import them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer

import attnd
from attnd.extras import missing
from attnd.protocol.tensors import Array
from attnd.v1 import tensor_pb2
from attnd_server.attention.config import FP8, AttentionConfig, Layout
from attnd_server.cli import main as cli
from attnd_server.cli import plane_case, plane_trial
from attnd_server.kv.snapshots import TENSORS
from tests.servers import ServerProcess

# Runs the command line in a process for which these are not installed.
PROGRAM = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numpy", "torch", "transformers", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Forbidden())
from attnd_server.__main__ import main
sys.exit(main())
"""
HAS_TOP = "top" in typer.main.get_command(cli.app).commands
needs_top = pytest.mark.skipif(not HAS_TOP, reason="there is no command top")


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "160"} | environment
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=plain, timeout=120)


@pytest.fixture(scope="module")
def planes_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("thin")
    with ServerProcess(folder / "log", "--device", "cpu", "--socket-dir", str(folder / "sockets")) as server:
        yield server.address


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("info",), "naive"),
        (("doctor",), "takes shm"),
        pytest.param(("top", "--once"), "", marks=needs_top),
    ],
    ids=lambda each: each[0] if isinstance(each, tuple) else "",
)
def test_commands_that_ask_a_server(planes_address: str, arguments: tuple[str, ...], shown: str) -> None:
    result = run(*arguments, planes_address)
    assert (result.returncode, result.stderr) == (0, "")
    assert shown in result.stdout
    assert result.stdout


@pytest.mark.parametrize("command", ["info", "doctor", pytest.param("top", marks=needs_top)])
def test_json_is_one_object_and_nothing_else(planes_address: str, command: str) -> None:
    once = ("--once",) if command == "top" else ()
    result = run(command, planes_address, "--json", *once)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\n") == 1
    assert isinstance(json.loads(result.stdout), dict)
    nobody = run(command, "127.0.0.1:1", "--json", "--timeout-s", "0.2", *once)
    assert (nobody.returncode, nobody.stdout, nobody.stderr.count("\n")) == (1, "", 1)


def test_the_keys_of_json(planes_address: str) -> None:
    with attnd.connect(planes_address) as client:
        geometry = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 64, "num_pages": 8, "dtype": "bfloat16"}
        with client.create_cache(**geometry, name=":smile: \x1b[31m[red]") as cache:
            told = json.loads(run("info", planes_address, "--json").stdout)
            drawn = run("info", planes_address).stdout
            assert told["epoch"] == str(cache.ref.epoch)
    assert set(told) == {
        *("address", "version", "epoch", "devices", "backends", "planes"),
        *("dtypes", "kv_dtypes", "layouts", "masks", "features", "limits", "caches", "kernels"),
    }
    assert told["kernels"] is None  # it compiles none for a processor
    (shown,) = told["caches"]
    assert shown["name"] == ":smile: \x1b[31m[red]"
    assert (shown["num_layers"], shown["dtype"], shown["kv_dtype"]) == (2, "bfloat16", "bfloat16")
    assert {"name": "shm", "available": True, "reason": ""} in told["planes"]
    # What a caller has named is shown as it is, and cannot do anything to a terminal.
    assert ":smile: \\x1b[31m[red]" in drawn
    assert "\x1b" not in drawn

    told = json.loads(run("doctor", planes_address, "--json").stdout)
    assert set(told) == {"address", "version", "epoch", "device", "client", "empty_rpc_us", "planes", "takes"}
    assert list(told["planes"]) == ["cuda", "shm", "inline"]
    assert told["takes"] == "shm"
    assert told["planes"]["shm"]["works"]
    assert set(told["planes"]["shm"]["call_us"]) == {"1", "16"}
    assert not told["planes"]["cuda"]["works"]


def test_the_doctor_tries_no_cuda_plane_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = plane_trial.try_plane(None, "cuda", None)  # type: ignore[arg-type]
    assert found.reason.startswith("skipped: this process has no torch, which comes with attnd[torch]; in a checkout")
    assert "attnd[cuda]" in found.reason
    assert (found.fault, found.call_us) == ("", {})


def test_what_the_doctor_expects_is_attention() -> None:
    case = plane_case.Case()
    q, k, v = (torch.frombuffer(part.data, dtype=torch.float32).view(part.shape).double() for part in case.call(2))
    stored_k, stored_v = (
        torch.frombuffer(part.data, dtype=torch.float32).view(part.shape).double() for part in case.stored()[1:]
    )
    expected = torch.tensor(case.expected(2), dtype=torch.float64).view(2, 32, 128)
    for request in range(2):
        slots = [case.page_tables[request][index // 16] * 16 + index % 16 for index in range(64)]
        keys, values = (
            torch.cat([part[slots], new[request : request + 1]]) for part, new in ((stored_k, k), (stored_v, v))
        )
        keys, values = (part.repeat_interleave(4, dim=1).transpose(0, 1) for part in (keys, values))
        output = torch.softmax(q[request, :, None] @ keys.transpose(1, 2) * 128**-0.5, -1) @ values
        torch.testing.assert_close(output[:, 0], expected[request])
    output = Array(tensor_pb2.DTYPE_FLOAT32, (2, 32, 128), memoryview(expected.float().numpy().tobytes()))
    assert plane_case.error_of(output, case.expected(2)) < 1e-6
    assert plane_case.error_of(output, [1.1 * each for each in case.expected(2)]) > 0.05


def test_token(tmp_path: Path) -> None:
    result = run("token", "alice", tmp_path / "tokens")
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.strip()) == 43


@pytest.mark.parametrize(
    "geometry",
    [
        {"dtype": "float32", "layout": "distinct"},
        {"dtype": "float16", "layout": "distinct", "head_dim_v": 8},
        {"dtype": "bfloat16", "kv_dtype": "float8_e4m3fn", "k_scales": [0.0123, 7.0], "v_scales": 1e-3},
        {"dtype": "float32", "kv_dtype": "float8_e4m3fn", "k_scales": 0.07, "layout": "distinct"},
    ],
    ids=lambda each: "-".join(str(value) for value in each.values()),
)
def test_a_cache_to_files_and_back(planes_address: str, tmp_path: Path, geometry: dict[str, object]) -> None:
    sizes = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "num_pages": 64, "page_size": 4}
    at = ("--address", planes_address)
    with attnd.connect(planes_address) as client, client.create_cache(**sizes, **geometry) as cache:
        dtype = getattr(torch, str(geometry["dtype"]))
        k, v = torch.randn(7, 2, 16), torch.randn(7, 2, int(geometry.get("head_dim_v", 16)))
        k[0, 0, :3] = torch.tensor([float("nan"), -0.0, 1e5])
        cache.store_kv(1, [12, 13, 19, 248, 249, 250, 251], k.to(dtype), v.to(dtype))
        exported = run("cache", "export", cache.ref.id.hex(), tmp_path / "one", *at, "--json")
        assert (exported.returncode, exported.stderr) == (0, "")
        assert json.loads(exported.stdout)["num_pages"] == 3
        imported = run("cache", "import", tmp_path / "one", *at, "--json")
        assert (imported.returncode, imported.stderr) == (0, "")
        told = json.loads(imported.stdout)
        with client.open_cache(told["id"]) as other:
            assert told["epoch"] == str(other.ref.epoch)
            slots = torch.arange(256)
            for layer in range(2):
                for before, after in zip(
                    cache.read_kv(layer, slots, like=k), other.read_kv(layer, slots, like=k), strict=True
                ):
                    assert torch.equal(before.view(torch.uint8), after.view(torch.uint8))
            again = run("cache", "export", told["id"], tmp_path / "two", *at)
            assert again.returncode == 0, again.stderr
    assert (tmp_path / "one" / TENSORS).read_bytes() == (tmp_path / "two" / TENSORS).read_bytes()


@pytest.mark.parametrize(("command", "extra"), [("serve", "server"), ("demo", "demo"), ("chat", "demo")])
def test_what_needs_torch_says_which_extra_brings_it(command: str, extra: str) -> None:
    result = run(command)
    assert (result.returncode, result.stdout) == (1, "")
    where = f"which comes with attnd[{extra}]; in a checkout: pip install '.[{extra}]'"
    assert result.stderr == f"attnd: torch is not installed, {where}\n"


@pytest.mark.parametrize(
    ("statement", "extra"),
    [
        ("attnd.Attention", "torch"),
        ("attnd.attach", "torch"),
        ("import attnd.integrations.transformers", "transformers"),
        ("attnd.connect('inproc://')", "server"),
    ],
)
def test_the_client_says_so_too(statement: str, extra: str) -> None:
    program = PROGRAM.partition("from attnd_server")[0] + f"import attnd\n{statement}"
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert f"comes with attnd[{extra}]; in a checkout: pip install '.[{extra}]'" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("module", "wanted", "extra"),
    [
        ("typer", "", "cli"),
        ("torch", "server", "server"),
        ("cuda.bindings", "server", "cuda"),
        ("opentelemetry.sdk", "server", "otel"),
    ],
)
def test_a_module_is_of_the_extra_that_brings_it(module: str, wanted: str, extra: str) -> None:
    told = missing(ModuleNotFoundError(name=module), wanted)
    assert told is not None
    assert f"attnd[{extra}]" in told
    assert missing(ModuleNotFoundError(name="json"), wanted) is None


def test_geometries_of_both_kinds_are_written_alike() -> None:
    """What a command knows of a geometry by names, a server knows by torch's types."""
    named = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 16, "num_pages": 4, "layout": Layout.DISTINCT}
    config = AttentionConfig(**named, dtype=torch.float16, kv_dtype=FP8)
    assert AttentionConfig.of_names(**named, dtype="float16", kv_dtype="float8_e4m3fn", kv_split={}) == config
    assert (config.num_bytes, config.is_quantised) == (2 * 4 * 16 * 2 * 16, True)
