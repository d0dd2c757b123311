"""Passes of a model on a GPU, through a real server: on the cuda plane where they can be, and right everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import attnd
from attnd.integrations.model_session import ModelSession
from tests.gpu.test_cuda_plane import GEOMETRY, LAYERS, assert_same, new_tokens, serving, step_of
from tests.servers import ServerProcess

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU = 0
PLAIN = [attnd.AttentionOptions()] * LAYERS
WINDOWS = [attnd.AttentionOptions(window=0 if layer % 2 else 9) for layer in range(LAYERS)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Whose cuda regions hold passes of 800 tokens: what was asked for, rounded up to 2 MiB."""
    with serving(tmp_path_factory.mktemp("passes"), "--cuda-region-bytes", "1MiB") as process:
        yield process
        log = process.log
    assert "internal error" not in log, log


@pytest.fixture
def pair(server: ServerProcess) -> Iterator[Pair]:
    with attnd.connect(server.address) as client, attnd.connect("inproc://") as local:
        made = Pair(client, local)
        yield made
        made.close()


class Pair:
    """A session, and one in process whose passes are the same."""

    def __init__(self, client: attnd.Client, local: attnd.Client) -> None:
        self.ours, self.theirs = client.create_cache(**GEOMETRY), local.create_cache(**GEOMETRY)
        self.session, self._reference = ModelSession(self.ours), self.theirs.session()
        self.lens = [0] * 5

    def run(self, num_new: list[int], options: list[attnd.AttentionOptions] = PLAIN) -> None:
        """A pass of the first requests, of which none is looked at before all have begun."""
        lens = self.lens[: len(num_new)]
        begun = self.session.begin(step_of(lens, num_new))
        calls = [new_tokens(sum(num_new), GPU) for _ in range(LAYERS)]
        outputs = [begun.attend(layer, *call, options[layer]) for layer, call in enumerate(calls)]
        begun.finish()
        step = self._reference.step(step_of(lens, num_new))
        for layer, (call, output) in enumerate(zip(calls, outputs, strict=True)):
            expected = step.attend(layer, *call, options[layer])
            if self.session.timings().backend == self._reference.timings().backend:
                assert_same(output, expected)
            else:
                torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
        self.lens[: len(num_new)] = [length + new for length, new in zip(lens, num_new, strict=True)]

    def close(self) -> None:
        self.session.close()
        like = torch.empty(0, dtype=torch.bfloat16)
        slots = list(range(GEOMETRY["num_pages"] * GEOMETRY["page_size"]))
        for layer in range(LAYERS):
            for one, other in zip(
                *(each.read_kv(layer, slots, like) for each in (self.ours, self.theirs)), strict=True
            ):
                assert torch.equal(one, other)
        self.ours.delete()
        self.theirs.delete()


def test_a_prompt_and_many_tokens_on_the_cuda_plane(pair: Pair) -> None:
    pair.run([37, 1, 20, 64, 5])
    for _ in range(30):
        pair.run([1] * 5)
        assert (pair.session.plane, pair.session.refusals) == ("cuda", {})


def test_layers_that_differ(pair: Pair) -> None:
    pair.run([20, 30], WINDOWS)
    assert pair.session.plane == "shm"
    for _ in range(3):
        pair.run([1, 1], WINDOWS)
        assert pair.session.plane == "cuda"


def test_a_prompt_that_exceeds_the_region(pair: Pair) -> None:
    pair.run([1, 1])
    pair.run([410, 410])
    assert pair.session.plane == "shm"
    assert "tokens are larger than the plane's region" in pair.session.refusals["cuda"]
    pair.run([1, 1])
    assert pair.session.plane == "cuda"


@pytest.mark.parametrize("num_layers", [0, 1, LAYERS - 1])
def test_a_pass_that_was_stopped(pair: Pair, num_layers: int) -> None:
    """The next one is right, over either plane, and so is what is stored in the end."""
    for num_new in ([20, 20], [1, 1], [410, 410]):
        begun = pair.session.begin(step_of(pair.lens[:2], num_new))
        for layer in range(num_layers):
            begun.attend(layer, *new_tokens(sum(num_new), GPU))
        pair.run(num_new)


def test_a_pass_that_is_interrupted_in_a_layer(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnd.planes.cuda.plane import CudaPlane

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for num_new in ([20, 20], [1, 1]):
        begun = pair.session.begin(step_of(pair.lens[:2], num_new))
        begun.attend(0, *new_tokens(sum(num_new), GPU))
        with monkeypatch.context() as patch:
            patch.setattr(CudaPlane, "hand_over", interrupted)
            with pytest.raises(KeyboardInterrupt):
                begun.attend(1, *new_tokens(sum(num_new), GPU))
        pair.run(num_new)


def test_layers_in_another_order(pair: Pair) -> None:
    calls = [new_tokens(4, GPU) for _ in range(LAYERS)]
    begun, step = pair.session.begin(step_of([0], [4])), pair._reference.step(step_of([0], [4]))
    outputs = [(layer, begun.attend(layer, *calls[layer])) for layer in (0, 2, 1, 3)]
    for layer, output in outputs:
        torch.testing.assert_close(output, step.attend(layer, *calls[layer]), rtol=2e-2, atol=2e-2)
    assert pair.session.plane == "shm"
    assert "must attend all in order" in pair.session.refusals["cuda"]


def test_a_backend_that_the_plane_has_not(server: ServerProcess) -> None:
    with attnd.connect(server.address) as client, client.create_cache(**GEOMETRY, backend="sdpa") as cache:
        session = ModelSession(cache)
        q, k, v = new_tokens(1, GPU)
        begun = session.begin(step_of([0], [1]))
        for layer in range(LAYERS):
            torch.testing.assert_close(begun.attend(layer, q, k, v), v.repeat_interleave(4, 1), rtol=1e-2, atol=1e-2)
        begun.finish()
        assert session.plane == "shm"
        assert "backend sdpa serves this step" in session.refusals["cuda"]
        session.close()


def test_a_failed_pass_is_told(pair: Pair) -> None:
    pair.run([3])
    begun = pair.session.begin(attnd.StepMetadata([1], [3], [[0, 10**6]], [3]))
    with pytest.raises(attnd.InvalidRequest, match=r"page_tables\[0, 1\] is 1000000"):  # noqa: PT012  # or sooner
        for layer in range(LAYERS):
            begun.attend(layer, *new_tokens(1, GPU))
        begun.finish()
    pair.run([3])
    assert pair.session.plane == "cuda"


def test_tensors_of_a_gpu_over_shm(server: ServerProcess, tmp_path: Path) -> None:
    """Strided ones too; none of the outputs lies where another one's bytes went."""
    with attnd.connect(server.address, plane="shm") as client, attnd.connect("inproc://") as local:
        geometry = {**GEOMETRY, "backend": "triton_grouped"}  # auto may choose cuDNN in process, and not in a server
        with client.create_cache(**geometry) as ours, local.create_cache(**geometry) as theirs:
            session, reference = ours.session(), theirs.session()
            outputs = []
            for num_new in ([300], [300], [1], [1], [17], [300]):
                step, other = session.step(step_of([0], num_new)), reference.step(step_of([0], num_new))
                for layer in range(LAYERS):
                    q, k, v = new_tokens(num_new[0], GPU)
                    q = q.transpose(0, 1).contiguous().transpose(0, 1)
                    for options in (attnd.AttentionOptions(), attnd.AttentionOptions(return_lse=True)):
                        outputs.append((step.attend(layer, q, k, v, options), other.attend(layer, q, k, v, options)))
            for ours_, theirs_ in outputs:
                assert_same(ours_, theirs_)
                assert (ours_[0] if isinstance(ours_, tuple) else ours_).is_cuda
            session.close()
