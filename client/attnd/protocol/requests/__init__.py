"""Requests to bytes and replies to values: what the sync and the asyncio client share."""

from attnd.protocol.requests.arguments import CallTensors, StepShape, call_tensors, step_shape
from attnd.protocol.requests.caches import ask_written_pages, cache_id, copy_pages, open_cache, written_pages
from attnd.protocol.requests.calls import (
    DEFAULT_OPTIONS,
    MAX_CALLS_UNDER_WAY,
    AttendReply,
    attend_call,
    attend_reply,
    call_arrays,
    call_reply,
    taken,
    timeout_ms,
    unary_call,
    unary_call_of,
    unary_reply,
)
from attnd.protocol.requests.kv_transfers import joined, read_kv, store_kv, stored
from attnd.protocol.requests.results import Reply, Results, Wanted, reply
from attnd.protocol.requests.warm_ups import WarmUp, warm_up, warmed_up

__all__ = [
    "DEFAULT_OPTIONS",
    "MAX_CALLS_UNDER_WAY",
    "AttendReply",
    "CallTensors",
    "Reply",
    "Results",
    "StepShape",
    "Wanted",
    "WarmUp",
    "ask_written_pages",
    "attend_call",
    "attend_reply",
    "cache_id",
    "call_arrays",
    "call_reply",
    "call_tensors",
    "copy_pages",
    "joined",
    "open_cache",
    "read_kv",
    "reply",
    "step_shape",
    "store_kv",
    "stored",
    "taken",
    "timeout_ms",
    "unary_call",
    "unary_call_of",
    "unary_reply",
    "warm_up",
    "warmed_up",
    "written_pages",
]
