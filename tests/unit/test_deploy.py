"""The board and the files around it ask for metrics that a server has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types

import pytest
import torch
import typer
import yaml
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from attnd_server.attention.config import AttentionBackend
from attnd_server.cli import main as cli
from attnd_server.cli.credentials import CREDENTIAL_OPTIONS
from attnd_server.execution.step import Call, Result
from attnd_server.observe.counts import Metrics
from attnd_server.observe.verify import VerifyTally
from tests.scrape import Scrape
from tests.servers import ROOT
from tests.unit.test_metrics import collector

DEPLOY = ROOT / "deploy"
BOARD = json.loads((DEPLOY / "grafana" / "attnd.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
# PromQL's own words, and the labels that Prometheus adds to what it reads.
WORDS = {"or"}
OWN_LABELS = {"instance", "job"}


def load(name):
    return yaml.safe_load((DEPLOY / name).read_text())


@pytest.fixture(scope="module")
def scrape():
    """Of a server that has done something of everything."""
    metrics = Metrics()
    tensor = torch.ones(1)
    metrics.call_served(
        "inline", Call(None, 0, None, tensor, None, None), Result(tensor, None, AttentionBackend.SDPA), 1, 1
    )
    metrics.rpc_started("service/method")
    metrics.rpc_ended("service/method", "OK", 1.0, 1, 1)
    registry = CollectorRegistry()
    verifier = types.SimpleNamespace(tallies={AttentionBackend.SDPA: VerifyTally()})
    registry.register(collector(metrics, verifier=verifier))
    ProcessCollector(registry=registry)
    return Scrape.parse(generate_latest(registry).decode())


def identifiers(query):
    """What is left of a query without its selectors, ranges, groupings, functions and numbers: names of metrics."""
    rest = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\w+ by \([^)]*\)|\w+(?= ?\()", " ", query)
    return set(re.findall(r"[A-Za-z_]\w*", rest)) - WORDS


def labels(text):
    """Of a query or a legend: those that it selects, groups by, or shows."""
    selected = {
        label for inside in re.findall(r"\{([^{}]*)\}", text) for label in re.findall(r"(\w+)\s*(?:=|!)", inside)
    }
    grouped = {label for inside in re.findall(r"by \(([^)]*)\)", text) for label in re.findall(r"\w+", inside)}
    return selected | grouped | set(re.findall(r"\{\{(\w+)\}\}", text))


def test_the_board_asks_for_something_in_every_panel():
    assert len(PANELS) >= 10
    assert all(panel["targets"] and panel["title"] for panel in PANELS)
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_metrics_that_exist(scrape, query):
    names = identifiers(query)
    assert names
    assert names <= set(scrape.samples)
    known = set().union(*(given for name in names for given, _ in scrape.samples[name]))
    assert labels(query) <= known | OWN_LABELS


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_legend_shows_what_its_query_keeps(panel):
    for target in panel["targets"]:
        assert labels(target["legendFormat"]) <= labels(target["expr"])


def test_the_board_shows_everything_that_is_ours(scrape):
    shown = set().union(*map(identifiers, QUERIES))
    ours = [name for name in scrape.types if name.startswith(("attnd_", "grpc_"))]
    unseen = [name for name in ours if not any(each.startswith(name) for each in shown)]
    assert unseen == []


def test_the_board_finds_servers_by_a_metric_that_exists(scrape):
    (variable,) = [each for each in BOARD["templating"]["list"] if each["type"] == "query"]
    assert re.fullmatch(r"label_values\((\w+), instance\)", variable["query"]["query"])[1] in scrape.samples


def test_alerts_ask_for_metrics_that_exist_and_say_what_their_queries_keep(scrape):
    prometheus = load("metrics.yaml")["services"]["prometheus"]
    (path,) = load("prometheus.yaml")["rule_files"]
    assert f"./alerts.yaml:{path}:ro" in prometheus["volumes"]
    (group,) = load("alerts.yaml")["groups"]
    for rule in group["rules"]:
        assert identifiers(rule["expr"]) <= {*scrape.samples, "up"}
        shown = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert shown <= labels(rule["expr"]) | OWN_LABELS


def test_what_ends_is_started_again():
    for name in ("compose.yaml", "metrics.yaml"):
        services = [each for each in load(name)["services"].values() if "image" in each]
        assert all(service["restart"] == "unless-stopped" for service in services)


def test_prometheus_reads_where_the_composed_server_tells():
    told = load("metrics.yaml")["services"]["attnd"]["command"]
    port = told[told.index("--metrics") + 1].rpartition(":")[2]
    (job,) = load("prometheus.yaml")["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"attnd:{port}"]
    # It replaces the command of the first file, so it has to say that again.
    said = load("compose.yaml")["services"]["attnd"]["command"]
    assert told[: len(said)] == said


def test_what_is_published_is_published_to_this_host_only():
    services = {**load("compose.yaml")["services"], **load("metrics.yaml")["services"]}
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_compose_sets_variables_that_the_server_reads_and_mounts_what_it_writes():
    service = load("compose.yaml")["services"]["attnd"]
    parameters = {parameter.envvar: parameter for parameter in typer.main.get_command(cli.app).commands["serve"].params}
    assert set(service["environment"]) <= set(parameters)
    assert service["environment"]["ATTND_RESTORE"] == "true"
    folder = service["environment"]["ATTND_SNAPSHOT_DIR"]
    mounted = [volume.partition(":")[2] for volume in service["volumes"]]
    assert any(folder.startswith(f"{path}/") for path in mounted)


@pytest.mark.parametrize("is_required", [False, True])
def test_the_test_of_the_image_says_what_it_misses(tmp_path, is_required):
    environment = {"PATH": str(tmp_path), "REQUIRE": str(int(is_required))}
    command = [sys.executable, ROOT / "tests" / "image" / "run.py"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout.startswith("image-test skipped: buildah is not installed; bwrap is not installed; ")
    assert result.returncode == int(is_required)


def test_tls_sets_variables_that_the_server_and_its_probe_read():
    service = load("tls.yaml")["services"]["attnd"]
    read = {parameter.envvar for parameter in typer.main.get_command(cli.app).commands["serve"].params}
    read |= {option.envvar for option in CREDENTIAL_OPTIONS.values()}
    own = set(service["environment"])
    assert own <= read
    assert "--insecure" not in service["command"]
    assert all(port.startswith("${ATTND_PUBLIC_ADDRESS:?") for port in service["ports"])


def test_the_composed_server_has_room_for_what_a_principal_can_make_it_hold_and_no_more():
    service = load("compose.yaml")["services"]["attnd"]
    (told,) = re.findall(r"\| \*\*the sum\*\* \| \| \*\*(\d+) MiB\*\* \|", (ROOT / "SECURITY.md").read_text())
    rows = re.findall(r"\| (\d+) MiB \|\n", (ROOT / "SECURITY.md").read_text())
    assert sum(map(int, rows)) == int(told)
    limit_gib = int(re.fullmatch(r"(\d+)g", service["mem_limit"])[1])
    assert 4 + 1 + int(told) / 1024 < limit_gib <= 16
    assert 256 <= service["pids_limit"] <= 4096
