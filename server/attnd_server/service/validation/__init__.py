"""From the wire's bytes to valid objects, or an `attnd.errors` exception that names field, value and rule.

The only place that checks. Everything happens on host memory and before anything is written; what these functions
return is a fact for everybody behind them. Headers are checked before memory is allocated by them, and no check costs
more than the bytes that the caller sent, or than the page table that a delta gives. Everything small is copied; only
q, k and v are views of the received bytes.
"""

from attnd_server.service.validation.cache_shapes import cache_shape, create_cache
from attnd_server.service.validation.caches import cache_config
from attnd_server.service.validation.calls import (
    CallTensors,
    StoreTensors,
    call,
    group,
    layer,
    options,
    place,
    read_kv,
    store_kv,
)
from attnd_server.service.validation.pages import copy_pages, slots
from attnd_server.service.validation.resident import resident_sizes, resident_step
from attnd_server.service.validation.steps import NO_STEPS, OpenSteps, step, steps
from attnd_server.service.validation.warm_ups import warm_up

__all__ = [
    "NO_STEPS",
    "CallTensors",
    "OpenSteps",
    "StoreTensors",
    "cache_config",
    "cache_shape",
    "call",
    "copy_pages",
    "create_cache",
    "group",
    "layer",
    "options",
    "place",
    "read_kv",
    "resident_sizes",
    "resident_step",
    "slots",
    "step",
    "steps",
    "store_kv",
    "warm_up",
]
