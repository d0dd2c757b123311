"""Who has the device when: the executor, its queue, steps, batches and CUDA graphs."""
