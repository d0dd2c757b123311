"""What engines say of a step: stored first, windows, owners, padded rows. Random steps against plain lines."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

import attnd
from attnd_server.attention.config import FP8
from tests.plain_steps import PlainStep, Slots, attend, random_step, refusal, with_pages
from tests.servers import ServerProcess
from tests.tolerances import assert_close

HEADS, KV_HEADS, DIM, DIM_V, PAGE, PAGES = 4, 2, 8, 16, 4, 24
SCALE, FP8_SCALE = 0.4, 3 / 128


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[attnd.Client]:
    """Of a server with a shm plane."""
    folder = tmp_path_factory.mktemp("kinds")
    with ServerProcess(folder / "log", "--device", "cpu", "--socket-dir", str(folder / "s")) as process:
        with attnd.connect(process.address) as connected:
            yield connected
        assert "internal error" not in process.log


def rounded(token: np.ndarray) -> np.ndarray:
    """What FP8 pages make of K or V of a token."""
    codes = (torch.from_numpy(token).float() / FP8_SCALE).clamp(-448, 448).to(FP8)
    return (codes.double() * FP8_SCALE).numpy()


class World:
    """A cache of a server, and what lies in its slots."""

    def __init__(self, client: attnd.Client, seed: int, *, kv_dtype: str | None = None, **plane: str) -> None:
        scales = {"k_scales": FP8_SCALE, "v_scales": FP8_SCALE} if kv_dtype else {}
        self.cache = client.create_cache(
            num_layers=1, num_kv_heads=KV_HEADS, head_dim=DIM, head_dim_v=DIM_V, page_size=PAGE, num_pages=PAGES,
            dtype="float32", kv_dtype=kv_dtype, **scales,
        )  # fmt: skip
        self.session = self.cache.session(**plane)
        self.random = np.random.default_rng(seed)
        self.rounded = rounded if kv_dtype else lambda token: token
        k, v = self.tokens(PAGES * PAGE, KV_HEADS, DIM), self.tokens(PAGES * PAGE, KV_HEADS, DIM_V)
        self.cache.store_kv(0, range(PAGES * PAGE), k, v)
        self.lies: Slots = {i: (self.rounded(k[i]), self.rounded(v[i])) for i in range(PAGES * PAGE)}

    def tokens(self, *shape: int) -> np.ndarray:
        return self.random.standard_normal(shape).astype(np.float32)

    def run(self, step: PlainStep, backend: str, *, lse: bool = True, sinks: bool = True) -> None:
        """Runs a step there and here; the verdict and the numbers must be the same."""
        num = sum(step.query_lens)
        q, k, v = self.tokens(num, HEADS, DIM), self.tokens(num, KV_HEADS, DIM), self.tokens(num, KV_HEADS, DIM_V)
        extra, slopes = ([0.5, -1.0, 2.0, -np.inf], [0.25, 0.5, 1.0, 0.0]) if sinks else (None, None)
        options = attnd.AttentionOptions(scale=SCALE, backend=backend, return_lse=lse, sinks=extra, alibi_slopes=slopes)
        wrong = refusal(step, PAGE)
        verdict = ""
        try:
            given = self.session.step(metadata(step)).attend(0, q, k, v, options)
        except attnd.InvalidRequest as error:
            verdict = str(error.field)
        assert verdict == wrong, step
        if wrong:
            return
        output, all_lse, self.lies = attend(step, q, k, v, self.lies, PAGE, SCALE, extra, self.rounded, slopes)
        assert_close(torch.tensor(given[0] if lse else given), output, torch.float32)
        if lse:
            assert_close(torch.tensor(given[1]), all_lse, torch.float32)

    def check_slots(self) -> None:
        """Every slot holds what it is to hold, those that no step named too."""
        k, v = self.cache.read_kv(0, range(PAGES * PAGE), self.tokens(0))
        expected = [np.stack([self.lies[slot][part] for slot in range(PAGES * PAGE)]) for part in (0, 1)]
        np.testing.assert_array_equal(k, expected[0].astype(np.float32))
        np.testing.assert_array_equal(v, expected[1].astype(np.float32))


def metadata(step: PlainStep) -> attnd.StepMetadata:
    in_blocks = "block_causal" in step.masks
    return attnd.StepMetadata(
        step.query_lens, step.context_lens, step.page_tables, step.slots, kind=step.kind, mask=step.masks,
        block_size=step.block_size if in_blocks else 0, store_first=step.store_first, window=step.window,
        attend_new=None if all(step.owners) else step.owners, first_position=step.first_position,
    )  # fmt: skip


@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
@pytest.mark.parametrize("backend", ["naive", "auto"])
@pytest.mark.parametrize("count", [500, pytest.param(1_250, marks=pytest.mark.slow)])
def test_random_steps(client: attnd.Client, backend: str, kv_dtype: str | None, count: int) -> None:
    """So many of each of four kinds, some over the shm plane; sdpa has no lse and no sinks, so that auto takes it."""
    chance = random.Random(f"{backend} {kv_dtype}")
    worlds = [World(client, seed, kv_dtype=kv_dtype, plane=plane) for seed, plane in enumerate(["inline", "shm"])]
    num_refused = 0
    for index in range(count):
        step = random_step(chance, PAGES, PAGE)
        num_refused += bool(refusal(step, PAGE))
        is_plain = backend == "auto"
        worlds[index % 2].run(step, backend, lse=not is_plain, sinks=not is_plain)
        if index % 250 < 2:
            worlds[index % 2].check_slots()
    for world in worlds:
        world.check_slots()
        world.cache.delete()
    assert count / 60 < num_refused < count / 2


class Group(NamedTuple):
    """A layer group of the cache of `test_random_steps_of_layer_groups`."""

    spec: attnd.LayerGroup
    kv_heads: int
    dim: int
    dim_v: int
    page: int
    window: int = 0
    is_rounded: bool = False


GROUPS = [
    Group(attnd.LayerGroup(layers=[0, 3], num_kv_heads=2, head_dim=8, page_size=4, num_pages=24), 2, 8, 8, 4),
    Group(
        attnd.LayerGroup(layers=[1], num_kv_heads=4, head_dim=16, page_size=2, num_pages=48, window=5),
        4, 16, 16, 2, window=5,
    ),
    Group(
        attnd.LayerGroup(
            layers=[2], num_kv_heads=1, head_dim=8, head_dim_v=24, page_size=4, num_pages=24,
            kv_dtype="float8_e4m3fn", k_scales=FP8_SCALE, v_scales=FP8_SCALE,
        ),
        1, 8, 24, 4, is_rounded=True,
    ),
    Group(
        attnd.LayerGroup(
            layers=[4], num_kv_heads=1, head_dim=24, head_dim_v=16, page_size=4, num_pages=24, latent=True
        ),
        1, 24, 16, 4,
    ),
]  # fmt: skip


@pytest.mark.parametrize("plane", ["inline", "shm"])
def test_random_steps_of_layer_groups(client: attnd.Client, plane: str) -> None:
    """One message a step, every layer right; what one group is refused for names it."""
    chance, numbers = random.Random(plane), np.random.default_rng(7)
    cache = client.create_cache(groups=[group.spec for group in GROUPS], dtype="float32")
    layers = [(layer, group) for group in GROUPS for layer in group.spec.layers]
    lies: dict[int, Slots] = {}

    def tokens(num: int, heads: int, dim: int) -> np.ndarray:
        return numbers.standard_normal((num, heads, dim)).astype(np.float32)

    def new(group: Group, num: int) -> tuple[np.ndarray, np.ndarray]:
        k = tokens(num, group.kv_heads, group.dim)
        return k, k[..., : group.dim_v] if group.spec.latent else tokens(num, group.kv_heads, group.dim_v)

    for layer, group in layers:
        k, v = new(group, 96)
        cache.store_kv(layer, range(96), k, None if group.spec.latent else v)
        pages_of = rounded if group.is_rounded else lambda token: token
        lies[layer] = {slot: (pages_of(k[slot]), pages_of(v[slot])) for slot in range(96)}
    session, num_refused = cache.session(plane=plane), 0
    for _ in range(250):
        first = random_step(chance, 24, 4)
        first = with_pages(first, chance, 24, 4, 0)
        steps = {0: first}
        for index, group in enumerate(GROUPS[1:], 1):
            shares = index == 3 and chance.random() < 0.5
            steps[index] = first if shares else with_pages(first, chance, 96 // group.page, group.page, group.window)
        wrong = next((index for index, step in steps.items() if refusal(step, GROUPS[index].page)), None)
        said = [attnd.StepGroup(step.page_tables, step.slots, window=step.window) for step in steps.values()]
        whole = replace(metadata(first), page_tables=None, slot_mapping=None, groups=said)
        num = sum(first.query_lens)
        if wrong is not None:
            num_refused += 1
            with pytest.raises(attnd.InvalidRequest, match=rf"groups\[{wrong}\].slot_mapping"):
                session.step(whole).attend(0, tokens(num, 4, 8), *new(GROUPS[0], num), attnd.AttentionOptions())
            continue
        opened = session.step(whole)
        for layer, group in chance.sample(layers, len(layers)):
            step, q, (k, v) = steps[GROUPS.index(group)], tokens(num, 4, group.dim), new(group, num)
            options = attnd.AttentionOptions(scale=SCALE, return_lse=chance.random() < 0.5)
            given = opened.attend(layer, q, k, None if group.spec.latent else v, options)
            pages_of = rounded if group.is_rounded else lambda token: token
            output, lse, lies[layer] = attend(step, q, k, v, lies[layer], group.page, SCALE, None, pages_of)
            assert_close(torch.tensor(given[0] if options.return_lse else given), output, torch.float32)
            if options.return_lse:
                assert_close(torch.tensor(given[1]), lse, torch.float32)
    for layer, group in layers:
        found = cache.read_kv(layer, range(96), tokens(0, 1, 1))
        for part, array in enumerate(found[:1] if group.spec.latent else found):
            expected = np.stack([lies[layer][slot][part] for slot in range(96)]).astype(np.float32)
            np.testing.assert_array_equal(array, expected)
    assert 5 < num_refused < 150
    cache.delete()
