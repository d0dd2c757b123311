"""What libraries make or load at their first use on a GPU, made at the start, before anything waits there."""

from __future__ import annotations

import warnings

import torch
from torch.nn.functional import scaled_dot_product_attention

# Of tensors that are multiplied, and of those that torch's attention gets.
_PRODUCTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_ATTENTION = (torch.float32, torch.float16, torch.bfloat16)
_HEAD_DIMS = (64, 256)


def use_libraries(device: torch.device) -> None:
    """Uses cuBLAS and torch's attention once for each type, and waits until that is over.

    Where CUDA loads all of a library when it is first used (CUDA_MODULE_LOADING=EAGER), nothing of it is loaded later:
    in 2 s, and half a gigabyte of the GPU's memory. Otherwise this loads the kernels of these products alone. cuDNN's
    attention is off from now on: it compiles and loads kernels for each new shape.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that this GPU does not have
        for dtype in _PRODUCTS:
            matrices = torch.zeros(2, 64, 64, dtype=dtype, device=device)
            torch.matmul(matrices[0], matrices[1])
            torch.bmm(matrices, matrices)
        for dtype in _ATTENTION:
            for head_dim in _HEAD_DIMS:
                tokens = torch.zeros(1, 2, 64, head_dim, dtype=dtype, device=device)
                mask = torch.ones(64, 64, dtype=torch.bool, device=device)
                scaled_dot_product_attention(tokens, tokens, tokens)
                scaled_dot_product_attention(tokens, tokens, tokens, is_causal=True)
                scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=mask)
    torch.cuda.current_stream(device).synchronize()
