"""The command `attnd serve`: what can be set of a server."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec

import typer

from attnd_server.cli.derived_options import check_sizes, with_settings
from attnd_server.cli.exposure import Access, is_loopback
from attnd_server.config import GENERAL, OBSERVATION, ServerConfig
from attnd_server.observe import logs
from attnd_server.setting import Kind, option_name, setting

log = logging.getLogger(__name__)

# What is absurd beyond it: threads, and a day, of which gRPC counts the milliseconds in 32 bits.
_MOST = {"threads": 1_024, "keepalive_s": 86_400}


@dataclass(frozen=True)
class ServeConfig:
    """The settings of the command that the server does not see."""

    insecure: bool = setting(
        False,
        Kind.FLAG,
        GENERAL,
        "Listen where other machines reach it, though without TLS, or without asking anybody who they are.",
    )
    log_level: str = setting("info", Kind.CHOICE, OBSERVATION, "The least level that is written.", choices=logs.LEVELS)
    log_format: str = setting(
        "auto", Kind.CHOICE, OBSERVATION, "auto: text on a terminal, JSON otherwise.", choices=logs.FORMATS
    )


@with_settings(ServerConfig, ServeConfig)
def serve(config: ServerConfig, command: ServeConfig) -> None:
    """Serve attention until SIGTERM or Ctrl-C.

    Every option is also read from the environment: ATTND_PORT is --port, ATTND_KV_BYTES is --kv-bytes, and so on.
    """
    access = Access(
        is_encrypted=bool(config.tls_cert),
        asks_for_certificates=bool(config.tls_client_ca),
        asks_for_tokens=bool(config.tokens),
    )
    check_together(config)
    if not command.insecure:
        check_exposure(config, access)
    check_sizes(config)
    let_idle_threads_sleep()
    let_streams_have_queues()
    if config.socket_dir and config.device != "cpu":
        let_kernels_be_loaded_at_the_start()
    from attnd_server.app import run_server

    logs.setup(command.log_level, command.log_format)
    if access.missing and not is_loopback(config.host):
        log.warning("listening without %s", " and ".join(access.missing), extra={"host": config.host})
    raise typer.Exit(run_server(config))


def check_together(config: ServerConfig) -> None:
    """Raises `typer.BadParameter` if settings do not go together."""
    if bool(config.tls_cert) != bool(config.tls_key) or (config.tls_client_ca and not config.tls_cert):
        raise typer.BadParameter(
            "tls_cert and tls_key must be given together, and tls_client_ca only with them", param_hint="--tls-cert"
        )
    for name, most in _MOST.items():
        if (value := getattr(config, name)) > most:
            raise typer.BadParameter(f"{name} is {value:g}, but must be at most {most}", param_hint=option_name(name))
    if config.default_ttl_s > config.max_ttl_s:
        raise typer.BadParameter(
            f"default_ttl_s is {config.default_ttl_s:g}, but must be at most max_ttl_s, {config.max_ttl_s:g}",
            param_hint="--default-ttl-s",
        )
    if config.operators and not config.asks_who_calls:
        raise typer.BadParameter(
            "operators is given, but must be given with tokens or tls_client_ca: without, everybody is one principal",
            param_hint="--operators",
        )
    if config.restore and not config.snapshot_dir:
        raise typer.BadParameter("snapshot_dir is absent, but must be given with restore", param_hint="--snapshot-dir")


def check_exposure(config: ServerConfig, access: Access) -> None:
    """Raises `typer.BadParameter` if other machines could reach what is open to everybody."""
    if not is_loopback(config.host) and (danger := access.danger):
        raise typer.BadParameter(
            f"host is {config.host}, but must be a loopback address unless --insecure is given, or {access.remedy}: "
            f"{danger}",
            param_hint="--host",
        )
    if config.metrics and not is_loopback(config.metrics.rpartition(":")[0]):
        raise typer.BadParameter(
            f"metrics is {config.metrics}, but must be at a loopback address unless --insecure is given: whoever "
            "reaches the port sees how the server is used",
            param_hint="--metrics",
        )


def let_idle_threads_sleep() -> None:
    """Before torch is imported, unless the operator has said otherwise.

    OpenMP's threads spin for milliseconds after each piece of work, on cores that a worker on the same machine needs
    right then. A worker's own threads had better spin: its next piece of work comes at once.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def let_streams_have_queues() -> None:
    """Before CUDA starts, unless the operator has said otherwise.

    A GPU has up to 32 hardware queues for the streams of a process, which uses 8 of them by default. A stream that
    waits for the worker of a cuda plane holds up others in its queue.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def let_kernels_be_loaded_at_the_start() -> None:
    """Before CUDA starts, unless the operator has said otherwise, where there can be cuda planes.

    CUDA loads a kernel of torch or another library when it is first launched. Then it waits for all that runs on the
    GPU: for the worker of a cuda plane's step, too. To load all of them takes 2.6 s and 640 MiB of the GPU more.
    """
    if find_spec("cuda") is not None:  # cuda-bindings, without which there are no cuda planes
        os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
