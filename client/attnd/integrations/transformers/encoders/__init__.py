"""Models with an encoder: cross-attention is served, and the encoder itself stays in the worker."""
