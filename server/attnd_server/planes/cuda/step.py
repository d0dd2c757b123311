"""Steps on a cuda plane: all layers of a step are enqueued ahead of the worker, on the session's own stream.

For each layer the stream waits for the worker, stores, attends, writes the output to the region and tells the worker.
What the executor promises everybody else still holds:

- It enqueues a step as any other work, in its turn, on its thread; it never waits for a worker. Only the session's own
  stream does, and no other stream waits for that one. A session's next step may be enqueued while one runs, after it.
- What the executor enqueued before a step, on the stream of all other work, comes before it: the session's stream waits
  for an event there. So caches are created, filled and copied before the step reads them.
- What comes after the step's answer comes after the step: the answer is sent when its stream is done. Between the
  step's message and its answer nothing else is ordered against it, as between two calls under way at once; the client
  waits for the answer (`CudaStep.finish`) before it asks for anything else of the cache.
- A cache that is deleted meanwhile, or whose lease ends, is closed at once for everybody; the step keeps hold of its
  pages (`Cache.held`), so that their memory stays until the step is over, and is answered with CacheLost.
- It waits for no other session's worker: a step is planned, and its kernels are launched once, on the stream of all
  other work and with memory of that stream; the session's own has the layers alone, and kernels that bring a graph its
  step. A kernel that is not on the device yet is waited for by the session before anything of the step waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnd.errors import CacheLost, Unsupported
from attnd.protocol.cuda.layout import StepLayout
from attnd_server.attention.config import AttentionBackend
from attnd_server.attention.kernels.pages import stored_tokens
from attnd_server.attention.metadata import AttentionOptions
from attnd_server.attention.ops import TritonAttentionOps
from attnd_server.device.kernels.launch import KernelMissing
from attnd_server.execution.step import Step
from attnd_server.planes.cuda.channel import Channel
from attnd_server.planes.cuda.step_graph import StepGraph
from attnd_server.planes.cuda.step_graphs import StepGraphs

# Their layers only launch. Others copy from the host or wait for the device, which would make the executor wait.
BACKENDS = (AttentionBackend.TRITON, AttentionBackend.TRITON_GROUPED)


@dataclass(eq=False)
class CudaStep:
    """A step to be enqueued.

    Attributes:
        step: checked.
        options: of each layer.
        num_heads: query heads; 0 in a store-only step.
        layouts: where the tensors of even and odd layers lie.
        wait: waits until the step is over, once it was enqueued.
        backend: what computes it; None in a store-only step.
        started_at: when the executor took it, `time.perf_counter`.
        graph: that runs it, and stays until it is over; None: its layers are launched one by one.
    """

    step: Step
    options: list[AttentionOptions]
    num_heads: int
    layouts: tuple[StepLayout, StepLayout]
    wait: Callable[[], None] | None = None
    backend: AttentionBackend | None = None
    started_at: float = 0.0
    graph: StepGraph | None = None

    def num_bytes(self) -> tuple[int, int]:
        """Bytes of q, k and v that its layers have together, and of output and lse."""
        q, k, v, output, lse = self.layouts[0]
        metadata, num_layers = self.step.metadata, len(self.options)
        received = sent = 0
        if not metadata.store_only:
            received += num_layers * q.num_bytes
            sent += num_layers * output.num_bytes + lse.num_bytes * sum(each.return_lse for each in self.options)
        if not metadata.cache_only:
            received += num_layers * (k.num_bytes + v.num_bytes)
        return received, sent

    def enqueue(self, channel: Channel, graphs: StepGraphs, ops: TritonAttentionOps) -> None:
        """Enqueues all layers. On the executor's thread; does not wait for the worker.

        Raises:
            CacheLost: the cache is closed.
            Unsupported: no backend that only launches can serve the step, or not the one that is named.
            KernelMissing: a kernel is not there yet; nothing of the step waits.
        """
        self.started_at = time.perf_counter()
        self.step.cache.refuse_if_closed()
        self.step.mark_written()
        step = self.step
        self.graph = graph = graphs.find(step.cache, step.group, step.metadata, self.options, self.layouts)
        if graph is not None:
            self.backend = graph.backend
        else:
            self._plan(channel, ops)
        try:
            with channel.current():
                if graph is not None:  # after the step before, which may still read what the graph has of it
                    graph.load(self.step.metadata)
                    graph.replay()
                else:
                    self._enqueue_layers(channel)
        except KernelMissing as kernel:
            raise RuntimeError(f"{kernel}, and layers of the step wait already") from kernel
        self.wait = channel.mark()

    def refuse_if_lost(self) -> None:
        """After the step. Raises CacheLost: its cache was closed while it ran."""
        if self.step.cache.is_closed:
            raise CacheLost("the cache was deleted, or its lease ended, while a step ran", field="cache.id")

    def _plan(self, channel: Channel, ops: TritonAttentionOps) -> None:
        """Plans the layers; what they need is the step's own until it is over."""
        step, metadata = self.step, self.step.metadata
        if metadata.slot_mapping is not None and not metadata.cache_only:
            step.stored = stored_tokens(metadata.slot_mapping, ops.device)
        for options in () if metadata.store_only else dict.fromkeys(self.options):
            began_ns = time.time_ns()
            plan = ops.plan(step.group.config, metadata, options, BACKENDS)
            if step.trace is not None:
                step.trace.planned(began_ns)
            if plan.backend not in BACKENDS:
                names = ", ".join(backend.value for backend in BACKENDS)
                raise Unsupported(
                    f"backend {plan.backend.value} serves this step, but on a cuda plane must be one of {names}",
                    field="backend",
                )
            step.plans[options] = plan
            self.backend = plan.backend
        self._load_kernels(*(channel.tensor(place) for place in self.layouts[0]))

    def _enqueue_layers(self, channel: Channel) -> None:
        step, group = self.step, self.step.group
        tensors = [[channel.tensor(place) for place in layout] for layout in self.layouts]
        for layer, options in enumerate(self.options):
            is_last = layer == len(self.options) - 1
            q, k, v, output, lse = tensors[layer % 2]
            new_k, new_v = (None, None) if step.metadata.cache_only else (k, v)
            channel.flags.wait(channel.handle, layer, is_last)
            if step.stored is not None:
                group.store(layer, k, v, step.stored)
            if options in step.plans:
                returned = lse if options.return_lse else None
                step.plans[options].launch(output, returned, q, new_k, new_v, group.layers[layer])
            channel.flags.signal(channel.handle, layer, is_last)

    def _load_kernels(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor, lse: torch.Tensor
    ) -> None:
        """Launches every kernel of the step once, to no effect, before anything of it waits.

        So it is here that one is found to be missing, or that Triton compiles and loads it where there is no library.
        The results go elsewhere, because the worker may still be reading those of the step before.
        """
        group, metadata = self.step.group, self.step.metadata
        if self.step.stored is not None:
            group.store_at(0, k, v, torch.full((metadata.num_tokens,), -1, dtype=torch.int64, device=k.device))
        new_k, new_v = (None, None) if metadata.cache_only else (k, v)
        for options, plan in self.step.plans.items():
            results = torch.empty_like(output), torch.empty_like(lse) if options.return_lse else None
            plan.launch(*results, q, new_k, new_v, group.layers[0])
