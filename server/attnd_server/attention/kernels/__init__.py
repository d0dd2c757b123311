"""Functions over tensors: no message, no request, no configuration beyond shapes."""
