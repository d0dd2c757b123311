"""The results of a call that lie in a region, and how they get to where they are wanted, copied once."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attnd.protocol.shm.pinned_region import PinnedRegion
from attnd.protocol.shm.placed_tensors import PlacedTensors
from attnd.protocol.tensors import copy_array, empty_like

if TYPE_CHECKING:
    import torch


class PlacedResults:
    """Implements `attnd.protocol.requests.Results`. Good until the next call is made."""

    def __init__(self, tensors: PlacedTensors, pinned: PinnedRegion, gpu: torch.device | None) -> None:
        """Those of `tensors`, in a region of which `pinned` is told what a GPU reads; `gpu` is where they go to."""
        self._tensors = tensors
        self._pinned = pinned
        self._gpu = gpu

    def copies(self, like: Any) -> dict[str, Any]:
        """Copies of all, by name, of the kind of thing that `like` is, on its device."""
        torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
        is_tensor = torch is not None and isinstance(like, torch.Tensor)
        if is_tensor and like.is_cpu and self._gpu is None and self._tensors.are_placed:
            return self._tensors.copies()
        arrays = self._tensors.arrays
        if is_tensor or (numpy is not None and isinstance(like, numpy.ndarray)):
            made = {name: empty_like(like, array.dtype, array.shape) for name, array in arrays.items()}
            self.copy_to(made)
            return made
        return {name: array._replace(data=memoryview(bytes(array.data))) for name, array in arrays.items()}

    def copy_to(self, targets: Mapping[str, Any]) -> None:
        """Copies some, by name, to torch tensors or numpy arrays of their types and shapes."""
        torch, gpus = sys.modules.get("torch"), set()
        for name, target in targets.items():
            if torch is None or not isinstance(target, torch.Tensor) or not self._tensors.are_placed:
                copy_array(self._tensors.arrays[name], target)
                continue
            is_read_later = target.is_cuda or target.device == self._gpu
            self._tensors.copy_to(name, target, waits=not is_read_later)
            if is_read_later:
                gpus.add(target.device)
        for gpu in gpus:
            self._pinned.note_read(gpu)
