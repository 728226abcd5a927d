"""What is deployed: the stack, its proxy and dashboards, the Kubernetes manifests, rendered and held to their schemas."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from service.settings import Settings
from service.telemetry import Metrics

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
STACK = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
KUBERNETES = "1.30"
OVERLAYS = ("base", "gpu")


# --- docker compose --------------------------------------------------------------------------------------------------


def test_every_port_is_published_on_loopback_alone():
    ports = [port for service in STACK["services"].values() for port in service.get("ports", ())]
    assert len(ports) >= 4
    assert all(port.startswith("127.0.0.1:") for port in ports), ports


def test_anonymous_access_and_profiles():
    started = {name for name, service in STACK["services"].items() if "profiles" not in service}
    assert started == {"service", "redis"}, "what `docker compose up` starts"
    profiles = {profile for service in STACK["services"].values() for profile in service.get("profiles", ())}
    assert profiles == {"gpu", "scale", "observe"}


@pytest.mark.parametrize("name", ["service", "gpu", "replica", "worker"])
def test_services_can_write_nowhere_but_to_their_volume(name):
    service = STACK["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["environment"].keys() <= {f"ANCHORWELL_{field.upper()}" for field in Settings.model_fields}
    assert int(service["stop_grace_period"].removesuffix("s")) > Settings.model_fields["drain_timeout_s"].default


def test_every_redis_keeps_what_it_acknowledged():
    wanted = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
    alone, script = STACK["services"]["redis"]["command"], (DOCKER / "redis.sh").read_text(encoding="utf-8")
    for name, value in wanted.items():
        assert f"--{name} {value}" in alone
        assert f"{name} {value}" in script
    assert "min-replicas-to-write 1" in script


def test_what_is_mounted_is_there():
    mounted = [
        volume.partition(":")[0]
        for service in STACK["services"].values()
        for volume in service.get("volumes", ())
        if volume.startswith("./")
    ]
    assert len(set(mounted)) >= 4
    assert all((ROOT / name).exists() for name in mounted), mounted


def test_the_proxy_takes_its_configuration():
    haproxy = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    if haproxy is None:
        pytest.skip("no haproxy on this machine")
    found = subprocess.run([haproxy, "-c", "-f", DOCKER / "haproxy.cfg"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_proxys_problems_are_json():
    bodies = re.findall(r"http-error status (\d+) .* string '(.*)' hdr Retry-After \d", (DOCKER / "haproxy.cfg").read_text())
    assert [status for status, _ in bodies] == ["502", "503", "504"]
    for status, body in bodies:
        assert json.loads(body)["status"] == int(status)


# --- dashboards ------------------------------------------------------------------------------------------------------


def metric_names() -> set[str]:
    """What the service tells, under the names that Prometheus has them."""
    metrics = Metrics()
    metrics.request("GET", "/model", 200, 0.1)
    metrics.engine("CPU", "fp32", "0" * 12)
    metrics.sites("classify", 1)
    found = re.findall(r"^([a-z_]+)(?:\{| )", metrics.text().decode(), re.MULTILINE)
    return {name for name in found if name.startswith("anchorwell_")}


def expressions() -> list[str]:
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "anchorwell.json").read_text(encoding="utf-8"))
    rules = yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    adapter = yaml.safe_load((DOCKER / "kubernetes" / "prometheus-adapter.yaml").read_text(encoding="utf-8"))
    return [
        *(target["expr"] for panel in dashboard["panels"] for target in panel["targets"]),
        *(rule["expr"] for group in rules["groups"] for rule in group["rules"]),
        *(rule["metricsQuery"] for rule in adapter["rules"]["custom"]),
    ]


def test_dashboards_and_alerts_ask_for_metrics_that_there_are():
    asked = {name for expression in expressions() for name in re.findall(r"anchorwell_[a-z_]+", expression)}
    assert len(asked) >= 6
    assert asked <= metric_names()


def test_the_alert_rules_hold_together():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on this machine")
    found = subprocess.run([promtool, "check", "config", DOCKER / "prometheus" / "prometheus.yml"],
                           capture_output=True, text=True, check=False)  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def rendered(overlay: str | Path) -> list[dict]:
    """The manifests as a cluster would get them."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl on this machine: manifests are not rendered")
    command = [kubectl, "kustomize", DOCKER / "kubernetes" / overlay]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return list(yaml.safe_load_all(found.stdout))


def pods(manifests: list[dict]) -> dict[str, dict]:
    """The pods of each Deployment."""
    return {one["metadata"]["name"]: one["spec"]["template"] for one in manifests if one["kind"] == "Deployment"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_render_and_hold_to_their_schemas(overlay):
    manifests = rendered(overlay)
    kinds = {one["kind"] for one in manifests}
    assert kinds == {"ConfigMap", "Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Service"}
    for manifest in manifests:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_find_their_pods(overlay):
    manifests = rendered(overlay)
    labels = {name: template["metadata"]["labels"] for name, template in pods(manifests).items()}
    selecting = [one for one in manifests if one["kind"] in ("Deployment", "Service", "PodDisruptionBudget")]
    assert len(selecting) == 5
    for one in selecting:
        selector = one["spec"]["selector"]
        wanted = selector.get("matchLabels", selector)
        assert labels[one["metadata"]["name"]].items() >= wanted.items()
    (scaler,) = (one for one in manifests if one["kind"] == "HorizontalPodAutoscaler")
    assert scaler["spec"]["scaleTargetRef"]["name"] in labels


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_confined_and_have_time_to_end(overlay):
    for template in pods(rendered(overlay)).values():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["enableServiceLinks"] is False, "the Service would set ANCHORWELL_PORT"
        assert spec["terminationGracePeriodSeconds"] > Settings.model_fields["drain_timeout_s"].default
        for container in (*spec["containers"], *spec["initContainers"]):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]


def test_settings_are_ones_that_there_are():
    manifests = rendered("gpu")
    (config,) = (one for one in manifests if one["kind"] == "ConfigMap")
    given = {*config["data"], *(item["name"] for template in pods(manifests).values()
                                for item in template["spec"]["containers"][0].get("env", ()))}  # fmt: skip
    known = {f"ANCHORWELL_{field.upper()}" for field in Settings.model_fields} | {"ANCHORWELL_SECRETS_DIR", "AWS_REGION"}
    assert given <= known


def test_each_pod_of_the_gpu_overlay_has_one_gpu_and_needs_it():
    for template in pods(rendered("gpu")).values():
        (container,) = template["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert {"name": "ANCHORWELL_DEVICE", "value": "cuda"} in container["env"]
        assert container["image"].endswith(":gpu")


def test_what_a_scaler_decides_no_manifest_decides_again():
    manifests = rendered("base")
    (scaler,) = (one for one in manifests if one["kind"] == "HorizontalPodAutoscaler")
    (scaled,) = (one for one in manifests if one["kind"] == "Deployment"
                 and one["metadata"]["name"] == scaler["spec"]["scaleTargetRef"]["name"])  # fmt: skip
    assert "replicas" not in scaled["spec"], "an apply would take away what is scaled up"
    adapter = yaml.safe_load((DOCKER / "kubernetes" / "prometheus-adapter.yaml").read_text(encoding="utf-8"))
    (rule,) = adapter["rules"]["custom"]
    assert rule["name"]["as"] == scaler["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert "clamp_min(" in rule["metricsQuery"], "of an idle pod it is nothing, not unknown: else it is never scaled down"


def test_the_overlay_that_the_documentation_shows_is_one(tmp_path):
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    base = os.path.relpath(DOCKER / "kubernetes" / "base", tmp_path)
    (tmp_path / "kustomization.yaml").write_text(block.replace("../docker/kubernetes/base", base), encoding="utf-8")
    manifests = rendered(tmp_path)
    assert {one["metadata"]["namespace"] for one in manifests} == {"screening"}
    images = {container["image"] for template in pods(manifests).values() for container in template["spec"]["containers"]}
    assert images == {"registry.example/anchorwell:cpu"}
    (config,) = (one for one in manifests if one["kind"] == "ConfigMap")
    assert config["data"]["ANCHORWELL_OBJECTS"] == "s3://bucket/lab"
    assert "ANCHORWELL_DATA" in config["data"], "the rest is the base's"
