"""GPU memory by descriptor, and the flags by which two processes hand over a layer."""
