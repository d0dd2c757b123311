"""attnd's server: paged KV and attention kernels for workers that send q, k and v.

Names load when they are first used, so that importing the package costs neither torch nor triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnd._version import __version__
    from attnd_server.attention.backends.base import AttentionKernel
    from attnd_server.attention.backends.naive import NaiveAttention
    from attnd_server.attention.backends.reference import reference_torch_attention
    from attnd_server.attention.backends.triton.attention import (
        TritonPagedAttention,
        triton_attention,
        triton_grouped_attention,
    )
    from attnd_server.attention.backends.window import SlidingWindowAttention
    from attnd_server.attention.config import AttentionBackend, AttentionConfig, PrecisionMode
    from attnd_server.attention.kv_split import KVSplitConfig
    from attnd_server.attention.metadata import AttentionMetadata
    from attnd_server.attention.ops import TritonAttentionOps
    from attnd_server.attention.warming_up import is_warming_up, reset_warming_up, set_warming_up

__all__ = [
    "AttentionBackend",
    "AttentionConfig",
    "AttentionKernel",
    "AttentionMetadata",
    "KVSplitConfig",
    "NaiveAttention",
    "PrecisionMode",
    "SlidingWindowAttention",
    "TritonAttentionOps",
    "TritonPagedAttention",
    "__version__",
    "is_warming_up",
    "reference_torch_attention",
    "reset_warming_up",
    "set_warming_up",
    "triton_attention",
    "triton_grouped_attention",
]

_MODULES = {
    "AttentionBackend": "attnd_server.attention.config",
    "AttentionConfig": "attnd_server.attention.config",
    "AttentionKernel": "attnd_server.attention.backends.base",
    "AttentionMetadata": "attnd_server.attention.metadata",
    "KVSplitConfig": "attnd_server.attention.kv_split",
    "NaiveAttention": "attnd_server.attention.backends.naive",
    "PrecisionMode": "attnd_server.attention.config",
    "SlidingWindowAttention": "attnd_server.attention.backends.window",
    "TritonAttentionOps": "attnd_server.attention.ops",
    "TritonPagedAttention": "attnd_server.attention.backends.triton.attention",
    "__version__": "attnd._version",
    "is_warming_up": "attnd_server.attention.warming_up",
    "reference_torch_attention": "attnd_server.attention.backends.reference",
    "reset_warming_up": "attnd_server.attention.warming_up",
    "set_warming_up": "attnd_server.attention.warming_up",
    "triton_attention": "attnd_server.attention.backends.triton.attention",
    "triton_grouped_attention": "attnd_server.attention.backends.triton.attention",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
