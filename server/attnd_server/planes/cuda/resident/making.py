"""What resident steps are made of: kernels and plans, and what they take."""

from __future__ import annotations

import torch

from attnd.errors import Unsupported
from attnd.protocol.cuda.layout import StepLayout
from attnd_server.attention.backends.base import DecodeShape, DevicePlan, PlansOnDevice
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions, decode_step
from attnd_server.attention.resident import ResidentSizes
from attnd_server.kv.cache import Cache
from attnd_server.kv.layer_group import LayerGroup
from attnd_server.planes.cuda.resident.graph import ResidentGraph, buffers_of
from attnd_server.planes.cuda.step import BACKENDS
from attnd_server.service.service import AttentionService


def only_group(of: Cache) -> LayerGroup:
    """The layer group of a cache. Raises Unsupported: it has several."""
    if len(of.groups) > 1:
        raise Unsupported(f"the cache has {len(of.groups)} layer groups, and resident steps have one", field="cache")
    return of.groups[0]


def _shape(sizes: ResidentSizes) -> DecodeShape:
    return DecodeShape(sizes.max_reqs, sizes.query_len, sizes.max_pages * sizes.page_size)


def longest_step(sizes: ResidentSizes) -> AttentionMetadata:
    """The one of them that costs the most."""
    context_len = min(sizes.max_context_len, sizes.max_pages * sizes.page_size)
    return decode_step(sizes.max_reqs, sizes.query_len, context_len, sizes.page_size)


def kernels_of(
    service: AttentionService, group: LayerGroup, options: list[AttentionOptions], sizes: ResidentSizes
) -> dict[AttentionOptions, PlansOnDevice]:
    """What computes the layers, by their options. Raises Unsupported: it does not plan steps on the device."""
    kernels: dict[AttentionOptions, PlansOnDevice] = {}
    for each in dict.fromkeys(options):
        kernel = service.executor.ops.kernel_for(group.config, _shape(sizes), each)
        if kernel.backend not in BACKENDS or not isinstance(kernel, PlansOnDevice):
            raise Unsupported(f"backend {kernel.backend.value} does not plan steps on the device", field="backend")
        kernels[each] = kernel
    return kernels


def num_bytes_of(kernels: dict[AttentionOptions, PlansOnDevice], group: LayerGroup, sizes: ResidentSizes) -> int:
    """What their graph will take, before anything is taken. Raises Unsupported: there is no plan of such steps."""
    meta, total = torch.device("meta"), 0
    for options, kernel in kernels.items():
        num_bytes = kernel.device_plan_bytes(group.config, _shape(sizes), options, group.device)
        if isinstance(num_bytes, str):
            raise Unsupported(f"backend {kernel.backend.value} does not plan these steps: {num_bytes}", field="backend")
        total += num_bytes
    step = next(iter(kernels.values())).device_step(group.config, _shape(sizes), meta)
    return total + buffers_of(sizes, step).num_bytes


def graph_of(
    kernels: dict[AttentionOptions, PlansOnDevice],
    group: LayerGroup,
    options: list[AttentionOptions],
    sizes: ResidentSizes,
) -> ResidentGraph:
    """Their graph, which is still to be captured."""
    first = next(iter(kernels.values()))
    step = first.device_step(group.config, _shape(sizes), group.device)
    plans: dict[AttentionOptions, DevicePlan] = {}
    for each, kernel in kernels.items():
        plan = kernel.device_plan(group.config, _shape(sizes), each, step)
        assert not isinstance(plan, str)
        plans[each] = plan
    return ResidentGraph(group, options, plans, first.backend, step, sizes)


def bytes_of_token(layout: StepLayout, options: list[AttentionOptions], sizes: ResidentSizes) -> tuple[int, int]:
    """Of q, k and v, and of output and lse, of all layers."""
    q, k, v, output, lse = (place.num_bytes // (sizes.max_reqs * sizes.query_len) for place in layout)
    num_lse = sum(each.return_lse for each in options)
    return len(options) * (q + k + v), len(options) * output + num_lse * lse
