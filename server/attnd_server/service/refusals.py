"""What a client is told of an error."""

from __future__ import annotations

import logging
import secrets

from attnd.errors import AttndError, Exhausted, ServerFault
from attnd_server.device.faults import DeviceFaults
from attnd_server.device.memory import is_memory_error

log = logging.getLogger(__name__)


def refusal_of(error: Exception, faults: DeviceFaults) -> AttndError:
    """What a client is told: the error itself; of a lack of memory, that; of a bug an id, under which the log has it.

    Args:
        error: of a request.
        faults: of the device, which may have failed with it.
    """
    if faults.look_at(error):
        return faults.refusal()
    if isinstance(error, AttndError):
        return error
    if is_memory_error(error):
        return Exhausted(f"the server has no memory left for this request: {error}")
    fault_id = secrets.token_hex(4)
    log.error("internal error %s", fault_id, exc_info=error)
    return ServerFault(f"internal error {fault_id}: the server's log has the details under this id")
