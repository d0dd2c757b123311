"""Whether a model's call is still running: asked of the frames of its thread, because an exception may end it anywhere.

A cache is told when a layer begins, and never when a pass ends early: by Ctrl-C, by an exception in a hook, by a
deadline. What it can know is whether the call that began the pass is still on its thread's stack.
"""

from __future__ import annotations

import dis
import sys
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any

from transformers import PreTrainedModel

from attnd.integrations.transformers.compiling import is_compiled

# Names under which models take a cache.
CACHE_NAMES = ("past_key_values", "cache_params")


class RunningCall:
    """A call of a model that was running when this was made, on the thread that made it.

    Attributes:
        thread: that made it.
        is_compiled: whether it goes through torch.compile.
        wants_weights: whether it was asked for attention weights.
    """

    def __init__(self, frame: FrameType | None, is_compiled: bool = False, wants_weights: bool = False) -> None:
        """Of the call that `frame` executes; None: nobody knows which, and it is taken for over."""
        self.is_compiled = is_compiled
        self.wants_weights = wants_weights
        self.thread = threading.get_ident()
        self._frame = frame

    @property
    def is_anothers(self) -> bool:
        """Whether another thread made it."""
        return self.thread != threading.get_ident()

    @property
    def is_running(self) -> bool:
        """Whether the call is still on its thread's stack."""
        if self._frame is None:
            return False
        frame = sys._current_frames().get(self.thread)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None

    @property
    def is_known(self) -> bool:
        """Whether anything is known of it."""
        return self._frame is not None

    @property
    def has_returned(self) -> bool:
        """Whether it has ended, and with a result: the last that it executed was a return."""
        frame = self._frame
        if frame is None or self.is_running:
            return False
        return frame.f_lasti >= 0 and dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN")

    @property
    def has_failed(self) -> bool:
        """Whether it has ended without a result: by Ctrl-C, or by any other exception."""
        return self._frame is not None and not self.is_running and not self.has_returned

    def forget(self) -> None:
        """Lets go of the frame, and so of the call's tensors; the call is taken for over."""
        self._frame = None


def call_with(cache: Any, innermost: bool = False) -> RunningCall:
    """The running `forward` that was given `cache`, looked for from here: a model's outermost one, or the innermost.

    What calls a model may have the cache too, and may run one pass after the other: a loop that is itself a module. So
    the outermost one of transformers' models has the word.
    """
    frame: FrameType | None = sys._getframe(1)
    found, of_model, compiled, weights = None, None, False, False
    while frame is not None:
        compiled = compiled or is_compiled(frame)
        if frame.f_code.co_name == "forward":
            given = frame.f_locals
            if any(_holds(given.get(name), cache) for name in CACHE_NAMES):
                found = frame
                weights = weights or given.get("output_attentions") is True
                if innermost:
                    break
                if isinstance(given.get("self"), PreTrainedModel):
                    of_model = frame
        elif frame.f_code.co_name == "wrapper":  # transformers' around a model's forward, which takes it away there
            weights = weights or bool(frame.f_locals.get("recordable_keys", {}).get("output_attentions"))
        frame = frame.f_back
    return RunningCall(of_model or found, compiled, weights)


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache among what a model was given, by name; None: there is none."""
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)


def given_cache() -> Any:
    """The cache that the innermost running `forward` with one was given, looked for from here; None: there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        cache = cache_in(frame.f_locals) if frame.f_code.co_name == "forward" else None
        if cache is not None:
            return cache
        frame = frame.f_back
    return None


def _holds(given: Any, cache: Any) -> bool:
    """Whether what a model was given is the cache, or the pair of an encoder-decoder that has it."""
    pair = (getattr(given, "self_attention_cache", None), getattr(given, "cross_attention_cache", None))
    return given is not None and any(each is cache for each in (given, *pair))
