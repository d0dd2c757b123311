"""The code in C with which Triton launches a kernel: built ahead, in a process that does not launch.

Triton up to 3.6 has such a library for each signature, which a C compiler makes in half a second or more when a kernel
is first launched, unless Triton's cache has it. Later ones have one for all kernels, as all of them have one for the
driver.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class NoCompiler(Exception):
    """There is no C compiler that works, or it does not find Python's headers."""


class _Unloaded:
    """Stands for a library that was built and is not loaded."""

    def __getattr__(self, name: str) -> None:
        return None


def build_for_driver() -> None:
    """Builds what Triton calls the driver through. Raises NoCompiler."""
    from triton.backends.nvidia import driver

    with _not_loaded(), _told():
        driver.CudaUtils()


def look_for_driver() -> None:
    """Finds the driver's library to link with, if it is there; Triton keeps where."""
    from triton.backends.nvidia import driver

    try:
        driver.library_dirs()
    except (AssertionError, OSError, subprocess.SubprocessError):
        pass  # who needs it will say so


def has_launchers() -> bool:
    """Whether kernels have launchers of their own."""
    from triton.backends.nvidia import driver

    return hasattr(driver, "make_launcher")


def build_launcher(source: Any, descriptions: Any = None) -> None:
    """Builds the launcher of a kernel, unless Triton's cache has it.

    Args:
        source: what Triton compiles.
        descriptions: of the tensor descriptors that it takes, from the compiled kernel; None: not known yet, but that
            it will use them.
    """
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_src

    if descriptions is None:
        descriptions = [{} for kind in source.signature.values() if str(kind).startswith("tensordesc")]
    with _not_loaded():
        compile_module_from_src(
            src=driver.make_launcher(source.constants, source.signature, descriptions),
            name="__triton_launcher",
            library_dirs=driver.library_dirs(),
            include_dirs=driver.include_dirs,
            libraries=driver.libraries,
        )


@contextmanager
def _not_loaded() -> Iterator[None]:
    """Triton loads no library that it builds: the driver need not be here, and is not for this process."""
    from triton.runtime import build

    load = build._load_module_from_path
    build._load_module_from_path = lambda name, path: _Unloaded()
    try:
        yield
    finally:
        build._load_module_from_path = load


@contextmanager
def _told() -> Iterator[None]:
    """Says of a compiler that fails which it is, and what is needed."""
    try:
        yield
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # Triton has a RuntimeError for none at all
        said = str(error)
        if isinstance(error, subprocess.CalledProcessError):
            said = f"{error.cmd[0]} ended with {error.returncode}"
        needed = "kernels need a C compiler that works (CC, or gcc) and the headers of this Python (python3-dev)"
        raise NoCompiler(f"{said}; {needed}") from error


def stand_in_for_driver(folder: Path) -> Path:
    """Makes a library with the name of the driver's, to link with where there is no driver.

    Set TRITON_LIBCUDA_PATH to its folder. What is linked with it finds the driver's own where it is loaded.

    Args:
        folder: that is there.

    Returns:
        The folder.

    Raises:
        NoCompiler: it cannot be built.
    """
    name = "libcuda.so.1"
    compiler = os.environ.get("CC") or "gcc"
    # Linkers may leave a library out of which nothing is used.
    source = "".join(f"void {function}(void) {{}}\n" for function in ("cuCtxGetCurrent", "cuPointerGetAttribute"))
    command = [compiler, "-shared", f"-Wl,-soname,{name}", "-x", "c", "-", "-o", str(folder / name)]
    with _told():
        subprocess.run(command, input=source.encode(), check=True)
    return folder


def link_without_driver(folder: Path) -> None:
    """Has launchers linked with what stands in for the driver, from now on and in all processes that this one starts.

    Args:
        folder: for it, which must stay as long.

    Raises:
        NoCompiler: it cannot be built.
    """
    os.environ["TRITON_LIBCUDA_PATH"] = str(stand_in_for_driver(folder))
