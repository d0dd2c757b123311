"""What may go to the place of another call's tensors, and that exactly these bytes do."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest
import torch

from attnd.protocol.regions import Region
from attnd.protocol.shm import placed_tensors
from attnd.protocol.shm.placed_tensors import INPUTS, RESULTS, PlacedTensors, key_of
from attnd.protocol.tensors import Array, from_array, to_array

SHAPES = {"q": (3, 6, 8), "k": (3, 2, 8), "v": (3, 2, 4)}


def placed(given: dict[str, torch.Tensor]) -> tuple[PlacedTensors, memoryview]:
    """Tensors in a region, and all of its bytes."""
    memory = mmap.mmap(-1, 4096)
    arrays = {name: to_array(tensor, name) for name, tensor in given.items()}
    _, views = Region(1, memory).placed(list(arrays.values()), 64, "call")
    pairs = zip(arrays.items(), views, strict=True)
    return PlacedTensors({name: array._replace(data=view) for (name, array), view in pairs}, INPUTS), memoryview(memory)


def random(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("names", ["qkv", "q", "kv"])
def test_tensors_like_those_before_take_their_places_and_no_other_byte(dtype: torch.dtype, names: str) -> None:
    first, second = ({name: random(dtype)[name] for name in names} for _ in range(2))
    tensors, memory = placed(first)
    expected = placed(second)[1]
    assert bytes(memory) != bytes(expected)
    assert tensors.fill_with_torch(*(second.get(name) for name in "qkv"))
    assert bytes(memory) == bytes(expected)


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.randn(3, 6, 4)},
        {"q": torch.randn(3, 48)},
        {"q": torch.randn(1, 6, 8).expand(3, 6, 8)},
        {"k": torch.randn(3, 8, 2).transpose(1, 2)},
        {"v": torch.randn(3, 2, 4).double()},
        {"v": torch.randn(3, 2, 4).half()},
        {"v": torch.randn(3, 2, 4, device="meta")},
        {"v": torch.nn.Parameter(torch.randn(3, 2, 4))},
        {"q": np.zeros((3, 6, 8), np.float32)},
        {"q": None},
        {"k": None, "v": None},
    ],
)
def test_anything_else_takes_the_long_way_and_nothing_is_copied(change: dict[str, Any]) -> None:
    tensors, memory = placed(random())
    before = bytes(memory)
    assert not tensors.fill_with_torch(*({**random(), **change}[name] for name in "qkv"))
    assert bytes(memory) == before


def test_what_the_call_had_not_cannot_come() -> None:
    given = random()
    tensors, memory = placed({"q": given["q"]})
    before = bytes(memory)
    assert not tensors.fill_with_torch(*random().values())
    assert bytes(memory) == before


def test_a_process_without_torch_copies_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(placed_tensors.sys.modules, "torch")
    new = {name: np.random.default_rng(0).random(shape, np.float32) for name, shape in SHAPES.items()}
    arrays = {name: to_array(array, name) for name, array in new.items()}
    zeros = {name: to_array(np.zeros_like(array), name) for name, array in new.items()}
    _, views = Region(1, mmap.mmap(-1, 4096)).placed(list(zeros.values()), 0, "call")
    tensors = PlacedTensors(
        {name: array._replace(data=view) for (name, array), view in zip(zeros.items(), views, strict=True)}, INPUTS
    )
    assert key_of(tensors.arrays) == key_of(arrays)
    assert not tensors.fill_with_torch(*new.values())
    tensors.fill(arrays)
    for name, copy in tensors.copies(as_torch=True).items():
        assert np.array_equal(from_array(copy, new[name]), new[name])


@pytest.mark.parametrize("as_torch", [False, True])
def test_copies_stay_as_they_are(as_torch: bool) -> None:
    given = random(torch.bfloat16)
    tensors, memory = placed(given)
    copies = tensors.copies(as_torch=as_torch)
    assert all(isinstance(copy, torch.Tensor if as_torch else Array) for copy in copies.values())
    memory[:] = bytes(len(memory))
    for name, tensor in given.items():
        assert torch.equal(from_array(copies[name], tensor), tensor)


def test_tensors_of_no_bytes() -> None:
    empty = {name: torch.empty(0, *shape[1:]) for name, shape in SHAPES.items()}
    tensors, _ = placed(empty)
    assert tensors.fill_with_torch(*empty.values())
    assert {name: copy.shape for name, copy in tensors.copies(as_torch=True).items()} == {
        name: tensor.shape for name, tensor in empty.items()
    }


def test_what_came_in_a_message_is_copied_as_an_array() -> None:
    array = Array(1, (2,), memoryview(bytes(range(8))))
    (copy,) = PlacedTensors({"output": array}, RESULTS).copies(as_torch=True).values()
    assert copy == array
