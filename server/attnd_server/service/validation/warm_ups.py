"""Decode steps that are to be warmed up."""

from __future__ import annotations

from typing import NamedTuple

from attnd.protocol import frames
from attnd.v1 import attention_pb2
from attnd_server.attention.config import AttentionConfig
from attnd_server.attention.metadata import AttentionOptions
from attnd_server.config import ServerConfig
from attnd_server.service.validation.arrays import refuse
from attnd_server.service.validation.calls import REPLY_HEADER_BYTES, options


class WarmSteps(NamedTuple):
    """Decode steps of a cache.

    Attributes:
        options: of their layers.
        query_len: new tokens of each request.
        max_reqs: most requests.
        max_context_len: most cached tokens of a request; 0: as many as there can be.
    """

    options: AttentionOptions
    query_len: int
    max_reqs: int
    max_context_len: int


def warm_up(message: attention_pb2.WarmUpRequest, config: AttentionConfig, limits: ServerConfig) -> WarmSteps:
    """The steps that a warm-up is for; its cache is the caller's business.

    Raises:
        InvalidRequest: no such step could be sent, or the options break a rule of step.proto.
    """
    num_heads, kv_heads = message.num_heads, config.num_kv_heads
    if num_heads == 0 or num_heads % kv_heads:
        rule = f"must be a multiple of the cache's {kv_heads} KV heads, and at least {kv_heads}"
        refuse("num_heads", f"num_heads is {num_heads}, but {rule}")
    _check(message, "query_len", 1, limits.max_step_tokens)
    _check(message, "max_reqs", 1, limits.max_step_reqs)
    _check(message, "max_context_len", 0, limits.max_context_len)
    num_tokens = message.max_reqs * message.query_len
    if num_tokens > limits.max_step_tokens:
        rule = f"a step has at most {limits.max_step_tokens} new tokens"
        refuse("max_reqs", f"max_reqs is {message.max_reqs} with a query_len of {message.query_len}, but {rule}")
    _check_message_bytes(num_tokens, num_heads, config)
    return WarmSteps(
        options(message.options, config, num_heads, config.window),
        message.query_len,
        message.max_reqs,
        message.max_context_len,
    )


def _check(message: attention_pb2.WarmUpRequest, field: str, low: int, high: int) -> None:
    value = getattr(message, field)
    if not low <= value <= high:
        refuse(field, f"{field} is {value}, but must be {low}..{high}")


def _check_message_bytes(num_tokens: int, num_heads: int, config: AttentionConfig) -> None:
    """Buffers are made for what a call may bring, so for no more than a message holds."""
    head_dim = max(config.head_dim, config.head_dim_v)
    num_bytes = num_tokens * num_heads * head_dim * config.dtype.itemsize
    limit = frames.MAX_MESSAGE_BYTES - REPLY_HEADER_BYTES
    if num_bytes > limit:
        rule = f"a message has room for {limit}"
        refuse("max_reqs", f"max_reqs asks for calls of {num_bytes} bytes of q or output, but {rule}")
