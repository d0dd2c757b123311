"""Triton's cache on disk, which it asks for a kernel before it compiles one."""

from __future__ import annotations

from hashlib import sha256

from attnd_server.device.kernels.spec import KernelSpec


def has_kernel(spec: KernelSpec) -> bool:
    """Whether the cache has a kernel for this process' GPU, so that `spec.compile` takes milliseconds."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import get_cache_key, get_cache_manager
    from triton.runtime.driver import driver

    source, backend = spec.source(), make_backend(driver.active.get_current_target())
    options = backend.parse_options(dict(spec.options, **source.parse_options()))
    key = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
    name = f"{source.name[:150]}.json"  # as Triton cuts it
    files = get_cache_manager(sha256(key.encode()).hexdigest()).get_group(name)
    return files is not None and name in files
