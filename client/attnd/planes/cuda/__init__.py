"""The cuda plane: tensors lie in memory of the server's GPU, and a step is one message."""
