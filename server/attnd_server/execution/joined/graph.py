"""One class of joined launches as a CUDA graph: calls come together, their step is laid out, stored and attended."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch

from attnd_server.attention.backends.base import DecodeShape, DevicePlan, DeviceStep
from attnd_server.attention.config import AttentionBackend
from attnd_server.attention.kernels.pages import StoredTokens
from attnd_server.attention.metadata import AttentionOptions
from attnd_server.attention.staging import call_fields
from attnd_server.device.copy_timer import NO_COPIES, Copies, timed_behind
from attnd_server.device.cuda_graph import Launches
from attnd_server.device.kernels.launch import for_graphs, launch_all
from attnd_server.execution.decode_graphs import Capture
from attnd_server.execution.joined.host_calls import HostCalls, Rows, Said, rows_of
from attnd_server.execution.joined.repeat import Repeat
from attnd_server.execution.step import Call, Result, Step
from attnd_server.kv.layer_group import LayerGroup


class JoinedGraph:
    """Launches of decode calls whose caches lie in one space, of layers with the same options.

    All that differs between launches lies in the host's block, from which the device takes it. So the graph is
    captured once, and a launch costs the host the same few numbers of each call, whoever shares it.

    Attributes:
        backend: of the plan.
        num_bytes: of the device's memory that it takes.
    """

    def __init__(
        self,
        group: LayerGroup,
        options: AttentionOptions,
        backend: AttentionBackend,
        shape: DecodeShape,
        plan: DevicePlan,
        step: DeviceStep,
        *,
        max_calls: int,
        margin: int,
    ) -> None:
        """Takes the memory.

        Args:
            group: of any of the caches.
            options: of the layers.
            backend: of the plan.
            shape: the launches that fit; its contexts are as long as the page tables are wide.
            plan: of `step`.
            step: where the requests of a launch come together.
            max_calls: of a launch.
            margin: columns past a context that kernels look at.
        """
        from attnd_server.attention.kernels.joined import JoinedTensors

        assert group.pages is not None
        space, device = group.pages.space, group.device
        config = space.config
        self._group, self.backend, self._plan, self._shape = group, backend, plan, shape
        self._pages = group.layers[0]._replace(k=space.k, v=space.v)  # scales are those of the whole group
        self._device, self._page_size, self._margin = device, config.page_size, margin
        self._max_pages = max_pages = shape.max_context_len // config.page_size
        self._host = HostCalls(config, options, shape, max_calls=max_calls, max_pages=max_pages, device=device)
        self._calls = self._host.as_device_sees()
        num_tokens = shape.num_reqs * shape.query_len
        inputs, results = (
            [torch.zeros(num_tokens, *field.row, dtype=field.dtype, device=device) for field in fields]
            for fields in call_fields(config, options)
        )
        slots, k, v, q = inputs
        *lse, output = results
        slots.fill_(-1)
        tables = step.step[step.tables : step.tables + shape.num_reqs * max_pages].view(shape.num_reqs, max_pages)
        self._tensors = JoinedTensors(step.step, tables, slots, q, k, v, output, lse[0] if lse else None)
        self.num_bytes = step.step.nbytes + plan.num_bytes + sum(each.nbytes for each in (*inputs, *results))
        self._launch: Launches | None = None
        self._copies: Copies | None = None if device.type == "cuda" else NO_COPIES
        self._space = space
        self._rows: WeakKeyDictionary[Step, Rows] = WeakKeyDictionary()

    @property
    def is_over(self) -> bool:
        """Whether no cache lies in the space any more."""
        return self._space.is_empty

    def make(self, capture: Capture) -> None:
        """Captures the launch, once it was made without requests. Raises KernelMissing: a kernel is not there yet."""
        with for_graphs():
            launch_all(self._launch_all, self._device.index)
            self._launch = capture(self._launch_all)

    def attend(self, calls: Sequence[Call]) -> list[Result]:
        """Attends all and stores all: a layer each of steps that fit."""
        first_pages = [_first_page(call.step, call.layer) for call in calls]
        rows = [self._rows_of(call.step) for call in calls]
        outputs = self._host.fill(calls, rows, first_pages, self._num_columns(calls))
        copies = self._run(calls)
        return [Result(*each, self.backend, copies) for each in outputs]

    def attend_repeats(self, repeats: Sequence[Repeat]) -> Copies:
        """As `attend`, of calls whose tensors and results lie where the device reaches them."""
        calls = [each.of.call for each in repeats]
        said = [
            Said(self._rows_of(each.call.step), each.at, _first_page(each.call.step, layer)) for each, layer in repeats
        ]
        self._host.say(said, self._num_columns(calls))
        return self._run(calls)

    def _num_columns(self, calls: Sequence[Call]) -> int:
        """Of the page tables, that kernels look at."""
        longest = max(call.step.metadata.max_context_len for call in calls)
        return -(-longest // self._page_size) + self._margin

    def _run(self, calls: Sequence[Call]) -> Copies:
        """Launches what the host has said, and waits for the device."""
        assert self._launch is not None
        for call in calls:
            call.step.mark_written()
        self._launch()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        if self._copies is None:  # of the first launch: to time each would cost more than they differ
            self._copies = timed_behind(self._launch, self._take, self._give, self._device)
        return self._copies

    def _launch_all(self) -> None:
        tensors = self._tensors
        self._take()
        self._plan.lay_out()
        self._plan.launch(tensors.output, tensors.lse, tensors.q, tensors.k, tensors.v, self._pages)
        self._group.store_in(self._pages, tensors.k, tensors.v, StoredTokens(tensors.slots))
        self._give()

    def _take(self) -> None:
        from attnd_server.attention.kernels.joined import take_calls

        take_calls(self._calls, self._tensors, query_len=self._shape.query_len, page_size=self._page_size)

    def _give(self) -> None:
        from attnd_server.attention.kernels.joined import give_results

        give_results(self._calls, self._tensors)

    def _rows_of(self, step: Step) -> Rows:
        """Those of a step, made once."""
        rows = self._rows.get(step)
        if rows is None:
            num_pages = -(-step.metadata.max_context_len // self._page_size)
            rows = self._rows[step] = rows_of(step.metadata, self._shape.query_len, num_pages, self._max_pages)
        return rows


def _first_page(step: Step, layer: int) -> int:
    """Page 0 of a layer of a step's group, in the space."""
    group = step.group
    assert group.pages is not None
    return group.pages.first + layer * group.config.num_pages
