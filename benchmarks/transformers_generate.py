"""What a transformers model generates with its attention on a server, beside its own: prefill and decode apart.

`python -m benchmarks.transformers_generate --help`; README.md beside this file says how to read the result.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

import attnd
from attnd.integrations.transformers import RemoteCache
from benchmarks import report
from benchmarks.servers import running

MODELS = {
    "8B": {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "vocab_size": 32768,
    },
    "tiny": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "vocab_size": 512,
    },
}
LOCAL = ("sdpa", "flash_attention_2", "flash_attention_3")
PLANES = ("inline", "shm", "cuda")
BASE = "sdpa"
# Tokens after the prompt whose logits are compared.
CHECKED_TOKENS = 4
# Of a row, most: prompt and what is generated.
MAX_TOKENS = 2048
COLUMNS = {
    "batch": "batch",
    "way": "way",
    "prefill_s": "prefill s",
    "prefill_ratio": "x sdpa",
    "tokens_per_s": "tokens/s",
    "decode_ratio": "x sdpa",
    "error": "error",
}
CAPTION = """prefill s: from generate's call to its first token; tokens/s: of all rows after it. Medians of the rounds.
x sdpa: its ratio to that of the model's own scaled_dot_product_attention.
error: ||logits - eager's|| / ||eager's||, of the worst row. The planes are open, and the kernels loaded."""


class Clock(StoppingCriteria):
    """Notes when each token is there, and stops nothing."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self.at: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Whether each row ends: none does."""
        self._synchronize()
        self.at.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Way:
    """The model with one attention.

    Attributes:
        name: for people.
        samples: of each batch size, seconds of prefill and of each token after it.
    """

    def __init__(self, name: str, model: Any, implementation: str, plane: str = "", client: Any = None) -> None:
        self.name, self.samples = name, dict[int, list[tuple[float, float]]]()
        self._model, self._implementation, self._plane, self._client = model, implementation, plane, client
        self._cache: RemoteCache | None = None

    def logits(self, ids: torch.Tensor, prompt_len: int) -> torch.Tensor:
        """Float64 `[batch, tokens, vocabulary]` of the prompt's last token and of each token after it."""
        cache = self._ready(ids)
        first = self._model(ids[:, :prompt_len], past_key_values=cache, use_cache=True, logits_to_keep=1)
        parts = [first.logits]
        for position in range(prompt_len, ids.shape[1]):
            step = self._model(ids[:, position : position + 1], past_key_values=first.past_key_values)
            parts.append(step.logits)
        return torch.cat(parts, 1).double()

    def generate(self, ids: torch.Tensor, num_tokens: int, synchronize: Callable[[], None]) -> None:
        """Generates once, and notes the times."""
        clock, cache = Clock(synchronize), self._ready(ids)
        synchronize()
        began = time.perf_counter()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            past_key_values=cache,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        decode_s = (clock.at[-1] - clock.at[0]) / (len(clock.at) - 1)
        self.samples.setdefault(ids.shape[0], []).append((clock.at[0] - began, decode_s))

    def close(self) -> None:
        """Ends the cache, if there is one: the next batch size has another."""
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def _ready(self, ids: torch.Tensor) -> RemoteCache | None:
        """The cache of one run, with nothing in it; None: the model makes its own."""
        self._model.set_attn_implementation(self._implementation)
        if self._cache is not None:
            self._cache.reset()
        elif self._plane:
            tokens = ids.shape[0] * MAX_TOKENS
            self._cache = RemoteCache(
                self._client, self._model.config, max_tokens=tokens, dtype=self._model.dtype, plane=self._plane
            )
        return self._cache


def ways_of(model: Any, options: argparse.Namespace, client: Any, console: Console) -> list[Way]:
    """Those that can be had; says why others cannot."""
    ways = []
    for name in LOCAL:
        try:
            model.set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            console.print(f"no local {name}: {str(error).partition('. ')[0]}")
        else:
            ways.append(Way(f"local {name}", model, name))
    planes = [plane for plane in PLANES if plane in options.planes]
    return ways + [Way(f"attnd {plane}", model, "attnd", plane, client) for plane in planes]


def errors_of(ways: Sequence[Way], model: Any, ids: torch.Tensor, prompt_len: int) -> dict[str, float]:
    """How far each way's logits are from eager's. Raises WrongResult for one that is much farther than sdpa's."""
    eager = Way("local eager", model, "eager").logits(ids, prompt_len)
    errors = {}
    for way in ways:
        difference = (way.logits(ids, prompt_len) - eager).flatten(1).norm(dim=1)
        errors[way.name] = float((difference / eager.flatten(1).norm(dim=1)).max())
    limit = 2 * errors[f"local {BASE}"] + 1e-6
    for name, error in errors.items():
        if not error <= limit:
            raise report.WrongResult(f"{name} has logits {error:.2g} off eager's, but must be at most {limit:.2g} off")
    return errors


def rows_of(ways: Sequence[Way], batch: int, errors: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for way in ways:
        prefill_s, decode_s = (statistics.median(each) for each in zip(*way.samples[batch], strict=True))
        rows.append(
            {
                "batch": batch,
                "way": way.name,
                "prefill_s": prefill_s,
                "tokens_per_s": batch / decode_s,
                "error": errors[way.name],
            }
        )
    base = rows[0]
    for row in rows:
        row["prefill_ratio"] = row["prefill_s"] / base["prefill_s"]
        row["decode_ratio"] = row["tokens_per_s"] / base["tokens_per_s"]
    return rows


def draw(path: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Tokens per second of each way, beside those of the model's own attention."""
    panels: dict[str, list[report.Bar]] = {}
    for row in rows:
        panel = panels.setdefault(f"batch {row['batch']}", [])
        base = row["tokens_per_s"] / row["decode_ratio"]
        panel.append(report.Bar(row["way"].replace(" ", "\n"), row["tokens_per_s"], {f"local {BASE}": base}))
    report.plot(path, title, "tokens/s", panels)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transformers_generate", description=description)
    parser.add_argument("--model", choices=MODELS, help="of random weights; default: 8B, on a CPU tiny")
    parser.add_argument("--device", help="of the model; default: a GPU, or the CPU")
    parser.add_argument("--server-device", help="of the server; default: the second GPU, or that of the model")
    parser.add_argument("--planes", nargs="+", choices=PLANES, help="default: shm cuda, on a CPU inline shm")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of each row; default: 512")
    parser.add_argument("--tokens", type=int, default=65, metavar="N", help="to generate; default: 65")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="after one that does not count; default: 3")
    parser.add_argument("--serve", nargs="+", default=[], metavar="OPTION=VALUE", help="more for attnd serve")
    results = report.ROOT / "benchmarks" / "results"
    parser.add_argument("--out", type=Path, default=results, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args(arguments)
    count = torch.cuda.device_count()
    options.device = options.device or ("cuda:0" if count else "cpu")
    on_gpu = options.device.startswith("cuda")
    options.server_device = options.server_device or ("cuda:1" if on_gpu and count > 1 else options.device)
    options.model = options.model or ("8B" if on_gpu else "tiny")
    options.planes = options.planes or (["shm", "cuda"] if on_gpu else ["inline", "shm"])
    return options


@torch.inference_mode()
def run(options: argparse.Namespace, console: Console) -> None:
    """Checks, times, prints and writes."""
    attnd.tune_process()
    torch.manual_seed(0)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = LlamaConfig(**MODELS[options.model], max_position_embeddings=4096, eos_token_id=None, pad_token_id=0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="attnd-") as folder:
        more = [part for option in options.serve for part in f"--{option}".split("=", 1)]
        more = ["--socket-dir", folder, *(["--kv-bytes", "8GiB"] if device.type == "cuda" else []), *more]
        serve = running("attnd_server", "serve", "--port", "0", "--device", options.server_device, *more)
        with serve as address, attnd.connect(address, timeout_s=120) as client:
            ways = ways_of(model, options, client, console)
            for batch in options.batch:
                ids = torch.randint(config.vocab_size, (batch, options.prompt + CHECKED_TOKENS), device=device)
                errors = errors_of(ways, model, ids, options.prompt)
                for number in range(options.rounds + 1):
                    for way in ways:
                        way.generate(ids[:, : options.prompt], options.tokens, synchronize)
                    if number == 0:
                        for way in ways:
                            way.samples.clear()
                rows += rows_of(ways, batch, errors)
                for way in ways:
                    way.close()
    title = (
        f"{options.model} of random weights, {str(dtype).removeprefix('torch.')}, prompts of {options.prompt}, "
        f"model on {options.device}, server on {options.server_device}"
    )
    console.print(report.table(title, CAPTION, rows, COLUMNS))
    path = options.out / f"transformers-{device.type}"
    parameters = {key: value for key, value in vars(options).items() if key != "out"}
    report.write(console, path, "transformers_generate", parameters, rows, lambda plot: draw(plot, title, rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    return report.exit_code(lambda console: run(parse(arguments), console))


if __name__ == "__main__":
    sys.exit(main())
