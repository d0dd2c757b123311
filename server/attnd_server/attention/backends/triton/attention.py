"""Backends `triton` and `triton_grouped`: paged attention on a GPU, or in Triton's interpreter for tests.

This module imports without triton; what needs it is in the other modules of this folder and loads when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnd_server.attention.backends.base import DecodeShape, DeviceStep
from attnd_server.attention.backends.triton.limits import MAX_CONTEXT_LEN
from attnd_server.attention.config import AttentionBackend, AttentionConfig
from attnd_server.attention.layer_pages import LayerPages
from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.attention.scales import MAX_SOFTCAP, refusal

if TYPE_CHECKING:
    from attnd_server.attention.backends.triton.fixed_plan import FixedTritonPlan
    from attnd_server.attention.backends.triton.plan import TritonPlan

# Oldest GPU with bfloat16 tensor cores.
MIN_CAPABILITY = (8, 0)


def availability(device: torch.device) -> str | None:
    """None if Triton's kernels run on `device`, or the reason why not. Triton's interpreter runs on any."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"device is {device}, but must be a CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability is {capability}, but must be at least {MIN_CAPABILITY}"
    return None


class TritonPagedAttention:
    """Paged attention in Triton, for every mask and option; holds no state.

    Args:
        backend: TRITON_GROUPED, in which the query heads of a KV head share each tile of K and V, or TRITON, in which
            each query head has programs of its own.
    """

    batch_invariant = True

    def __init__(self, backend: AttentionBackend = AttentionBackend.TRITON_GROUPED) -> None:
        if backend not in (AttentionBackend.TRITON, AttentionBackend.TRITON_GROUPED):
            raise ValueError(f"backend is {backend}, but must be TRITON or TRITON_GROUPED")
        self.backend = backend

    def supports(self, config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions) -> str | None:
        """None, or the reason why not."""
        from triton import knobs

        if not self.supports_context_length(metadata.max_context_len):
            return f"a context has {metadata.max_context_len} tokens, but must have at most {MAX_CONTEXT_LEN}"
        if config.latent:
            return "the cache is latent, but its kernels read K and V from memory of their own"
        if knobs.runtime.interpret and config.precision.dtype(config.dtype) is torch.bfloat16:
            return "Triton's interpreter cannot multiply bfloat16"
        if options.softcap > MAX_SOFTCAP:
            return f"softcap is {options.softcap:g}, but must be at most {MAX_SOFTCAP:g}"
        return refusal(options)

    def supports_context_length(self, num_tokens: int) -> bool:
        """Whether positions fit the kernels' integers."""
        return num_tokens <= MAX_CONTEXT_LEN

    def plan(
        self, config: AttentionConfig, metadata: AttentionMetadata, options: AttentionOptions, device: torch.device
    ) -> TritonPlan:
        """Lays out the step's work on the host and copies it to the device in one transfer."""
        from attnd_server.attention.backends.triton.planning import make_plan

        return make_plan(config, metadata, options, self.backend is AttentionBackend.TRITON_GROUPED, device)

    def shifted(self, plan: TritonPlan, page_offsets: torch.Tensor) -> TritonPlan:
        """The plan with a number added to each request's page ids; see `ShiftsPages`."""
        return plan.shifted(page_offsets)

    def fixed_plan(
        self, config: AttentionConfig, shape: DecodeShape, options: AttentionOptions, device: torch.device
    ) -> FixedTritonPlan | str:
        """One where Hopper's kernels serve the shape; see `AttentionKernel.fixed_plan`."""
        from attnd_server.attention.backends.triton.fixed_plan import make_fixed_plan

        return make_fixed_plan(config, shape, options, self.backend is AttentionBackend.TRITON_GROUPED, device)

    def device_step(self, config: AttentionConfig, shape: DecodeShape, device: torch.device) -> DeviceStep:
        """Room for steps of a shape; see `PlansOnDevice`."""
        from attnd_server.attention.backends.triton.fixed_plan import device_step

        return device_step(config, shape, device)

    def device_plan_bytes(
        self, config: AttentionConfig, shape: DecodeShape, options: AttentionOptions, device: torch.device
    ) -> int | str:
        """What a plan takes beside its step; see `PlansOnDevice`."""
        from attnd_server.attention.backends.triton.fixed_plan import fixed_plan_bytes

        return fixed_plan_bytes(config, shape, options, self.backend is AttentionBackend.TRITON_GROUPED, device)

    def device_plan(
        self, config: AttentionConfig, shape: DecodeShape, options: AttentionOptions, step: DeviceStep
    ) -> FixedTritonPlan | str:
        """One where Hopper's kernels serve the shape; see `PlansOnDevice`."""
        from attnd_server.attention.backends.triton.fixed_plan import make_fixed_plan

        is_grouped, device = self.backend is AttentionBackend.TRITON_GROUPED, step.step.device
        return make_fixed_plan(config, shape, options, is_grouped, device, step)

    def run(
        self,
        plan: TritonPlan,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of one layer; see `AttentionKernel.run`. Only launches."""
        return plan.run(q, k, v, pages)

    def launch(
        self,
        plan: TritonPlan,
        output: torch.Tensor,
        lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        pages: LayerPages,
    ) -> None:
        """As `run`, into `output` and `lse`; see `AttentionKernel.launch`. Only launches."""
        plan.launch(output, lse, q, k, v, pages)


def triton_attention(
    config: AttentionConfig,
    metadata: AttentionMetadata,
    options: AttentionOptions,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Plan and one layer in one call, with programs for each query head; see `AttentionKernel.run`."""
    kernel = TritonPagedAttention(AttentionBackend.TRITON)
    return kernel.run(kernel.plan(config, metadata, options, q.device), q, k, v, LayerPages(k_pages, v_pages))


def triton_grouped_attention(
    config: AttentionConfig,
    metadata: AttentionMetadata,
    options: AttentionOptions,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Plan and one layer in one call, with programs for each group of query heads; see `AttentionKernel.run`."""
    kernel = TritonPagedAttention(AttentionBackend.TRITON_GROUPED)
    return kernel.run(kernel.plan(config, metadata, options, q.device), q, k, v, LayerPages(k_pages, v_pages))
