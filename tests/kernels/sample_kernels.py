"""Kernels that compile fast, slowly, badly or not at all; never run."""

import os
import signal
import time

import triton
import triton.language as tl


def sleep_for(seconds, _semantic=None):
    """The compiler calls it."""
    time.sleep(seconds.value)


def crash(_semantic=None):
    """Ends the compiler."""
    os.kill(os.getpid(), signal.SIGSEGV)


# So that Triton's compiler takes them for its own.
sleep_for.__triton_builtin__ = crash.__triton_builtin__ = True


_STEP = tl.constexpr(2)


@triton.jit
def more(value):
    """Uses a constant of the module."""
    return value + _STEP


@triton.jit
def calling(output, FACTOR: tl.constexpr):
    """Compiles at once, and has what it calls compiled with it."""
    tl.store(output, more(tl.load(output)) + FACTOR)


@triton.jit
def add(output, FACTOR: tl.constexpr):
    """Compiles at once."""
    tl.store(output + tl.arange(0, 16), tl.load(output + tl.arange(0, 16)) + FACTOR)


@triton.jit
def slow(output, SECONDS: tl.constexpr):
    """Compiles for some seconds."""
    sleep_for(SECONDS)
    tl.store(output, 1.0)


@triton.jit
def broken(output, FACTOR: tl.constexpr):
    """Does not compile."""
    tl.store(output, no_such_name)  # noqa: F821


@triton.jit
def crashing(output, FACTOR: tl.constexpr):
    """Ends the compiler."""
    crash()
    tl.store(output, 1.0)
