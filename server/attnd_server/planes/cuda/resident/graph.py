"""What every launch of a session's resident steps is: one CUDA graph, from the first gate to the last.

It takes the metadata that the worker wrote, checks and plans it, and runs the layers between their gates. Its bits are
those of steps by message: the plans are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from attnd.protocol.cuda.layout import Place, StepLayout
from attnd.protocol.cuda.resident import LENS_ROWS, ResidentLayout
from attnd.v1 import tensor_pb2
from attnd_server.attention.backends.base import DevicePlan, DeviceStep
from attnd_server.attention.config import AttentionBackend
from attnd_server.attention.metadata import AttentionOptions
from attnd_server.attention.resident import ResidentSizes
from attnd_server.device.cuda_graph import Launches
from attnd_server.device.kernels.launch import for_graphs
from attnd_server.kv.layer_group import LayerGroup
from attnd_server.planes.cuda.channel import Channel, Gates

if TYPE_CHECKING:
    from attnd_server.attention.kernels.resident.metadata import Buffers


class ResidentGraph:
    """The launches of a class of steps, on one channel and one cache.

    Attributes:
        sizes: of the class.
        buffers: private ones.
        backend: of the plans.
    """

    def __init__(
        self,
        group: LayerGroup,
        options: list[AttentionOptions],
        plans: dict[AttentionOptions, DevicePlan],
        backend: AttentionBackend,
        step: DeviceStep,
        sizes: ResidentSizes,
    ) -> None:
        """Takes its memory; captures nothing yet. On the stream of all other work.

        Args:
            group: of all layers.
            options: of each layer.
            plans: by options, of `step`.
            backend: of the plans.
            step: where steps are accepted into.
            sizes: of the class.
        """
        self.sizes, self.backend = sizes, backend
        self._group, self._options, self._plans = group, options, plans
        self.buffers = buffers_of(sizes, step)

    def capture(
        self,
        capture: Callable[[Launches], Launches],
        channel: Channel,
        gates: Gates,
        layouts: tuple[StepLayout, StepLayout],
        where: ResidentLayout,
    ) -> Launches:
        """Captures the launches, and returns what enqueues them.

        Args:
            capture: records launches on the channel's stream.
            channel: of the session.
            gates: likewise.
            layouts: of the tensors of the class's most requests, of even and odd layers.
            where: the metadata.

        Raises:
            KernelMissing: a kernel is not there yet.
        """
        tensors = [[channel.tensor(place) for place in each] for each in layouts]
        lens, tables = (channel.tensor(place) for place in metadata_places(where))
        last = len(self._options) - 1

        def attend(index: int, options: AttentionOptions) -> None:
            q, k, v, output, lse = tensors[index % 2]
            self._plans[options].launch(output, lse if options.return_lse else None, q, k, v, self._group.layers[index])

        def store(index: int) -> None:
            _, k, v, _, _ = tensors[index % 2]
            self._group.store_at(index, k, v, self.buffers.slots)

        def launches() -> None:
            gates.begin(channel.handle)
            self._take(lens, tables)
            for index, options in enumerate(self._options):
                gates.wait(channel.handle)
                attend(index, options)
                if index < last:  # the worker goes on while its K and V are stored
                    gates.signal(channel.handle)
                store(index)
            gates.end(channel.handle)

        with for_graphs():
            # Once to no effect: no step came. A kernel that is not on the device yet cannot be captured.
            self._take(lens, tables)
            store(0)
            for options in self._plans:
                attend(0, options)
            return capture(launches)

    def _take(self, lens: torch.Tensor, tables: torch.Tensor) -> None:
        from attnd_server.attention.kernels.resident.metadata import take_step

        take_step(self.sizes, self.buffers, lens, tables)
        for plan in self._plans.values():
            plan.lay_out()


def buffers_of(sizes: ResidentSizes, step: DeviceStep) -> Buffers:
    """The private buffers of a class, beside the step that they are accepted into, on its device."""
    from attnd_server.attention.kernels.resident.metadata import make_buffers

    return make_buffers(sizes, step.step[: step.tables], step.step[step.tables :])


def metadata_places(where: ResidentLayout) -> tuple[Place, Place]:
    """Lengths and page tables, in the region."""
    shapes = (where.lens, (LENS_ROWS, where.max_reqs)), (where.page_tables, (where.max_reqs, where.max_pages))
    lens, tables = (
        Place(offset, tensor_pb2.DTYPE_INT32, shape, 4 * shape[0] * shape[1], is_result=False)
        for offset, shape in shapes
    )
    return lens, tables
