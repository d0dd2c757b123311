"""Random calls of random geometries, and what each must give in float64: the work of `benchmarks.first_calls`.

The driver keeps what it has stored, in float64, so a call is checked against plain arithmetic over that and nothing
else. Contexts are short: what is looked for are kernels, not bandwidth.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

import attnd
from attnd.pages import PagedSequence, PagePool, page_tables
from benchmarks.report import refuse_wrong

MAX_SEQUENCES, MAX_LEN = 6, 600
DTYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)
FP8 = torch.float8_e4m3fn
# Most ||output - expected|| / ||expected|| of a token and head: more than rounding gives, less than one key left out.
LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class Geometry(NamedTuple):
    """Of a cache; arguments of `create_cache` but for the number of pages."""

    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    kv_dtype: torch.dtype | None
    layout: str
    group: int  # query heads of a KV head

    @classmethod
    def drawn(cls, rng: random.Random) -> Geometry:
        """A random one."""
        dtype = rng.choice(DTYPES)
        head_dim = rng.choice((32, 64, 64, 80, 96, 128, 128, 128, 192, 256))
        layout = "distinct" if rng.random() < 0.15 else "unified"
        is_fp8 = dtype is not torch.float32 and rng.random() < 0.2
        return cls(
            rng.choice((1, 2, 3, 4, 8)),
            head_dim,
            rng.choice((4, 8, 16, 16, 16, 32, 48, 64)),
            dtype,
            FP8 if is_fp8 else None,
            layout,
            rng.choice((1, 2, 3, 4, 5, 8)),
        )

    @property
    def cache(self) -> dict[str, Any]:
        """Arguments of `create_cache`."""
        own = {name: value for name, value in self._asdict().items() if name != "group"}
        return {**own, "num_layers": 2, "num_pages": self.num_pages}

    @property
    def num_pages(self) -> int:
        """Room for all sequences."""
        return MAX_SEQUENCES * (-(-MAX_LEN // self.page_size))


@dataclass
class Stored:
    """A sequence, and K and V of its tokens as pages have them: float64 `[length, num_kv_heads, head_dim]`."""

    pages: PagedSequence
    k: torch.Tensor
    v: torch.Tensor


@dataclass
class MixedCache:
    """A cache of a server, and what was stored in its layer 0."""

    geometry: Geometry
    cache: attnd.Cache
    sequences: list[Stored] = field(default_factory=list)
    pool: PagePool = field(init=False)

    def __post_init__(self) -> None:
        """Nothing is stored yet."""
        self.pool = PagePool(self.geometry.num_pages, self.geometry.page_size)

    def drawn_call(self, rng: random.Random, generator: torch.Generator) -> MixedCall:
        """A random call. Its sequences are taken to have its tokens from now on."""
        is_decode = rng.random() < 0.6
        num_reqs = rng.choice((1, 1, 2, 3, MAX_SEQUENCES))
        lens = [rng.choice((1, 1, 2, 4, 8, 32))] * num_reqs if is_decode else self._prefill_lens(rng, num_reqs)
        chosen = rng.sample(range(MAX_SEQUENCES), num_reqs)
        while len(self.sequences) < MAX_SEQUENCES:
            self.sequences.append(self._new())
        for index, length in zip(chosen, lens, strict=True):
            if self.sequences[index].pages.length + length > MAX_LEN:
                self.sequences[index].pages.free()
                self.sequences[index] = self._new()
        return MixedCall.drawn(self, [self.sequences[index] for index in chosen], lens, is_decode, rng, generator)

    def _prefill_lens(self, rng: random.Random, num_reqs: int) -> list[int]:
        return [rng.choice((1, 5, 16, 17, 100, 255, 257, 300)) for _ in range(num_reqs)]

    def _new(self) -> Stored:
        empty = torch.zeros(0, self.geometry.num_kv_heads, self.geometry.head_dim, dtype=torch.float64)
        return Stored(PagedSequence(self.pool), empty, empty)


@dataclass
class MixedCall:
    """A call, and what it must give."""

    cache: attnd.Cache
    metadata: attnd.StepMetadata
    options: attnd.AttentionOptions
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    expected: torch.Tensor
    expected_lse: torch.Tensor

    @classmethod
    def drawn(
        cls,
        mixed: MixedCache,
        sequences: list[Stored],
        lens: list[int],
        is_decode: bool,
        rng: random.Random,
        generator: torch.Generator,
    ) -> MixedCall:
        """Random tensors and options for new tokens of some sequences."""
        geometry = mixed.geometry
        num_heads, num_tokens = geometry.num_kv_heads * geometry.group, sum(lens)

        def tensor(heads: int) -> torch.Tensor:
            return torch.randn(num_tokens, heads, geometry.head_dim, generator=generator).to(geometry.dtype)

        q, k, v = tensor(num_heads), tensor(geometry.num_kv_heads), tensor(geometry.num_kv_heads)
        options = drawn_options(rng, num_heads)
        mask = rng.choice(("causal", "causal", "bidirectional"))
        contexts = [each.pages.length for each in sequences]
        slots = [slot for each, length in zip(sequences, lens, strict=True) for slot in each.pages.extend(length)]
        outputs = []
        for stored, rows in zip(sequences, torch.arange(num_tokens).split(lens), strict=True):
            new_k, new_v = k[rows].double(), v[rows].double()
            keys, values = torch.cat([stored.k, new_k]), torch.cat([stored.v, new_v])
            outputs.append(attended(q[rows].double(), keys, values, len(stored.k), mask, options))
            stored.k = torch.cat([stored.k, as_stored(k[rows], geometry.kv_dtype)])
            stored.v = torch.cat([stored.v, as_stored(v[rows], geometry.kv_dtype)])
        metadata = attnd.StepMetadata(
            lens,
            contexts,
            page_tables([each.pages for each in sequences]),
            slots,
            kind="decode" if is_decode else "prefill",
            mask=mask,
        )
        expected, lse = (torch.cat(each) for each in zip(*outputs, strict=True))
        return cls(mixed.cache, metadata, options, q, k, v, expected, lse)

    def __call__(self, client: attnd.Client) -> Any:
        """Its answer from a server."""
        call = client.decode if self.metadata.kind == "decode" else client.prefill
        return call(self.cache, self.metadata, 0, self.q, self.k, self.v, self.options)

    def check(self, what: str, answer: Any) -> None:
        """Raises WrongResult unless an answer is what it must be."""
        output, lse = answer if self.options.return_lse else (answer, None)
        refuse_wrong(what, output, self.expected, LIMITS[output.dtype])
        if lse is not None:
            refuse_wrong(f"lse of {what}", lse[..., None].exp(), self.expected_lse[..., None].exp(), 0.1)


def drawn_options(rng: random.Random, num_heads: int) -> attnd.AttentionOptions:
    """Random options: most calls of a model have none."""

    def floats() -> list[float]:
        return [rng.uniform(0, 0.2) for _ in range(num_heads)]

    return attnd.AttentionOptions(
        softcap=rng.choice((0.0, 0.0, 0.0, 20.0)),
        window=rng.choice((0, 0, 0, 50)),
        alibi_slopes=floats() if rng.random() < 0.15 else None,
        sinks=floats() if rng.random() < 0.2 else None,
        return_lse=rng.random() < 0.3,
    )


def as_stored(tokens: torch.Tensor, kv_dtype: torch.dtype | None) -> torch.Tensor:
    """What pages have of new tokens, in float64. FP8 pages have no scales here."""
    return tokens.double() if kv_dtype is None else tokens.float().to(kv_dtype).double()


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context_len: int, mask: str, options: attnd.AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of one request's new tokens, in float64: the definition.

    Args:
        q: `[new tokens, num_heads, head_dim]`.
        k: `[context_len + new tokens, num_kv_heads, head_dim]`, as v.
        v: likewise.
        context_len: keys that are cached.
        mask: "causal" or "bidirectional".
        options: of the call.
    """
    num_new, num_heads, head_dim = q.shape
    k, v = (each.repeat_interleave(num_heads // k.shape[1], 1) for each in (k, v))
    positions, key_positions = context_len + torch.arange(num_new), torch.arange(len(k))
    distance = positions[:, None] - key_positions
    visible = torch.ones_like(distance, dtype=torch.bool) if mask == "bidirectional" else distance >= 0
    if options.window:
        visible &= distance < options.window
    scores = torch.einsum("ihd,jhd->hij", q, k) * head_dim**-0.5
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.alibi_slopes is not None:
        slopes = torch.tensor(options.alibi_slopes, dtype=torch.float32).double()
        scores = scores - slopes[:, None, None] * distance
    scores = scores.masked_fill(~visible, float("-inf"))
    if options.sinks is not None:
        sinks = torch.tensor(options.sinks, dtype=torch.float32).double()[:, None, None].expand(-1, num_new, 1)
        scores = torch.cat([scores, sinks], 2)
    lse = scores.logsumexp(2)
    weights = (scores - lse[..., None]).exp()[..., : len(k)]
    return torch.einsum("hij,jhd->ihd", weights, v), lse.T
