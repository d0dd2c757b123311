"""Steps on a cuda plane: all layers of a step are enqueued ahead of the worker, on the session's own stream.

For each layer the stream waits for the worker, stores, attends, writes the output to the region and tells the worker.
What the executor promises everybody else still holds:

- It enqueues a step as any other work, in its turn, on its thread; it never waits for a worker. Only the session's own
  stream does, and no other stream waits for that one. A session's next step is enqueued when its last one is over.
- What the executor enqueued before a step, on the stream of all other work, comes before it: the session's stream waits
  for an event there. So caches are created, filled and copied before the step reads them.
- What comes after the step's answer comes after the step: the answer is sent when its stream is done. Between the
  step's message and its answer nothing else is ordered against it, as between two calls under way at once; the client
  waits for the answer (`CudaStep.finish`) before it asks for anything else of the cache.
- A cache that is deleted meanwhile, or whose lease ends, is closed at once for everybody; the step keeps hold of its
  pages, so that their memory is no other cache's before the step is over, and is answered with CacheLost.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnd.errors import CacheLost, InvalidRequest, Unsupported
from attnd.planes.cuda_layout import Geometry, StepLayout, step_layout
from attnd.tensors import DTYPES
from attnd_server.config import AttentionBackend
from attnd_server.cuda_graphs import StepGraphs
from attnd_server.dispatcher import Plan, TritonAttentionOps
from attnd_server.kernels.pages import stored_tokens
from attnd_server.metadata import AttentionOptions
from attnd_server.planes.cuda import Lane
from attnd_server.steps import Step

# Their layers only launch. Others copy from the host or wait for the device, which would make the executor wait.
BACKENDS = (AttentionBackend.TRITON, AttentionBackend.TRITON_GROUPED)


@dataclass(eq=False)
class CudaStep:
    """A step to be enqueued.

    Attributes:
        step: checked.
        options: of each layer.
        num_heads: query heads; 0 in a store-only step.
        wait: waits until the step is over, once it was enqueued.
        backend: what computes it; None in a store-only step.
        started_at: when the executor took it, `time.perf_counter`.
    """

    step: Step
    options: list[AttentionOptions]
    num_heads: int
    wait: Callable[[], None] | None = None
    backend: AttentionBackend | None = None
    started_at: float = 0.0

    def layout(self, lane: Lane) -> StepLayout:
        """Where its tensors lie. Raises InvalidRequest: the region does not hold them."""
        config = self.step.cache.config
        dtype = DTYPES[str(config.dtype).removeprefix("torch.")]
        geometry = Geometry(config.num_kv_heads, config.head_dim, config.head_dim_v, dtype)
        return step_layout(self.step.metadata.num_tokens, self.num_heads, geometry, lane.num_bytes)

    def enqueue(self, lane: Lane, graphs: StepGraphs, ops: TritonAttentionOps) -> None:
        """Enqueues all layers. On the executor's thread; does not wait for the worker.

        Raises:
            CacheLost: the cache is closed.
            Unsupported: no backend that only launches can serve the step, or not the one that is named.
        """
        self.started_at = time.perf_counter()
        self.step.cache.refuse_if_closed()
        layout = self.layout(lane)
        with lane.current():
            self.step.mark_written()
            # Held until the step is over, see above.
            self._pages = self.step.cache.k_pages, self.step.cache.v_pages
            # Before the first layer waits, while the stream is idle: plans are copied to the device.
            graph = graphs.find(self.step.cache, self.step.metadata, self.options, layout)
            if graph is not None:
                self.backend = graph.backend
                graph.run(self.step.metadata)
            else:
                plans = {} if self.step.metadata.store_only else self._plans(ops)
                self._enqueue_layers(lane, layout, plans, ops.device)
            self.wait = lane.mark()

    def refuse_if_lost(self) -> None:
        """After the step. Raises CacheLost: its cache was closed while it ran."""
        if self.step.cache.is_closed:
            raise CacheLost("the cache was deleted, or its lease ended, while a step ran", field="cache.id")

    def _plans(self, ops: TritonAttentionOps) -> dict[AttentionOptions, Plan]:
        plans = {options: self.step.plan_for(options, ops) for options in self.options}
        for plan in plans.values():
            if plan.backend not in BACKENDS:
                names = ", ".join(backend.value for backend in BACKENDS)
                raise Unsupported(
                    f"backend {plan.backend.value} serves this step, but on a cuda plane must be one of {names}",
                    field="backend",
                )
            self.backend = plan.backend
        return plans

    def _enqueue_layers(
        self, lane: Lane, layout: StepLayout, plans: dict[AttentionOptions, Plan], device: torch.device
    ) -> None:
        cache, metadata = self.step.cache, self.step.metadata
        q, k, v, output, lse = (lane.tensor(place) for place in layout)
        slots = metadata.slot_mapping
        stored = None if slots is None or metadata.cache_only else stored_tokens(slots, device)
        if plans:
            self._load_kernels(plans, q, k, v, output, lse)
        for layer, options in enumerate(self.options):
            is_last = layer == len(self.options) - 1
            lane.flags.wait(lane.handle, layer, is_last)
            if stored is not None:
                cache.store(layer, k, v, stored)
            if plans:
                new = (None, None) if metadata.cache_only else (k, v)
                pages = cache.k_pages[layer], cache.v_pages[layer], cache.k_scales, cache.v_scales
                # A plan of Triton's, which writes where it is told.
                plans[options].state.launch(output, lse if options.return_lse else None, q, *new, *pages)
            lane.flags.signal(lane.handle, layer, is_last)

    def _load_kernels(
        self,
        plans: dict[AttentionOptions, Plan],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Launches every kernel of the step once, to no effect, before anything waits.

        To load a kernel that is not on the device yet the driver may wait for all that is there: for the worker, too.
        The results go elsewhere, because the worker may still be reading those of the step before.
        """
        cache, metadata = self.step.cache, self.step.metadata
        new: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if not metadata.cache_only:
            new = k, v
            cache.store_at(0, k, v, torch.full((metadata.num_tokens,), -1, dtype=torch.int64, device=k.device))
        pages = cache.k_pages[0], cache.v_pages[0], cache.k_scales, cache.v_scales
        for options, plan in plans.items():
            results = torch.empty_like(output), torch.empty_like(lse) if options.return_lse else None
            plan.state.launch(*results, q, *new, *pages)


def layer_options(options: list[AttentionOptions], num_layers: int) -> list[AttentionOptions]:
    """Those of each layer.

    Raises:
        InvalidRequest: neither one for all nor one for each.
    """
    if len(options) not in (1, num_layers):
        rule = f"must have one for all layers, or one for each of the cache's {num_layers}"
        raise InvalidRequest(f"options has {len(options)} elements, but {rule}", field="options")
    return options * num_layers if len(options) == 1 else options
