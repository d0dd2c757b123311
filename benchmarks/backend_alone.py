"""The backend without client and server: what a call cannot be faster than."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from attnd.v1 import cache_pb2
from attnd_server.attention.backends.base import DecodeShape, FixedPlan
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.kernels.pages import stored_tokens
from attnd_server.attention.metadata import AttentionOptions
from attnd_server.attention.ops import TritonAttentionOps
from attnd_server.config import ServerConfig
from attnd_server.device.cuda_graph import captured
from attnd_server.kv.cache import Cache
from attnd_server.kv.cache_shape import CacheShape
from attnd_server.service import validation
from benchmarks.graph_timing import synchronize
from benchmarks.workload import DecodeStep


class BackendAlone:
    """Plan, store and run as the server's executor does them, tensors on the device already.

    On a GPU each layer is a CUDA graph, as after a warm-up, if the backend has a plan that can be captured.
    """

    def __init__(self, step: DecodeStep, device: torch.device) -> None:
        """Its cache is empty; `fill` it before the graphs of `open` are of any use."""
        self._device = device
        self._step = step
        self._ops = TritonAttentionOps(device)
        config = AttentionConfig(**step.geometry)
        self._cache = Cache(CacheShape.of(config), epoch=0, principal="", ttl_s=0.0, name="", device=device)
        (self._group,) = self._cache.groups
        self._metadata = validation.step(step.metadata.to_message(1, cache_pb2.CacheRef()), config, ServerConfig())
        self._options = AttentionOptions(num_heads=step.heads.num_heads, scale=step.heads.head_dim**-0.5)
        self._layers = [tuple(tensor.to(device) for tensor in layer) for layer in step.layers]
        assert self._metadata.slot_mapping is not None
        self._slots = self._metadata.slot_mapping.to(device, torch.int64)
        self._stored = stored_tokens(self._metadata.slot_mapping, device)
        self._output = torch.empty_like(self._layers[0][0])
        self._outputs = [torch.empty_like(self._output) for _ in self._layers] if device.type == "cuda" else []
        self._replays: list[Callable[[], None]] = []
        self._replay_all: Callable[[], None] | None = None
        self._plan = self._captured() if device.type == "cuda" else None

    @property
    def is_captured(self) -> bool:
        """Whether calls replay CUDA graphs."""
        return self._plan is not None

    def open(self) -> Callable[[int], torch.Tensor]:
        """Plans the step; what it returns computes a layer to its end."""
        call = self.open_queued()

        def call_to_end(layer: int) -> torch.Tensor:
            output = call(layer)
            self.wait()
            return output

        return call_to_end

    def open_queued(self) -> Callable[[int], torch.Tensor]:
        """Plans the step; what it returns does not wait for the device."""
        if self._plan is not None:
            self._plan.update(self._metadata)
            return self._replay
        plan = self._ops.plan(self._group.config, self._metadata, self._options)

        def call(layer: int) -> torch.Tensor:
            q, k, v = self._layers[layer]
            self._group.store(layer, k, v, self._stored)
            output, _ = plan.run(q, k, v, self._group.layers[layer])
            return output

        return call

    def open_graph(self) -> Callable[[int], torch.Tensor]:
        """As `open_queued`, but layer 0 launches all layers as one CUDA graph; only if `is_captured`."""
        plan = self._plan
        assert plan is not None
        if self._replay_all is None:
            self._replay_all = captured(partial(self._launch_all, plan), torch.cuda.Stream(self._device))

        def call(layer: int) -> torch.Tensor:
            if layer == 0:
                plan.update(self._metadata)
                assert self._replay_all is not None
                self._replay_all()
            return self._outputs[layer]

        return call

    def wait(self) -> None:
        """Waits for the device."""
        synchronize(self._device)

    def close(self) -> None:
        """Frees graphs and pages."""
        self.wait()
        self._replays.clear()
        self._replay_all = None
        self._plan = None
        self._cache.close()

    def store_kv(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """As `attnd.Cache.store_kv`."""
        self._group.store(layer, k.to(self._device), v.to(self._device), stored_tokens(slots, self._device))

    def read_kv(self, layer: int, slots: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `attnd.Cache.read_kv`."""
        k, v = self._group.read(layer, slots.to(self._device))
        return k.to(like.device), v.to(like.device)

    def _replay(self, layer: int) -> torch.Tensor:
        self._replays[layer]()
        return self._output

    def _captured(self) -> FixedPlan | None:
        """Captures every layer; None if the backend has no plan whose launches never change."""
        config, shape = self._group.config, DecodeShape(self._step.num_reqs, 1, self._step.context_len)
        kernel = self._ops.kernel_for(config, shape, self._options)
        plan = kernel.fixed_plan(config, shape, self._options, self._device)
        if isinstance(plan, str):
            return None
        plan.update(self._metadata)
        stream = torch.cuda.Stream(self._device)
        for layer in range(config.num_layers):
            launches = partial(self._launch, plan, layer, self._output)
            launches()  # a kernel that is not on the device yet cannot be captured
            self.wait()
            self._replays.append(captured(launches, stream))
        return plan

    def _launch_all(self, plan: FixedPlan) -> None:
        for layer, output in enumerate(self._outputs):
            self._launch(plan, layer, output)

    def _launch(self, plan: FixedPlan, layer: int, output: torch.Tensor) -> None:
        q, k, v = self._layers[layer]
        self._group.store_at(layer, k, v, self._slots)
        plan.launch(output, None, q, k, v, self._group.layers[layer])
