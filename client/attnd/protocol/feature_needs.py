"""Which later versions of the contract a message needs, by the fields that are set in it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TypeAlias

from attnd.v1 import cache_pb2, capabilities_pb2, step_pb2

Feature: TypeAlias = capabilities_pb2.Feature.ValueType
# A feature, and the field for which a message needs it.
Need: TypeAlias = tuple[Feature, str]


def step_needs(step: step_pb2.Step) -> Iterator[Need]:
    """What a step needs."""
    if step.groups:
        yield capabilities_pb2.FEATURE_LAYER_GROUPS, "groups"
    if step.store_first:
        yield capabilities_pb2.FEATURE_STORE_FIRST, "store_first"
    if step.window or any(group.window for group in step.groups):
        yield capabilities_pb2.FEATURE_STEP_WINDOW, "window"
    if step.HasField("attend_new"):
        yield capabilities_pb2.FEATURE_ATTEND_NEW, "attend_new"
    if step.HasField("first_position"):
        yield capabilities_pb2.FEATURE_FIRST_POSITION, "first_position"
    if _has_padded_rows(step):
        yield capabilities_pb2.FEATURE_PADDED_ROWS, "context_lens"


def cache_needs(config: cache_pb2.CacheConfig) -> Iterator[Need]:
    """What a cache needs."""
    if config.groups:
        yield capabilities_pb2.FEATURE_LAYER_GROUPS, "groups"
    if config.v_dtype or any(group.v_dtype for group in config.groups):
        yield capabilities_pb2.FEATURE_V_DTYPE, "v_dtype"


def _has_padded_rows(step: step_pb2.Step) -> bool:
    """Whether the new tokens of a request are padding, or a request of a decode step has none."""
    try:
        starts = memoryview(step.cu_seqlens_q.data).cast("i")
        context_lens = memoryview(step.context_lens.data).cast("i")
    except TypeError:
        return False  # half an element, which any server refuses
    query_lens = [end - start for start, end in pairwise(starts)]
    if any(length > 0 and held == -length for length, held in zip(query_lens, context_lens, strict=False)):
        return True
    return step.kind == step_pb2.STEP_KIND_DECODE and any(query_lens) and not all(query_lens)
