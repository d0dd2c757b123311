"""A server with caches of two principals, and a model of what every byte of their pages must be."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from attnd.errors import ServerFault
from attnd.v1 import cache_pb2, step_pb2, tensor_pb2
from attnd_server.attention.config import AttentionConfig
from attnd_server.build import build_service
from attnd_server.config import ServerConfig
from attnd_server.identity import Principals
from attnd_server.kv.cache_shape import CacheShape
from attnd_server.observe.traces import StepTrace
from attnd_server.planes.negotiation import Planes
from attnd_server.planes.open_planes import PlaneTable
from attnd_server.rpc.servicer import AttentionServicer
from tests.fuzz.caches import shapes
from tests.fuzz.pool import Pool
from tests.fuzz.valid_steps import told_of

CALLER, OTHER = "caller", "other"

_LIMITS = ServerConfig(
    device="cpu",
    kv_bytes=1 << 18,
    threads=1,
    max_step_tokens=16,
    max_step_reqs=4,
    max_page_table_elements=24,
    max_caches=18,
    default_ttl_s=86_400,
    max_planes=8,
    traces=1_000,
    # Nobody reads it: it makes two principals of two callers. Each may take all.
    tokens="of the caller and the other",
    principal_kv_bytes=1 << 18,
    principal_caches=18,
    principal_sessions=256,
    principal_queue_depth=1_024,
)
# Caches that requests have made and that are kept.
_MAX_MADE = 3


class _Named(Principals):
    """Takes a caller's word."""

    def of(self, context: Any) -> str:
        return str(context.principal)


class _NoSpans:
    """Looks at a step that was traced as whoever makes spans does, and makes none."""

    def write(self, trace: StepTrace) -> None:
        assert trace.parent.trace_id
        assert all(call.ended_ns >= trace.began_ns for call in trace.calls)

    def close(self) -> None:
        """There is nothing to end."""


class World:
    """A service, its servicer, the caches of both principals, and what was told INTERNAL."""

    def __init__(self) -> None:
        """Makes the caches and fills them."""
        planes = Planes()
        planes.offer(PlaneTable("/nowhere", 1 << 16, _LIMITS.max_planes), "there is no GPU")
        self.service = build_service(_LIMITS, planes=planes, spans=_NoSpans())
        self.servicer = AttentionServicer(self.service, _Named())
        self.faults: list[BaseException] = []
        self._told = self.service.told
        self.service.told = self._listen  # type: ignore[method-assign]
        self.pools: dict[bytes, Pool] = {}
        self._made: list[Pool] = []
        for shape in shapes():
            # The other's lies between the caller's two, in the same spaces of pages.
            for principal in (CALLER, OTHER, *[CALLER] * (shape == shapes()[0])):
                self._add(principal, shape)
        self._fixed = list(self.pools.values())

    def _listen(self, error: Exception, principal: str = "") -> Any:
        told = self._told(error, principal)
        if isinstance(told, ServerFault):
            self.faults.append(error)
        return told

    def _add(self, principal: str, shape: CacheShape[AttentionConfig]) -> Pool:
        cache = self.service.caches.create(shape, principal=principal, ttl_s=86_400, name="")
        for group in cache.groups:
            for pages in (group.k_pages, group.v_pages):
                pages.copy_(torch.randn(pages.shape))
        pool = self.pools[cache.id] = Pool(cache)
        return pool

    @property
    def own(self) -> list[Pool]:
        """The caller's, for which valid requests can be made."""
        return [
            pool
            for pool in self.pools.values()
            if pool.cache.principal == CALLER and pool.info.config.dtype != tensor_pb2.DTYPE_BFLOAT16
        ]

    @property
    def refs(self) -> list[cache_pb2.CacheRef]:
        """Every cache's, those of the other too."""
        return [pool.info.cache for pool in self.pools.values()]

    def pool(self, ref: cache_pb2.CacheRef) -> Pool:
        """The caller's cache of a request that was done."""
        pool = self.pools.get(ref.id)
        assert pool is not None, f"a request was done in cache {ref.id.hex()}, which is none"
        assert pool.cache.principal == CALLER, "a request was done in another principal's cache"
        assert ref.epoch == pool.info.cache.epoch
        return pool

    def created(self, info: cache_pb2.CacheInfo) -> None:
        """A request made a cache: nothing of anybody's is in it. Or it was the same as an earlier one, by its key."""
        if info.cache.id in self.pools:
            assert self.pool(info.cache).cache.key
            return
        cache = self.service.caches.get(info.cache, CALLER)
        for group in cache.groups:
            assert not group.k_pages.any()
            assert not group.v_pages.any()
        self._made.append(Pool(cache))
        self.pools[cache.id] = self._made[-1]
        if len(self._made) > _MAX_MADE:
            oldest = self._made.pop(0)
            self.service.caches.delete(oldest.info.cache, CALLER)
            del self.pools[oldest.cache.id]

    def deleted(self, ref: cache_pb2.CacheRef) -> None:
        """A request deleted a cache; another takes its place if it was there from the beginning."""
        pool = self.pool(ref)
        assert pool.cache.is_closed
        del self.pools[ref.id]
        if pool in self._made:
            self._made.remove(pool)
        else:
            self._fixed.remove(pool)
            self._fixed.append(self._add(CALLER, pool.cache.shape))

    def attended(self, step: step_pb2.Step, call: step_pb2.Call, k: bytes, v: bytes) -> None:
        """A call was done: it stored what its step says, and nothing else."""
        pool = self.pool(step.cache)
        told = told_of(step, pool.cache.shape.places[call.layer][0])
        if told.HasField("slot_mapping"):
            pool.stored(call.layer, integers(told.slot_mapping), k, v)

    def check(self, doing: str) -> None:
        """Fails if the server told of a fault of its own, or a byte of any page is not what it must be."""
        if self.faults:
            raise AssertionError(f"INTERNAL for {doing}") from self.faults[0]
        for pool in self.pools.values():
            assert not pool.cache.is_closed, f"cache {pool.cache.id.hex()} has gone after {doing}"
            owner = pool.cache.principal
            assert pool.is_as_expected(), f"bytes of {owner}'s cache {pool.cache.id.hex()} changed after {doing}"

    def __enter__(self) -> World:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends its threads."""
        self.service.close()


def integers(tensor: tensor_pb2.Tensor) -> list[int]:
    """The elements of an int32 or int64 tensor."""
    dtype = {tensor_pb2.DTYPE_INT32: "<i4", tensor_pb2.DTYPE_INT64: "<i8"}[tensor.dtype]
    elements: list[int] = np.frombuffer(tensor.data, dtype).tolist()
    return elements
