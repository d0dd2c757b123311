"""Every setting is declared whole, and what is derived from the declarations stays as users know it."""

import dataclasses

import pytest
import typer

from attnd.protocol import frames
from attnd_server.cli import main as cli
from attnd_server.cli.serve import ServeConfig
from attnd_server.cli.settings_table import settings_table
from attnd_server.config import MAX_MESSAGE_BYTES, ServerConfig
from attnd_server.setting import NUMBERS, Kind, settings
from tests.servers import ROOT

DECLARED = [each for kind in (ServerConfig, ServeConfig) for each in settings(kind)]
# Of each option of `attnd serve`, by its group in the help: the environment variable and the default.
KNOWN = {
    "Options": {
        "--host": ("ATTND_HOST", "127.0.0.1"),
        "--port": ("ATTND_PORT", 7411),
        "--insecure": ("ATTND_INSECURE", False),
        "--device": ("ATTND_DEVICE", "auto"),
        "--kv-bytes": ("ATTND_KV_BYTES", 0),
        "--kernel-cache": ("ATTND_KERNEL_CACHE", ""),
        "--threads": ("ATTND_THREADS", 0),
    },
    "Limits of a step and of the server": {
        "--max-step-tokens": ("ATTND_MAX_STEP_TOKENS", 65536),
        "--max-step-reqs": ("ATTND_MAX_STEP_REQS", 4096),
        "--max-page-table-elements": ("ATTND_MAX_PAGE_TABLE_ELEMENTS", 2097152),
        "--max-context-len": ("ATTND_MAX_CONTEXT_LEN", 1048576),
        "--max-call-s": ("ATTND_MAX_CALL_S", 120.0),
        "--max-caches": ("ATTND_MAX_CACHES", 256),
        "--max-step-bytes": ("ATTND_MAX_STEP_BYTES", 268435456),
        "--max-message-bytes": ("ATTND_MAX_MESSAGE_BYTES", 268435456),
        "--max-sessions": ("ATTND_MAX_SESSIONS", 256),
        "--max-connection-rpcs": ("ATTND_MAX_CONNECTION_RPCS", 1024),
        "--max-queue-depth": ("ATTND_MAX_QUEUE_DEPTH", 1024),
        "--max-cache-queue-depth": ("ATTND_MAX_CACHE_QUEUE_DEPTH", 128),
    },
    "Limits of one principal": {
        "--principal-kv-bytes": ("ATTND_PRINCIPAL_KV_BYTES", 0),
        "--principal-caches": ("ATTND_PRINCIPAL_CACHES", 0),
        "--principal-sessions": ("ATTND_PRINCIPAL_SESSIONS", 0),
        "--principal-queue-depth": ("ATTND_PRINCIPAL_QUEUE_DEPTH", 0),
        "--principal-step-bytes": ("ATTND_PRINCIPAL_STEP_BYTES", 0),
    },
    "Leases and shutdown": {
        "--default-ttl-s": ("ATTND_DEFAULT_TTL_S", 60),
        "--max-ttl-s": ("ATTND_MAX_TTL_S", 86400),
        "--drain-s": ("ATTND_DRAIN_S", 10),
        "--device-timeout-s": ("ATTND_DEVICE_TIMEOUT_S", 600),
        "--snapshot-dir": ("ATTND_SNAPSHOT_DIR", ""),
        "--restore": ("ATTND_RESTORE", False),
        "--keepalive-s": ("ATTND_KEEPALIVE_S", 10),
    },
    "Shared memory for clients on this host": {
        "--socket-dir": ("ATTND_SOCKET_DIR", ""),
        "--socket-uids": ("ATTND_SOCKET_UIDS", frozenset()),
        "--region-bytes": ("ATTND_REGION_BYTES", 536870912),
        "--max-planes": ("ATTND_MAX_PLANES", 64),
        "--cuda-region-bytes": ("ATTND_CUDA_REGION_BYTES", 128 << 20),
        "--max-cuda-planes": ("ATTND_MAX_CUDA_PLANES", 16),
    },
    "Who may call, and encryption": {
        "--tls-cert": ("ATTND_TLS_CERT", ""),
        "--tls-key": ("ATTND_TLS_KEY", ""),
        "--tls-client-ca": ("ATTND_TLS_CLIENT_CA", ""),
        "--tokens": ("ATTND_TOKENS", ""),
        "--operators": ("ATTND_OPERATORS", frozenset()),
    },
    "Shadow verification": {
        "--verify": ("ATTND_VERIFY", 0),
        "--verify-action": ("ATTND_VERIFY_ACTION", "log"),
    },
    "Logs, metrics and traces": {
        "--log-level": ("ATTND_LOG_LEVEL", "info"),
        "--log-format": ("ATTND_LOG_FORMAT", "auto"),
        "--metrics": ("ATTND_METRICS", ""),
        "--traces": ("ATTND_TRACES", 0),
    },
}


def options_of_serve():
    return typer.main.get_command(cli.app).commands["serve"].params


def test_options_variables_defaults_and_groups_are_those_that_users_know():
    found = {}
    for option in options_of_serve():
        (name,) = option.opts
        assert option.secondary_opts == []
        assert not option.hidden
        found.setdefault(option.rich_help_panel or "Options", {})[name] = (option.envvar, option.default)
    assert found == KNOWN


@pytest.mark.parametrize(("field", "declared"), DECLARED, ids=lambda each: getattr(each, "name", ""))
def test_a_setting_is_declared_whole(field, declared):
    assert declared.help.endswith(".")
    assert declared.group in KNOWN
    assert bool(declared.unit) == (declared.kind in NUMBERS)
    assert bool(declared.choices) == (declared.kind is Kind.CHOICE)
    assert not declared.choices or field.default in declared.choices
    if declared.kind in NUMBERS:
        assert isinstance(field.default, int | float)
        assert declared.low <= field.default
        assert declared.high is None or field.default <= declared.high


def test_every_field_is_a_setting():
    for kind in (ServerConfig, ServeConfig):
        assert len(list(settings(kind))) == len(dataclasses.fields(kind))


def test_a_message_is_at_most_what_clients_take():
    assert MAX_MESSAGE_BYTES == frames.MAX_MESSAGE_BYTES


def test_the_table_of_settings_is_up_to_date():
    assert (ROOT / "docs" / "settings.md").read_text() == settings_table()
