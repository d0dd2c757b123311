"""Asks a service of known weaknesses about every version in the locks: `python deploy/audit.py [OPTION...]`.

Exit code 1 if one is known to be weak, or if pip-audit does not work. A service that cannot be reached, or that knows
none of the packages, is no failure: the last line says what was not asked. The options are those of pip-audit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOCKS = [ROOT / "requirements.lock", *sorted((ROOT / "locks").glob("*.lock"))]
TIMEOUT_S = 120.0  # of one lock; all of them take seconds where the service answers
# What pip-audit's traceback names where the service is out of reach. It has no exit code for that.
UNREACHED = re.compile(r"requests\.exceptions|urllib3\.exceptions|ServiceError|ConnectionError")


def ask(lock: Path, options: list[str]) -> list[dict[str, Any]] | None:
    """The packages of a lock as pip-audit tells them: name, and version and vulns, or skip_reason.

    Args:
        lock: A requirements file with hashes.
        options: More options of pip-audit.

    Returns:
        None if the service was not reached within the time.

    Raises:
        RuntimeError: pip-audit failed for another reason.
    """
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "--progress-spinner", "off"]
    command += ["--format", "json", "--requirement", str(lock), *options]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None
    try:
        return json.loads(result.stdout)["dependencies"]
    except ValueError:
        if UNREACHED.search(result.stderr):
            return None
        raise RuntimeError(f"pip-audit failed on {lock.name}:\n{result.stderr}") from None


def main(options: list[str]) -> int:
    """Asks about all locks, with `options` of pip-audit. Returns the exit code."""
    known: set[tuple[str, str]] = set()
    unknown: set[str] = set()
    weak: set[str] = set()
    unreached = []
    for lock in LOCKS:
        packages = ask(lock, options)
        if packages is None:
            unreached.append(lock.name)
            break  # The others would wait as long.
        for package in packages:
            if "skip_reason" in package:
                unknown.add(package["name"])
                continue
            known.add((package["name"], package["version"]))
            for each in package["vulns"]:
                fixed = ", ".join(each["fix_versions"]) or "no version"
                weak.add(f"{package['name']} {package['version']} in {lock.name}: {each['id']}, fixed in {fixed}")
    for line in sorted(weak):
        print(line)
    print(f"{len(known)} versions scanned; weak: {len(weak)}; of packages that were not found: {len(unknown)}")
    if unreached:
        print(f"not scanned whole: the service did not answer for {unreached[0]}")
    elif not known:
        print("not scanned: the service knows none of the versions")
    return int(bool(weak))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
