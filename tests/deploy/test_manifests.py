"""The Kubernetes manifests: known to the API server and to KubeRay, and true to the code they start."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import Settings

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deploy").glob("*.yaml"))
SHARED = ROOT.parent / "shared"
CHECKER = SHARED / "tools" / "crdvalidate.py"
CRDS = SHARED / "kuberay-crds"
needs_crds = pytest.mark.skipif(
    not (CHECKER.is_file() and CRDS.is_dir()),
    reason="needs ../shared/tools/crdvalidate.py and ../shared/kuberay-crds beside the repository",
)
JOBS_API_PORT = 8265
OPERATIONS = ROOT / "docs" / "operations.md"
SERVICE_FILES = sorted((ROOT / "service").rglob("*.py"))
INTERNAL = {"CLPEFT_EMBEDDED_ID"}  # marks the embedded service's processes; nobody sets it


def documents(kind: str | None = None) -> list[dict[str, Any]]:
    found = [doc for file in FILES for doc in yaml.safe_load_all(file.read_text()) if doc]
    return [doc for doc in found if kind in (None, doc["kind"])]


def one(kind: str, name: str) -> dict[str, Any]:
    (found,) = (doc for doc in documents(kind) if doc["metadata"]["name"] == name)
    return found


def pod_templates() -> dict[str, dict[str, Any]]:
    ray = one("RayCluster", "clpeft-ray")["spec"]
    groups = {group["groupName"]: group["template"] for group in ray["workerGroupSpecs"]}
    return {
        "head": ray["headGroupSpec"]["template"],
        **groups,
        "control-plane": one("Deployment", "clpeft-control-plane")["spec"]["template"],
    }


PODS = pod_templates()


def container(pod: str) -> dict[str, Any]:
    (only,) = PODS[pod]["spec"]["containers"]
    return only


def environment(pod: str) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(pod)["env"]}


def check_crds(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHECKER), str(CRDS / "*.yaml"), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    "document",
    [pytest.param(doc, id=f"{doc['kind']}-{doc['metadata']['name']}") for doc in documents()],
)
def test_core_kinds_have_no_unknown_or_wrong_field(document: dict[str, Any]) -> None:
    if document["kind"] == "RayCluster":  # a custom resource; checked against KubeRay's own schema below
        with pytest.raises(kubernetes_validate.SchemaNotFoundError):
            kubernetes_validate.validate(document, "1.37", strict=True)
        return
    kubernetes_validate.validate(document, "1.37", strict=True)


def test_an_unknown_core_field_is_an_error() -> None:
    deployment = one("Deployment", "clpeft-control-plane")
    deployment["spec"]["template"]["spec"]["runAsNonRoot"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.37", strict=True)


@needs_crds
def test_the_ray_cluster_fits_kuberays_schema() -> None:
    done = check_crds(*FILES)
    assert done.stdout.strip() == "1 custom resources checked, 0 errors", done.stdout + done.stderr
    assert done.returncode == 0


@needs_crds
def test_an_unknown_kuberay_field_is_an_error(tmp_path: Path) -> None:
    cluster = one("RayCluster", "clpeft-ray")
    cluster["spec"]["headGroupSpec"]["serviceTyp"] = cluster["spec"]["headGroupSpec"].pop("serviceType")
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(cluster))
    done = check_crds(changed)
    assert done.returncode == 1
    assert "serviceTyp" in done.stdout


@pytest.mark.parametrize("pod", PODS)
def test_every_pod_runs_without_root_and_without_extra_rights(pod: str) -> None:
    security = PODS[pod]["spec"]["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(pod)["securityContext"]["allowPrivilegeEscalation"] is False
    assert container(pod)["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert PODS[pod]["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("pod", PODS)
def test_every_pod_has_probes_and_a_memory_limit_that_it_asks_for(pod: str) -> None:
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container(pod).keys()
    resources = container(pod)["resources"]
    assert {"cpu", "memory"} <= resources["requests"].keys()
    assert "memory" in resources["limits"]


@pytest.mark.parametrize("pod", PODS)
def test_volumes_claims_and_accounts_exist(pod: str) -> None:
    spec = PODS[pod]["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert {mount["name"] for mount in container(pod)["volumeMounts"]} == volumes.keys()
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            one("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
    one("ServiceAccount", spec["serviceAccountName"])


def test_all_pods_use_one_image_and_one_storage_root() -> None:
    assert len({container(pod)["image"] for pod in PODS}) == 1
    assert len({environment(pod)["CLPEFT_STORAGE_URL"] for pod in PODS}) == 1
    assert len({environment(pod)["CLPEFT_MODELS_DIR"] for pod in PODS}) == 1


@pytest.mark.parametrize("pod", PODS)
def test_storage_and_models_lie_on_the_shared_volume(pod: str) -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in container(pod)["volumeMounts"]}
    assert environment(pod)["CLPEFT_STORAGE_URL"].startswith(f"file://{mounts['shared']}/")
    assert environment(pod)["CLPEFT_MODELS_DIR"].startswith(f"{mounts['shared']}/")


def test_the_pods_set_only_settings_that_the_service_has() -> None:
    known = {f"CLPEFT_{name.upper()}" for name in Settings.model_fields}
    for pod in PODS:
        assert environment(pod).keys() <= known


def test_every_variable_is_documented_and_every_documented_one_exists() -> None:
    documented = set(re.findall(r"`(CLPEFT_[A-Z_]+)`", OPERATIONS.read_text()))
    read = {
        name for file in SERVICE_FILES for name in re.findall(r"\bCLPEFT_[A-Z_]*[A-Z]\b", file.read_text())
    }
    settings = {f"CLPEFT_{name.upper()}" for name in Settings.model_fields}
    assert documented == (read | settings) - INTERNAL


def test_documented_defaults_are_the_settings_defaults() -> None:
    rows = re.findall(r"^\| `CLPEFT_([A-Z_]+)` \| `?([^|`]+?)`? \|", OPERATIONS.read_text(), re.MULTILINE)
    documented = {name.lower(): default for name, default in rows}
    for name, field in Settings.model_fields.items():
        if field.default and isinstance(field.default, str | int | float):
            expected = str(field.default)
            assert documented[name] == (expected.lower() if isinstance(field.default, bool) else expected)


def test_the_control_plane_finds_the_ray_head_by_its_service_name() -> None:
    name = documents("RayCluster")[0]["metadata"]["name"]
    ports = {port["name"]: port["containerPort"] for port in container("head")["ports"]}
    values = environment("control-plane")
    assert values["CLPEFT_RAY_DASHBOARD_URL"] == f"http://{name}-head-svc:{ports['dashboard']}"
    assert values["CLPEFT_SERVE_URL"] == f"http://{name}-head-svc:{ports['serve']}"


def test_control_plane_and_ray_share_one_token_by_reference() -> None:
    auth = one("RayCluster", "clpeft-ray")["spec"]["authOptions"]
    assert auth["mode"] == "token"
    volumes = {volume["name"]: volume for volume in PODS["control-plane"]["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container("control-plane")["volumeMounts"]}
    assert volumes["ray-token"]["secret"]["secretName"] == auth["secretName"]
    # KubeRay reads the token under the key auth_token.
    assert environment("control-plane")["CLPEFT_RAY_TOKEN_PATH"] == f"{mounts['ray-token']}/auth_token"
    assert not documents("Secret")


def test_only_ray_and_the_control_plane_reach_the_jobs_api() -> None:
    policy = one("NetworkPolicy", "clpeft-ray")["spec"]
    cluster = {"ray.io/cluster": documents("RayCluster")[0]["metadata"]["name"]}  # KubeRay labels its pods so
    assert policy["podSelector"]["matchLabels"] == cluster
    assert policy["policyTypes"] == ["Ingress"]
    sources = [
        source
        for rule in policy["ingress"]
        if JOBS_API_PORT in [port["port"] for port in rule.get("ports", [{"port": JOBS_API_PORT}])]
        for source in rule["from"]
    ]
    labels = PODS["control-plane"]["metadata"]["labels"]
    assert sources == [
        {"podSelector": {"matchLabels": cluster}},
        {"podSelector": {"matchLabels": labels}},
    ]


def test_the_api_is_closed_to_pods_without_the_client_label() -> None:
    policy = one("NetworkPolicy", "clpeft-control-plane")["spec"]
    labels = PODS["control-plane"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert one("Service", "clpeft")["spec"]["selector"] == labels
    (rule,) = policy["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"cl-peft.io/api-client": "true"}}}]
    assert [port["port"] for port in rule["ports"]] == [
        container("control-plane")["ports"][0]["containerPort"]
    ]


def test_sqlite_has_one_writer_on_a_volume() -> None:
    spec = one("Deployment", "clpeft-control-plane")["spec"]
    assert spec["replicas"] == 1
    assert spec["strategy"] == {"type": "Recreate"}
    mounts = {mount["name"]: mount["mountPath"] for mount in container("control-plane")["volumeMounts"]}
    assert environment("control-plane")["CLPEFT_HOME"] == mounts["home"]
    assert "CLPEFT_DATABASE_URL" not in environment("control-plane")


def test_the_ray_version_is_the_one_that_the_package_pins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = one("RayCluster", "clpeft-ray")["spec"]["rayVersion"]
    assert f"ray[default,train,tune,serve]~={version}" in project["dependencies"]
    for pod in PODS:
        assert container(pod)["image"].endswith(f"/cl-peft:{project['version']}")


def test_the_control_plane_starts_a_command_that_exists() -> None:
    arguments = container("control-plane")["args"]
    clpeft = Path(sys.executable).with_name("clpeft")
    command = [str(clpeft), arguments[0], "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for option in (word for word in arguments if word.startswith("--")):
        assert option in done.stdout
