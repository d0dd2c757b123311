"""Whether this thread is warming up: what it launches now serves no caller. The state is the client's too."""

from attnd.protocol.warming_up import is_warming_up, reset_warming_up, set_warming_up, this_thread_warms_up

__all__ = ["is_warming_up", "reset_warming_up", "set_warming_up", "this_thread_warms_up"]
