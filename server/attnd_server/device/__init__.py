"""torch and CUDA, without attention."""
