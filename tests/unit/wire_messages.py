"""Small valid messages, to be spoiled one field at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from attnd.protocol.tensors import Array, dtype_of
from attnd.v1 import step_pb2, tensor_pb2
from attnd_server.attention.config import AttentionConfig
from attnd_server.config import ServerConfig

PAGE_SIZE = 4
NUM_PAGES = 8


def config_of(num_pages: int) -> AttentionConfig:
    """A cache of that many pages."""
    return AttentionConfig(
        num_layers=3,
        num_kv_heads=2,
        head_dim=16,
        head_dim_v=24,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        dtype=torch.float32,
    )


CONFIG = config_of(NUM_PAGES)
LIMITS = ServerConfig(max_step_tokens=16, max_step_reqs=4, max_page_table_elements=24)


def tensor(values: Any, dtype: str = "int32") -> tensor_pb2.Tensor:
    """The wire's form of nested lists."""
    array = np.asarray(values, dtype)
    return tensor_pb2.Tensor(dtype=dtype_of(dtype), shape=array.shape, data=array.tobytes())


def array(dtype: str, *shape: int) -> Array:
    """An array of zeros, as received."""
    size = {"float32": 4, "float16": 2, "bfloat16": 2}[dtype]
    return Array(dtype_of(dtype), shape, memoryview(bytes(int(np.prod(shape)) * size)))


def step(**changes: Any) -> step_pb2.Step:
    """Two requests with 5 and 3 tokens of context and 2 new tokens each, all stored; None leaves a field out."""
    fields: dict[str, Any] = {
        "id": 1,
        "kind": step_pb2.STEP_KIND_PREFILL,
        "cu_seqlens_q": tensor([0, 2, 4]),
        "context_lens": tensor([5, 3]),
        "page_tables": tensor([[0, 1], [2, -1]]),
        "slot_mapping": tensor([5, 6, 11, 12]),
        "mask": step_pb2.MASK_CAUSAL,
    } | changes
    return step_pb2.Step(**{field: value for field, value in fields.items() if value is not None})
