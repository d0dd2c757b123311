"""Generates the sync client from the asyncio one, or with --check says where the two differ.

A file of `GENERATED` is its source without async and await, and with the sync client's names. What threads do in
another way than tasks lies in modules that are written by hand for each client: transports, renewal, sessions.
"""

from __future__ import annotations

import difflib
import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).resolve().parent / "attnd"
# What is generated, by its source.
GENERATED = {
    "aio/cache.py": "cache.py",
    "aio/client.py": "client.py",
    "aio/connection.py": "connection.py",
    "aio/leases.py": "planes/leases.py",
    "aio/open_stream.py": "planes/open_stream.py",
    "aio/retries.py": "planes/retries.py",
}
# Modules that are written by hand for both.
TWINS = {
    "attnd.aio.addresses": "attnd.planes.addresses",
    "attnd.aio.choice": "attnd.planes.choice",
    "attnd.aio.renewal": "attnd.renewal",
    "attnd.aio.sessions": "attnd.sessions",
    "attnd.aio.shm": "attnd.planes.shm.stream",
    "attnd.aio.streams": "attnd.planes.transport",
    "attnd.aio.transport": "attnd.planes.transport",
}
# Sentences that are true of the asyncio client alone, and what the sync client says there.
SENTENCES = {
    "One event loop may use it.": "Any thread may use it.",
    'address: "host:port"; without a port it is 7411.': (
        'address: "host:port", the port 7411 if absent, or "inproc://" for a server in this process (needs\n'
        "            `attnd[server]`)."
    ),
    '"auto" in the better of the two.': (
        '"cuda" in memory of the server\'s GPU, from a GPU of the same host (see `CudaSession`);\n'
        '            "auto" in the better of the first two that can be had.'
    ),
}


def sync(text: str, source: str) -> str:
    """What the sync client has in place of a file of the asyncio client."""
    for said, instead in SENTENCES.items():
        text = text.replace(said, instead)
    for module, twin in {**{_module(a): _module(b) for a, b in GENERATED.items()}, **TWINS}.items():
        text = re.sub(rf"\b{re.escape(module)}\b", twin, text)
    text = re.sub(r"\bawait |\basync (?=def|with|for)", "", text)
    text = re.sub(r"\bAwaitable\[(\w+)\]", r"\1", text).replace("import Awaitable, Callable", "import Callable")
    text = re.sub(r"\b__a(enter|exit)__", r"__\1__", text)
    text = text.replace("import asyncio", "import time").replace("asyncio.sleep", "time.sleep")
    text = re.sub(r"\bAsync(?=[A-Z])", "", text).replace("attnd.aio.", "attnd.").replace(" in asyncio", "")
    first, _, rest = text.partition("\n\n")
    return _formatted(f"{first}\n\n# Generated from {source} by `make generate`. Not to be edited.\n\n{rest}")


def _module(path: str) -> str:
    return "attnd." + path.removesuffix(".py").replace("/", ".")


def _formatted(text: str) -> str:
    """As ruff has it, with the settings of this repository."""
    for arguments in (["check", "--select", "I", "--fix", "--quiet"], ["format", "--quiet"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--stdin-filename", str(CLIENT / "generated.py"), "-"]
        text = subprocess.run(command, input=text, capture_output=True, text=True, check=True, cwd=CLIENT).stdout
    return text


def main() -> int:
    """Writes what differs; with --check shows it instead, and returns 1 then."""
    is_check, differs = "--check" in sys.argv[1:], False
    for source, target in GENERATED.items():
        path = CLIENT / target
        before = path.read_text() if path.exists() else ""
        after = sync((CLIENT / source).read_text(), f"attnd/{source}")
        differs |= before != after
        if is_check:
            lines = (text.splitlines(keepends=True) for text in (before, after))
            sys.stdout.writelines(difflib.unified_diff(*lines, f"attnd/{target}", f"what attnd/{source} generates"))
        elif before != after:
            path.write_text(after)
    return int(is_check and differs)


if __name__ == "__main__":
    sys.exit(main())
