"""The gates of resident steps: kernels of one thread around what a launch computes.

The first one waits until the worker has counted its step up, or the host has revoked the launch, and says which; all
else of the launch goes by that. The others are the hand-overs of the layers, as in `attnd.protocol.cuda.gate_flags`,
with the same counter and words; a launch that was revoked leaves these as they are. The last one tells the worker
whether the step was refused, and enters it in the books.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from attnd.protocol.cuda.driver import CudaError, Device, driver, kernels
from attnd.protocol.cuda.gate_flags import WORD_BYTES, polled, unless_stopped
from attnd_server.attention.kernels.resident import state as words
from attnd_server.planes.cuda.resident import books

# As `TURNS`, of the first gate: a launch that is revoked is to leave soon.
_TURNS_FIRST = 31

_HEAD = """
    .param .u64 state, .param .u64 books, .param .u64 word, .param .u64 counter, .param .u64 signal, .param .u64 flag,
    .param .u64 stop, .param .u64 told
) {
    .reg .pred %decided;
    .reg .u32 %turn, %low, %stop;
    .reg .u64 %state, %books, %word, %counter, %signal, %flag, %stop_word, %told;
    .reg .u64 %came, %launch, %next, %seen, %most, %revoked, %refused, %step, %time, %began;
    ld.param.u64 %state, [state];
    ld.param.u64 %books, [books];
    ld.param.u64 %word, [word];
    ld.param.u64 %counter, [counter];
    ld.param.u64 %signal, [signal];
    ld.param.u64 %flag, [flag];
    ld.param.u64 %stop_word, [stop];
    ld.param.u64 %told, [told];
    mov.u32 %turn, 0;
"""
# A step that has come counts only if the launch was not revoked before: what the host does to the pages for others is
# done before these learn of it. More than one step beyond the one that is awaited is a fault of the worker's.
_BEGIN = f"""
    ld.global.u64 %launch, [%state + {words.LAUNCH * WORD_BYTES}];
    add.u64 %launch, %launch, 1;
    st.global.u64 [%state + {words.LAUNCH * WORD_BYTES}], %launch;
    ld.global.u64 %next, [%state + {words.STEP * WORD_BYTES}];
    add.u64 %next, %next, 1;
    add.u64 %most, %next, 1;
{polled("word", _TURNS_FIRST, then="ASK")}ASK:
    ld.volatile.global.u64 %revoked, [%books + {books.REVOKED * WORD_BYTES}];
    setp.ge.u64 %decided, %revoked, %launch;
    @%decided bra LEAVE;
    ld.volatile.global.u32 %stop, [%stop_word];
    setp.ne.u32 %decided, %stop, 0;
    @%decided bra LEAVE;
    setp.ge.u64 %decided, %seen, %next;
    @%decided bra CAME;
    bra AGAIN;
LEAVE:
    mov.u64 %came, 0;
    st.global.u64 [%state + {words.CAME * WORD_BYTES}], %came;
    ret;
CAME:
    mov.u64 %came, 1;
    st.global.u64 [%state + {words.CAME * WORD_BYTES}], %came;
    st.global.u64 [%state + {words.STEP * WORD_BYTES}], %next;
    mov.u64 %time, %globaltimer;
    st.global.u64 [%state + {words.BEGAN_NS * WORD_BYTES}], %time;
    st.volatile.global.u64 [%books + {books.BEGUN * WORD_BYTES}], %next;
    setp.le.u64 %decided, %seen, %most;
    @%decided bra DONE;
    st.global.u64 [%state + {words.IS_WRONG * WORD_BYTES}], %came;
DONE:
"""
_IF_CAME = f"""
    ld.global.u64 %came, [%state + {words.CAME * WORD_BYTES}];
    setp.eq.u64 %decided, %came, 0;
    @%decided bra DONE;
    ld.global.u64 %next, [%counter];
"""
_SIGNAL = """
    st.release.sys.global.u64 [%signal], %next;
"""
_WAIT = f"""
    add.u64 %next, %next, 1;
    st.global.u64 [%counter], %next;
{polled()}{unless_stopped()}"""
# The books first: whoever has seen the worker's last output finds the step there. Once nothing is to wait any more,
# layers are done with whatever lies in the region: such a step does not count as done, and nobody is told so.
_END = f"""
    ld.volatile.global.u32 %stop, [%stop_word];
    setp.ne.u32 %decided, %stop, 0;
    @%decided bra DONE;
    ld.global.u64 %refused, [%state + {words.REFUSED * WORD_BYTES}];
    ld.global.u64 %step, [%state + {words.STEP * WORD_BYTES}];
    ld.global.u64 %began, [%state + {words.BEGAN_NS * WORD_BYTES}];
    ld.global.u64 %most, [%state + {words.NUM_REQS * WORD_BYTES}];
    st.volatile.global.u64 [%books + {books.NUM_REQS * WORD_BYTES}], %most;
    mov.u64 %time, %globaltimer;
    st.volatile.global.u64 [%books + {books.BEGAN_NS * WORD_BYTES}], %began;
    st.volatile.global.u64 [%books + {books.ENDED_NS * WORD_BYTES}], %time;
    st.volatile.global.u64 [%books + {books.REFUSED * WORD_BYTES}], %refused;
    st.volatile.global.u64 [%books + {books.DONE * WORD_BYTES}], %step;
    st.volatile.global.u64 [%told], %refused;
    st.volatile.global.u64 [%told + 8], %step;
    st.release.sys.global.u64 [%signal], %next;
"""
_LEFT = f"""
DONE:
    ld.global.u64 %launch, [%state + {words.LAUNCH * WORD_BYTES}];
    st.volatile.global.u64 [%books + {books.LAUNCHES * WORD_BYTES}], %launch;
"""
_RESUME = f"""
    mov.u64 %refused, 0;
    st.global.u64 [%state + {words.REFUSED * WORD_BYTES}], %refused;
    st.volatile.global.u64 [%books + {books.REFUSED * WORD_BYTES}], %refused;
    st.volatile.global.u64 [%told], %refused;
"""
_BODIES = {
    "begin": _BEGIN,
    "wait": _IF_CAME + _WAIT + "DONE:\n",
    "signal": _IF_CAME + _SIGNAL + "DONE:\n",
    "end": _IF_CAME + _END + _LEFT,
    "resume": _RESUME,
}
PTX = ".version 7.0\n.target sm_70\n.address_size 64\n" + "".join(
    f".visible .entry attnd_resident_{name}({_HEAD}{body}    ret;\n}}\n" for name, body in _BODIES.items()
)


@cache
def _functions(on: Device) -> dict[str, Any]:
    """The kernels on a GPU, the thread's current one, until the process ends."""
    return kernels(PTX, tuple(f"attnd_resident_{name}" for name in _BODIES))


def prepare(on: Device) -> None:
    """Loads the kernels, for which the driver may wait for all that runs on the GPU, the thread's current one."""
    _functions(on)


class ResidentGates:
    """The gates of one session's resident steps."""

    def __init__(
        self,
        on: Device,
        *,
        state: int,
        books: int,
        word: int,
        counter: int,
        signal: int,
        flag: int,
        stop: int,
        told: int,
    ) -> None:
        """Addresses, for GPUs, of private words and those that the worker maps.

        Args:
            on: the server's GPU, the thread's current one.
            state: of the private words, see `state.py`.
            books: of the session's books.
            word: where the worker counts steps.
            counter: where the session counts hand-overs.
            signal: of the word that the worker waits for.
            flag: of the word that the worker counts up.
            stop: of the host's word that ends all waits.
            told: where the worker reads the first step that was refused, and then the last that is done.
        """
        self._kernels = _functions(on)
        self._values = [ctypes.c_uint64(each) for each in (state, books, word, counter, signal, flag, stop, told)]
        self._pointers = (ctypes.c_void_p * len(self._values))(*map(ctypes.addressof, self._values))
        self._arguments = ctypes.addressof(self._pointers)
        self._launch = driver().cuLaunchKernel

    def begin(self, stream: int) -> None:
        """Waits for a step, or until the launch is revoked."""
        self._enqueue("begin", stream)

    def wait(self, stream: int) -> None:
        """Waits until the worker has handed over the next layer."""
        self._enqueue("wait", stream)

    def signal(self, stream: int) -> None:
        """Tells the worker that the layer is done."""
        self._enqueue("signal", stream)

    def end(self, stream: int) -> None:
        """Tells the worker that the last layer is done, and how the step went."""
        self._enqueue("end", stream)

    def resume(self, stream: int) -> None:
        """No step was refused any more. No launch may be queued."""
        self._enqueue("resume", stream)

    def _enqueue(self, kernel: str, stream: int) -> None:
        function = self._kernels[f"attnd_resident_{kernel}"]
        (result,) = self._launch(function, 1, 1, 1, 1, 1, 1, 0, stream, self._arguments, 0)
        if result:
            raise CudaError("cuLaunchKernel", result.name)
