"""The attention of a long call on a processor, a piece at a time."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import nullcontext
from functools import partial

import torch

from attnd_server.attention.ops import TritonAttentionOps
from attnd_server.device.copy_timer import NO_COPIES
from attnd_server.execution.step import Call, Result, attend, store, stored_before


def attend_in_pieces(call: Call, ops: TritonAttentionOps) -> Generator[None, None, Result]:
    """As `attend` on a processor, of a long call: stops between its pieces, and others' calls may run meanwhile."""
    step, layer, options, q, k, v, *_ = call
    step.cache.refuse_if_closed()
    plan = None if q is None else step.plan_for(options, ops)
    if q is None or plan is None or not plan.runs_in_pieces:
        return attend(call, ops)
    output = q.new_empty(*q.shape[:2], step.group.config.head_dim_v)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32) if options.return_lse else None
    stores_first = step.metadata.reads_stored
    with stored_before(call, k, v, ops) if stores_first else nullcontext():
        for _ in plan.kernel.pieces(plan.state, output, lse, q, k, v, step.group.layers[layer]):  # type: ignore[attr-defined]
            yield
            step.cache.refuse_if_closed()
    return Result(output, lse, plan.backend, NO_COPIES, None if stores_first else partial(store, call, k, v, ops))
