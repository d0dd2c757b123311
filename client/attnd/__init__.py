"""attnd: attention as a service. The client.

```
import attnd

client = attnd.connect("localhost:7411")
cache = client.create_cache(num_layers=30, num_kv_heads=3, head_dim=64, num_pages=256)
```
"""

from typing import TYPE_CHECKING, Any

from attnd import aio, errors
from attnd._version import __version__
from attnd.cache import Cache
from attnd.client import Client, connect
from attnd.credentials import Credentials
from attnd.errors import (
    AttndError,
    CacheLost,
    DeadlineExceeded,
    Disconnected,
    EpochMismatch,
    Exhausted,
    InvalidRequest,
    PermissionDenied,
    ServerFault,
    Unauthenticated,
    Unsupported,
)
from attnd.extras import as_missing
from attnd.foreign_metadata import from_diffulex
from attnd.integrations.diffulex.metadata import (
    AttnMetaDataBase,
    FN_TYPE_AttnMetaDataFetch,
    fetch_attn_metadata,
    infer_prefill_flags,
    is_warming_up,
    reset_warming_up,
    set_fetch_fn_for_attn_metadata,
    set_warming_up,
)
from attnd.pages import PagedSequence, PagePool
from attnd.planes.cuda.resident import ResidentSteps
from attnd.planes.cuda.resident_shape import ResidentShape
from attnd.planes.cuda.session import CudaSession
from attnd.planes.cuda.step import CudaStep
from attnd.protocol.attention_options import AttentionOptions
from attnd.protocol.cache_spec import CacheSpec
from attnd.protocol.kv_split import KVSplit
from attnd.protocol.layer_groups import LayerGroup
from attnd.protocol.requests import WarmUp
from attnd.protocol.step_metadata import StepMetadata
from attnd.protocol.steps.step_groups import StepGroup
from attnd.protocol.tensors import Array
from attnd.session import Session
from attnd.steps import PendingCall, Step
from attnd.timings import Timings
from attnd.tuning import tune_process

if TYPE_CHECKING:
    from attnd.integrations.diffulex.attention import Attention, attach

__all__ = [
    "Array",
    "Attention",
    "AttentionOptions",
    "AttnMetaDataBase",
    "AttndError",
    "Cache",
    "CacheLost",
    "CacheSpec",
    "Client",
    "Credentials",
    "CudaSession",
    "CudaStep",
    "DeadlineExceeded",
    "Disconnected",
    "EpochMismatch",
    "Exhausted",
    "FN_TYPE_AttnMetaDataFetch",
    "InvalidRequest",
    "KVSplit",
    "LayerGroup",
    "PagePool",
    "PagedSequence",
    "PendingCall",
    "PermissionDenied",
    "ResidentShape",
    "ResidentSteps",
    "ServerFault",
    "Session",
    "Step",
    "StepGroup",
    "StepMetadata",
    "Timings",
    "Unauthenticated",
    "Unsupported",
    "WarmUp",
    "__version__",
    "aio",
    "attach",
    "connect",
    "errors",
    "fetch_attn_metadata",
    "from_diffulex",
    "infer_prefill_flags",
    "is_warming_up",
    "reset_warming_up",
    "set_fetch_fn_for_attn_metadata",
    "set_warming_up",
    "tune_process",
]


def __getattr__(name: str) -> Any:
    """Loads what needs torch when it is first asked for."""
    if name in ("Attention", "attach"):
        try:
            from attnd.integrations.diffulex import attention
        except ModuleNotFoundError as error:
            raise as_missing(error, f"attnd.{name}") from None
        return getattr(attention, name)
    raise AttributeError(f"module 'attnd' has no attribute {name!r}")
