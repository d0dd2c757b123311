"""Devices by number."""

from __future__ import annotations

import torch


def with_index(device: torch.device | str) -> torch.device:
    """The device with its number: "cuda" alone is this thread's current GPU, which may be another one later."""
    device = torch.device(device)
    is_current = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if is_current else device
