"""Calls of workers on a GPU as engines make them: outputs in memory that the caller has, rows that lie apart or pad."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attnd
from tests.attention import dense_attention
from tests.servers import ServerProcess

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

PAGE, HEADS, KV_HEADS, HEAD_DIM = 16, 8, 2, 64
GEOMETRY = {"num_layers": 2, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "num_pages": 64, "dtype": torch.bfloat16}
LSE = attnd.AttentionOptions(return_lse=True)


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("outputs")
    options = "--device", request.param, "--socket-dir", str(folder / "sockets")
    with ServerProcess(folder / "log", *options) as process:
        yield process.address
        log = process.log
    assert "internal error" not in log, log


@pytest.fixture(params=["inline", "shm"])
def session(request: pytest.FixtureRequest, address: str) -> Iterator[attnd.Session]:
    with attnd.connect(address, plane=request.param) as client, client.create_cache(**GEOMETRY) as cache:
        with cache.session() as opened:
            yield opened


def qkv(num_rows: int, device: str) -> list[torch.Tensor]:
    """Slices of one projection."""
    sizes = [heads * HEAD_DIM for heads in (HEADS, KV_HEADS, KV_HEADS)]
    projection = torch.randn(num_rows, sum(sizes), device=device, dtype=torch.bfloat16)
    return [part.unflatten(1, (-1, HEAD_DIM)) for part in projection.split(sizes, 1)]


def dense(num_rows: int, device: str) -> torch.Tensor:
    return torch.full((num_rows, HEADS, HEAD_DIM), torch.nan, device=device).bfloat16()


def rows_apart(num_rows: int, device: str) -> torch.Tensor:
    return dense(3 * num_rows, device)[1::3]


@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("make", [dense, rows_apart])
@pytest.mark.parametrize("worker", ["cpu", "cuda"])
def test_outputs_go_to_where_they_are_wanted(session: attnd.Session, worker: str, make: Any, place: str) -> None:
    kept = []
    for num_tokens, num_rows in ((PAGE, PAGE), (PAGE + 1, PAGE + 4), (1, 1), (1, 8), (1, 8)):
        step = session.step(attnd.StepMetadata([num_tokens], [0], [[3, 5]]))
        for layer in range(2):
            q, k, v = qkv(num_rows, worker)
            out = make(num_rows, place)
            output, lse = step.attend(layer, q, k, v, LSE, out=out)
            assert output is out
            assert lse.device == q.device
            kept.append((out, lse, num_tokens, dense_attention(*(each[:num_tokens] for each in (q, k, v)))))
    for out, lse, num_tokens, expected in kept:  # at the end: none lies where a later one went
        torch.testing.assert_close(out[:num_tokens], expected.to(place), rtol=2e-2, atol=2e-2)
        assert (out[num_tokens:] == 0).all()
        assert lse[:num_tokens].isfinite().all()
        assert (lse[num_tokens:] == -torch.inf).all()
        base = out.as_strided((out.untyped_storage().nbytes() // 2,), (1,), 0)
        assert int(base.isnan().sum()) == base.numel() - out.numel()


@pytest.mark.parametrize("worker", ["cpu", "cuda"])
def test_rows_that_lie_apart_give_the_bits_of_dense_ones(session: attnd.Session, worker: str) -> None:
    for num_tokens in (PAGE + 1, PAGE + 1, 1):
        step = session.step(attnd.StepMetadata([num_tokens], [0], [[3, 5]]))
        q, k, v = qkv(num_tokens, worker)
        loose = step.attend(0, q, k, v)
        assert torch.equal(loose, step.attend(1, q.contiguous(), k.contiguous(), v.contiguous()))


def test_tensors_of_both_sides_in_one_call(session: attnd.Session) -> None:
    step = session.step(attnd.StepMetadata([PAGE], [0], [[3]]))
    for which in range(3):
        given = qkv(PAGE, "cuda")
        on_both = [each.cpu() if index == which else each for index, each in enumerate(given)]
        out = torch.full((PAGE, HEADS, HEAD_DIM), torch.nan, device="cuda").bfloat16()
        assert step.attend(0, *on_both, out=out) is out
        torch.testing.assert_close(out, dense_attention(*given), rtol=2e-2, atol=2e-2)
        assert step.attend(1, *on_both).device == on_both[0].device


def test_an_error_leaves_the_output_as_it_was(session: attnd.Session) -> None:
    out = torch.full((PAGE, HEADS, HEAD_DIM), 7.0, device="cuda").bfloat16()
    step = session.step(attnd.StepMetadata([PAGE], [0], [[3]]))
    with pytest.raises(attnd.InvalidRequest, match="layer is 2"):
        step.attend(2, *qkv(PAGE, "cuda"), out=out)
    with pytest.raises(attnd.InvalidRequest, match="out has dtype float32"):
        step.attend(0, *qkv(PAGE, "cuda"), out=out.float())
    assert (out == 7).all()
