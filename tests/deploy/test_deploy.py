"""deploy/ is valid by its own tools, and names metrics, variables, paths and files that exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from deploy.image import BENTOFILES, BUILDERS, find_builder
from service import settings
from service.app import ROUTES
from service.metrics import REGISTRY
from service.settings import Settings
from tests.support.servers import PROJECT_DIR

DEPLOY_DIR = PROJECT_DIR / "deploy"
KUBERNETES_DIR = DEPLOY_DIR / "kubernetes"
DASHBOARD_PATH = DEPLOY_DIR / "grafana" / "dashboards" / "graft.json"
# Not settings of the service; the last is of 0.1.0.
OTHER_VARIABLES = settings.OTHER_VARIABLES | {"GRAFT_KEEP_ALIVE_SECONDS"}
# From the scrape itself, and from the adapter's rule.
OTHER_METRICS = {"up", "graft_queue_seconds_mean"}

Document = dict[str, Any]


def read_yaml(path: Path) -> Document:
    return cast(Document, yaml.safe_load(path.read_text()))


def manifests(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((KUBERNETES_DIR / folder).glob("*.yaml"))]


def variables() -> set[str]:
    return {
        "CHECKPOINTS" if name == "checkpoints" else f"GRAFT_{name.upper()}"
        for name in Settings.model_fields
    }


def metric_names() -> set[str]:
    """Every series that /metrics can have, also those that have no labels yet."""
    names = set()
    for family in REGISTRY.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(
            family.type, ("",)
        )
        names |= {family.name + suffix for suffix in suffixes}
    return names


def expressions() -> Iterator[tuple[str, str]]:
    """Each PromQL expression with its place; Grafana's and the adapter's placeholders filled."""
    for panel in json.loads(DASHBOARD_PATH.read_text())["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m")
    for group in read_yaml(DEPLOY_DIR / "prometheus" / "alerts.yaml")["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for rule in read_yaml(KUBERNETES_DIR / "base" / "adapter-values.yaml")["rules"]["custom"]:
        yield "adapter", rule["seriesQuery"]
        yield (
            "adapter",
            rule["metricsQuery"]
            .replace("<<.LabelMatchers>>", 'pod="x"')
            .replace("<<.GroupBy>>", "pod"),
        )


def test_every_expression_asks_for_existing_metrics() -> None:
    found = set()
    for where, expression in expressions():
        names = set(
            re.findall(
                r"\b(?:graft|process)_\w+|\bup\b", re.sub(r'"[^"]*"|by \([^)]*\)', "", expression)
            )
        )
        assert names, where
        assert names <= metric_names() | OTHER_METRICS, f"{where}: {names - metric_names()}"
        found |= names
    # And all of our metrics are on the dashboard.
    ours = {
        name
        for name in metric_names()
        if name.startswith("graft_") and not name.endswith(("_sum", "_count"))
    }
    assert {name for name in ours if not name.endswith("_bucket")} <= found


def test_every_expression_is_promql() -> None:
    parser = pytest.importorskip("promql_parser", reason="promql-parser is not installed")
    for where, expression in expressions():
        try:
            parser.parse(expression)
        except ValueError as error:
            raise AssertionError(f"{where}: {expression}: {error}") from error


def test_labels_in_expressions_are_those_of_the_metrics() -> None:
    labels = {"le", "job", "instance", "namespace", "pod"}
    for collector in set(vars(REGISTRY)["_collector_to_names"]):
        labels |= set(getattr(collector, "_labelnames", ()))
    for where, expression in expressions():
        grouped = [
            name.strip()
            for names in re.findall(r"(?:by|on) \(([^)]*)\)", expression)
            for name in names.split(",")
        ]
        matched = re.findall(r'(\w+)(?:=~|!=|=)"', expression)
        assert set(grouped) | set(matched) <= labels, where


def test_the_dashboard_is_one_that_grafana_can_provision() -> None:
    dashboard = json.loads(DASHBOARD_PATH.read_text())
    (source,) = read_yaml(
        DEPLOY_DIR / "grafana" / "provisioning" / "datasources" / "prometheus.yaml"
    )["datasources"]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}


def test_grafanas_own_model_knows_the_whole_dashboard() -> None:
    """Grafana's SDK drops what it does not know, so that less would come back."""
    plugins = pytest.importorskip(
        "grafana_foundation_sdk.cog.plugins", reason="grafana-foundation-sdk is not installed"
    )
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    written = json.loads(DASHBOARD_PATH.read_text())
    known = json.loads(json.dumps(Dashboard.from_json(written), cls=JSONEncoder))
    assert not list(missing(written, known))
    unknown = {**written, "panels": [{**written["panels"][0], "colour": "red"}]}
    assert list(
        missing(unknown, json.loads(json.dumps(Dashboard.from_json(unknown), cls=JSONEncoder)))
    ) == [".panels[0].colour"]


def missing(whole: Any, part: Any, where: str = "") -> Iterator[str]:
    """Where something of `whole` is missing in `part` or differs."""
    if isinstance(whole, dict) and isinstance(part, dict):
        for key, value in whole.items():
            yield from (
                missing(value, part[key], f"{where}.{key}") if key in part else [f"{where}.{key}"]
            )
    elif isinstance(whole, list) and isinstance(part, list) and len(whole) == len(part):
        for index, pair in enumerate(zip(whole, part, strict=True)):
            yield from missing(*pair, f"{where}[{index}]")
    elif whole != part:
        yield where


def test_manifests_match_kuberneteses_schemas() -> None:
    validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    for path in [*manifests("base"), KUBERNETES_DIR / "gpu" / "deployment.yaml"]:
        document = read_yaml(path)
        if "apiVersion" not in document or document["kind"] == "Kustomization":
            continue
        if path.parent.name == "gpu":
            # A patch: what it changes, on what there is.
            document = merge(read_yaml(KUBERNETES_DIR / "base" / path.name), document)
        validate.validate(document, validate.latest_version(), strict=True)


def merge(base: Any, patch: Any) -> Any:
    """Kubernetes' strategic merge as these patches need it: maps by key, named items by name."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {
            key: merge(base[key], patch[key])
            if key in base and key in patch
            else patch.get(key, base.get(key))
            for key in base | patch
        }
    if (
        isinstance(base, list)
        and isinstance(patch, list)
        and all("name" in one for one in (*base, *patch))
    ):
        named = {one["name"]: one for one in base}
        return [
            *(merge(named.get(one["name"], {}), one) for one in patch),
            *(one for one in base if one["name"] not in {p["name"] for p in patch}),
        ]
    return patch


@pytest.mark.parametrize("folder", ["base", "gpu", "kserve"])
def test_kustomizations_name_files_that_there_are(folder: str) -> None:
    kustomization = read_yaml(KUBERNETES_DIR / folder / "kustomization.yaml")
    for name in (
        *kustomization["resources"],
        *(patch["path"] for patch in kustomization.get("patches", ())),
    ):
        assert (KUBERNETES_DIR / folder / name).exists(), name
    tags = {image["newTag"] for image in kustomization.get("images", ())}
    assert tags <= set(BENTOFILES)
    if shutil.which("kubectl") is not None:
        subprocess.run(
            ["kubectl", "kustomize", KUBERNETES_DIR / folder], capture_output=True, check=True
        )


def test_the_deployment_is_probed_and_ended_as_the_service_is_made() -> None:
    pod = read_yaml(KUBERNETES_DIR / "base" / "deployment.yaml")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    paths = {
        container[probe]["httpGet"]["path"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert paths <= {route.path for route in ROUTES}
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    assert float(env["GRAFT_DRAIN_SECONDS"]) < float(env["GRAFT_SHUTDOWN_SECONDS"])
    preparing = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert preparing + float(env["GRAFT_SHUTDOWN_SECONDS"]) < pod["terminationGracePeriodSeconds"]
    security = container["securityContext"]
    assert (security["readOnlyRootFilesystem"], security["allowPrivilegeEscalation"]) == (
        True,
        False,
    )


def test_the_autoscaler_reads_what_the_adapter_gives() -> None:
    (metric,) = read_yaml(KUBERNETES_DIR / "base" / "autoscaler.yaml")["spec"]["metrics"]
    (rule,) = read_yaml(KUBERNETES_DIR / "base" / "adapter-values.yaml")["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert "graft_queue_seconds_sum" in rule["seriesQuery"]


def test_kserve_gets_the_runtime_and_the_protocol_that_it_asks_for() -> None:
    runtime = read_yaml(KUBERNETES_DIR / "kserve" / "runtime.yaml")
    model = read_yaml(KUBERNETES_DIR / "kserve" / "service.yaml")["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    (container,) = runtime["spec"]["containers"]
    assert {
        container[probe]["httpGet"]["path"] for probe in ("livenessProbe", "readinessProbe")
    } <= {route.path for route in ROUTES}
    assert model["modelFormat"]["name"] in {
        one["name"] for one in runtime["spec"]["supportedModelFormats"]
    }


def test_compose_mounts_files_that_there_are() -> None:
    compose = read_yaml(DEPLOY_DIR / "compose.yaml")
    assert {"graft", "prometheus", "grafana", "tensorboard"} == set(compose["services"])
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            # What a run makes may not be there yet.
            if source.startswith("./"):
                assert (DEPLOY_DIR / source).exists(), source
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    (tensorboard,) = re.findall(
        r"^tensorboard==.*$", (PROJECT_DIR / "constraints.txt").read_text(), re.MULTILINE
    )
    assert tensorboard in compose["services"]["tensorboard"]["build"]["dockerfile_inline"]


def test_compose_is_what_compose_reads() -> None:
    compose = find_compose()
    if compose is None:
        pytest.skip("docker compose is not installed")
    command = [*compose, "-f", str(DEPLOY_DIR / "compose.yaml"), "config", "--quiet"]
    env = {"PATH": os.environ["PATH"]}
    subprocess.run(command, env={**env, "GRAFANA_PASSWORD": "x"}, capture_output=True, check=True)
    refused = subprocess.run(command, env=env, capture_output=True, text=True)
    assert refused.returncode
    assert "set GRAFANA_PASSWORD" in refused.stderr


def find_compose() -> list[str] | None:
    """Docker's plugin or its own program, not version 1, which has no `dockerfile_inline`."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) is not None:
            version = subprocess.run(
                [*command, "version", "--short"], capture_output=True, text=True
            )
            if version.returncode == 0 and version.stdout.strip().removeprefix("v").startswith(
                tuple("23456789")
            ):
                return command
    return None


def test_prometheus_reads_its_configuration(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    subprocess.run(
        [promtool, "check", "config", DEPLOY_DIR / "prometheus" / "prometheus.yaml"],
        capture_output=True,
        check=True,
    )


def test_every_variable_in_manifests_and_docs_is_a_setting() -> None:
    pages = [
        *DEPLOY_DIR.rglob("*.yaml"),
        *PROJECT_DIR.glob("bentofile*.yaml"),
        *PROJECT_DIR.glob("*.md"),
        *PROJECT_DIR.glob("docs/*.md"),
    ]
    for path in pages:
        named = set(re.findall(r"\bGRAFT_[A-Z_]+\b", path.read_text()))
        assert named <= variables() | OTHER_VARIABLES, f"{path.name}: {named - variables()}"


def test_every_variable_in_docs_is_tried_on_the_image() -> None:
    tried = (PROJECT_DIR / "tests" / "deploy" / "test_image.py").read_text()
    documented = {
        name
        for path in PROJECT_DIR.glob("docs/*.md")
        for name in re.findall(r"\bGRAFT_[A-Z_]+\b|\bCHECKPOINTS\b", path.read_text())
    }
    assert variables() <= documented
    assert not [name for name in documented - OTHER_VARIABLES if f'"{name}"' not in tried]


def test_both_flavours_are_the_same_but_for_torch() -> None:
    cpu, cuda = (read_yaml(PROJECT_DIR / name) for name in BENTOFILES.values())
    packages, more = set(cpu["python"].pop("packages")), set(cuda["python"].pop("packages"))
    assert {package.split("==")[0] for package in more - packages} == {"torch", "timm"}
    assert packages < more
    for option in ("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"):
        del cuda["docker"]["env"][option]
    del cpu["name"], cuda["name"]
    assert cpu == cuda


def test_pins_of_the_image_are_those_that_were_tested() -> None:
    constraints = set((PROJECT_DIR / "constraints.txt").read_text().splitlines())
    for name in BENTOFILES.values():
        assert set(read_yaml(PROJECT_DIR / name)["python"]["packages"]) <= constraints


def test_without_a_builder_the_error_names_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "docker"
    broken.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="Cannot connect to the Docker daemon") as caught:
        find_builder()
    assert all(name in str(caught.value) for name in BUILDERS)


def test_the_first_builder_that_answers_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, code in (("docker", 1), ("buildah", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_builder() == "buildah"
