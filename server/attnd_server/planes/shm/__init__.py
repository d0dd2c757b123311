"""The shm plane: calls on a Unix socket, tensors in memory that the client has mapped too."""
