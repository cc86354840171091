"""deploy/ passes its validator, and a typo planted in a file of any kind does not."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from deploy.validate.__main__ import CHECKS, main, problems
from deploy.validate.dockerfile import parse
from deploy.validate.monitoring import check_monitoring, check_queries
from deploy.validate.tools import ToolMissing, run_tool

ROOT = Path(__file__).parents[2]
# What the checks look at outside of deploy/.
NEEDED = (
    "pyproject.toml",
    "setup.py",
    "constraints.txt",
    "constraints-vllm.txt",
    "README.md",
    "LICENSE",
    "kvstore",
    "services",
    "proto",
    "docs",
)

# By file below deploy/: what stands there, the typo in its place, and words that one line of the validator has.
TYPOS = {
    "docker/router.Dockerfile": [("HEALTHCHECK --", "HELTHCHECK --", "router.Dockerfile HELTHCHECK")],
    "docker/worker.Dockerfile": [
        ("USER 10001", "USER 0", "worker.Dockerfile root"),
        ('"tandem", "decode"', '"tandem", "decod"', "worker.Dockerfile ENTRYPOINT decode"),
        ('"tandem", "elastic"', '"tandem", "prefill"', "worker.Dockerfile ENTRYPOINT elastic"),
        ("COPY proto", "COPY prot", "worker.Dockerfile prot"),
        ("FROM model-${MODEL} AS elastic", "FROM runtime AS elastic", "worker.Dockerfile elastic layers"),
    ],
    "docker/store.Dockerfile": [
        ("WORKDIR /src", "WORKDIR src", "store.Dockerfile DL3000"),
        ("EXTRAS=store\n", "EXTRAS=store,worker\n", "store.Dockerfile worker torch"),
    ],
    "docker/worker-vllm.Dockerfile": [
        ('"tandem", "prefill"', '"tandem", "prefil"', "worker-vllm.Dockerfile ENTRYPOINT prefill"),
        ('"tandem", "decode"', '"tandem", "decod"', "worker-vllm.Dockerfile ENTRYPOINT decode"),
        ("USER 10001", "USER tandem", "worker-vllm.Dockerfile number"),
        ("FROM runtime AS decode", "FROM runtime AS decode\nRUN true", "worker-vllm.Dockerfile decode layers RUN"),
    ],
    "compose/compose.yaml": [
        ("healthcheck:", "healthchek:", "compose.yaml healthchek"),
        ("TANDEM_DRAIN_TIMEOUT_S", "TANDEM_DRAIN_TIMEOT_S", "compose.yaml prefill TANDEM_DRAIN_TIMEOT_S"),
        ("prefill-0: {condition", "prefil-0: {condition", "compose.yaml router prefil-0"),
        ("- ./prometheus.yml", "- ./prometeus.yml", "compose.yaml prometheus prometeus.yml"),
        ("read_only: true", "read_only: false", "compose.yaml read_only"),
        ("limits: {cpus", "limit: {cpus", "compose.yaml limit"),
        ("${BIND:-127.0.0.1}:", "", "compose.yaml router ports 8000 open"),
        (
            "TANDEM_PEER_SECRET_FILE: /run/secrets/peer",
            "TANDEM_PEER_SECRET: ${PEER}",
            "store-0 TANDEM_PEER_SECRET",
        ),
        ("      TANDEM_API_KEY_FILE: /run/secrets/api-keys\n", "", "compose.yaml router everybody"),
        ("[peer, tenant, api-keys, registry.yaml]", "[peer, api-keys, registry.yaml]", "compose.yaml router tenant"),
        ("  proof: {file", "  prof: {file", "compose.yaml decode-0 proof"),
        ("secrets: [peer, registry.yaml]", "secrets: [peer, proof, registry.yaml]", "compose.yaml store-0 proof"),
        ("group_add:", "x-group_add:", "compose.yaml redis group_add"),
        ("networks: [monitoring]", "networks: [monitorin]", "compose.yaml grafana monitorin"),
    ],
    "compose/elastic.yaml": [
        ("TANDEM_ROLE: prefill", "TANDEM_ROLE: prefil", "elastic.yaml prefill-0 prefil"),
        ("target: elastic", "target: decode", "elastic.yaml decode-0 target"),
        ("TANDEM_TPOT_OBJECTIVE", "TANDEM_TPOT_OBJECTIV", "elastic.yaml router TANDEM_TPOT_OBJECTIV"),
        ("  decode-1:", "  decode-2:", "elastic.yaml decode-2"),
    ],
    "compose/vllm.yaml": [
        ("device_ids:", "device_id:", "vllm.yaml device_id"),
        ("TANDEM_ENGINE: vllm", "TANDEM_ENGINE: vlm", "vllm.yaml prefill-0 vlm"),
        ("target: decode", "target: prefill", "vllm.yaml decode-0 target"),
        ("dockerfile: deploy/docker/worker-vllm", "dockerfile: deploy/docker/worker", "vllm.yaml worker-vllm"),
        ("  decode-1: {", "  decode-2: {", "vllm.yaml decode-2"),
        ("limits: {cpus", "limit: {cpus", "vllm.yaml limit"),
        ('["decode-0:/cache"]', '["decode:/cache"]', "vllm.yaml decode volumes"),
    ],
    "compose/prometheus.yml": [
        ("scrape_configs", "scrape_config", "prometheus.yml scrape_config"),
        ("store-0:7080", "stor-0:7080", "prometheus.yml stor-0:7080"),
    ],
    "compose/grafana/datasource.yaml": [("access:", "acces:", "datasource.yaml acces")],
    "compose/grafana/dashboards.yaml": [("folder:", "foldr:", "dashboards.yaml foldr")],
    "kustomize/base/kustomization.yaml": [("configMapGenerator", "configMapGenerater", "cpu-demo configMapGenerater")],
    "kustomize/base/router.yaml": [
        ("readinessProbe", "readynessProbe", "cpu-demo Deployment tandem-router readynessProbe"),
        ("averageUtilization", "averageUse", "cpu-demo HorizontalPodAutoscaler tandem-router averageUse"),
        ("minAvailable", "minAvailabl", "cpu-demo PodDisruptionBudget tandem-router minAvailabl"),
        ("targetPort: http", "targetPort: htp", "cpu-demo Service tandem-router htp"),
        ("GracePeriodSeconds: 140", "GracePeriodSeconds: 14", "cpu-demo Deployment tandem-router drain"),
        ("port: http\n            periodSeconds: 5", "port: htp\n            periodSeconds: 5", "readinessProbe htp"),
    ],
    "kustomize/base/prefill.yaml": [
        ("port: http\n", "port: htp\n", "cpu-demo Deployment tandem-prefill readinessProbe htp"),
        ("path: /ready", "path: /health", "cpu-demo Deployment tandem-prefill readinessProbe /ready"),
    ],
    "kustomize/base/decode.yaml": [("TANDEM_WORKER_ID", "TANDEM_WORKERID", "cpu-demo tandem-decode TANDEM_WORKERID")],
    "kustomize/base/store.yaml": [("serviceName", "servicName", "cpu-demo StatefulSet tandem-store servicName")],
    "kustomize/base/redis.yaml": [("port: 6379", "port: redis", "cpu-demo Service tandem-redis redis")],
    "kustomize/base/network-policies.yaml": [
        ("policyTypes", "policyType", "cpu-demo NetworkPolicy tandem-router policyType"),
        ("component: redis\n", "component: reddis\n", "cpu-demo NetworkPolicy tandem-redis reddis"),
    ],
    "kustomize/overlays/cpu-demo/kustomization.yaml": [
        ("\nimages:", "\nimags:", "cpu-demo imags"),
        ("TANDEM_NUM_THREADS", "TANDEM_NUM_THREAD", "cpu-demo tandem-decode TANDEM_NUM_THREAD"),
        ("/spec/template/", "/spec/templat/", "cpu-demo templat"),
    ],
    "kustomize/overlays/cpu-demo/namespace.yaml": [("labels:", "lables:", "cpu-demo Namespace tandem lables")],
    "kustomize/overlays/gpu-rdma/kustomization.yaml": [("\ncomponents:", "\ncomponent:", "gpu-rdma component")],
    "kustomize/overlays/gpu-rdma/namespace.yaml": [("kind: Namespace", "kind: Namespac", "gpu-rdma Namespac")],
    "kustomize/overlays/gpu-rdma/worker-devices.yaml": [("medium:", "medum:", "gpu-rdma Deployment medum")],
    "kustomize/overlays/gpu-rdma/store-devices.yaml": [
        ("name: shm, mount", "name: shn, mount", "gpu-rdma tandem-store shn")
    ],
    "kustomize/overlays/gpu-vllm/kustomization.yaml": [
        ("\ncomponents:", "\ncomponent:", "gpu-vllm component"),
        ("TANDEM_MODEL=", "TANDEM_MODL=", "gpu-vllm tandem-decode TANDEM_MODL"),
    ],
    "kustomize/overlays/cpu-elastic/kustomization.yaml": [("\ncomponents:", "\ncomponent:", "cpu-elastic component")],
    "kustomize/components/elastic/kustomization.yaml": [
        ("TANDEM_ROLE=decode", "TANDEM_ROLE=decod", "cpu-elastic tandem-decode decod"),
        ("TANDEM_TTFT", "TANDEM_TFT", "cpu-elastic tandem-router TANDEM_TFT"),
    ],
    "kustomize/components/vllm/kustomization.yaml": [
        ("ENGINE=vllm", "ENGINE=vlm", "gpu-vllm tandem-prefill vlm"),
        ("TANDEM_KV_TRANSPORT=auto", "TANDEM_KV_TRANSPORT=nixl", "gpu-vllm tandem-decode nixl ranks"),
    ],
    "kustomize/components/vllm/devices.yaml": [("op: replace", "op: replac", "gpu-vllm replac")],
    "kustomize/components/vllm/volumes.yaml": [("sizeLimit", "sizelimit", "gpu-vllm Deployment sizelimit")],
    "kustomize/components/model-volume/claim.yaml": [("accessModes", "accesModes", "PersistentVolumeClaim accesModes")],
    "kustomize/components/model-volume/kustomization.yaml": [
        ("tandem-models", "tandem-model", "gpu-rdma tandem-model")
    ],
    "kustomize/components/keda/kustomization.yaml": [("op: remove", "op: remov", "gpu-rdma remov")],
    "kustomize/components/keda/prefill.yaml": [
        ("serverAddress", "serverAdress", "gpu-rdma ScaledObject tandem-prefill serverAdress"),
        ("tandem:waiting_tokens", "tandem:waiting_token", "keda/prefill.yaml queued-tokens tandem:waiting_token"),
        ("sum(tandem:waiting_tokens", "sum((tandem:waiting_tokens", "keda/prefill.yaml queued-tokens"),
    ],
    "kustomize/components/keda/decode.yaml": [
        (
            "scaleTargetRef:\n    name: tandem-decode",
            "scaleTargetRef:\n    name: tandem-decod",
            "ScaledObject tandem-decod",
        ),
    ],
    "monitoring/kustomization.yaml": [("options:", "option:", "gpu-rdma option")],
    "monitoring/monitors.yaml": [
        (" endpoints:", " endpoint:", "gpu-rdma ServiceMonitor tandem-router endpoint"),
        ("podMetricsEndpoints", "podMetricEndpoints", "gpu-rdma PodMonitor podMetricEndpoints"),
        ("component: store", "component: stor", "gpu-rdma PodMonitor tandem-store stor"),
    ],
    "monitoring/prometheusrule.yaml": [
        ("annotations", "anotations", "gpu-rdma PrometheusRule anotations"),
    ],
    "monitoring/rules/recording.yml": [
        ("record:", "recod:", "recording.yml recod"),
        ("histogram_quantile", "histogram_quantil", "recording.yml histogram_quantil"),
        ("tandem:prefills_total", "tandem:prefill_total", "recording.yml tandem:prefill_total"),
    ],
    "monitoring/rules/alerts.yml": [
        ("labels:", "lables:", "alerts.yml lables"),
        (
            "tandem:store_disk_paused",
            "tandem:store_disk_pause",
            "alerts.yml TandemStoreDiskPaused tandem:store_disk_pause",
        ),
        ("alert: TandemKVCacheFull", "alert: TandemKvCacheFull", "operations.md TandemKvCacheFull"),
        ("== 0", "!= 0", "rules.yml TandemRegistryDown"),
    ],
    "monitoring/tests/rules.yml": [
        ("input_series", "input_serie", "rules.yml input_serie"),
        ("alertname: TandemKVCacheFull", "alertname: TandemKVCacheFul", "TandemKVCacheFull"),
    ],
    "monitoring/grafana/tandem.json": [
        ('"legendFormat"', '"legendFormt"', "tandem.json legendFormt"),
        ("tandem:recomputes_total", "tandem:recompute_total", "tandem.json tandem:recompute_total"),
    ],
}


def check_of(path: str) -> str:
    """The name of the check that looks at a file."""
    if path.startswith("docker/"):
        return "Dockerfiles"
    if path.startswith("compose/"):
        return "compose"
    is_manifest = path.startswith("kustomize/") or path.count("/") == 1
    return "kustomize" if is_manifest else "rules and dashboards"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository with a deploy/ of its own."""
    shutil.copytree(
        ROOT / "deploy", tmp_path / "deploy", ignore=shutil.ignore_patterns("__pycache__", "secrets", ".env")
    )
    for name in NEEDED:
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_everything_passes(copy: Path) -> None:
    assert list(problems(copy)) == []


def test_the_secrets_of_compose_are_made_and_kept(copy: Path) -> None:
    compose = copy / "deploy/compose"
    text = (compose / "compose.yaml").read_text(encoding="utf-8")
    paths = [compose / path for path in re.findall(r"\{file: (\S+)\}", text)]
    assert len(paths) == len(yaml.safe_load(text)["secrets"]) == 6
    made = []
    for _ in range(2):
        subprocess.run([compose / "make_secrets.sh"], check=True)
        assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o640}
        made.append({path.name: path.read_text() for path in paths})
    assert made[0] == made[1]
    assert (compose / ".env").read_text() == f"SECRETS_GID={os.getgid()}\n"
    registry = made[0].pop("registry.yaml")
    assert yaml.safe_load(registry) == {"redis": f"redis://:{made[0]['redis-password'].strip()}@redis:6379/0"}
    assert len(set(made[0].values())) == 5
    assert all(re.fullmatch(r"[0-9a-f]{64}\n", secret) for secret in made[0].values())


@pytest.mark.parametrize(("found", "status"), [([], 0), (["a.yaml is wrong"], 1), (ToolMissing("no promtool"), 1)])
def test_the_exit_status_says_whether_all_was_looked_at_and_good(
    found: list[str] | ToolMissing, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check = Mock(side_effect=[found])
    monkeypatch.setattr("deploy.validate.__main__.CHECKS", {"a kind": check})
    assert main([str(tmp_path)]) == status


@pytest.mark.parametrize(
    ("path", "old", "new", "words"),
    [
        pytest.param(path, *typo, id=f"{path}-{number}")
        for path, typos in TYPOS.items()
        for number, typo in enumerate(typos)
    ],
)
def test_a_typo_is_named(copy: Path, path: str, old: str, new: str, words: str) -> None:
    file = copy / "deploy" / path
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    named = re.findall("cpu-demo|cpu-elastic|gpu-rdma|gpu-vllm", words)
    for overlay in (copy / "deploy/kustomize/overlays").iterdir() if named else ():  # to render one is enough
        if overlay.name not in (*named, "gpu-rdma", "cpu-demo"):  # which others lie on
            shutil.rmtree(overlay)
    of_queries = check_queries(copy) if path.startswith("kustomize/components/keda/") else ()
    found = list[str]()
    for line in itertools.chain(of_queries, CHECKS[check_of(path)](copy)):
        found.append(line)
        if all(word in line for word in words.split()):
            return
    pytest.fail(f"{words} is in none of {found}")


def test_a_generated_file_that_is_out_of_date_is_named(copy: Path) -> None:
    file = copy / "deploy/monitoring/prometheusrule.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("> 0.95", "> 0.59"), encoding="utf-8")
    found = list(check_monitoring(copy))
    assert len(found) == 1
    assert "prometheusrule.yaml" in found[0]
    assert "make render-deploy" in found[0]


def test_every_file_of_deploy_has_a_typo_planted() -> None:
    kinds = {".yaml", ".yml", ".json", ".Dockerfile"}
    files = {path.relative_to(ROOT / "deploy") for path in (ROOT / "deploy").rglob("*") if path.suffix in kinds}
    validated = {str(path) for path in files if path.parts[0] not in {"demo_model", "schemas"}}
    assert validated == set(TYPOS)


def test_a_missing_tool_is_named_with_where_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("deploy.validate.tools._PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolMissing, match=r"promtool is missing \(.*prometheus"):
        run_tool("promtool", ["--version"], tmp_path)


def test_a_dockerfile_is_read_as_docker_reads_it() -> None:
    dockerfile = parse(
        "ARG KIND=a\nFROM base AS kind-a\nENV ONE=1 TWO='2 3'\n\nFROM base AS kind-b\n"
        "# a comment\nFROM kind-${KIND} AS build\nRUN --mount=type=cache one \\\n  # between\n  && two\n"
        'FROM build\nHEALTHCHECK --interval=5s CMD ["true", "x y"]\n'
    )
    assert [stage.name for stage in dockerfile.chain(None, {})] == ["kind-a", "build", ""]
    assert [stage.name for stage in dockerfile.chain("build", {"KIND": "b"})] == ["kind-b", "build"]
    environment, run, health = [item for stage in dockerfile.chain(None, {}) for item in stage.instructions]
    assert environment.words == ["ONE=1", "TWO=2 3"]
    assert (run.line, run.flags, run.text.split()) == (8, {"mount": "type=cache"}, ["one", "&&", "two"])
    assert health.words == ["true", "x y"]
    with pytest.raises(ValueError, match="no FROM"):
        parse("ARG A=1\n")
