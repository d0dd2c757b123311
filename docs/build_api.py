"""Builds the API reference from the docstrings: `python docs/build_api.py FOLDER`, or `make docs`.

It fails if something public has no docstring, if a docstring names something that does not exist, or if pdoc warns.
"""

from __future__ import annotations

import builtins
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pdoc
from pdoc import doc, extract

from attnd.v1 import attention_pb2, cache_pb2, capabilities_pb2, error_pb2, plane_pb2, status_pb2, step_pb2, tensor_pb2

PACKAGES = ("attnd", "attnd_server")
# What users import; `!` leaves the server's modules out, whose public names the package itself has.
SPECS = (
    "attnd",
    "attnd.integrations",
    "attnd.traces",
    "attnd_server",
    "!attnd_server.",
)
# `Session.step`, `attnd.Session.step`, `StepMetadata`. A lone word in small letters may be an argument: it is none.
REFERENCE = re.compile(r"`((?:attnd|attnd_server)(?:\.\w+)+|[A-Z]\w*[a-z]\w*(?:\.\w+)*)(?:\([^`]*\))?`")
RAISES = re.compile(r"^Raises:\n((?: +.*\n?|\n)+)", re.MULTILINE)
ATTRIBUTES = re.compile(r"^Attributes:\n((?: +.*\n?|\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\w+):", re.MULTILINE)
EXAMPLE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# Names of the wire, which docstrings speak of: its messages, enumerations and methods.
WIRE = {
    name
    for file in (attention_pb2, cache_pb2, capabilities_pb2, error_pb2, plane_pb2, status_pb2, step_pb2, tensor_pb2)
    for names in (file.DESCRIPTOR.message_types_by_name, file.DESCRIPTOR.enum_types_by_name)
    for name in names
} | {method.name for service in attention_pb2.DESCRIPTOR.services_by_name.values() for method in service.methods}


def load(name: str) -> doc.Module:
    """A module with what it loads when it is first asked for: pdoc does not ask."""
    module = extract.load_module(name)
    for public in getattr(module, "__all__", ()):
        vars(module).setdefault(public, getattr(module, public))
    return doc.Module(module)


def members(item: doc.Doc[Any]) -> Iterator[doc.Doc[Any]]:
    """A module or class and all that it shows, each once where it is defined."""
    yield item
    if isinstance(item, doc.Namespace):
        for member in item.members.values():
            if isinstance(member, doc.Module) or (member.name.startswith("_") and member.name != "__init__"):
                continue
            if isinstance(item, doc.Class) and member.taken_from[0].split(".")[0] not in PACKAGES:
                continue  # inherited from a library
            yield from members(member)


def entries(section: re.Pattern[str], text: str) -> set[str]:
    """The names that a section of a docstring explains."""
    return {name for block in section.findall(text) for name in ENTRY.findall(block)}


def exists(reference: str, item: doc.Doc[Any], named: dict[str, doc.Doc[Any]]) -> bool:
    """Whether a name that the docstring of `item` mentions is public, or one that some module of its package has."""
    if reference in named or reference in WIRE:
        return True
    parts = reference.split(".")
    for end in range(len(parts) - 1, 0, -1):
        owner = named.get(".".join(parts[:end]))
        if isinstance(owner, doc.Class):
            return parts[end] in entries(ATTRIBUTES, owner.docstring) or hasattr(owner.obj, parts[end])
    package = item.taken_from[0].partition(".")[0]
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == package]
    return len(parts) == 1 and any(reference in vars(module) for module in modules)


def faults(modules: list[doc.Module]) -> Iterator[str]:
    """What is wrong with the docstrings, a line each."""
    shown = [item for module in modules for item in members(module)]
    named: dict[str, doc.Doc[Any]] = {}
    for item in shown:
        named[item.fullname] = item
        named.setdefault(item.qualname, item)
    for item in shown:
        text = item.docstring
        if not text and isinstance(item, (doc.Module, doc.Class, doc.Function)) and item.name != "__init__":
            yield f"{item.fullname} has no docstring"
        for reference in REFERENCE.findall(EXAMPLE.sub("", text)):
            if not exists(reference, item, named):
                yield f"{item.fullname} names `{reference}`, which is not there"
        for error in entries(RAISES, text):
            if error not in named and not hasattr(builtins, error):
                yield f"{item.fullname} raises {error}, which is not there"


def main(folder: str) -> int:
    """Writes the pages to `folder`. Returns the exit code."""
    warnings.simplefilter("error", UserWarning)  # pdoc's
    pdoc.render.configure(docformat="google", show_source=False, footer_text="attnd")
    names = extract.walk_specs(SPECS)
    found = sorted(set(faults([load(name) for name in names])))
    for fault in found:
        print(fault, file=sys.stderr)
    if found:
        return 1
    pdoc.pdoc(*SPECS, output_directory=Path(folder))
    print(f"{folder}/index.html: {len(names)} modules")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
