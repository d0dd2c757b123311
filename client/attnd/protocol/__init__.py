"""What client and server share: frames, tensors, steps, and the layouts of shared memory."""
