"""Decode steps of one shape as a CUDA graph: all layers with their waits and signals in a single launch.

A graph belongs to a session, because it has the addresses of the session's region and words. Its bits are those of the
layers launched one by one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from attnd.protocol.cuda.layout import StepLayout
from attnd_server.attention.backends.base import FixedPlan
from attnd_server.attention.config import AttentionBackend
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.device.cuda_graph import Launches
from attnd_server.device.kernels.launch import for_graphs
from attnd_server.device.pinned_tensor import PinnedTensor
from attnd_server.kv.cache import Cache
from attnd_server.kv.layer_group import LayerGroup
from attnd_server.planes.cuda.channel import Channel


class StepGraph:
    """All layers of decode steps of one shape, on one channel and one cache.

    Attributes:
        backend: what computes them.
        num_bytes: memory of the device that its plans take.
    """

    def __init__(
        self,
        cache: Cache,
        group: LayerGroup,
        options: list[AttentionOptions],
        plans: dict[AttentionOptions, FixedPlan],
        backend: AttentionBackend,
        channel: Channel,
        layouts: tuple[StepLayout, StepLayout],
    ) -> None:
        """Takes memory for the slots; captures nothing yet. As the rest, on the stream of all other work.

        Args:
            cache: that the steps read and write.
            group: of all its layers.
            options: of each layer.
            plans: by options.
            backend: of the plans.
            channel: of the session.
            layouts: of the steps' tensors, of even and odd layers.
        """
        self.cache = cache
        self._group = group
        self.backend = backend
        self.num_bytes = sum(plan.num_bytes for plan in plans.values())
        self._options, self._plans, self._channel = options, plans, channel
        self._tensors = [[channel.tensor(place) for place in layout] for layout in layouts]
        self._slots = torch.full((layouts[0].q.shape[0],), -1, dtype=torch.int64, device=group.device)
        self._staged_slots = [PinnedTensor(self._slots) for _ in range(2)]
        self._replay: Launches | None = None

    def fits(self, metadata: AttentionMetadata) -> bool:
        """Whether it serves a step of its shape: page tables with gaps it does not."""
        return all(plan.refusal(metadata) is None for plan in self._plans.values())

    def capture(self, capture: Callable[[Launches], Launches], metadata: AttentionMetadata) -> None:
        """Captures a step that fits, which is still to be loaded."""
        self.load(metadata)  # loads the kernels that do it
        # A kernel that is not on the device yet cannot be captured. Nothing is stored: slots are -1. The region's own
        # output may still be read by the worker.
        self._slots.fill_(-1)
        output, lse = (torch.empty_like(each) for each in self._tensors[0][3:])
        with for_graphs():
            for options in self._plans:
                self._store_and_attend(0, options, output, lse)
            self._replay = capture(self._layers)

    def replay(self) -> None:
        """Enqueues the layers of the step that was loaded, once it was captured. The channel's stream is current."""
        assert self._replay is not None
        self._replay()

    def load(self, metadata: AttentionMetadata) -> None:
        """Makes a step that fits the one that is replayed next, in the order of the current stream.

        Unless it is two steps ahead of the device, it does not wait for it.
        """
        for plan in self._plans.values():
            plan.update(metadata)
        staged = self._staged_slots[0]
        self._staged_slots.reverse()
        staged.wait()
        if metadata.slot_mapping is None:
            staged.host.fill_(-1)
        else:
            staged.host.copy_(metadata.slot_mapping)
        staged.send(len(self._slots))

    def _layers(self) -> None:
        channel, last = self._channel, len(self._options) - 1
        for layer, options in enumerate(self._options):
            channel.flags.wait(channel.handle, layer, layer == last)
            self._store_and_attend(layer, options, *self._tensors[layer % 2][3:])
            channel.flags.signal(channel.handle, layer, layer == last)

    def _store_and_attend(self, layer: int, options: AttentionOptions, output: torch.Tensor, lse: torch.Tensor) -> None:
        group, (q, k, v, *_) = self._group, self._tensors[layer % 2]
        group.store_at(layer, k, v, self._slots)
        returned = lse if options.return_lse else None
        self._plans[options].launch(output, returned, q, k, v, group.layers[layer])
