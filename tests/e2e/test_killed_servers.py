"""A server that is killed or told to end while a call runs: an answer that is right, or an error, and nothing else."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import attnd
from tests.servers import ServerProcess

# One call of it takes the plain backend most of a second.
NUM_TOKENS, HEADS, DIM = 3000, 4, 64
GEOMETRY = {
    "num_layers": 2,
    "num_kv_heads": HEADS,
    "head_dim": DIM,
    "num_pages": 188,
    "dtype": "float32",
    "backend": "naive",
}
PLANES = ["inline", "shm"]


def serve(folder: Path) -> ServerProcess:
    options = ("--device", "cpu", "--threads", "1", "--socket-dir", str(folder / "sockets"))
    return ServerProcess(folder / "log", *options)


def submit(session: attnd.Session, num_tokens: int) -> tuple[attnd.PendingCall, torch.Tensor]:
    """A call that is under way, of a step that the server has taken, and the call's q, k and v."""
    tensors = torch.randn(3, num_tokens, HEADS, DIM)
    step = session.step(attnd.StepMetadata([num_tokens], [0], [list(range(188))], list(range(num_tokens))))
    step.attend(0, *tensors)
    return step.submit(1, *tensors), tensors  # a step is under way until its last layer was answered


@pytest.mark.parametrize("plane", PLANES)
def test_sigterm_while_a_call_runs_lets_it_finish(tmp_path: Path, plane: str) -> None:
    with serve(tmp_path) as server, attnd.connect(server.address, plane=plane) as client:
        session = client.create_cache(**GEOMETRY).session()
        call, tensors = submit(session, NUM_TOKENS // 3)
        server.terminate()
        expected = scaled_dot_product_attention(*tensors.double().transpose(1, 2), is_causal=True).transpose(0, 1)
        np.testing.assert_allclose(call.wait().double(), expected, atol=2e-5)
        session.close()
        assert server.wait() == 0


def test_sigkill_while_a_call_runs_is_told_at_once(tmp_path: Path) -> None:
    # Of the shm plane: see test_shm_deaths.py.
    with serve(tmp_path) as server, attnd.connect(server.address, plane="inline") as client:
        session = client.create_cache(**GEOMETRY).session()
        call, _ = submit(session, NUM_TOKENS)
        server.freeze()  # so that it is in the middle of it
        server.kill()
        started = time.monotonic()
        with pytest.raises(attnd.Disconnected):
            call.wait()
        assert time.monotonic() - started < 5
        with pytest.raises(attnd.Disconnected):  # and again, whoever asks
            call.wait()
        session.close()
