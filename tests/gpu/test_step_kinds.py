"""What engines say of a step, on a GPU: random steps against plain lines, and the bits of freed pages."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

import attnd
from attnd_server.attention.backends.window import first_visible_pages
from attnd_server.attention.config import FP8
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.metadata import AttentionMetadata
from attnd_server.service.validation.page_tables import checked_page_tables
from tests.e2e import test_engines as examples
from tests.e2e.test_engines import EXAMPLES
from tests.gpu.test_triton import KERNELS, arrays, options, step
from tests.plain_steps import PlainStep, Slots, attend, random_step, refusal, with_pages

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

HEADS, KV_HEADS, DIM, PAGE, PAGES, SCALE = 8, 2, 128, 16, 24, 128**-0.5
FP8_SCALE = 3 / 128


@pytest.fixture(scope="module")
def client() -> Iterator[attnd.Client]:
    with attnd.connect("inproc://") as connected:
        yield connected


def in_bf16(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).bfloat16()


def rounded(token: np.ndarray) -> np.ndarray:
    codes = (torch.from_numpy(token).float() / FP8_SCALE).clamp(-448, 448).to(FP8)
    return (codes.double() * FP8_SCALE).numpy()


@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
@pytest.mark.parametrize("backend", ["triton_grouped", "triton", "sdpa"])
def test_random_steps(client: attnd.Client, backend: str, kv_dtype: str | None) -> None:
    """Every verdict, every number, and at the end every slot."""
    chance, numbers = random.Random(f"{backend} {kv_dtype}"), np.random.default_rng()
    scales = {"k_scales": FP8_SCALE, "v_scales": FP8_SCALE} if kv_dtype else {}
    as_stored = rounded if kv_dtype else lambda token: token
    has_all = backend != "sdpa"

    def tokens(num: int, heads: int) -> tuple[torch.Tensor, np.ndarray]:
        """In bfloat16, and the same in float64."""
        tensor = in_bf16(numbers.standard_normal((num, heads, DIM)))
        return tensor, tensor.double().numpy()

    with client.create_cache(
        num_layers=1, num_kv_heads=KV_HEADS, head_dim=DIM, page_size=PAGE, num_pages=PAGES, kv_dtype=kv_dtype, **scales
    ) as cache:
        (k, plain_k), (v, plain_v) = tokens(PAGES * PAGE, KV_HEADS), tokens(PAGES * PAGE, KV_HEADS)
        cache.store_kv(0, range(PAGES * PAGE), k, v)
        lies: Slots = {i: (as_stored(plain_k[i]), as_stored(plain_v[i])) for i in range(PAGES * PAGE)}
        session = cache.session()
        sinks = [0.5, -1.0, 2.0, -np.inf] * 2 if has_all else None
        asked = attnd.AttentionOptions(scale=SCALE, backend=backend, return_lse=has_all, sinks=sinks)
        for _ in range(150):
            plain = random_step(chance, PAGES, PAGE)
            num, wrong = sum(plain.query_lens), refusal(plain, PAGE)
            (q, plain_q), (k, plain_k), (v, plain_v) = (tokens(num, heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
            verdict = ""
            try:
                given = session.step(said(plain)).attend(0, q, k, v, asked)
            except attnd.InvalidRequest as error:
                verdict = str(error.field)
            assert verdict == wrong, plain
            if wrong:
                continue
            output, lse, lies = attend(plain, plain_q, plain_k, plain_v, lies, PAGE, SCALE, sinks, as_stored)
            found = (given[0] if has_all else given).double().numpy()
            np.testing.assert_allclose(found, output, rtol=0.02, atol=0.02, err_msg=str(plain))
            if has_all:
                np.testing.assert_allclose(given[1].numpy(), lse, rtol=1e-3, atol=1e-3, err_msg=str(plain))
        k, v = cache.read_kv(0, range(PAGES * PAGE), k)
        for part, found in enumerate((k, v)):
            expected = in_bf16(np.stack([lies[slot][part] for slot in range(PAGES * PAGE)]))
            assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["triton", "triton_grouped", "auto"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_schedulers(name: str, backend: str) -> None:
    examples.check(name, "inproc", "inproc://", backend)


# Geometry of each layer group's only layer: KV heads, head dims, page size, window; the rest of its spec.
GROUPS = [
    (2, 128, 128, 16, 0, {}),
    (4, 64, 64, 32, 40, {}),
    (1, 128, 128, 16, 0, {"v_dtype": "float8_e4m3fn", "v_scales": FP8_SCALE}),
    (1, 576, 512, 16, 0, {"latent": True}),
]


def test_random_steps_of_layer_groups(client: attnd.Client) -> None:
    """Each group has the kernels of its own geometry; the last one's are torch's."""
    chance, numbers = random.Random(5), np.random.default_rng()
    specs = [
        attnd.LayerGroup(
            [layer], num_kv_heads=heads, head_dim=dim, head_dim_v=dim_v, page_size=page, num_pages=768 // page,
            window=window, **more,
        )
        for layer, (heads, dim, dim_v, page, window, more) in enumerate(GROUPS)
    ]  # fmt: skip

    def tokens(num: int, heads: int, dim: int) -> tuple[torch.Tensor, np.ndarray]:
        tensor = in_bf16(numbers.standard_normal((num, heads, dim)))
        return tensor, tensor.double().numpy()

    def new(layer: int, num: int) -> tuple[tuple[torch.Tensor, torch.Tensor | None], tuple[np.ndarray, np.ndarray]]:
        heads, dim, dim_v, _, _, more = GROUPS[layer]
        k, plain_k = tokens(num, heads, dim)
        if "latent" in more:
            return (k, None), (plain_k, plain_k[..., :dim_v])
        v, plain_v = tokens(num, heads, dim_v)
        return (k, v), (plain_k, plain_v)

    def lying(layer: int, slots: Slots) -> Slots:
        """V as its pages have it."""
        is_rounded = "v_dtype" in GROUPS[layer][5]
        return {slot: (k, rounded(v)) for slot, (k, v) in slots.items()} if is_rounded else slots

    with client.create_cache(groups=specs) as cache:
        lies: dict[int, Slots] = {}
        for layer in range(len(GROUPS)):
            kv, plain_kv = new(layer, 768)
            cache.store_kv(layer, range(768), *kv)
            lies[layer] = lying(layer, dict(enumerate(zip(*plain_kv, strict=True))))
        session = cache.session()
        for _ in range(60):
            first = replace(random_step(chance, 48, 16), owners=[1] * 4)
            first.owners = first.owners[: len(first.query_lens)]
            steps = [with_pages(first, chance, 768 // page, page, window) for _, _, _, page, window, _ in GROUPS]
            if any(refusal(step, GROUPS[layer][3]) for layer, step in enumerate(steps)):
                continue
            groups = [attnd.StepGroup(step.page_tables, step.slots, window=step.window) for step in steps]
            whole = replace(said(first), page_tables=None, slot_mapping=None, window=0, groups=groups)
            opened = session.step(whole)
            for layer, step in enumerate(steps):
                _, dim, _, page, _, more = GROUPS[layer]
                (q, plain_q), (kv, plain_kv) = (
                    tokens(sum(step.query_lens), HEADS, dim),
                    new(layer, sum(step.query_lens)),
                )
                output = opened.attend(layer, q, *kv, attnd.AttentionOptions(scale=SCALE))
                expected, _, after = attend(step, plain_q, *plain_kv, lies[layer], page, SCALE)
                if "v_dtype" in more and step.store_first:
                    in_pages = plain_kv[0], np.stack([rounded(token) for token in plain_kv[1]])
                    expected, _, _ = attend(step, plain_q, *in_pages, lies[layer], page, SCALE)
                np.testing.assert_allclose(output.double().numpy(), expected, rtol=0.02, atol=0.02, err_msg=str(step))
                changed = {slot: pair for slot, pair in after.items() if pair is not lies[layer].get(slot)}
                lies[layer] = {**lies[layer], **lying(layer, changed)}
        for layer in range(len(GROUPS)):
            found, latent = cache.read_kv(layer, range(768), in_bf16(np.zeros((1, 1, 1)))), "latent" in GROUPS[layer][5]
            for part in range(1 if latent else 2):
                expected = in_bf16(np.stack([lies[layer][slot][part] for slot in range(768)]))
                assert torch.equal(found[part], expected)


def said(plain: PlainStep) -> attnd.StepMetadata:
    return attnd.StepMetadata(
        plain.query_lens, plain.context_lens, plain.page_tables, plain.slots, kind=plain.kind, mask=plain.masks,
        block_size=plain.block_size, store_first=plain.store_first, window=plain.window,
        attend_new=None if all(plain.owners) else plain.owners, first_position=plain.first_position,
    )  # fmt: skip


def without_hidden(metadata: AttentionMetadata, window: int, num_pages: int) -> AttentionMetadata:
    """The step whose pages before its window are -1 or others', as the server's check leaves it."""
    first = first_visible_pages(metadata.context_lens, window, PAGE)
    columns = torch.arange(metadata.page_tables.shape[1])
    junk = torch.randint(-2, num_pages + 2, metadata.page_tables.shape, dtype=torch.int32)
    tables = torch.where(columns < first[:, None], junk, metadata.page_tables)
    config = replace(step([(1, 1)]).config(), num_pages=num_pages)
    checked = checked_page_tables(tables.numpy(), metadata.context_lens.numpy(), window, config)
    return replace(metadata, page_tables=torch.from_numpy(checked), window=window)


@pytest.mark.parametrize("kv_dtype", [None, FP8])
@pytest.mark.parametrize("window", [1, 17, 100, 1024])
@pytest.mark.parametrize(
    "lens", [[(5000, 1)] * 3, [(4097, 1), (33, 1)], [(2000, 32), (700, 32)], [(3000, 300), (50, 1)]]
)
def test_freed_pages_leave_the_bits(lens: list[tuple[int, int]], window: int, kv_dtype: torch.dtype | None) -> None:
    """What the window hides may hold anything, NaN too, and the kernels stay the same."""
    case = replace(step(lens, num_pages=2048, first_page=64), window=window, kv_dtype=kv_dtype, return_lse=True)
    given, kernel, device = arrays(case), KERNELS["triton_grouped"], torch.device("cuda")
    if kv_dtype is not None:
        ones = torch.ones(case.num_kv_heads, device=device)
        given[3] = LayerPages(given[3].k.to(FP8), given[3].v.to(FP8), ones, ones)
    config, opts = case.config(), options(case)
    whole = case.metadata()
    expected = kernel.run(kernel.plan(config, whole, opts, device), *given)
    plan = kernel.plan(config, without_hidden(whole, window, 2048), opts, device)
    found = kernel.run(plan, *given)
    assert all(each.isfinite().all() for each in expected)
    for have, want in zip(found, expected, strict=True):
        assert torch.equal(have, want)
    if torch.cuda.get_device_capability()[0] == 9 and kv_dtype is None:
        assert all(launch.shape.tile is None for launch in plan.launches)  # Hopper's


def test_decodes_of_a_mixed_batch_keep_their_bits_and_kernels() -> None:
    lens = [(5000, 1), (1, 1), (129, 1), (700, 300), (0, 65)]
    case, device = step(lens), torch.device("cuda")
    kernel, (q, k, v, pages) = KERNELS["triton_grouped"], arrays(case)
    plan = kernel.plan(case.config(), case.metadata(), options(case), device)
    output, _ = kernel.run(plan, q, k, v, pages)
    decodes = replace(case, requests=case.requests[:3])
    alone = kernel.plan(decodes.config(), decodes.metadata(), options(case), device)
    expected, _ = kernel.run(alone, q[:3], k[:3], v[:3], pages)
    assert torch.equal(output[:3], expected)
    (launch,) = alone.launches
    assert launch.shape in [each.shape for each in plan.launches]
