"""The shm plane: tensors lie in host memory that server and client share."""
