"""A cache with three layer groups that differ in all that groups may differ in, and a worker with its own copy of all K
and V that holds every output against float64."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import attnd
from attnd.v1 import cache_pb2, tensor_pb2

NUM_HEADS = 4
NUM_LAYERS = 6


@dataclass(frozen=True)
class Group:
    """A layer group: its layers and geometry."""

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    page_size: int
    num_pages: int
    window: int = 0
    latent: bool = False
    k_scale: float = 0.0  # of FP8 pages; 0: pages have the dtype of calls
    v_scale: float = 0.0

    def message(self) -> cache_pb2.LayerGroup:
        """As the wire has it."""
        fields = ("num_kv_heads", "head_dim", "head_dim_v", "page_size", "num_pages", "window", "latent")
        message = cache_pb2.LayerGroup(
            layers=tensor(torch.tensor(self.layers, dtype=torch.int32)),
            **{field: getattr(self, field) for field in fields},
        )
        if self.k_scale:
            message.kv_dtype = tensor_pb2.DTYPE_FLOAT8_E4M3FN
            message.k_scales.CopyFrom(tensor(torch.tensor([self.k_scale])))
            message.v_scales.CopyFrom(tensor(torch.tensor([self.v_scale])))
        return message

    def spec(self) -> attnd.LayerGroup:
        """As a client is told it."""
        fields = ("layers", "num_kv_heads", "head_dim", "head_dim_v", "page_size", "num_pages", "window", "latent")
        types: dict[str, Any] = {}
        if self.k_scale:
            types = {"kv_dtype": "float8_e4m3fn", "k_scales": self.k_scale, "v_scales": self.v_scale}
        return attnd.LayerGroup(**{field: getattr(self, field) for field in fields}, **types)

    def stored(self, new: torch.Tensor, *, is_k: bool) -> torch.Tensor:
        """What later steps read of new K or V."""
        scale = self.k_scale if is_k else self.v_scale
        if not scale:
            return new
        return (new / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


FULL = Group((0, 2, 5), 2, 16, 16, page_size=4, num_pages=12)
WINDOWED = Group((1, 4), 1, 24, 8, page_size=2, num_pages=25, window=5, k_scale=0.02, v_scale=0.03)
LATENT = Group((3,), 1, 40, 32, page_size=8, num_pages=7, latent=True)
GROUPS = (FULL, WINDOWED, LATENT)


def tensor(values: torch.Tensor) -> tensor_pb2.Tensor:
    """A tensor as the wire has it."""
    dtypes = {torch.float32: tensor_pb2.DTYPE_FLOAT32, torch.int32: tensor_pb2.DTYPE_INT32}
    return tensor_pb2.Tensor(dtype=dtypes[values.dtype], shape=values.shape, data=values.numpy().tobytes())


def config(groups: Sequence[Group] = GROUPS, **changes: Any) -> cache_pb2.CacheConfig:
    """A cache with these groups."""
    fields: dict[str, Any] = {"num_layers": sum(len(group.layers) for group in groups)}
    fields |= {"dtype": tensor_pb2.DTYPE_FLOAT32, "groups": [group.message() for group in groups]} | changes
    return cache_pb2.CacheConfig(**fields)


def create(client: attnd.Client, groups: Sequence[Group] = GROUPS, **more: Any) -> attnd.Cache:
    """Leases a cache with these groups."""
    return client.create_cache(groups=[group.spec() for group in groups], dtype="float32", **more)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Attention in float64 of q `[n, num_heads, d]`, the last n of the tokens of k and v, causal and in a window."""
    n, s, per_head = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    keys, values = (each.double().repeat_interleave(per_head, 1) for each in (k, v))
    scores = torch.einsum("nhd,shd->hns", q.double(), keys) * q.shape[2] ** -0.5
    ages = torch.arange(s - n, s)[:, None] - torch.arange(s)
    seen = (ages >= 0) & (ages < (window or s))
    return torch.einsum("hns,shd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(2), values)


class Worker:
    """Requests whose layers are attended by a server, and here.

    Attributes:
        lens: cached tokens of each request.
    """

    def __init__(self, seed: int, num_reqs: int = 2, groups: Sequence[Group] = GROUPS) -> None:
        """Nothing is cached. Each request has as many shuffled pages of each group as there are for it."""
        self._random = random.Random(seed)
        self._torch = torch.Generator().manual_seed(seed)
        self.groups = groups
        self.lens = [0] * num_reqs
        # By group, the page ids of each request; they may exceed what other groups have.
        self.tables = [self._tables(group, num_reqs) for group in groups]
        none = torch.empty(0)
        self._kept: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for group in groups:
            for layer in group.layers:
                k = none.reshape(0, group.num_kv_heads, group.head_dim)
                self._kept[layer] = [(k, none.reshape(0, group.num_kv_heads, group.head_dim_v))] * num_reqs

    def _tables(self, group: Group, num_reqs: int) -> list[list[int]]:
        pages = self._random.sample(range(group.num_pages), group.num_pages)
        each = group.num_pages // num_reqs
        return [pages[request * each : (request + 1) * each] for request in range(num_reqs)]

    @property
    def room(self) -> int:
        """Tokens that each request's pages hold."""
        return min(len(tables[0]) * group.page_size for tables, group in zip(self.tables, self.groups, strict=True))

    def metadata(
        self, query_lens: Sequence[int], *, gives_back: bool = False, width: int = 0, **changes: Any
    ) -> attnd.StepMetadata:
        """A step in which each request has so many new tokens.

        Args:
            query_lens: new tokens of each request.
            gives_back: whether pages that a window hides are absent.
            width: least columns of the page tables.
            changes: of the metadata.
        """
        parts = []
        for group, pages in zip(self.groups, self.tables, strict=True):
            tables, slots = [], []
            for own, cached, new in zip(pages, self.lens, query_lens, strict=True):
                table = own[: -(-(cached + new) // group.page_size)]
                positions = range(cached, cached + new)
                slots += [own[p // group.page_size] * group.page_size + p % group.page_size for p in positions]
                if gives_back and group.window:
                    hidden = max(0, cached + 1 - group.window) // group.page_size
                    table = [-1] * hidden + table[hidden:]
                tables.append(table)
            columns = max(width, *map(len, tables))
            parts.append(attnd.StepGroup([[*table, *[-1] * (columns - len(table))] for table in tables], slots))
        kind = "decode" if len(set(query_lens)) == 1 else "prefill"
        fields: dict[str, Any] = {"kind": kind, "groups": parts} | changes
        return attnd.StepMetadata(list(query_lens), list(self.lens), **fields)

    def tensors(self, layer: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """New q, k and v of a layer; no v of a latent one."""
        group = self.group_of(layer)
        shapes = [(NUM_HEADS, group.head_dim), (group.num_kv_heads, group.head_dim)]
        shapes += [] if group.latent else [(group.num_kv_heads, group.head_dim_v)]
        q, k, *v = (torch.randn(num_tokens, *shape, generator=self._torch) for shape in shapes)
        return q, k, v[0] if v else None

    def group_of(self, layer: int) -> Group:
        """The group of a layer."""
        return next(group for group in self.groups if layer in group.layers)

    def expected(
        self, layer: int, query_lens: Sequence[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None
    ) -> torch.Tensor:
        """The output of a layer in float64; its K and V are cached from then on, see `ends`."""
        group, outputs, first = self.group_of(layer), [], 0
        v = k[..., : group.head_dim_v] if v is None else v
        for request, new in enumerate(query_lens):
            rows = slice(first, first + new)
            kept = [each[: self.lens[request]] for each in self._kept[layer][request]]
            keys, values = (torch.cat([old, each[rows]]) for old, each in zip(kept, (k, v), strict=True))
            outputs.append(dense(q[rows], keys, values, group.window))
            stored = [group.stored(each[rows], is_k=is_k) for each, is_k in ((k, True), (v, False))]
            k_now, v_now = (torch.cat(pair) for pair in zip(kept, stored, strict=True))
            self._kept[layer][request] = k_now, v_now
            first += new
        return torch.cat(outputs)

    def ends(self, query_lens: Sequence[int]) -> None:
        """A step is over: its tokens are context from now on."""
        self.lens = [cached + new for cached, new in zip(self.lens, query_lens, strict=True)]

    def runs(self, session: attnd.Session, query_lens: Sequence[int], **changes: Any) -> None:
        """A step in a session, layer after layer, each held against float64."""
        step = session.step(self.metadata(query_lens, **changes))
        for layer in sorted(self._kept):
            tensors = self.tensors(layer, sum(query_lens))
            check(step.attend(layer, *tensors), self.expected(layer, query_lens, *tensors))
        self.ends(query_lens)

    def kept(self, layer: int, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a request as pages have them."""
        return self._kept[layer][request]

    def slots(self, layer: int, request: int) -> list[int]:
        """The slots of a request's cached tokens in a layer."""
        group = self.group_of(layer)
        own = self.tables[self.groups.index(group)][request]
        size = group.page_size
        return [own[p // size] * size + p % size for p in range(self.lens[request])]


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Whether a float32 output is that in float64."""
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-5)
