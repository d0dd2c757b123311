"""Which plans steps keep for their next layers: so many bytes of each principal, the newest."""

from __future__ import annotations

from collections import deque
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch

from attnd_server.attention.metadata import AttentionMetadata, AttentionOptions
from attnd_server.attention.ops import Plan

# Bytes of the plans of one principal, and what a plan takes besides its tensors.
PRINCIPAL_BYTES, PLAN_BYTES = 64 << 20, 4 << 10


class Plans(dict[AttentionOptions, Plan]):
    """The plans of one step, by the options of a layer."""


class _Kept(NamedTuple):
    plans: ReferenceType[Plans]
    options: AttentionOptions
    num_bytes: int


class _OfPrincipal:
    """The plans of one principal, the oldest first, those of steps that are over included."""

    def __init__(self) -> None:
        self.kept: deque[_Kept] = deque()
        self.num_bytes = 0


class KeptPlans:
    """The plans that are kept. With the device."""

    def __init__(self) -> None:
        """None yet."""
        self._by_principal: dict[str, _OfPrincipal] = {}

    def keep(self, principal: str, plans: Plans, options: AttentionOptions, plan: Plan, num_bytes: int) -> None:
        """Keeps a plan of a step, and lets the principal's oldest go for it; one that is too big is not kept.

        Args:
            principal: whose step it is.
            plans: of the step.
            options: of the layer.
            plan: of these.
            num_bytes: of its tensors.
        """
        num_bytes += PLAN_BYTES
        if num_bytes > PRINCIPAL_BYTES:
            return
        own = self._by_principal.setdefault(principal, _OfPrincipal())
        plans[options] = plan
        own.kept.append(_Kept(ref(plans), options, num_bytes))
        own.num_bytes += num_bytes
        while own.num_bytes > PRINCIPAL_BYTES:
            oldest = own.kept.popleft()
            own.num_bytes -= oldest.num_bytes
            old_plans = oldest.plans()
            if old_plans is not None:
                old_plans.pop(oldest.options, None)


def most_bytes(metadata: AttentionMetadata) -> int:
    """More than the slots, masks and page tables of a small step's plan take; to count them would take longer."""
    return 16 * metadata.num_tokens * (metadata.max_context_len + 256) + 8 * metadata.page_tables.numel()


def tensor_bytes(state: Any) -> int:
    """Bytes of the tensors of a plan, those that it shares with its step included."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, (AttentionMetadata, AttentionOptions)):
        return 0  # the step's own
    if is_dataclass(state) and not isinstance(state, type):
        return sum(tensor_bytes(getattr(state, each.name)) for each in fields(state))
    if isinstance(state, (list, tuple)):
        return sum(map(tensor_bytes, state))
    return 0
