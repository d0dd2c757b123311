"""What resident steps are made of: kernels, plans, places, and what they take."""

from __future__ import annotations

import torch

from attnd.errors import InvalidRequest, Unsupported
from attnd.protocol.cuda.layout import Geometry, StepLayout, step_layout
from attnd.protocol.cuda.resident import ResidentLayout, resident_layout
from attnd.protocol.tensors import DTYPES
from attnd.v1 import attention_pb2, step_pb2
from attnd_server.attention.backends.base import DecodeShape, DevicePlan, PlansOnDevice
from attnd_server.attention.metadata import AttentionOptions, decode_step
from attnd_server.attention.resident import ResidentSizes
from attnd_server.execution.cost import cost_of, too_costly
from attnd_server.kv.cache import Cache
from attnd_server.kv.layer_group import LayerGroup
from attnd_server.planes.cuda.resident.graph import ResidentGraph, buffers_of
from attnd_server.planes.cuda.step import BACKENDS, layer_options
from attnd_server.service.service import AttentionService


def only_group(of: Cache) -> LayerGroup:
    """The layer group of a cache. Raises Unsupported: it has several."""
    if len(of.groups) > 1:
        raise Unsupported(f"the cache has {len(of.groups)} layer groups, and resident steps have one", field="cache")
    return of.groups[0]


def options_of(
    service: AttentionService, message: attention_pb2.ResidentSteps, group: LayerGroup, num_layers: int
) -> list[AttentionOptions]:
    """Those of each layer. Raises InvalidRequest: they break a rule."""
    config, heads = group.config, message.num_heads
    if heads == 0 or heads % config.num_kv_heads:
        rule = f"must be a multiple of the cache's {config.num_kv_heads} KV heads"
        raise InvalidRequest(f"num_heads is {heads}, but {rule}", field="num_heads")
    messages = list(message.options) or [step_pb2.AttentionOptions()]
    return layer_options([service.checked_options(each, config, heads, config.window) for each in messages], num_layers)


def places(
    sizes: ResidentSizes, num_heads: int, group: LayerGroup, region_bytes: int
) -> tuple[StepLayout, ResidentLayout]:
    """Where the tensors of the most requests lie, and the metadata. Raises InvalidRequest: the region is too small."""
    config = group.config
    dtype = DTYPES[str(config.dtype).removeprefix("torch.")]
    geometry = Geometry(config.num_kv_heads, config.head_dim, config.head_dim_v, dtype)
    layout = step_layout(sizes.max_reqs * sizes.query_len, num_heads, geometry, region_bytes)
    return layout, resident_layout(sizes.max_reqs, sizes.max_pages, layout, region_bytes)


def _shape(sizes: ResidentSizes) -> DecodeShape:
    return DecodeShape(sizes.max_reqs, sizes.query_len, sizes.max_pages * sizes.page_size)


def refuse_costly(
    service: AttentionService, group: LayerGroup, options: list[AttentionOptions], sizes: ResidentSizes
) -> None:
    """Raises Exhausted: the longest of the steps would have the GPU for longer than a step may."""
    context_len = min(sizes.max_context_len, sizes.max_pages * sizes.page_size)
    longest = decode_step(sizes.max_reqs, sizes.query_len, context_len, sizes.page_size)
    costs = {each: cost_of(group.config, longest, each, group.device).work for each in dict.fromkeys(options)}
    if (work := sum(costs[each] for each in options)) > service.executor.most_work:
        raise too_costly(work, service.executor.most_work)


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
