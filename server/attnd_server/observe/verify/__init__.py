"""Verification: a sample of the calls is computed again in float64, and compared.

`choice` says which rows of a call, `sample` copies what they need while the call's thread still has the device, `check`
computes them with the arithmetic of the backend `naive` in float64 on the processor, and `verifier` does all that to
some calls, off everybody's way or before they are answered.
"""

from attnd_server.observe.verify.tally import DROP_REASONS, VerifyTally
from attnd_server.observe.verify.verifier import Verifier

__all__ = ["DROP_REASONS", "Verifier", "VerifyTally"]
