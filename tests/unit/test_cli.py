"""The command line: what it takes, what it refuses, what it hands on."""

import dataclasses
import logging
import os
import re
import subprocess
import sys
import types

import pytest
import typer
from typer.testing import CliRunner

from attnd._version import __version__
from attnd.credentials import Credentials
from attnd_server import __main__, app
from attnd_server.cli import credentials as cli_credentials
from attnd_server.cli import exposure, parsers, serve
from attnd_server.cli import main as cli
from attnd_server.config import ServerConfig
from attnd_server.identity import TokenFile

COMMANDS = {"cache", "serve", "demo", "doctor", "chat", "info", "kernels", "token", "top", "version"}


def run(*arguments, env=None):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env=env)
    # Boxes and line breaks are the terminal's, not the message's.
    result.text = " ".join(re.sub("[─│╭╮╰╯]", " ", result.output).split())
    return result


def parameters(command):
    return {parameter.name: parameter for parameter in typer.main.get_command(cli.app).commands[command].params}


@pytest.fixture
def served(monkeypatch):
    """The configurations with which `attnd serve` would have run a server; the root logger as it was."""
    configs = []
    monkeypatch.setattr(app, "run_server", lambda config: configs.append(config) or 0)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield configs
    root.handlers[:] = handlers
    root.setLevel(level)


def test_the_commands_are_these():
    assert set(typer.main.get_command(cli.app).commands) == COMMANDS


@pytest.mark.parametrize(
    ("options", "before", "expected"),
    [
        (["--socket-dir", "sockets"], None, "EAGER"),
        (["--socket-dir", "sockets"], "LAZY", "LAZY"),  # as the operator says
        (["--socket-dir", "sockets", "--device", "cpu"], None, None),
        ([], None, None),
    ],
)
def test_kernels_are_loaded_at_the_start_where_there_can_be_cuda_planes(served, monkeypatch, options, before, expected):
    for name in ("CUDA_MODULE_LOADING", "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, before or "")  # what the command sets goes with the test
        if before is None:
            monkeypatch.delenv(name)
    monkeypatch.setattr(serve, "find_spec", lambda name: object())
    assert run("serve", *options).exit_code == 0
    assert os.environ.get("CUDA_MODULE_LOADING") == expected
    monkeypatch.delenv("CUDA_MODULE_LOADING", raising=False)
    monkeypatch.setattr(serve, "find_spec", lambda name: None)  # without cuda-bindings there are none
    assert run("serve", *options).exit_code == 0
    assert "CUDA_MODULE_LOADING" not in os.environ


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Usage: attnd {command}" in result.text or f"{command} [OPTIONS]" in result.text


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_option_has_help_and_a_default(command):
    for name, parameter in parameters(command).items():
        assert parameter.help, name
        assert parameter.default is not None or parameter.show_default, name


def test_serve_has_the_options_and_defaults_of_the_configuration():
    options = parameters("serve")
    for field in dataclasses.fields(ServerConfig):
        assert options.pop(field.name).default == field.default, field.name
    assert set(options) == {"insecure", "log_level", "log_format"}


def test_every_option_of_serve_reads_its_environment_variable():
    for name, parameter in parameters("serve").items():
        assert parameter.envvar == f"ATTND_{name.upper()}"


def test_serve_runs_a_server_with_what_it_was_given(served):
    result = run("serve", "--port", 0, "--kv-bytes", "2GiB", "--device", "cuda:1", env={"ATTND_MAX_CACHES": "7"})
    assert result.exit_code == 0, result.output
    assert served == [ServerConfig(port=0, kv_bytes=2 << 30, device="cuda:1", max_caches=7)]


def test_serve_limits_principals_as_it_is_told(served):
    arguments = ["--principal-kv-bytes", "1GiB", "--principal-caches", 3, "--principal-sessions", 5]
    result = run("serve", *arguments, "--max-message-bytes", "8MiB", env={"ATTND_PRINCIPAL_QUEUE_DEPTH": "7"})
    assert result.exit_code == 0, result.output
    limits = {"principal_caches": 3, "principal_sessions": 5, "principal_queue_depth": 7}
    assert served == [ServerConfig(principal_kv_bytes=1 << 30, max_message_bytes=8 << 20, **limits)]


def test_the_rule_of_quotas_is_in_the_help():
    told = parameters("serve")["principal_kv_bytes"].help
    assert "half of the server's limit where it asks who calls, and else all of it" in told


def test_serve_shares_memory_where_it_is_told_to(served):
    result = run("serve", "--socket-dir", "/run/attnd", "--socket-uids", "1000,7", "--region-bytes", "1GiB")
    assert result.exit_code == 0, result.output
    expected = ServerConfig(socket_dir="/run/attnd", socket_uids=frozenset({7, 1000}), region_bytes=1 << 30)
    assert served == [expected]


def test_serve_leaves_snapshots_where_it_is_told_to(served):
    assert run("serve", "--snapshot-dir", "/snapshots", "--restore").exit_code == 0
    assert run("serve", env={"ATTND_SNAPSHOT_DIR": "/snapshots", "ATTND_RESTORE": "true"}).exit_code == 0
    assert served == [ServerConfig(snapshot_dir="/snapshots", restore=True)] * 2
    refused = run("serve", "--restore")
    assert refused.exit_code == 2
    assert "snapshot_dir is absent, but must be given with restore" in refused.text


def test_operators_are_named_where_anybody_is(served):
    expected = ServerConfig(tokens="t", operators=frozenset({"olga", "team/otto"}))
    assert run("serve", "--tokens", "t", "--operators", "olga, team/otto,").exit_code == 0
    assert run("serve", "--tokens", "t", env={"ATTND_OPERATORS": "team/otto,olga"}).exit_code == 0
    assert served == [expected] * 2
    refused = run("serve", "--operators", "olga")
    assert refused.exit_code == 2
    assert "operators is given, but must be given with tokens or tls_client_ca" in refused.text


def test_serve_without_arguments_is_the_default_configuration(served):
    assert run("serve").exit_code == 0
    assert served == [ServerConfig()]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9464", "127.0.0.1:9464"),
        ("0", "127.0.0.1:0"),
        ("localhost:9464", "localhost:9464"),
        ("[::1]:9464", "[::1]:9464"),
        ("", ""),
    ],
)
def test_serve_takes_an_address_of_metrics(served, text, address):
    assert run("serve", "--metrics", text).exit_code == 0
    assert run("serve", env={"ATTND_METRICS": text}).exit_code == 0
    assert served == [ServerConfig(metrics=address)] * 2


def test_the_exit_code_is_the_servers(monkeypatch, served):
    monkeypatch.setattr(app, "run_server", lambda config: 3)
    assert run("serve").exit_code == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-message-bytes", "1GiB"), "max_message_bytes is 1073741824, but must be 1MiB..256MiB"),
        (("--max-message-bytes", "9"), "max_message_bytes is 9, but must be 1MiB..256MiB"),
        (("--principal-caches", "-1"), "'--principal-caches': it is -1, but must be a whole number from 0"),
        (("--keepalive-s", "0.5"), "'--keepalive-s': it is 0.5, but must be a number from 1"),
        (("--port", "70000"), "'--port': it is 70000, but must be a whole number 0..65535"),
        (("--port", "x"), "'--port': it is x, but must be a whole number 0..65535"),
        (("--device", "gpu"), "'--device': it is 'gpu', but must be auto, cpu, cuda or cuda:N"),
        (("--kv-bytes", "8GB"), "'--kv-bytes': it is '8GB', but must be bytes, or a number with a unit"),
        (("--max-caches", "0"), "'--max-caches': it is 0, but must be a whole number from 1"),
        (("--threads", "-1"), "'--threads': it is -1, but must be a whole number from 0"),
        (("--max-ttl-s", "nan"), "'--max-ttl-s': it is nan, but must be a number from 1"),
        (("--drain-s", "-1"), "'--drain-s': it is -1, but must be a number from 0"),
        (("--default-ttl-s", "9", "--max-ttl-s", "8"), "default_ttl_s is 9, but must be at most max_ttl_s, 8"),
        (("--socket-uids", "root"), "'--socket-uids': it is 'root', but must be numbers of users as in 1000,1001"),
        (("--region-bytes", "0"), "region_bytes is 0, but must be at least 1"),
        (("--cuda-region-bytes", "0"), "cuda_region_bytes is 0, but must be at least 1"),
        (("--max-cuda-planes", "0"), "'--max-cuda-planes': it is 0, but must be a whole number from 1"),
        (("--max-planes", "0"), "'--max-planes': it is 0, but must be a whole number from 1"),
        (("--log-format", "xml"), "'xml' is not one of 'auto', 'text', 'json'"),
        (("--host", "0.0.0.0"), "host is 0.0.0.0, but must be a loopback address unless --insecure is given"),
        (("--host", "attention.example"), "host is attention.example, but must be a loopback address"),
        (("--metrics", "9464x"), "'--metrics': it is 9464x, but must be HOST:PORT or PORT, and PORT 0..65535"),
        (("--metrics", "localhost"), "'--metrics': it is localhost, but must be HOST:PORT or PORT"),
        (("--metrics", "127.0.0.1:65536"), "'--metrics': it is 127.0.0.1:65536, but must be HOST:PORT or PORT"),
        (("--metrics", "::1:9464"), "'--metrics': it is ::1:9464, but must be HOST:PORT or PORT"),
        (("--metrics", "0.0.0.0:9464"), "metrics is 0.0.0.0:9464, but must be at a loopback address unless --insecure"),
        (("--host", "0.0.0.0", "--tls-cert", "c", "--tls-key", "k"), "or --tokens or --tls-client-ca: TLS alone hides"),
        (("--host", "0.0.0.0", "--tokens", "t"), "or --tls-cert: tokens, and what they protect, would cross"),
        (("--tls-cert", "c"), "tls_cert and tls_key must be given together, and tls_client_ca only with them"),
        (("--tls-client-ca", "c"), "tls_cert and tls_key must be given together, and tls_client_ca only with them"),
        (("--bogus",), "No such option: --bogus"),
    ],
)
def test_serve_refuses(served, arguments, message):
    result = run("serve", *arguments)
    assert result.exit_code == 2
    assert message in result.text
    assert served == []


def test_a_wrong_environment_variable_is_refused_like_the_option(served):
    result = run("serve", env={"ATTND_PORT": "99999"})
    assert result.exit_code == 2
    assert "it is 99999, but must be a whole number 0..65535" in result.text


def test_insecure_serves_any_host_and_says_so(served):
    result = run("serve", "--host", "0.0.0.0", "--insecure", "--log-format", "json", "--metrics", "[::]:9464")
    assert [(config.host, config.metrics) for config in served] == [("0.0.0.0", "[::]:9464")]
    assert "listening without encryption and authentication" in result.output


@pytest.mark.parametrize("who", ["--tokens", "--tls-client-ca"])
def test_with_tls_and_a_way_to_tell_clients_apart_any_host_is_served(served, who):
    result = run("serve", "--host", "0.0.0.0", "--tls-cert", "c.pem", "--tls-key", "c.key", who, "who")
    assert result.exit_code == 0, result.output
    assert [(config.host, config.tls_cert, config.tls_key) for config in served] == [("0.0.0.0", "c.pem", "c.key")]
    assert (served[0].tokens or served[0].tls_client_ca) == "who"
    assert "listening without" not in result.output


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [(("--tls-cert", "c", "--tls-key", "k"), "authentication"), (("--tokens", "t"), "encryption")],
)
def test_insecure_says_what_is_missing(served, arguments, missing):
    result = run("serve", "--host", "0.0.0.0", "--insecure", "--log-format", "json", *arguments)
    assert f'"listening without {missing}"' in result.output
    assert len(served) == 1


@pytest.mark.parametrize("module_name", ["info", "doctor", "demo.demo", "demo.chat"])
def test_commands_hand_credentials_on(monkeypatch, tmp_path, module_name):
    handed_on = []
    command = module_name.rpartition(".")[2]
    name = f"run_{command}"
    module = types.SimpleNamespace(**{name: lambda *values, **named: handed_on.extend((*values, *named.values())) or 0})
    monkeypatch.setitem(sys.modules, f"attnd_server.cli.{module_name}", module)
    token_file = tmp_path / "token"
    arguments = ["--tls-ca", "ca.pem", "--tls-client-cert", "c.pem", "--tls-client-key", "c.key"]
    assert run(command, *arguments, env={"ATTND_TOKEN_FILE": str(token_file)}).exit_code == 0
    (shown,) = [value for value in handed_on if isinstance(value, Credentials)]
    assert (shown.ca, shown.cert, shown.key, shown.tls) == ("ca.pem", "c.pem", "c.key", True)
    for text in ("one\n", "two"):  # read anew each time
        token_file.write_text(text)
        assert shown.metadata() == (("authorization", f"Bearer {text.strip()}"),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h:1", "--tls-server-name", "n"), "tls_ca is absent, but must be given, as another option of TLS is"),
        (("h:1", "--tls-ca", "c", "--tls-client-cert", "c"), "key is absent, but must be given, as cert is"),
        (("h:1", "--token-file", "t"), "tls_ca is absent, but must be given with token_file unless the address is a"),
    ],
)
def test_commands_refuse_credentials_that_do_not_go_together(arguments, message):
    result = run("info", *arguments)
    assert result.exit_code == 2
    assert message in result.text


def test_the_system_knows_authorities_too_and_loopback_needs_none():
    shown = cli_credentials.credentials({"tls_ca": "system"})
    assert (shown.tls, shown.ca, shown.metadata()) == (True, "", None)
    assert not cli_credentials.credentials({"token_file": "t"}).tls
    assert cli_credentials.credentials({}) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_loopback_hosts(host):
    assert exposure.is_loopback(host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "[::]", "192.168.0.1", "127.0.0.1.example", "localhost.example"])
def test_hosts_that_others_may_reach(host):
    assert not exposure.is_loopback(host)


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("17", 17), (17, 17), ("1 KiB", 1 << 10), ("3MiB", 3 << 20), ("2TiB", 2 << 40)]
)
def test_amounts_of_memory(text, size):
    assert parsers.num_bytes(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1.5GiB", "8gb", "GiB", "٣"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(typer.BadParameter):
        parsers.num_bytes(text)


def test_demo_hands_its_options_on(monkeypatch):
    calls = []
    module = types.SimpleNamespace(run_demo=lambda **options: calls.append(options) or 5)
    monkeypatch.setitem(sys.modules, "attnd_server.cli.demo.demo", module)
    assert run("demo", "--max-new-tokens", 3, "--dtype", "bfloat16", "--address", "h:1").exit_code == 5
    del calls[0]["console"]
    expected = {
        "device": "auto",
        "max_new_tokens": 3,
        "dtype": "bfloat16",
        "model_path": None,
        "address": "h:1",
        "credentials": None,
    }
    assert calls == [expected]


def test_chat_hands_its_options_on(monkeypatch):
    calls = []
    module = types.SimpleNamespace(run_chat=lambda **options: calls.append(options) or 0)
    monkeypatch.setitem(sys.modules, "attnd_server.cli.demo.chat", module)
    assert run("chat", "--temperature", 0, "--model-path", "m.gguf", env={"ATTND_DEVICE": "cpu"}).exit_code == 0
    del calls[0]["console"]
    expected = {
        "device": "cpu",
        "max_new_tokens": 512,
        "address": None,
        "model_path": "m.gguf",
        "temperature": 0.0,
        "credentials": None,
    }
    assert calls == [expected]


def test_token_is_printed_once_and_its_digest_kept(tmp_path):
    path = tmp_path / "tokens"
    result = run("token", "alice", path)
    assert result.exit_code == 0, result.output
    token = result.output.strip()
    assert TokenFile(str(path)).principal(token) == "alice"
    assert token not in path.read_text()
    assert run("token", "bob", tmp_path).exit_code == 2
    assert "which cannot be written: Is a directory" in run("token", "bob", tmp_path).text
    assert "principal is 'a b', but must be letters" in run("token", "a b", path).text


def test_version():
    result = run("version")
    assert result.exit_code == 0
    assert result.output.startswith(f"attnd {__version__}, Python 3.")


def test_help_and_probe_do_not_import_torch():
    program = (
        "import sys, attnd_server.cli.main, attnd_server.observe.logs, attnd_server.health_probe\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert result.stdout == "set()\n"


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [("typer", "info", "cli"), ("rich", "top", "cli"), ("typer", "serve", "server"), ("rich", "demo", "demo")],
)
def test_a_missing_extra_is_named_in_one_line(monkeypatch, capsys, module, command, extra):
    monkeypatch.setattr(sys, "argv", ["attnd", command])
    monkeypatch.setitem(sys.modules, module, None)  # how the import system remembers that there is none
    for name in [name for name in sys.modules if name.startswith((f"{module}.", "attnd_server.cli.main"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("attnd_server.cli.main")
    assert __main__.main() == 1
    assert capsys.readouterr().err == (
        f"attnd: {module} is not installed, which comes with attnd[{extra}]; in a checkout: pip install '.[{extra}]'\n"
    )


def test_a_missing_module_of_our_own_is_not_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "attnd_server.cli.main", None)
    monkeypatch.delattr("attnd_server.cli.main")
    with pytest.raises(ModuleNotFoundError):
        __main__.main()
