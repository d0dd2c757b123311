"""Passes of a model on a cuda plane, both ends in this process and without a GPU: which stay there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attnd
from attnd.integrations import model_pass
from attnd.integrations.model_session import MAX_LEFT, ModelSession
from attnd.planes.choice import PlaneOptions
from attnd.session import Session
from tests import host_channels, interpreter

pytestmark = pytest.mark.skipif(
    interpreter.reason_against() is not None or torch.cuda.is_available(), reason="needs Triton's interpreter"
)

LAYERS, HEADS = 3, 4
GEOMETRY = {
    "num_layers": LAYERS,
    "num_kv_heads": 2,
    "head_dim": 16,
    "num_pages": 16,
    "page_size": 16,
    "dtype": "float32",
    "backend": "triton_grouped",
}
PLAIN = attnd.AttentionOptions()
WINDOWS = [attnd.AttentionOptions(window=3), PLAIN, attnd.AttentionOptions(window=3)]

Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[attnd.Client]:
    """Of a server with cuda planes, whose regions hold passes of 60 tokens."""
    monkeypatch.setattr(model_pass, "GPUS", ("cpu",))
    with interpreter.interpreter(), host_channels.serving(tmp_path, monkeypatch, region_bytes=52_000) as (opened, *_):
        opened.plane = PlaneOptions("auto")
        yield opened


class Pair:
    """A session, and another whose passes are the same on the inline plane: outputs must be equal bit for bit."""

    def __init__(self, client: attnd.Client, plane: str = "auto") -> None:
        self._caches = [client.create_cache(**GEOMETRY) for _ in range(2)]
        self.session = ModelSession(self._caches[0], plane)
        self._reference: Session = self._caches[1].session(plane="inline")
        self.length = 0

    def metadata(self, num_tokens: int, page: int = 2) -> attnd.StepMetadata:
        slots = range(self.length, self.length + num_tokens)
        return attnd.StepMetadata([num_tokens], [self.length], [[0, 1, page, 3, 4, 5, 6, 7]], slots)

    def run(
        self,
        num_tokens: int,
        options: list[attnd.AttentionOptions] | None = None,
        layers: Any = range(LAYERS),
        **more: Any,
    ) -> model_pass.ModelPass:
        """A pass, which is compared once it is over."""
        begun = self.session.begin(self.metadata(num_tokens), **more)
        done = []
        for layer in layers:
            call = new_tokens(num_tokens)
            used = (options or [PLAIN] * LAYERS)[layer]
            done.append((layer, call, used, begun.attend(layer, *call, used)))
        self.session.settle()
        step = self._reference.step(self.metadata(num_tokens))  # now: a step under way holds up the executor here
        for layer, call, used, output in done:
            assert torch.equal(output, step.attend(layer, *call, used))
        self.length += num_tokens
        return begun

    def close(self) -> None:
        self.session.close()
        self._reference.close()
        stored = [
            [cache.read_kv(layer, range(self.length), torch.empty(0)) for layer in range(LAYERS)]
            for cache in self._caches
        ]
        for ours, theirs in zip(*stored, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
        for cache in self._caches:
            cache.delete()


@pytest.fixture
def pair(client: attnd.Client) -> Iterator[Pair]:
    """A pair whose stored K and V are compared at the end."""
    made = Pair(client)
    yield made
    made.close()


def new_tokens(num_tokens: int, heads: int = HEADS) -> Call:
    return torch.randn(num_tokens, heads, 16), torch.randn(num_tokens, 2, 16), torch.randn(num_tokens, 2, 16)


def test_a_model_whose_layers_are_alike_is_on_the_cuda_plane_from_the_first_pass(pair: Pair) -> None:
    for num_tokens in (9, 1, 1, 3):
        pair.run(num_tokens)
        assert (pair.session.plane, pair.session.refusals) == ("cuda", {})
    assert pair.session.timings().num_steps == 4
    assert pair.session.timings().num_calls == 4 * LAYERS
    assert pair.session.timings().backend == "triton_grouped"


def test_a_model_whose_layers_differ_is_there_from_the_second_pass(pair: Pair) -> None:
    pair.run(9, WINDOWS)
    assert pair.session.plane == "shm"
    assert "the options of layer 1 are others than the step was opened with" in pair.session.refusals["cuda"]
    for _ in range(3):
        pair.run(1, WINDOWS)
        assert (pair.session.plane, pair.session.refusals) == ("cuda", {})


def test_another_session_of_the_model_knows_its_layers(client: attnd.Client) -> None:
    first, second = Pair(client), Pair(client)
    first.run(9, WINDOWS)
    second.session = ModelSession(second.session.cache, like=first.session)
    second.run(9, WINDOWS)
    assert second.session.plane == "cuda"
    first.close()
    second.close()


def test_options_that_change_in_each_pass_end_the_tries(pair: Pair) -> None:
    for number in range(MAX_LEFT + 1):
        pair.run(2, [PLAIN, attnd.AttentionOptions(softcap=1.0 + number), PLAIN])
        assert pair.session.plane == "shm"
    assert "options of layer 1" in pair.session.model.why_no_cuda
    pair.run(1)
    assert pair.session.plane == "shm"


@pytest.mark.parametrize("layers", [(0, 2, 1), (0, 1, 1, 2), (1, 0, 2)])
def test_layers_in_another_order_are_served_over_the_stream(pair: Pair, layers: tuple[int, ...]) -> None:
    for _ in range(2):
        pair.run(3, layers=layers)
        assert pair.session.plane == "shm"
        assert "must attend all in order" in pair.session.refusals["cuda"]


def test_layers_that_are_known_to_be_in_another_order_never_go_there(pair: Pair) -> None:
    pair.session.begin(pair.metadata(1), layers=(0, 2)).attend(0, *new_tokens(1))
    assert pair.session.refusals["cuda"] == "the model attends layers [0, 2], and must attend all 3 in order"
    pair.run(1)
    assert pair.session.plane == "cuda"
    pinned = ModelSession(pair.session.cache, "cuda")
    with pytest.raises(attnd.Unsupported, match=r"plane is cuda, but the model attends layers \[0, 2\], and must"):
        pinned.begin(pair.metadata(1), layers=(0, 2)).attend(0, *new_tokens(1))


def test_a_pinned_plane_is_not_left_for_a_model_that_is_not_for_it(client: attnd.Client) -> None:
    pinned = Pair(client, "cuda")
    told = "plane is cuda, but the model attends layer 2 where 1 is next, and must attend all in order"
    for error in (told, told):
        with pytest.raises(attnd.Unsupported, match=error):
            pinned.run(3, layers=(0, 2, 1))


def test_a_pinned_plane_serves_a_model_whose_layers_differ(client: attnd.Client) -> None:
    pinned = Pair(client, "cuda")
    pinned.run(9, WINDOWS)
    pinned.run(1, WINDOWS)
    assert pinned.session.plane == "cuda"
    pinned.close()


@pytest.mark.parametrize("plane", ["auto", "cuda"])
def test_a_pass_that_exceeds_the_region_goes_over_the_stream(client: attnd.Client, plane: str) -> None:
    pair = Pair(client, plane)
    pair.run(2)
    pair.run(90)
    assert pair.session.plane == "shm"
    told = "the tensors of 90 tokens are larger than the plane's region; the server's --cuda-region-bytes gives more"
    assert pair.session.refusals["cuda"] == told
    pair.run(2)
    assert pair.session.plane == "cuda"
    pair.close()


def test_the_server_hears_of_a_pass_before_its_first_layer(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.run(2, device=torch.device("cpu"))
    sent = pair.session.timings().num_steps
    pair.session.begin(pair.metadata(1), device=torch.device("cpu"))
    assert pair.session.timings().num_steps == sent + 1
    pair.run(1, device=torch.device("cpu"))
    assert pair.session.plane == "cuda"


def test_a_failed_pass_is_told_by_its_end_and_once(pair: Pair) -> None:
    pair.run(2)
    for tell in ("finish", "settle", "begin"):
        begun = pair.session.begin(attnd.StepMetadata([1], [2], [[0, 99]], [2]))
        with pytest.raises(attnd.InvalidRequest, match=r"page_tables\[0, 1\] is 99"):  # noqa: PT012  # or sooner
            for layer in range(LAYERS):
                begun.attend(layer, *new_tokens(1))
            if tell == "finish":
                begun.finish()
            elif tell == "settle":
                pair.session.settle()
            else:
                pair.session.begin(pair.metadata(1))
        pair.session.settle()
    pair.run(2)
    assert pair.session.plane == "cuda"


@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_an_interrupted_pass_leaves_nothing_behind(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, num_layers: int
) -> None:
    """Between two layers, and in the middle of one, where the plane ends."""
    pair.run(2)
    begun = pair.session.begin(pair.metadata(3))
    for layer in range(num_layers):
        begun.attend(layer, *new_tokens(3))
    pair.run(3)
    begun = pair.session.begin(pair.metadata(3))
    for layer in range(num_layers):
        begun.attend(layer, *new_tokens(3))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(host_channels.HostPlane, "hand_over", interrupted)
        with pytest.raises(KeyboardInterrupt):
            begun.attend(num_layers, *new_tokens(3))
    pair.run(3)
    assert pair.session.plane == "cuda"


def test_a_model_that_never_attends_all_layers_stays_away_at_last(pair: Pair) -> None:
    pair.run(2)
    for _ in range(MAX_LEFT):
        begun = pair.session.begin(pair.metadata(1))
        for layer in range(LAYERS - 1):
            begun.attend(layer, *new_tokens(1))
        begun.finish()
        begun.finish()
    pair.run(1)
    assert pair.session.refusals["cuda"] == "the model does not attend all layers in each pass, and must"


def test_tensors_of_other_shapes_in_a_later_layer(client: attnd.Client) -> None:
    with client.create_cache(**GEOMETRY) as cache:
        for plane, heads in (("auto", 2), ("cuda", 2)):
            session = ModelSession(cache, plane)
            begun = session.begin(attnd.StepMetadata([1], [0], [[0]], [0]))
            q, k, v = new_tokens(1)
            begun.attend(0, q, k, v)
            q, k, v = new_tokens(1, heads)
            if plane == "auto":
                assert torch.equal(begun.attend(1, q, k, v), v)
                assert session.refusals["cuda"].startswith("the model has 2 query heads on cpu in layer 1, and must")
            else:
                with pytest.raises(attnd.Unsupported, match="the model has 2 query heads on cpu in layer 1, and must"):
                    begun.attend(1, q, k, v)
            session.close()


def test_what_the_server_cannot_serve_there_goes_over_the_stream(client: attnd.Client) -> None:
    told = "backend naive serves this step, but on a cuda plane must be one of"
    q, k, v = new_tokens(1)
    with client.create_cache(**{**GEOMETRY, "backend": "naive"}) as cache:
        metadata = attnd.StepMetadata([1], [0], [[0]], [0])
        session = ModelSession(cache)
        for _ in range(2):
            begun = session.begin(metadata)
            for layer in range(LAYERS):
                assert torch.equal(begun.attend(layer, q, k, v), v.repeat_interleave(2, 1))
            begun.finish()
            assert session.plane == "shm"
            assert told in session.refusals["cuda"]
        session.close()
        with pytest.raises(attnd.Unsupported, match=told):
            ModelSession(cache, "cuda").begin(metadata).attend(0, q, k, v)
