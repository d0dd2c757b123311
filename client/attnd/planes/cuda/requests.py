"""What a cuda plane's session says of a step."""

from __future__ import annotations

from attnd import traces
from attnd.planes.cuda.step import CudaStep
from attnd.planes.leases import Lease
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.page_table_deltas import SentPageTables
from attnd.protocol.requests import DEFAULT_OPTIONS
from attnd.v1 import attention_pb2


def step_request(
    cache: Lease, step: CudaStep, tables: SentPageTables, num_heads: int, options: tuple[AttentionOptions, ...]
) -> attention_pb2.CudaStep:
    """A step as it is sent. Begins its span, if it has one and has not begun it.

    Raises:
        InvalidRequest: the metadata cannot be sent.
        Unsupported: the server lacks something that it needs.
    """
    message = step.metadata.to_message(step.id, cache.ref, tables)
    if cache.missing is not None:
        cache.missing.check_step(message)
    if step.span is not None:
        message.traceparent = step.span.traceparent
    elif traces.tracer is not None and not step.is_unsampled:
        step.span = traces.begin(message, range(cache.config.num_layers), "cuda")
    heads = 0 if step.metadata.store_only else num_heads
    told = [] if options == (DEFAULT_OPTIONS,) else [each.message for each in options]
    return attention_pb2.CudaStep(step=message, num_heads=heads, options=told)


def begin_span(cache: Lease, step: CudaStep) -> bool:
    """Begins a step's span if it has one, before it is known how the step goes; whether it has."""
    message = step.metadata.to_message(step.id, cache.ref)
    step.span = traces.begin(message, range(cache.config.num_layers), "cuda")
    step.is_unsampled = step.span is None
    return not step.is_unsampled


def num_tokens_of(request: attention_pb2.CudaStep) -> int:
    """New tokens of a step."""
    cu_seqlens_q = request.step.cu_seqlens_q.data
    return memoryview(cu_seqlens_q).cast("i")[-1] if cu_seqlens_q else 0
