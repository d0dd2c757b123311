"""The manifests are what Kubernetes takes, name what is there, and agree with the image and the settings."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import kubernetes_validate
import pytest
import typer
import yaml

from attnd_server.cli import main as cli
from attnd_server.cli.credentials import CREDENTIAL_OPTIONS
from attnd_server.config import ServerConfig
from tests.servers import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
# The oldest that has everything here without a switch, and the newest whose schemas are installed.
VERSIONS = ["1.32", ".".join(kubernetes_validate.latest_version().split(".")[:2])]
SIZES = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


def load(name):
    (document,) = yaml.safe_load_all((FOLDER / name).read_text())
    return document


KUSTOMIZATION = load("kustomization.yaml")
MANIFESTS = sorted(path.name for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")
SET = load("statefulset.yaml")["spec"]
POD = SET["template"]["spec"]
(SERVER,) = POD["containers"]
VARIABLES = {each["name"]: each.get("value") for each in SERVER["env"]}
MOUNTS = {each["mountPath"]: each["name"] for each in SERVER["volumeMounts"]}
PORTS = {each["name"]: each["containerPort"] for each in SERVER["ports"]}


def size(text):
    """Bytes of 12Gi, as Kubernetes writes it, and of 12GiB, as a setting has it."""
    number, unit = re.fullmatch(r"(\d+)([KMGT]i)B?", text).groups()
    return int(number) * SIZES[unit]


def options():
    """What `attnd serve` can be told: its parameters by option and by variable."""
    parameters = typer.main.get_command(cli.app).commands["serve"].params
    return {option for each in parameters for option in each.opts}, {each.envvar for each in parameters}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_what_kubernetes_takes(name, version):
    assert kubernetes_validate.validate(load(name), version, strict=True) == version


def test_the_schemas_refuse_what_is_not_in_them():
    manifest = load("statefulset.yaml")
    manifest["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(manifest, VERSIONS[0], strict=True)


def test_the_kustomization_lists_every_manifest_and_nothing_else():
    fields = {"apiVersion", "kind", "namespace", "resources", "images", "generatorOptions", "secretGenerator"}
    assert set(KUSTOMIZATION) == fields
    assert sorted(KUSTOMIZATION["resources"]) == MANIFESTS
    assert load("namespace.yaml")["metadata"]["name"] == KUSTOMIZATION["namespace"]
    assert [each["name"] for each in KUSTOMIZATION["images"]] == [SERVER["image"]]


def test_the_secret_is_a_folder_of_the_files_that_the_server_reads_and_that_git_ignores():
    (secret,) = KUSTOMIZATION["secretGenerator"]
    paths = [PurePosixPath(path) for path in secret["files"]]
    assert {str(path.parent) for path in paths} == {"secrets"}
    assert "deploy/kubernetes/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    (volume,) = [each for each in POD["volumes"] if "secret" in each]
    assert volume["secret"] == {"secretName": secret["name"], "defaultMode": 0o440}
    # A file that is mounted by itself, by subPath, is never seen to change.
    assert all("subPath" not in mount for mount in SERVER["volumeMounts"])
    assert KUSTOMIZATION["generatorOptions"] == {"disableNameSuffixHash": True}
    (folder,) = [path for path, name in MOUNTS.items() if name == volume["name"]]
    read = {"ATTND_TLS_CERT", "ATTND_TLS_KEY", "ATTND_TLS_CA", "ATTND_TOKENS"}
    assert {VARIABLES[name] for name in read} == {f"{folder}/{path.name}" for path in paths}


def test_it_sets_options_and_variables_that_the_server_and_its_probe_read():
    known, read = options()
    read |= {option.envvar for option in CREDENTIAL_OPTIONS.values()}
    assert {name for name in VARIABLES if name.startswith("ATTND_")} <= read
    assert {word for word in SERVER["args"] if word.startswith("--")} <= known
    # Kubernetes' variables for a Service of this name would be taken for settings.
    assert "ATTND_PORT" in read
    assert POD["enableServiceLinks"] is False


def test_ports_are_the_servers_and_stand_wherever_they_are_named():
    assert PORTS["grpc"] == ServerConfig().port == int(re.search(r"^EXPOSE (\d+)$", DOCKERFILE, re.M)[1])
    metrics = SERVER["args"][SERVER["args"].index("--metrics") + 1]
    assert metrics == f"0.0.0.0:{PORTS['metrics']}"
    assert {each["name"]: each["port"] for each in load("service.yaml")["spec"]["ports"]} == PORTS
    rules = load("networkpolicy.yaml")["spec"]["ingress"]
    assert sorted(port["port"] for rule in rules for port in rule["ports"]) == sorted(PORTS.values())
    assert all(rule["from"] for rule in rules)  # Without `from` everybody may.
    assert SERVER["livenessProbe"]["tcpSocket"]["port"] == PORTS["grpc"]


def test_everything_selects_the_pods_of_the_set():
    labels = SET["template"]["metadata"]["labels"]
    selectors = [SET["selector"], load("poddisruptionbudget.yaml")["spec"]["selector"]]
    selectors.append(load("networkpolicy.yaml")["spec"]["podSelector"])
    assert all(selector == {"matchLabels": labels} for selector in selectors)
    service = load("service.yaml")
    assert service["spec"]["selector"] == labels
    assert service["metadata"]["name"] == SET["serviceName"]
    assert service["spec"]["clusterIP"] == "None"


def test_the_name_in_the_certificate_is_that_of_the_pod():
    namespace = KUSTOMIZATION["namespace"]
    assert VARIABLES["ATTND_TLS_SERVER_NAME"] == f"$(POD_NAME).{SET['serviceName']}.{namespace}.svc.cluster.local"
    names = [each["name"] for each in SERVER["env"]]
    assert names.index("POD_NAME") < names.index("ATTND_TLS_SERVER_NAME")  # Only what stands before is put in.


def test_the_pod_runs_as_the_images_user_with_nothing_that_it_does_not_need():
    user = int(re.search(r"^USER (\d+):\1$", DOCKERFILE, re.M)[1])
    pod = POD["securityContext"]
    assert (pod["runAsUser"], pod["runAsGroup"], pod["fsGroup"]) == (user, user, user)
    assert pod["runAsNonRoot"] is True
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert POD["automountServiceAccountToken"] is False
    assert SERVER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert load("namespace.yaml")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_what_the_server_writes_is_mounted():
    volumes = {each["name"] for each in POD["volumes"]} | {
        each["metadata"]["name"] for each in SET["volumeClaimTemplates"]
    }
    assert set(MOUNTS.values()) == volumes
    written = [VARIABLES["ATTND_SNAPSHOT_DIR"], "/tmp", *re.findall(r"(?:HOME|_DIR|_PATH)=(/\S+)", DOCKERFILE)]
    assert len(written) >= 6
    for path in map(PurePosixPath, written):
        assert {str(each) for each in (path, *path.parents)} & set(MOUNTS), path
    # Caches that outlive the pod lie in its claim.
    (claim,) = SET["volumeClaimTemplates"]
    assert MOUNTS[str(PurePosixPath(VARIABLES["ATTND_SNAPSHOT_DIR"]).parent)] == claim["metadata"]["name"]
    assert VARIABLES["ATTND_RESTORE"] == "true"
    assert size(claim["spec"]["resources"]["requests"]["storage"]) > size(VARIABLES["ATTND_KV_BYTES"])


def test_nothing_ends_the_server_before_it_has_drained_and_written_its_caches():
    grace = POD["terminationGracePeriodSeconds"]
    assert grace >= ServerConfig().drain_s + size(VARIABLES["ATTND_KV_BYTES"]) / (256 << 20)
    liveness = SERVER["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= grace
    # Health says no while it drains: what asks health may stop sending, and must not kill.
    assert "exec" not in liveness
    asked = ["python", "-m", "attnd_server.health_probe", f"localhost:{PORTS['grpc']}"]
    assert SERVER["readinessProbe"]["exec"]["command"] == SERVER["startupProbe"]["exec"]["command"] == asked
    # Docker asks with the same words.
    assert ", ".join(f'"{word}"' for word in asked) in DOCKERFILE


def test_memory_is_bounded_and_the_gpu_is_one():
    limits, requests = SERVER["resources"]["limits"], SERVER["resources"]["requests"]
    assert limits["nvidia.com/gpu"] == "1"
    assert size(limits["memory"]) == size(requests["memory"])
    in_memory = sum(
        size(each["emptyDir"]["sizeLimit"]) for each in POD["volumes"] if each.get("emptyDir", {}).get("medium")
    )
    assert size(limits["memory"]) > in_memory
    assert all("sizeLimit" in each["emptyDir"] for each in POD["volumes"] if "emptyDir" in each)
