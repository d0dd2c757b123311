"""The interface of a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions


@dataclass(frozen=True)
class DecodeShape:
    """Decode steps that one fixed plan serves.

    Attributes:
        num_reqs: most requests of a step.
        query_len: new tokens of each request.
        max_context_len: most cached tokens of a request.
    """

    num_reqs: int
    query_len: int
    max_context_len: int


class DeviceStep(NamedTuple):
    """A decode step as kernels read it on the device.

    Attributes:
        step: int32 on the device, what `kernels.decode_items` reads.
        tables: its element where the page tables begin, a row of them for each request.
        num_pages: elements of these, of all requests.
    """

    step: torch.Tensor
    tables: int
    num_pages: int


class FixedPlan(Protocol):
    """A plan whose launches never change: steps are written into its buffers, so its launches can be captured once.

    All calls belong on one stream. Of a plan's layers, none may be launched for a step before `update` with it.
    """

    @property
    def shape(self) -> DecodeShape:
        """The steps that it serves."""

    @property
    def num_bytes(self) -> int:
        """Memory of the device that its buffers take."""

    def refusal(self, metadata: AttentionMetadata) -> str | None:
        """None, or the reason why a step does not fit, for people."""

    def update(self, metadata: AttentionMetadata) -> None:
        """Makes a step that fits the one that `launch` computes: one copy and one launch.

        What was launched for earlier steps may still be queued. Waits for the device only where it would be two updates
        ahead.
        """

    def launch(
        self,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pages: LayerPages,
    ) -> None:
        """Attention of one layer. Only launches, with the same arguments for every step: a CUDA graph can keep them.

        Args:
            output: `[num_reqs * query_len, num_heads, head_dim_v]` of the shape in q's dtype, contiguous; the rows of
                requests that the step does not have are left alone.
            lse: float32 `[num_reqs * query_len, num_heads]`, likewise; None unless `options.return_lse`.
            q: `[num_reqs * query_len, num_heads, head_dim]`, contiguous. Rows of requests that the step does not have
                may hold anything; so may those of k and v.
            k: `[num_reqs * query_len, num_kv_heads, head_dim]`, contiguous.
            v: `[num_reqs * query_len, num_kv_heads, head_dim_v]`, contiguous.
            pages: of the layer.
        """


class AttentionKernel(Protocol):
    """One way of computing the attention of a step.

    `plan` runs once per step and kind of layer, `run` or `launch` once per layer. Inputs are valid: nothing is checked
    again.
    """

    @property
    def backend(self) -> AttentionBackend:
        """Its name."""

    @property
    def batch_invariant(self) -> bool:
        """Whether a request's output bits never depend on what shares its batch, if `KVSplitConfig` asks for that."""

    def supports(self, config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions) -> str | None:
        """None, or the reason why this step cannot be served, for people."""

    def supports_context_length(self, num_tokens: int) -> bool:
        """Whether a request may have `num_tokens` of context."""

    def plan(
        self, config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions, device: torch.device
    ) -> Any:
        """What `run` and `launch` need and every layer with these options shares."""

    def fixed_plan(
        self, config: AttentionConfig, shape: DecodeShape, options: AttentionOptions, device: torch.device
    ) -> FixedPlan | str:
        """A plan for all decode steps of a shape, or the reason why this backend has none, for people.

        It takes its memory, compiles and waits for the device: make it before there is work. Its steps get the bits of
        `plan` and `run`.
        """

    def run(
        self,
        plan: Any,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of one layer. Writes nothing but its results.

        New tokens are read from `k` and `v`, and stored afterwards, unless the plan says otherwise: see `ReadsStored`.

        Args:
            plan: from `plan`.
            q: `[num_tokens, num_heads, head_dim]`.
            k: `[num_tokens, num_kv_heads, head_dim]`, or None in a cache-only step.
            v: `[num_tokens, num_kv_heads, head_dim_v]`, or None in a cache-only step.
            pages: of the layer.

        Returns:
            output `[num_tokens, num_heads, head_dim_v]` in q's dtype, and lse float32 `[num_tokens, num_heads]` if
            `options.return_lse`, else None. A row that sees nothing has zeros and -inf.
        """

    def launch(
        self,
        plan: Any,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> None:
        """As `run`, into tensors that are there.

        Args:
            plan: from `plan`.
            output: `[num_tokens, num_heads, head_dim_v]` in q's dtype, contiguous.
            lse: float32 `[num_tokens, num_heads]`, contiguous; None unless `options.return_lse`.
            q: as for `run`, but contiguous; so are k and v.
            k: likewise.
            v: likewise.
            pages: as for `run`.
        """


class DevicePlan(FixedPlan, Protocol):
    """A fixed plan of steps that something on the device writes, in the order of the stream; never `update` it."""

    @property
    def lay_out(self) -> Callable[[], None]:
        """Makes what is in the device's step the one that `launch` computes: only launches, as `launch` does."""


@runtime_checkable
class PlansOnDevice(AttentionKernel, Protocol):
    """A kernel for which the device can plan steps that the host does not know."""

    def device_step(self, config: AttentionConfig, shape: DecodeShape, device: torch.device) -> DeviceStep:
        """Room for steps of a shape, on the device; several plans may have one in common."""

    def device_plan_bytes(
        self, config: AttentionConfig, shape: DecodeShape, options: AttentionOptions, device: torch.device
    ) -> int | str:
        """Memory of the device that `device_plan` will take beside the step, or why there is no such plan."""

    def device_plan(
        self, config: AttentionConfig, shape: DecodeShape, options: AttentionOptions, step: DeviceStep
    ) -> DevicePlan | str:
        """A plan of what lies in `step` when it is laid out, or the reason why there is none; see `fixed_plan`."""


@runtime_checkable
class ShiftsPages(AttentionKernel, Protocol):
    """A kernel that can have requests of several caches in one step, if their pages lie in one tensor."""

    def shifted(self, plan: Any, page_offsets: torch.Tensor) -> Any:
        """The plan with a number added to each request's page ids.

        Args:
            plan: from `plan`, or what the last `shifted` gave. It is not to be run any more.
            page_offsets: int32 `[num_reqs]` on the device, to be added to the ids that were planned with. No page that
                holds context is absent.
        """


@runtime_checkable
class RunsInPieces(AttentionKernel, Protocol):
    """A kernel whose work can be left between its pieces, each of which takes some tenths of a second at most."""

    def pieces(
        self,
        plan: Any,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> Iterator[None]:
        """As `launch`, but only as far as it is asked to go on.

        How a request is cut depends on itself alone, so that its bits do not depend on what shares its batch.
        """


@runtime_checkable
class ReadsStored(AttentionKernel, Protocol):
    """A kernel with plans that read new tokens from their slots."""

    def reads_stored(self, plan: Any) -> bool:
        """Whether `plan` does: then K and V must be stored before it runs."""
