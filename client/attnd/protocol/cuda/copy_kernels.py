"""The kernels of `copies`, in PTX: copies of rows, and between or behind them what tells the other side.

Here a few blocks of threads copy; the last one to be done tells the server; each waits for the server's word and copies
its part of the output.
"""

from __future__ import annotations

from attnd.protocol.cuda.gate_flags import polled, unless_stopped

# Copies to the server and back that a kernel makes at the most.
NUM_INPUTS, NUM_OUTPUTS = 3, 2

# Of one copy: where to and from, vectors in all and in a row, and bytes from one row of the source to the next. The
# target is dense.
_PARAMETERS = """
    .param .u64 to{n}, .param .u64 from{n}, .param .u32 vectors{n}, .param .u32 of_row{n}, .param .u64 stride{n}"""
_COPY = """
    ld.param.u64 %target, [to{n}];
    ld.param.u64 %source, [from{n}];
    ld.param.u32 %vectors, [vectors{n}];
    ld.param.u32 %of_row, [of_row{n}];
    ld.param.u64 %stride, [stride{n}];
    mov.u32 %index, %first;
COPY{n}:
    setp.ge.u32 %decided, %index, %vectors;
    @%decided bra COPIED{n};
    div.u32 %row, %index, %of_row;
    mul.lo.u32 %column, %row, %of_row;
    sub.u32 %column, %index, %column;
    cvt.u64.u32 %wide, %row;
    mad.lo.u64 %address, %wide, %stride, %source;
    mul.wide.u32 %wide, %column, 16;
    add.u64 %address, %address, %wide;
    ld{volatile}.global.v4.u32 {{%x, %y, %z, %w}}, [%address];
    mul.wide.u32 %wide, %index, 16;
    add.u64 %address, %target, %wide;
    st.global.v4.u32 [%address], {{%x, %y, %z, %w}};
    add.u32 %index, %index, %step;
    bra COPY{n};
COPIED{n}:
"""
_REGISTERS = """
    .reg .pred %decided;
    .reg .u32 %thread, %width, %block, %blocks, %first, %step, %index, %vectors, %of_row, %row, %column;
    .reg .u32 %x, %y, %z, %w, %turn, %low, %stop, %count;
    .reg .u64 %target, %source, %stride, %wide, %address;
    .reg .u64 %counter, %arrived, %signal, %flag, %stop_word, %next, %seen;
    mov.u32 %thread, %tid.x;
    mov.u32 %width, %ntid.x;
    mov.u32 %block, %ctaid.x;
    mov.u32 %blocks, %nctaid.x;
    mad.lo.u32 %first, %block, %width, %thread;
    mul.lo.u32 %step, %blocks, %width;
"""
# As a gate's wait, of many blocks. The first one alone reads the host's word, and tells the others, by the 4 bytes
# behind `arrived`: 64 reads of one word behind PCIe took 70 us, in which nobody saw that the server was done.
_WAIT_OF_BLOCKS = f"""
    mov.u32 %turn, 0;
{polled()}    setp.ne.u32 %decided, %block, 0;
    @%decided bra OTHERS;
{unless_stopped()}    st.volatile.global.u32 [%arrived + 4], %stop;
    bra DONE;
OTHERS:
{unless_stopped("arrived + 4")}DONE:
"""
# After the copies the first thread of each block goes on; beyond the second piece only that of the last one to arrive.
# Arriving hands what its block wrote to the last one, and that hands everything to the whole system with the word: to
# release and to acquire adds up in PTX's memory model.
_FIRST_THREAD = """
    bar.sync 0;
    setp.ne.u32 %decided, %thread, 0;
    @%decided bra DONE;
"""
_LAST_TO_ARRIVE = """    atom.acq_rel.gpu.global.add.u32 %count, [%arrived], 1;
    add.u32 %count, %count, 1;
    setp.ne.u32 %decided, %count, %blocks;
    @%decided bra {others};
    st.global.u32 [%arrived], 0;
"""
# Each thread reads the count before it arrives, and the last to arrive writes it, after all have read.
_HAND_OVER = f"""{_FIRST_THREAD}    ld.param.u64 %counter, [counter];
    ld.param.u64 %arrived, [arrived];
    ld.param.u64 %signal, [signal];
    ld.param.u64 %flag, [flag];
    ld.param.u64 %stop_word, [stop];
    ld.volatile.global.u64 %next, [%counter];
    add.u64 %next, %next, 1;
{_LAST_TO_ARRIVE.format(others="WAIT")}    st.global.u64 [%counter], %next;
    st.release.sys.global.u64 [%signal], %next;
WAIT:{_WAIT_OF_BLOCKS}    bar.sync 0;
"""
# Likewise, but the value of the word comes with the launch, and nothing is waited for.
_WRITE = f"""{_FIRST_THREAD}    ld.param.u64 %arrived, [arrived];
    ld.param.u64 %signal, [signal];
    ld.param.u64 %next, [value];
    cvt.u32.u64 %low, %next;
{_LAST_TO_ARRIVE.format(others="DONE")}    st.release.sys.global.u32 [%signal], %low;
DONE:
"""
# Likewise, but the word has 64 bits and is counted up, and goes to the host, too.
_POST = f"""{_FIRST_THREAD}    ld.param.u64 %counter, [counter];
    ld.param.u64 %arrived, [arrived];
    ld.param.u64 %signal, [signal];
    ld.param.u64 %flag, [wake];
{_LAST_TO_ARRIVE.format(others="DONE")}    ld.global.u64 %next, [%counter];
    add.u64 %next, %next, 1;
    st.global.u64 [%counter], %next;
    st.release.sys.global.u64 [%signal], %next;
    st.volatile.global.u64 [%flag], %next;
DONE:
"""
_POST_WORDS = """
    .param .u64 counter, .param .u64 arrived, .param .u64 signal, .param .u64 wake"""
_WRITE_WORDS = """
    .param .u64 arrived, .param .u64 signal, .param .u64 value"""
_WORDS = """
    .param .u64 counter, .param .u64 arrived, .param .u64 signal, .param .u64 flag, .param .u64 stop"""


def _kernel(name: str, words: str = "", tell: str = "", num_outputs: int = 0) -> str:
    """Copies there, what tells the other side, and copies back, which are read past the caches: somebody else wrote."""
    numbers = range(NUM_INPUTS + num_outputs)
    parameters = [_PARAMETERS.format(n=n) for n in numbers]
    if words:
        parameters.append(words)
    parts = [_COPY.format(n=n, volatile=".volatile" if n >= NUM_INPUTS else "") for n in numbers]
    parts.insert(NUM_INPUTS, tell)
    return f".visible .entry {name}({','.join(parameters)}\n) {{{_REGISTERS}{''.join(parts)}    ret;\n}}\n"


PTX = (
    ".version 7.0\n.target sm_70\n.address_size 64\n"
    + _kernel("attnd_copy")
    + _kernel("attnd_copy_and_write", _WRITE_WORDS, _WRITE)
    + _kernel("attnd_post", _POST_WORDS, _POST)
    + _kernel("attnd_hand_over", _WORDS, _HAND_OVER, NUM_OUTPUTS)
)
