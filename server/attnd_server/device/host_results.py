"""Results of a GPU on their way to the host."""

from __future__ import annotations

import torch


def on_host(
    output: torch.Tensor, lse: torch.Tensor | None, into: tuple[torch.Tensor, torch.Tensor | None] | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output and lse, once they are on the host.

    Args:
        output: on a GPU.
        lse: likewise.
        into: where they are to lie, pinned at best; None: in memory of their own.
    """
    if into is None:
        return output.cpu(), None if lse is None else lse.cpu()
    for host, tensor in zip(into, (output, lse), strict=True):
        if host is not None and tensor is not None:
            host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(output.device).synchronize()
    return into
