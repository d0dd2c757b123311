"""What may go to the place of another call's tensors, and that exactly these bytes do."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest
import torch

from attnd.planes.shm.placed_results import PlacedResults
from attnd.protocol.loose import copy_elements, to_sendable
from attnd.protocol.regions import Region
from attnd.protocol.shm import placed_tensors
from attnd.protocol.shm.pinned_region import PinnedRegion
from attnd.protocol.shm.placed_tensors import INPUTS, RESULTS, PlacedTensors, key_of
from attnd.protocol.tensors import Array, from_array, to_array

SHAPES = {"q": (3, 6, 8), "k": (3, 2, 8), "v": (3, 2, 4)}


def placed(given: dict[str, torch.Tensor]) -> tuple[PlacedTensors, memoryview]:
    """Tensors in a region, and all of its bytes."""
    memory = mmap.mmap(-1, 4096)
    arrays = {name: to_sendable(tensor, name) for name, tensor in given.items()}
    _, views = Region(1, memory).placed(list(arrays.values()), 64, "call")
    pairs = zip(arrays.items(), views, strict=True)
    arrays = {name: Array(array.dtype, array.shape, view) for (name, array), view in pairs}
    return PlacedTensors(arrays, INPUTS), memoryview(memory)


def results(tensors: PlacedTensors) -> PlacedResults:
    return PlacedResults(tensors, PinnedRegion(memoryview(b"")), None)


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


def slices_of_one_projection() -> dict[str, torch.Tensor]:
    sizes, head_dims = (48, 16, 8), (8, 8, 4)
    slices = torch.randn(3, sum(sizes)).split(sizes, 1)
    return {name: part.unflatten(1, (-1, dim)) for name, part, dim in zip("qkv", slices, head_dims, strict=True)}


LOOSE = {
    "slices_of_one_projection": slices_of_one_projection,
    "one_row_for_all": lambda: {**random(), "q": torch.randn(1, 6, 8).expand(3, 6, 8)},
    "transposed": lambda: {**random(), "k": torch.randn(3, 8, 2).transpose(1, 2)},
    "needs_gradients": lambda: {**random(), "v": torch.randn(3, 2, 8, requires_grad=True)[..., ::2]},
}


@pytest.mark.parametrize("make", LOOSE.values(), ids=LOOSE)
def test_what_is_not_dense_goes_to_the_same_places(make: Any) -> None:
    given = make()
    assert {name: tuple(tensor.shape) for name, tensor in given.items()} == SHAPES
    assert not all(tensor.is_contiguous() for tensor in given.values())
    tensors, memory = placed(random())
    assert tensors.fill_with_torch(*given.values())
    expected = placed({name: tensor.detach().contiguous() for name, tensor in given.items()})[1]
    assert bytes(memory) == bytes(expected)
    again, memory = placed(random())
    again.fill({name: to_sendable(tensor, name) for name, tensor in given.items()})
    assert bytes(memory) == bytes(expected)
    assert bytes(placed(given)[1]) == bytes(expected)


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.randn(3, 6, 4)},
        {"q": torch.randn(3, 48)},
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
    for name, copy in results(tensors).copies(new["q"]).items():
        assert np.array_equal(copy, new[name])


def test_a_process_without_torch_copies_arrays_that_are_not_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(placed_tensors.sys.modules, "torch")
    source = np.random.default_rng(0).random((3, 2, 6, 8), np.float32)[:, 1]
    view = memoryview(bytearray(source.nbytes))
    copy_elements(to_sendable(source, "q"), view)
    assert bytes(view) == source.tobytes()


KINDS = {
    "torch": lambda tensor: tensor,
    "numpy": lambda tensor: tensor.numpy(),
    "array": lambda tensor: to_array(tensor, "q"),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_copies_stay_as_they_are_and_are_aligned(kind: Any) -> None:
    given = random()
    tensors, memory = placed(given)
    copies = results(tensors).copies(kind(given["q"]))
    assert {type(copy) for copy in copies.values()} == {type(kind(given["q"]))}
    memory[:] = bytes(len(memory))
    for name, tensor in given.items():
        copy = from_array(copies[name], tensor) if isinstance(copies[name], Array) else torch.as_tensor(copies[name])
        assert torch.equal(copy, tensor)
        assert isinstance(copies[name], Array) or copy.data_ptr() % 64 == 0


OUTPUTS = {
    "dense": lambda shape: torch.full(shape, torch.nan),
    "rows_apart": lambda shape: torch.full((shape[0], 3, *shape[1:]), torch.nan)[:, 1],
    "elements_apart": lambda shape: torch.full((*shape, 2), torch.nan)[..., 1],
    "numpy": lambda shape: np.full(shape, np.nan, np.float32),
    "numpy_rows_apart": lambda shape: np.full((shape[0], 3, *shape[1:]), np.nan, np.float32)[:, 1],
}


@pytest.mark.parametrize("make", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("has_torch", [True, False], ids=["", "without_torch"])
def test_results_go_to_where_they_are_wanted_and_to_no_other_byte(
    make: Any, has_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = random()
    targets = {name: make(shape) for name, shape in SHAPES.items()}
    lie = results(placed(given)[0])
    if not has_torch:
        if isinstance(targets["q"], torch.Tensor):
            pytest.skip("a tensor of torch comes with torch")
        with monkeypatch.context() as patch:
            patch.delitem(placed_tensors.sys.modules, "torch")
            lie.copy_to(targets)
    else:
        lie.copy_to(targets)
    for name, target in targets.items():
        written = torch.as_tensor(target)
        assert torch.equal(written, given[name])
        whole = written.as_strided((written.untyped_storage().nbytes() // 4,), (1,), 0)
        assert int(whole.isnan().sum()) == whole.numel() - written.numel()


def test_results_of_a_gpus_call_go_to_the_host_at_once() -> None:
    given = random()
    targets = {name: torch.full_like(tensor, torch.nan) for name, tensor in given.items()}
    pinned = PinnedRegion(memoryview(b""))
    PlacedResults(placed(given)[0], pinned, torch.device("cuda", 0)).copy_to(targets)  # no GPU is asked to wait
    assert all(torch.equal(targets[name], tensor) for name, tensor in given.items())


def test_tensors_of_no_bytes() -> None:
    empty = {name: torch.empty(0, *shape[1:]) for name, shape in SHAPES.items()}
    tensors, _ = placed(empty)
    assert tensors.fill_with_torch(*empty.values())
    assert {name: copy.shape for name, copy in results(tensors).copies(empty["q"]).items()} == {
        name: tensor.shape for name, tensor in empty.items()
    }


@pytest.mark.parametrize("make", OUTPUTS.values(), ids=OUTPUTS)
def test_what_came_in_a_message_goes_there_too(make: Any) -> None:
    expected = torch.tensor([[1.5, -2.0]])
    array = Array(1, (1, 2), memoryview(bytes(expected.numpy().tobytes())))
    came = results(PlacedTensors({"output": array}, RESULTS))
    target = make((1, 2))
    came.copy_to({"output": target})
    assert torch.equal(torch.as_tensor(target), expected)
    assert torch.equal(torch.as_tensor(came.copies(target)["output"]), expected)
    assert came.copies(array)["output"] == array
