"""The files of docs/autoscaling.md: as Kubernetes would take them, on metrics of a server, with their arithmetic."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from engine.config import EngineConfig
from tests.vcli.conftest import ROOT, Server, StartServer
from vcli.flags import flags_of, resolve
from vcli.server.config import ServerConfig

NUM_PLACES = 2


def documents(page: Path) -> list[dict[str, Any]]:
    blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), flags=re.M | re.S)
    return [document for block in blocks for document in yaml.safe_load_all(block)]


DOCUMENTS = {each.get("kind", "adapter"): each for each in documents(ROOT / "docs" / "autoscaling.md")}
SCALER = DOCUMENTS["HorizontalPodAutoscaler"]
[RULE] = DOCUMENTS["adapter"]["rules"]


@pytest.fixture(scope="module")
def server(start_server: StartServer) -> Server:
    return start_server("--max-num-seqs", str(NUM_PLACES), FAKE_STEP_S="0.02").wait_ready()


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("kind", ["Deployment", "Service", "HorizontalPodAutoscaler"])
def test_kubernetes_would_take_it(kind: str, version: str):
    kubernetes_validate.validate(DOCUMENTS[kind], version, strict=True)


def test_the_autoscaler_that_keda_makes_is_one_that_kubernetes_would_take():
    spec = DOCUMENTS["ScaledObject"]["spec"]
    scaler = SCALER["spec"] | {"minReplicas": spec["minReplicaCount"], "maxReplicas": spec["maxReplicaCount"]}
    scaler |= spec["advanced"]["horizontalPodAutoscalerConfig"]
    kubernetes_validate.validate(SCALER | {"spec": scaler}, kubernetes_validate.latest_version(), strict=True)
    metadata = [trigger["metadata"] for trigger in spec["triggers"]]
    assert all(isinstance(value, str) for each in metadata for value in each.values()), "as its definition demands"


def test_all_of_it_is_about_one_deployment_that_is_let_finish():
    deployment = DOCUMENTS["Deployment"]
    name, template = deployment["metadata"]["name"], deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert DOCUMENTS["Service"]["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == labels
    scaled = {DOCUMENTS[kind]["spec"]["scaleTargetRef"]["name"] for kind in ("HorizontalPodAutoscaler", "ScaledObject")}
    assert scaled == {name}
    assert len({each["metadata"]["namespace"] for each in DOCUMENTS.values() if "metadata" in each}) == 1
    command, _, *arguments = template["spec"]["containers"][0]["args"]
    assert command == "serve"
    flags = {flag.name: flag for flag in flags_of(EngineConfig) + flags_of(ServerConfig)}
    given = {name: resolve(flags[name], text).value for name, text in zip(arguments[::2], arguments[1::2], strict=True)}
    assert template["spec"]["terminationGracePeriodSeconds"] > given["--shutdown-timeout"]


def test_every_metric_that_it_names_is_one_of_a_server(server: Server):
    names = {family.name for family in text_string_to_metric_families(server.get("/metrics").text)}
    names |= {f"{name}_total" for name in names}
    page = (ROOT / "docs" / "autoscaling.md").read_text()
    assert set(re.findall(r"vcli:[a-z_]+", page)) - {"vcli:"} <= names
    pattern = re.search(r'__name__=~"(.*)"', RULE["seriesQuery"])
    found = [name for name in names if re.fullmatch(pattern[1], name)]
    as_asked = {re.sub(RULE["name"]["matches"], RULE["name"]["as"].replace("${1}", r"\1"), name) for name in found}
    assert as_asked == {metric["pods"]["metric"]["name"] for metric in SCALER["spec"]["metrics"]}


def test_replicas_follow_the_load(server: Server):
    """By the formula of Kubernetes: for each metric what the sum over the pods needs at the target, and the most."""
    assert wanted_replicas(server) == SCALER["spec"]["minReplicas"]
    with streaming(server, num_streams=6):
        server.wait_until(lambda: server.metric("vcli:num_requests_waiting") == 6 - NUM_PLACES)
        assert wanted_replicas(server) == math.ceil((6 / NUM_PLACES) / 0.7) == 5
    server.wait_until(lambda: wanted_replicas(server) == 1)


def wanted_replicas(server: Server) -> int:
    """For a deployment of this one pod."""
    spec = SCALER["spec"]
    needed = [
        math.ceil(server.metric(metric["pods"]["metric"]["name"].replace("vcli_", "vcli:", 1)) / quantity(target))
        for metric in spec["metrics"]
        if (target := metric["pods"]["target"]["averageValue"])
    ]
    return min(max(spec["minReplicas"], *needed), spec["maxReplicas"])


def quantity(text: str) -> float:
    """'700m' -> 0.7"""
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


@contextmanager
def streaming(server: Server, num_streams: int) -> Iterator[None]:
    body = {"prompt": [5, 6], "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.Client(timeout=60) as client:
        request = client.build_request("POST", server.url + "/v1/completions", json=body)
        streams = [client.send(request, stream=True) for _ in range(num_streams)]
        yield
        for stream in streams:
            stream.close()
