"""The state of a process, in globals that are bound anew."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class AttnMetaDataBase:
    is_prefill: list = field(default_factory=lambda: [False])
    cu_seqlens_q: Any = None
    slot_mapping: Any = None
    context_lens: Any = None
    page_tables: Any = None
    page_size: int = 32
    block_size: int = 32
    kv_cache_layout: str = "unified"


FN_TYPE_AttnMetaDataFetch = Callable[[], AttnMetaDataBase]
fetch_attn_metadata: FN_TYPE_AttnMetaDataFetch = ...
WARMING_UP = False


def set_fetch_fn_for_attn_metadata(fn):
    global fetch_attn_metadata
    fetch_attn_metadata = fn


def infer_prefill_flags(is_prefill):
    return any(is_prefill), bool(is_prefill) and all(is_prefill)


def set_warming_up(is_warming_up):
    global WARMING_UP
    WARMING_UP = is_warming_up


def is_warming_up():
    return WARMING_UP


def reset_warming_up():
    set_warming_up(False)
