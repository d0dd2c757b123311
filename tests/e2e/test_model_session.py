"""Passes of a model over the planes of a real server: whole and in parts the values of attention, and what is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

import attnd
from attnd.integrations import model_runs, model_session
from attnd.integrations.model_session import ModelSession
from tests.attention import dense_attention
from tests.servers import ServerProcess

PAGE, LAYERS, HEADS, KV_HEADS, DIM = 4, 3, 4, 2, 16
GEOMETRY = {
    "num_layers": LAYERS,
    "num_kv_heads": KV_HEADS,
    "head_dim": DIM,
    "num_pages": 64,
    "page_size": PAGE,
    "dtype": "float32",
}
MOST_TOKENS = 7
# Of a token: q and output, k and v, lse; and five times alignment.
TOKEN_BYTES = 2 * HEADS * DIM * 4 + 2 * KV_HEADS * DIM * 4 + 4 * HEADS


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose steps have few tokens and requests."""
    limits = ("--max-step-tokens", str(MOST_TOKENS), "--max-step-reqs", "3")
    with ServerProcess(tmp_path_factory.mktemp("small") / "log", *limits) as process:
        yield process


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose regions hold calls of few tokens."""
    folder = tmp_path_factory.mktemp("narrow")
    region = str(5 * 64 + MOST_TOKENS * TOKEN_BYTES)
    with ServerProcess(folder / "log", "--socket-dir", str(folder / "sockets"), "--region-bytes", region) as process:
        yield process


@pytest.fixture(params=["small", "narrow"])
def address(request: pytest.FixtureRequest) -> str:
    """Of a server with limits of steps, and of one with limits of bytes."""
    server: ServerProcess = request.getfixturevalue(request.param)
    return server.address


class Rows:
    """Requests of a batch, and K and V of each layer, as a model that computes by itself would have them."""

    def __init__(self, num_rows: int) -> None:
        pages = torch.randperm(64).tolist()
        self.pages = [pages[16 * row : 16 * (row + 1)] for row in range(num_rows)]
        self.lengths = [0] * num_rows
        self.past = [[(torch.empty(0, KV_HEADS, DIM),) * 2 for _ in range(num_rows)] for _ in range(LAYERS)]

    def metadata(self, lens: list[int]) -> attnd.StepMetadata:
        slots = [
            pages[position // PAGE] * PAGE + position % PAGE
            for pages, length, new in zip(self.pages, self.lengths, lens, strict=True)
            for position in range(length, length + new)
        ]
        kind = "decode" if len(set(lens)) == 1 else "prefill"
        return attnd.StepMetadata(lens, list(self.lengths), self.pages, slots, kind=kind)

    def attended(self, layer: int, lens: list[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What a layer's attention gives; its K and V are past from now on."""
        outputs = []
        tensors = zip(q.split(lens), k.split(lens), v.split(lens), strict=True)
        for row, (new_q, new_k, new_v) in enumerate(tensors):
            old_k, old_v = self.past[layer][row]
            self.past[layer][row] = past = torch.cat([old_k, new_k]), torch.cat([old_v, new_v])
            outputs.append(dense_attention(new_q, *past))
        return torch.cat(outputs)


def new_tokens(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(num_tokens, HEADS, DIM), *(torch.randn(num_tokens, KV_HEADS, DIM) for _ in "kv")


def run_pass(session: ModelSession, rows: Rows, lens: list[int]) -> None:
    """One pass, compared layer by layer."""
    begun = session.begin(rows.metadata(lens))
    for layer in range(LAYERS):
        q, k, v = new_tokens(sum(lens))
        output = begun.attend(layer, q, k, v)
        torch.testing.assert_close(output, rows.attended(layer, lens, q, k, v))
    begun.finish()
    rows.lengths = [length + new for length, new in zip(rows.lengths, lens, strict=True)]


@pytest.mark.parametrize("plane", ["auto", "inline"])
@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1, MOST_TOKENS, MOST_TOKENS + 1, 17, 30])
def test_prompts_of_every_length(address: str, plane: str, length: int) -> None:
    with attnd.connect(address) as client, client.create_cache(**GEOMETRY) as cache:
        session, rows = ModelSession(cache, plane), Rows(1)
        for new in (length, 1, 1, 9):
            run_pass(session, rows, [new])
        session.close()


def test_batches_of_different_lengths(address: str) -> None:
    with attnd.connect(address) as client, client.create_cache(**GEOMETRY) as cache:
        session, rows = ModelSession(cache), Rows(4)
        for lens in ([17, 1, 4, 8], [1] * 4, [0, 3, 0, 12], [1] * 4):
            run_pass(session, rows, lens)
        session.close()


def test_lse_is_split_too(address: str) -> None:
    options = attnd.AttentionOptions(return_lse=True)
    q, k, v = new_tokens(20)
    with attnd.connect(address) as client, client.create_cache(**GEOMETRY) as cache:
        output, lse = ModelSession(cache).begin(Rows(1).metadata([20])).attend(0, q, k, v, options)
    scores = torch.einsum("nhd,shd->nhs", q.double(), k.double().repeat_interleave(2, 1)) * DIM**-0.5
    scores = scores.masked_fill(~torch.ones(20, 20).tril().bool()[:, None], -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(2).float())
    torch.testing.assert_close(output, dense_attention(q, k, v))


def test_store_only_and_cache_only_passes(address: str) -> None:
    q, k, v = new_tokens(20)
    with attnd.connect(address) as client, client.create_cache(**GEOMETRY) as cache:
        session, rows = ModelSession(cache), Rows(1)
        stored = dataclasses.replace(rows.metadata([20]), store_only=True)
        assert session.begin(stored).attend(1, None, k, v) is None
        seen = attnd.StepMetadata([20], [20], rows.pages, cache_only=True)
        output = session.begin(seen).attend(1, q, None, None)
        session.close()
    torch.testing.assert_close(output, dense_attention(q, k, v, causal=False))


def test_a_window_that_reaches_over_a_cut(address: str) -> None:
    q, k, v = new_tokens(20)
    with attnd.connect(address) as client, client.create_cache(**GEOMETRY) as cache:
        begun = ModelSession(cache).begin(Rows(1).metadata([20]))
        output = begun.attend(2, q, k, v, attnd.AttentionOptions(window=6))
    for row in range(20):
        first = max(0, row - 5)
        expected = dense_attention(q[row : row + 1], k[first : row + 1], v[first : row + 1])
        torch.testing.assert_close(output[row : row + 1], expected)


def test_steps_of_few_parts_are_opened_once(small: ServerProcess) -> None:
    most = model_runs.MOST_OPEN_STEPS
    with attnd.connect(small.address) as client, client.create_cache(**GEOMETRY) as cache:
        for num_parts, num_steps in ((1, 1), (most, most), (most + 1, 1 + LAYERS * (most + 1) - 1)):
            session = ModelSession(cache)
            run_pass(session, Rows(1), [MOST_TOKENS * num_parts])
            assert session.timings().num_steps == num_steps
            assert session.timings().num_calls == LAYERS * num_parts
            session.close()


def test_messages_limit_the_calls_of_the_inline_plane(
    small: ServerProcess, server_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with attnd.connect(server_address) as client, client.create_cache(**GEOMETRY) as cache:
        limit = client.capabilities().limits.max_message_bytes
        token_bytes = HEADS * DIM * 4 + 2 * KV_HEADS * DIM * 4
        monkeypatch.setattr(model_session, "HEADER_BYTES", limit - MOST_TOKENS * token_bytes)
        session = ModelSession(cache, "inline")
        run_pass(session, Rows(1), [2 * MOST_TOKENS])
        assert session.timings().num_calls == 2 * LAYERS
        session.close()


def test_planes_and_why_not_better(narrow: ServerProcess, small: ServerProcess) -> None:
    on_cpu = "the model's tensors are on cpu, and must be on a GPU"
    for address, asked, pinned, plane, refusals in (
        (narrow.address, "auto", "auto", "shm", {"cuda": on_cpu}),
        (
            small.address,
            "auto",
            "auto",
            "inline",
            {"cuda": on_cpu, "shm": "the server was started without --socket-dir"},
        ),
        (narrow.address, "auto", "inline", "inline", {}),
        (narrow.address, "inline", "auto", "inline", {}),
        (narrow.address, "shm", "inline", "shm", {}),
    ):
        with attnd.connect(address, plane=pinned) as client, client.create_cache(**GEOMETRY) as cache:
            session = ModelSession(cache, asked)
            assert (session.plane, session.refusals) == ("", {})
            run_pass(session, Rows(1), [1])
            assert session.plane == plane
            assert {name: session.refusals[name] for name in refusals} == refusals
            session.close()
    for pinned, asked in (("cuda", "auto"), ("auto", "cuda")):
        with attnd.connect(narrow.address, plane=pinned) as client, client.create_cache(**GEOMETRY) as cache:
            with pytest.raises(attnd.Unsupported, match=f"plane is cuda, but {on_cpu}"):
                run_pass(ModelSession(cache, asked), Rows(1), [1])
    with attnd.connect(small.address) as client, client.create_cache(**GEOMETRY) as cache:
        with pytest.raises(attnd.InvalidRequest, match="plane is 'gpu', but must be one of auto"):
            ModelSession(cache, "gpu")
        with pytest.raises(attnd.Unsupported, match="plane is shm, but the server was started without --socket-dir"):
            run_pass(ModelSession(cache, "shm"), Rows(1), [1])


def test_a_cache_in_another_ones_place(narrow: ServerProcess) -> None:
    with attnd.connect(narrow.address) as client:
        with client.create_cache(**GEOMETRY) as cache, client.create_cache(**GEOMETRY) as other:
            session = ModelSession(cache)
            run_pass(session, Rows(1), [5])
            session.cache = other
            assert session.plane == ""
            run_pass(session, Rows(1), [5])
            assert other.info().num_pages_written
            assert session.timings().num_steps == 2
            assert session.timings().plane == "shm"
            session.reset_timings()
            assert session.timings().num_steps == 0
            session.close()
            run_pass(session, Rows(1), [5])
            session.close()
