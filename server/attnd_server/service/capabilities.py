"""What this server is and can do, as the wire says it."""

from __future__ import annotations

import platform

import torch

from attnd._version import __version__
from attnd.v1 import backend_pb2, cache_pb2, capabilities_pb2, plane_pb2, step_pb2, tensor_pb2
from attnd_server.config import ServerConfig
from attnd_server.execution.executor import Executor
from attnd_server.kv.caches import CacheTable
from attnd_server.service.plane_offer import PlaneReasons

# What a client asks for before it says what a server of 0.1.0 would not see.
FEATURES = [
    capabilities_pb2.FEATURE_STORE_FIRST,
    capabilities_pb2.FEATURE_STEP_WINDOW,
    capabilities_pb2.FEATURE_ATTEND_NEW,
    capabilities_pb2.FEATURE_FIRST_POSITION,
    capabilities_pb2.FEATURE_PADDED_ROWS,
    capabilities_pb2.FEATURE_LAYER_GROUPS,
    capabilities_pb2.FEATURE_V_DTYPE,
]


def capabilities(
    config: ServerConfig, executor: Executor, caches: CacheTable, reasons: PlaneReasons
) -> capabilities_pb2.GetCapabilitiesResponse:
    """The answer to GetCapabilities, where planes are refused for `reasons`."""
    planes = [plane_pb2.PLANE_INLINE, plane_pb2.PLANE_SHM, plane_pb2.PLANE_CUDA]
    return capabilities_pb2.GetCapabilitiesResponse(
        version=__version__,
        epoch=caches.epoch,
        devices=[device_message(executor.device, caches.kv_bytes, caches.num_bytes)],
        backends=[
            capabilities_pb2.BackendState(
                backend=backend_pb2.Backend.Value(f"BACKEND_{backend.name}"),
                available=reason is None,
                reason=reason or "",
            )
            for backend, reason in executor.ops.states()
        ],
        dtypes=[tensor_pb2.DTYPE_FLOAT32, tensor_pb2.DTYPE_FLOAT16, tensor_pb2.DTYPE_BFLOAT16],
        kv_dtypes=[tensor_pb2.DTYPE_FLOAT8_E4M3FN],
        layouts=[cache_pb2.LAYOUT_UNIFIED, cache_pb2.LAYOUT_DISTINCT],
        masks=[
            step_pb2.MASK_CAUSAL,
            step_pb2.MASK_BLOCK_CAUSAL,
            step_pb2.MASK_BIDIRECTIONAL,
            step_pb2.MASK_PREFIX_FULL,
        ],
        features=FEATURES,
        planes=[
            capabilities_pb2.PlaneState(plane=plane, available=plane not in reasons, reason=reasons.get(plane, ""))
            for plane in planes
        ],
        limits=capabilities_pb2.Limits(
            max_message_bytes=config.max_message_bytes,
            max_step_tokens=config.max_step_tokens,
            max_step_reqs=config.max_step_reqs,
            max_page_table_elements=config.max_page_table_elements,
            max_caches=config.max_caches,
            max_ttl_s=config.max_ttl_s,
            max_queue_depth=config.max_queue_depth,
            max_cache_queue_depth=config.max_cache_queue_depth,
            max_context_len=config.max_context_len,
            max_sessions=config.max_sessions,
            max_connection_rpcs=config.max_connection_rpcs,
            principal_kv_bytes=caches.share.kv_bytes,
            principal_caches=caches.share.caches,
            principal_sessions=caches.share.sessions,
            principal_queue_depth=caches.share.queue_depth,
        ),
    )


def device_message(device: torch.device, num_bytes_limit: int = 0, num_bytes_used: int = 0) -> capabilities_pb2.Device:
    """A device, and the bytes that caches may take and take there."""
    description, uuid = platform.processor() or platform.machine(), ""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description, uuid = properties.name, str(properties.uuid)
    return capabilities_pb2.Device(
        name=str(device),
        description=description,
        uuid=uuid,
        num_bytes_limit=num_bytes_limit,
        num_bytes_used=num_bytes_used,
    )
