"""Frames on the socket of a shm plane, and tensors in its region."""
