"""What an operator sees of a cuda plane: its row in GetStatus, and the spans of its steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attnd
from attnd.v1 import plane_pb2
from tests.servers import ServerProcess, wait_for
from tests.spans import Collector, traced

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SIZES = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "num_pages": 8}
GEOMETRY = {**SIZES, "dtype": torch.bfloat16}
DECODE = attnd.StepMetadata([1], [5], [[1]], [21], kind="decode")


@pytest.mark.parametrize("plane", ["cuda", "shm", "inline"])
def test_a_session_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plane: str) -> None:
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    options = ("--device", "cuda:0", "--socket-dir", str(tmp_path / "s"), "--kv-bytes", "1GiB", "--traces", "1000")
    q = torch.randn(1, 8, 64, dtype=torch.bfloat16, device="cuda")
    k, v = torch.randn(2, 1, 2, 64, dtype=torch.bfloat16, device="cuda")
    with ServerProcess(tmp_path / "log", *options) as server, traced() as memory:
        with attnd.connect(server.address) as client, client.create_cache(**GEOMETRY) as cache:
            with cache.session(plane=plane) as session:
                for _ in range(3):
                    step = session.step(DECODE)
                    for layer in range(4):
                        step.attend(layer, q, k, v)
                    if plane == "cuda":
                        step.finish()
                (row,) = client.status().sessions
                assert row.plane == plane_pb2.Plane.Value(f"PLANE_{plane.upper()}")
                assert (row.served.steps, row.served.tokens, row.served.calls) == (3, 3, 12)
                assert sum(row.served.times.kernel) == (12 if plane == "cuda" else 1)
            ours = memory.spans("attnd.step")
            assert len(ours) == 3
            wait_for(lambda: len(collector.spans("attnd.step")) == 3, "the server's spans do not come")
            theirs = collector.spans("attnd.step")
    collector.close()
    assert {span.parent_id for span in theirs} == {span.id for span in ours}
    assert {span.attributes["attnd.plane"] for span in theirs} == {plane}
    calls = collector.spans("attnd.call")
    assert len(calls) == (3 if plane == "cuda" else 12)
    for call in calls:
        assert call.attributes["attnd.kernel_us"] > 0
        assert call.attributes["attnd.backend"] in ("triton", "triton_grouped")
    if plane == "cuda":
        assert all("attnd.step_us" in span.attributes for span in ours)
