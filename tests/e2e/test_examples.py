"""Every example runs as it stands there, against a real server, and prints what local attention gives."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from tests.attention import dense_attention
from tests.servers import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def load(name: str) -> ModuleType:
    """An example as a module: its model, without what it does with a server."""
    spec = importlib.util.spec_from_file_location(f"examples.{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(name: str, *arguments: str) -> list[str]:
    """The lines that an example prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(ROOT / "examples" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def numbers(lines: list[str]) -> torch.Tensor:
    """The numbers behind the colons."""
    return torch.tensor([float(re.fullmatch(r"\w+ \d: (\S+)", line)[1]) for line in lines])


class LocalKv:
    """K and V of one request in this process: `attend` is local attention."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, layer, q, k, v, *, causal=True, stores=True):
        if layer in self.layers:
            k, v = (torch.cat(parts) for parts in zip(self.layers[layer], (k, v), strict=True))
        if stores:
            self.layers[layer] = k, v
        return dense_attention(q, k, v, causal=causal)


@pytest.mark.parametrize("address", ["inproc", "grpc"])
def test_decode_loop(server_address, address):
    example = load("decode_loop")
    expected = []
    for prompt in example.PROMPTS:
        model, kv, tokens, answer = example.ToyModel(), LocalKv(), list(prompt), []
        for _ in range(example.NEW_TOKENS):
            tokens = [model.logits(tokens, kv.attend)[-1].argmax().item()]
            answer += tokens
        expected.append(" ".join(map(str, answer)))
        assert len(set(answer)) > 5  # it depends on more than the last token
    assert printed("decode_loop", *([server_address] if address == "grpc" else [])) == expected


def test_block_diffusion(server_address):
    example = load("block_diffusion")
    model, kv, expected = example.ToyModel(), LocalKv(), []

    def see(*arguments):
        return kv.attend(*arguments, causal=False, stores=False)

    def store(*arguments):
        return kv.attend(*arguments, causal=False)

    model.logits(example.PROMPT, store)
    for _ in range(example.NEW_BLOCKS):
        block = [example.MASK] * example.BLOCK
        while example.MASK in block:
            example.denoise(model, block, see)
        model.logits(block, store)
        expected.append(" ".join(map(str, block)))
    assert printed("block_diffusion", server_address) == expected


def test_transformers_generate(server_address):
    pytest.importorskip("transformers", reason="needs transformers")
    example = load("transformers_generate")
    tokens = example.make_model().generate(**example.PROMPTS, **example.HOW)
    answers = tokens[:, example.PROMPTS["input_ids"].shape[1] :].tolist()
    assert printed("transformers_generate", server_address) == [" ".join(map(str, answer)) for answer in answers]


def test_asyncio_workers(server_address):
    example = load("asyncio_workers")
    expected = []
    for worker in range(example.NUM_WORKERS):
        q, k, v = (each[-1] for each in example.tensors(worker))
        expected.append(dense_attention(q, k, v)[-1].sum())
    torch.testing.assert_close(
        numbers(printed("asyncio_workers", server_address)), torch.stack(expected), atol=2e-4, rtol=0
    )


def decoded_alone(example, forward):
    """The sum of each request's last hidden state, with local attention."""
    sums = []
    for hidden in example.FIRST_INPUTS.split(1):
        kv = LocalKv()
        for _ in range(example.NUM_STEPS):
            hidden = forward(hidden, kv)
        sums.append(hidden.sum())
    return torch.stack(sums)


def test_overlap(server_address):
    example = load("overlap")

    def forward(hidden, kv):
        for layer in range(example.NUM_LAYERS):
            hidden = hidden + kv.attend(layer, *example.qkv(layer, hidden)).flatten(1)
        return torch.tanh(hidden)

    actual = numbers(printed("overlap", server_address))
    torch.testing.assert_close(actual, decoded_alone(example, forward), atol=1e-3, rtol=0)


def test_two_halves(server_address):
    example = load("two_halves")
    expected = decoded_alone(example, lambda hidden, kv: example.forward(hidden, example.TO_QKV, kv.attend))
    lines = printed("two_halves", server_address)
    actual = numbers([line for line in lines if line.startswith("request ")])
    torch.testing.assert_close(actual, expected, atol=0.2, rtol=0)  # float16, summed up
    assert lines[0].startswith("no resident steps: ") == (lines[-1] == "resident steps: 0 of 40")


def test_plain_grpc(server_address):
    example = load("plain_grpc")
    shape = example.PROMPT_LEN + 1, example.NUM_HEADS, example.HEAD_DIM
    q, k, v = (torch.tensor(example.numbers(0, shape[0], factor)).view(shape) for factor in example.FACTORS)
    (line,) = printed("plain_grpc", server_address)
    actual = torch.tensor([float(word) for word in line.split()])
    torch.testing.assert_close(actual, dense_attention(q, k, v)[-1].flatten(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_is_short_tried_and_says_how_to_run_it(path):
    text = path.read_text()
    assert len(text.splitlines()) < (80 if path.stem != "two_halves" else 130)
    assert f"python examples/{path.name}" in text.partition('"""\n\n')[0]
    assert f"test_{path.stem}" in globals()
