"""The private words of a session's resident steps: int64 of the device, which no worker maps.

The gates of the plane write some of them, the kernels of the check the others, all in the order of one stream.
"""

from __future__ import annotations

NUM_WORDS = 8
(
    CAME,  # 1 if the launch that runs has a step, 0 if it was revoked
    REFUSED,  # number of the first step that was refused; 0: none was, or the client has resumed
    CHECK,  # number of the check that runs; rises with every launch, so that marks of earlier ones mean nothing
    IS_WRONG,  # 1 once a program of the check has found something wrong; 0 between launches
    STEP,  # number of the last step that came
    LAUNCH,  # number of the last launch that began
    BEGAN_NS,  # when that step came, nanoseconds of the GPU's %globaltimer
    NUM_REQS,  # requests of the step that runs; 0 if it is refused, or there is none
) = range(NUM_WORDS)
