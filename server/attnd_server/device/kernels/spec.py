"""What a compiled variant of a kernel is made of, in a form that another process can compile it from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from operator import attrgetter
from typing import Any


@dataclass(frozen=True)
class KernelSpec:
    """One variant of a kernel: all that Triton makes its cache's key of, but for the GPU.

    It can be pickled, and is the same in every process that reads the same source files. Two are equal if Triton
    compiles the same for both.

    Attributes:
        module: where the function under `triton.jit` or `gluon.jit` lies.
        name: of it there.
        signature: the type of each parameter, by its name.
        constexprs: what is known when it is compiled, by the places of the parameters.
        attrs: what is known of other parameters, such as that they are multiples of 16, likewise.
        options: Triton's: `num_warps` and so on.
        key: of everything else here. 1 and True are not the same to Triton.
    """

    module: str
    name: str
    signature: Mapping[str, Any] = field(compare=False, repr=False)
    constexprs: Mapping[tuple[int, ...], Any] = field(compare=False, repr=False)
    attrs: Mapping[tuple[int, ...], Any] = field(compare=False, repr=False)
    options: Mapping[str, Any] = field(compare=False, repr=False)
    key: str = field(repr=False)

    @classmethod
    def of(
        cls,
        jit_function: Any,
        signature: Mapping[str, Any],
        constexprs: Mapping[tuple[int, ...], Any],
        attrs: Mapping[tuple[int, ...], Any],
        options: Any,
    ) -> KernelSpec:
        """From what Triton's `JITFunction._do_compile` is called with.

        Args:
            jit_function: under `triton.jit` or `gluon.jit`, at the top of its module.
            signature: the type of each parameter.
            constexprs: known values.
            attrs: known attributes of other values.
            options: as Triton's backend parsed them.
        """
        given = dict(signature), dict(constexprs), dict(attrs), dict(vars(options))
        return cls(jit_function.fn.__module__, jit_function.fn.__qualname__, *given, key=repr(given))

    def function(self) -> Any:
        """The kernel's function; its module is imported."""
        return attrgetter(self.name)(import_module(self.module))

    def source(self) -> Any:
        """What Triton compiles."""
        from triton.compiler.compiler import ASTSource
        from triton.experimental.gluon._runtime import GluonASTSource

        hash_callees_first()
        function = self.function()
        kind = GluonASTSource if function.is_gluon() else ASTSource
        return kind(function, dict(self.signature), dict(self.constexprs), dict(self.attrs))

    def compile(self, target: Any = None) -> Any:
        """Triton's `CompiledKernel`. It takes milliseconds if Triton's cache on disk has it.

        Args:
            target: a `GPUTarget`; None: this process' GPU.
        """
        import triton

        return triton.compile(self.source(), target=target, options=dict(self.options))


@cache
def hash_callees_first() -> None:
    """Makes Triton's key of a function the same whatever was looked at before; called before any key is made.

    Triton joins the constants that a callee uses to those of the caller before it has looked for the callee's. So the
    keys of two processes would be different, and neither would find what the other has compiled.
    """
    from triton.runtime.jit import DependenciesFinder

    join = DependenciesFinder._update_hash

    def look_and_join(finder: Any, callee: Any) -> None:
        _ = callee.cache_key
        join(finder, callee)

    DependenciesFinder._update_hash = look_and_join
