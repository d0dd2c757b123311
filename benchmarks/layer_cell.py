"""A cell on both sides of a cuda plane: what a layer's parts are, what they compute on, and that they are right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from attnd_server.attention.backends.base import DecodeShape
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.ops import TritonAttentionOps
from attnd_server.kv.cache import Cache
from attnd_server.kv.cache_shape import CacheShape
from benchmarks import exactness, kernel_tensors, report
from benchmarks.kernel_cases import Case
from benchmarks.layer_sides import OneProcessor, Run, Sides, Tensors, TwoGpus, layout_of
from benchmarks.worker_model import ModelShape
from benchmarks.worker_options import CellSize


class Part(NamedTuple):
    """What a row's layers do.

    Attributes:
        name: of the row.
        hands_over: whether the worker hands q, k and v over, and waits for the server.
        stores: whether the server stores.
        attends: where the server writes attention's output: "here", "there" (the worker's memory), or "": it does not.
        returns: whether the worker copies its output out of the results' memory.
    """

    name: str
    hands_over: bool
    stores: bool
    attends: str
    returns: bool


PRODUCT, ALONE = "+ attention, output to the worker", "attention alone, output stays"
"""Whose outputs are checked: what a cuda plane does, and what it is compared with."""
PARTS = (
    Part("hand-over, nothing back", True, False, "", False),
    Part("hand-over", True, False, "", True),
    Part("+ store", True, True, "", True),
    Part("+ attention, output stays", True, True, "here", True),
    Part(PRODUCT, True, True, "there", True),
    Part("+ attention, nothing stored", True, False, "there", True),
    Part("store alone", False, True, "", False),
    Part("store and attention alone", False, True, "here", False),
    Part(ALONE, False, False, "here", False),
    Part("attention alone, output to the worker", False, False, "there", False),
)


@dataclass(eq=False)
class Layers:
    """A cell on both sides: pages of all layers, a plan, and the worker's tensors.

    Attributes:
        sides: where they are.
        local_outputs: of each layer, on the server's device.
        returned: of each layer, on the worker's.
    """

    sides: Sides
    case: Case
    tensors: kernel_tensors.Tensors
    cache: Cache
    plan: Any
    worker: Tensors
    local_outputs: list[torch.Tensor]
    returned: list[torch.Tensor]

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return len(self.returned)

    def prepare(self, part: Part) -> tuple[Run | None, Run | None]:
        """The runs of a part on both sides."""
        slots = self.case.new_slots.to(self.sides.server_device)
        (group,) = self.cache.groups
        q, k, v = self.sides.inputs

        def work(layer: int) -> None:
            if part.stores:
                group.store_at(layer, k, v, slots)
            if part.attends:
                output = self.sides.remote_output if part.attends == "there" else self.local_outputs[layer]
                self.plan.launch(output, None, q, k, v, group.layers[layer])

        server = self.sides.server(self.num_layers, part.hands_over, work)
        worker = self.sides.worker(self.worker, self.returned, part.returns) if part.hands_over else None
        return server, worker

    def refuse_wrong(self, runs: Mapping[str, tuple[Run | None, Run | None]]) -> None:
        """Runs the product's layers, and those whose output stays. Raises WrongResult: something is wrong."""
        for tensor in (*self.sides.inputs, self.sides.remote_output, *self.local_outputs, *self.returned):
            tensor.fill_(torch.nan)
        self.sides.times_us(*runs[PRODUCT], count=1)
        self.sides.times_us(*runs[ALONE], count=1)
        for layer, (here, there) in enumerate(zip(self.local_outputs, self.returned, strict=True)):
            if not torch.equal(here.cpu(), there.cpu()):
                raise report.WrongResult(f"layer {layer}: the output that the worker got is not the server's own")
        slots = self.case.new_slots.to(self.sides.server_device)
        (group,) = self.cache.groups
        for layer in (0, self.num_layers - 1):
            exactness.expected(self.case, self.tensors, layer).check(f"layer {layer}", self.local_outputs[layer])
            for stored, sent in zip(group.read(layer, slots), (self.tensors.k, self.tensors.v), strict=True):
                report.refuse_wrong(f"what is stored of layer {layer}", stored, sent.double(), limit=0.0)

    def close(self) -> None:
        """Frees pages and memory."""
        self.sides.close()
        self.cache.close()


def make_layers(size: CellSize, shape: ModelShape, dry_run: bool) -> Layers:
    """Draws a cell's tensors, and plans its step."""
    num_reqs, context_len = size
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    case = Case("", str(size), (context_len,) * num_reqs, (1,) * num_reqs, 1, 16, *heads, shape.dtype)
    layout = layout_of(num_reqs, *heads, shape.dtype)
    sides: Sides = OneProcessor(layout) if dry_run else TwoGpus(layout)
    device = sides.server_device
    with torch.cuda.device(device if device.type == "cuda" else -1):
        config = AttentionConfig(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            num_pages=int((case.page_tables >= 0).sum()),
            page_size=case.page_size,
            dtype=shape.dtype,
        )
        cache = Cache(CacheShape.of(config), epoch=0, principal="", ttl_s=0.0, name="", device=device)
        (group,) = cache.groups
        for layer in group.layers:
            layer.k.normal_()
            layer.v.normal_()
        q, k, v = (
            kernel_tensors.normal((num_reqs, each, shape.head_dim), shape.dtype, device)
            for each in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        )
        plan = plan_of(case, config, device)
        local_outputs = [torch.zeros_like(q) for _ in group.layers]
    workers_device = torch.device("cpu") if dry_run else torch.device("cuda", 0)
    worker = Tensors(*(tensor.to(workers_device) for tensor in (q, k, v)))
    returned = [torch.zeros_like(worker.q) for _ in group.layers]
    tensors = kernel_tensors.Tensors(q, k, v, list(group.layers))
    for there, here in zip(sides.inputs, (q, k, v), strict=True):
        there.copy_(here)  # for rows without a hand-over
    return Layers(sides, case, tensors, cache, plan, worker, local_outputs, returned)


def plan_of(case: Case, config: AttentionConfig, device: torch.device) -> Any:
    """A plan as a server's step graph has it; on a processor, where there is none, that of a single step.

    Raises:
        RuntimeError: the GPU has no fixed plan for the step.
    """
    ops, metadata, options = TritonAttentionOps(device), case.metadata(), case.options()
    if device.type == "cpu":
        return ops.plan(config, metadata, options)
    shape = DecodeShape(case.num_reqs, 1, metadata.max_context_len)
    plan = ops.kernel_for(config, shape, options).fixed_plan(config, shape, options, device)
    reason = plan if isinstance(plan, str) else plan.refusal(metadata)
    if isinstance(plan, str) or reason is not None:
        raise RuntimeError(f"there is no fixed plan: {reason}")
    plan.update(metadata)
    torch.cuda.synchronize(device)  # it was laid out on another stream than its launches'
    return plan
