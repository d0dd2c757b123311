"""Builds the image with buildah, and runs server and workers in it under bubblewrap: `make image-test`, as root.

It needs buildah, bubblewrap and debootstrap (packages of Debian), 12 GB of disk and, with a torch for GPUs, 20 minutes.
Where one is missing it says so and ends well, unless REQUIRE=1. STORAGE_DRIVER=vfs is for where overlays cannot be
mounted. The base is Debian with its own Python, made here, because no registry of images is asked. pip's configuration
on this machine counts inside too, so it decides which build of torch is taken.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from container import Container, Image, processes_in

ROOT = Path(__file__).parents[2]
TOOLS = ("buildah", "bwrap", "debootstrap")
SUITE = "bookworm"
BASE, NAME = "localhost/attnd-base", "localhost/attnd"
# Of pip's configuration: what names other sources than its index.
OTHER_SOURCES = {"find-links", "extra-index-url", "constraint", "no-index"}
SOCKETS = "/run/attnd"


def say(*words: object) -> None:
    """A line at once, also into a pipe."""
    print(*words, flush=True)


def output(*command: object, **options: Any) -> str:
    """What a command prints. Its errors go to standard error."""
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, **options).stdout.strip()


class Storage:
    """Images and what buildah mounts of them, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._options = ["--root", folder / "storage", "--runroot", folder / "run"]

    def buildah(self, *words: object) -> str:
        """What `buildah WORDS` prints."""
        return output("buildah", *self._options, *words)

    def buildah_aloud(self, *words: object) -> None:
        """Runs `buildah WORDS`, and shows what it prints."""
        subprocess.run([str(word) for word in ("buildah", *self._options, *words)], check=True, stdout=sys.stderr)

    def make_base(self, root: Path) -> None:
        """Debian with Python and its headers, as python:3.12-slim-bookworm has them: Triton compiles with these."""
        packages = "python3,python3-dev,python3-venv,ca-certificates"
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={packages}", SUITE, root], check=True, stdout=sys.stderr
        )
        for archive in (root / "var/cache/apt/archives").glob("*.deb"):
            archive.unlink()
        container = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", container, root, "/")
        self.buildah("config", "--env", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", container)
        self.buildah("commit", "--quiet", container, BASE)
        self.buildah("rm", container)
        shutil.rmtree(root)

    def build(self, volumes: list[str]) -> None:
        """The Dockerfile on that base."""
        mounted = [word for volume in volumes for word in ("--volume", f"{volume}:ro")]
        self.buildah_aloud(
            *("build", "--isolation", "chroot", "--format", "docker", "--pull=false", "--build-arg", f"BASE={BASE}"),
            *(*mounted, "--tag", NAME, ROOT),
        )

    @contextmanager
    def mounted(self, volumes: dict[str, Path]) -> Iterator[Image]:
        """The built image, mounted, with folders that its user may write to."""
        container = self.buildah("from", "--pull=never", NAME)
        try:
            config = json.loads(self.buildah("inspect", "--type", "image", NAME))["Docker"]["config"]
            root = Path(self.buildah("mount", container))
            uid, _, gid = config["User"].partition(":")
            for inside, outside in volumes.items():
                (root / inside.lstrip("/")).mkdir(parents=True, exist_ok=True)
                outside.mkdir(mode=0o700)
                os.chown(outside, int(uid), int(gid))
            assert config["Volumes"].keys() <= volumes.keys()
            yield Image(root, config["User"], config["Env"], config["Entrypoint"], volumes)
        finally:
            self.buildah("umount", container)
            self.buildah("rm", container)


def pip_volumes(folder: Path, only_index: bool) -> list[str]:
    """pip's configuration as a file, and the local files and folders that it names, as volumes for a build."""
    settings: dict[str, str] = {}
    for line in sorted(output(sys.executable, "-m", "pip", "config", "list").splitlines(), reverse=True):
        name, _, value = line.partition("=")
        # Sorted so that ":env:", which counts most, comes last.
        settings[name.rpartition(".")[2]] = ast.literal_eval(value)
    if only_index:
        settings = {name: value for name, value in settings.items() if name not in OTHER_SOURCES}
    path = folder / "pip.conf"
    lines = [f"{name} = {' '.join(value.split())}" for name, value in settings.items()]
    path.write_text("\n".join(["[global]", *lines, ""]))
    named = {each for value in settings.values() for each in re.findall(r"(?:^|\s|file://)(/[^\s]*)", value)}
    # A folder of packages is often beside their index, under names relative to it.
    named = {str(Path(each).parent) if each.endswith("/simple") else each for each in named if Path(each).exists()}
    return [f"{path}:/etc/pip.conf", *(f"{each}:{each}" for each in sorted(named))]


class Trials:
    """Server and workers in containers of the image, tried in turn."""

    def __init__(self, image: Image) -> None:
        self._image = image
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._address = f"localhost:{free.getsockname()[1]}"
        self._started: list[Container] = []

    def start(self, *command: str, **options: Any) -> Container:
        """A container that runs `command`."""
        self._started.append(Container(self._image, command, **options))
        return self._started[-1]

    def server(self) -> Container:
        """A server with a socket for shared memory, that listens."""
        port = self._address.rpartition(":")[2]
        options = ["--port", port, "--socket-dir", SOCKETS, "--kv-bytes", "64MiB", "--device", "cpu"]
        server = self.start(*self._image.entrypoint, *options)
        server.lines_until("serving")
        return server

    def worker(self, num_calls: int) -> Container:
        """A worker in a container of its own, after its first call."""
        binds = {"/mnt": Path(__file__).parent}
        worker = self.start("python", "/mnt/worker.py", self._address, str(num_calls), binds=binds)
        worker.lines_until("first")
        return worker

    def probe(self) -> tuple[int, str]:
        """What the image's health check says of the server."""
        return self.start("python", "-m", "attnd_server.health_probe", self._address).ended()

    def confinement(self) -> None:
        """The image's user, without capabilities, on a root that cannot be written to and a small /tmp."""
        program = (
            "import os; s = open('/proc/self/status').read(); print(os.getuid(), os.getgid(), os.getgroups(), "
            "[line.split()[1] for line in s.splitlines() if line.startswith(('CapEff', 'CapBnd', 'NoNewPrivs'))], "
            "os.access('/', os.W_OK), os.access('/opt/attnd', os.W_OK), os.statvfs('/').f_flag & os.ST_RDONLY, "
            "os.statvfs('/tmp').f_blocks * os.statvfs('/tmp').f_frsize >> 20)"
        )
        code, said = self.start("python", "-c", program).ended()
        none = "0" * 16
        assert said == f"10001 10001 [] ['{none}', '{none}', '1'] False False 1 64\n", said
        assert code == 0
        say("ok: runs as 10001:10001 without capabilities on a read-only root, with 64 MiB of /tmp")

    def service(self) -> None:
        """Probe, workers that end or are killed, and SIGTERM."""
        code, said = self.probe()
        assert code == 1, said
        server = self.server()
        code, said = self.probe()
        assert (code, said) == (0, ""), said
        say("ok: the health probe fails without a server, and passes with one")
        code, said = self.worker(200).ended()
        assert (code, said) == (0, "first\n200 right through shm\n"), said
        say("ok: a worker in a second container, 200 calls through shared memory")
        files = self._open_files(server)
        worker = self.worker(0)
        worker.signal(signal.SIGKILL)
        assert worker.ended()[0] == 128 + signal.SIGKILL
        assert self.worker(20).ended()[0] == 0
        assert self.probe()[0] == 0
        # What the killed one had, memory and socket, was closed when the next one had been served.
        assert self._open_files(server) <= files, (files, self._open_files(server))
        say("ok: after SIGKILL of a worker the server serves the next, and has closed what it shared")
        server.signal(signal.SIGTERM)
        code, said = server.ended()
        assert code == 0, said
        self._no_socket()
        say("ok: SIGTERM drains the server, exit code 0")

    def death_of_the_server(self) -> None:
        """SIGTERM and SIGKILL of a server while a worker calls, and the next server in the same folders."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            server = self.server()
            worker = self.worker(0)
            server.signal(number)
            code, said = server.ended()
            assert code == (0 if number == signal.SIGTERM else 128 + number), said
            code, said = worker.ended()
            assert (code, said) == (3, "first\ndisconnected\n"), said
            say(f"ok: {number.name} of the server under calls ends its worker with attnd.Disconnected")
        server = self.server()
        assert self.worker(20).ended()[0] == 0
        server.signal(signal.SIGTERM)
        assert server.ended()[0] == 0
        self._no_socket()
        say("ok: the next server takes over the folder of the socket, and leaves it empty")

    def _open_files(self, server: Container) -> int:
        return len(os.listdir(f"/proc/{server.pid}/fd"))

    def _no_socket(self) -> None:
        left = list(self._image.volumes[SOCKETS].iterdir())
        assert not left, left

    def end(self) -> None:
        """Ends whatever still runs.

        Raises:
            AssertionError: A process is left although its container ended.
        """
        for container in self._started:
            container.kill()
        left = processes_in({container.namespace for container in self._started})
        assert not left, left
        say("ok: no process is left in any of", len(self._started), "containers")


def try_image(storage: Storage, folder: Path) -> None:
    """All trials of the built image."""
    paths = {"cache": "/var/cache/attnd", "lib": "/var/lib/attnd", "sockets": SOCKETS}
    shared = set(os.listdir("/dev/shm"))
    volumes = Path(tempfile.mkdtemp(prefix="volumes-", dir=folder))
    with storage.mounted({inside: volumes / name for name, inside in paths.items()}) as image:
        say(f"the image has {output('du', '-sm', image.root).split()[0]} MiB of files")
        trials = Trials(image)
        try:
            trials.confinement()
            trials.service()
            trials.death_of_the_server()
        finally:
            trials.end()
        say("not tried: a worker over tcp, a plane that attnd does not have; a GPU")
    left = [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(folder) in line]
    assert not [line for line in left if "/merged" in line], left
    assert set(os.listdir("/dev/shm")) <= shared
    assert str(volumes) not in Path("/proc/net/unix").read_text()
    shutil.rmtree(volumes)
    say("ok: no mount, socket or shared memory is left")


def main() -> int:
    """Builds and tries. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Builds the image, and runs server and workers in it.")
    parser.add_argument("--folder", type=Path, help="keep images here, and do not build again what is there")
    parser.add_argument("--only-index", action="store_true", help="of pip's configuration take its index alone")
    arguments = parser.parse_args()
    missing = [f"{tool} is not installed" for tool in TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0:
        missing.append("it needs root")
    if missing:
        say("image-test skipped:", "; ".join(missing))
        return int(os.environ.get("REQUIRE") == "1")
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="attnd-image-", dir="/var/tmp"))
    folder.mkdir(parents=True, exist_ok=True)
    storage = Storage(folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # also then nothing is left
    try:
        known = storage.buildah("images", "--format", "{{.Name}}").splitlines()
        if BASE not in known:
            storage.make_base(folder / "base")
        storage.build(pip_volumes(folder, arguments.only_index))
        try_image(storage, folder)
    finally:
        if arguments.folder is None:
            storage.buildah("rm", "--all")
            storage.buildah("rmi", "--all", "--force")
            # Where overlays are mounted, the storage itself is a mount.
            subprocess.run(["umount", folder / "storage" / "overlay"], stderr=subprocess.DEVNULL)
            shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
