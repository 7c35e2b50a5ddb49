"""`deploy kubernetes`: manifests by Kubernetes' own schemas, and pods that start with the files they are for alone."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import assert_names_no_place, random_adapter
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parent))
from manifests import check, manifests

from teamlora_export.adapter import write_adapter
from teamlora_export.bundle import Bundle, read_bundle
from teamlora_export.cli import app
from teamlora_export.deploy.folder import TEMPLATES
from teamlora_export.deploy.kubernetes import (
    SERVER_IMAGE,
    cache_bytes,
    deploy_kubernetes,
    dns_label,
    memory_bytes,
    read_repository,
)
from teamlora_export.deploy.publish import publish_shelf
from teamlora_export.deploy.session import Session
from teamlora_export.deploy.triton_options import TritonOptions
from teamlora_export.errors import ExportError
from teamlora_export.export import export_onnx
from teamlora_export.shelf import add_adapter, remove_adapter, slot_bytes

DIGEST = "sha256:" + 64 * "a"
SOURCES = {
    "pvc": "pvc://models/team",
    "s3": "s3://a-bucket/some/models",
    "oci": f"oci://registry.example:5000/m@{DIGEST}",
}


@pytest.fixture(scope="module")
def bundle(make_bundle):
    return make_bundle("llama", cache="in-place")


@pytest.fixture(scope="module")
def deployed(bundle, tmp_path_factory) -> Path:
    return deploy_kubernetes(
        bundle, tmp_path_factory.mktemp("kubernetes") / "out", TritonOptions(name="3_Llamas.v2", capacity=100)
    )


def by_kind(folder: Path) -> dict[str, dict[str, Any]]:
    """Of what is applied with `kubectl apply -k`."""
    return {document["kind"]: document for name, document in manifests(folder) if name != "kserve.yaml"}


def pod_of(folder: Path) -> dict[str, Any]:
    return by_kind(folder)["Deployment"]["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    ("model", "source"),
    [("text", "pvc"), ("text", "s3"), ("text", "oci"), ("encoder", "pvc"), ("on a GPU", "oci"), ("shelf", "pvc")],
)
def test_every_manifest_is_valid_by_the_schemas_of_its_api(model, source, bundle, make_bundle, make_shelf, tmp_path):
    given = {"encoder": lambda: make_bundle("bert"), "shelf": make_shelf}.get(model, lambda: bundle)()
    out = deploy_kubernetes(given, tmp_path / "out", TritonOptions(gpu=model == "on a GPU"), source=SOURCES[source])
    found = list(manifests(out))
    # Image volumes are younger than the rest.
    for _, document in found:
        check(document, "1.31" if source == "oci" else "1.30")
    assert {document["kind"] for _, document in found} == {
        "ConfigMap",
        "Deployment",
        "HorizontalPodAutoscaler",
        "InferenceService",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "PodMonitor",
        "Service",
    }
    (container,) = pod_of(out)["containers"]
    # The model that batches continuously alone reads it.
    ends = [entry["value"] for entry in container["env"] if entry["name"] == "TEAMLORA_WHEN_BROKEN"]
    assert ends == ([] if model == "encoder" else ["end-server"])
    limits = container["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == (1 if model == "on a GPU" else None)
    assert_names_no_place(out, given)


def test_the_schemas_refuse_what_is_wrong(deployed):
    for wrong in ("replica", "templates"):
        broken = by_kind(deployed)["Deployment"]
        broken["spec"][wrong] = 3
        with pytest.raises(Exception, match=wrong):
            check(broken)
    service = next(document for name, document in manifests(deployed) if document["kind"] == "InferenceService")
    service["spec"]["predictor"]["containers"][0]["ports"][0]["containerPort"] = "8000"
    with pytest.raises(Exception, match="8000"):
        check(service)
    service["spec"]["predictor"] = {"models": {}}
    with pytest.raises(AssertionError):
        check(service)


def test_what_belongs_together_names_each_other(deployed):
    found = by_kind(deployed)
    deployment, name = found["Deployment"], "model-3-llamas-v2"
    template = deployment["spec"]["template"]
    pod, labels = template["spec"], template["metadata"]["labels"]
    assert {document["metadata"]["name"] for kind, document in found.items() if kind != "ConfigMap"} == {name}
    selectors = (
        deployment["spec"]["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        found["PodMonitor"]["spec"]["selector"]["matchLabels"],
        *(spread["labelSelector"]["matchLabels"] for spread in pod["topologySpreadConstraints"]),
    )
    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
    assert {port["targetPort"]: port["port"] for port in found["Service"]["spec"]["ports"]}.items() <= ports.items()
    assert found["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["port"] in ports
    assert found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == name
    # An autoscaler says how many there are, and nobody else.
    assert "replicas" not in deployment["spec"]
    for container in (*pod["initContainers"], *pod["containers"]):
        assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["expected"]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    applied = yaml.safe_load((deployed / "kustomization.yaml").read_text())["resources"]
    assert set(applied) == {name for name, _ in manifests(deployed)} - {"kserve.yaml"}
    rule = yaml.safe_load((deployed / "adapter.yaml").read_text())["rules"]["custom"][0]
    metric = found["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert rule["name"]["as"] == metric


def test_an_inference_service_has_the_deployments_pod(deployed):
    service, scaler = (document for name, document in manifests(deployed) if name == "kserve.yaml")
    predictor, pod = service["spec"]["predictor"], pod_of(deployed)
    assert predictor["containers"][0].pop("name") == "kserve-container"
    pod["containers"][0].pop("name")
    assert {field: predictor[field] for field in pod} == pod
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (2, 8)
    assert scaler["spec"]["scaleTargetRef"]["name"] == f"{service['metadata']['name']}-predictor"


def test_pods_are_restricted_and_end_after_their_requests(deployed):
    pod = pod_of(deployed)
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    server = pod["containers"][0]
    writable = {mount["mountPath"] for mount in server["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/tmp", "/dev/shm"}
    timeout = next(int(arg.split("=")[1]) for arg in server["args"] if arg.startswith("--exit-timeout-secs="))
    waits = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > waits + timeout


def test_threads_and_cores_are_as_many(bundle, make_bundle, tmp_path):
    for number, (given, key) in enumerate(((bundle, "threads"), (make_bundle("bert"), "intra_op_thread_count"))):
        out = deploy_kubernetes(given, tmp_path / str(number), cpus=3, replicas="2", monitor=False)
        configs = "".join(path.read_text() for path in out.glob("triton/models/*/config.pbtxt"))
        assert re.search(rf'key: "{key}"\s+value {{\s+string_value: "3"', configs)
        assert pod_of(out)["containers"][0]["resources"]["requests"]["cpu"] == "3"
        found = by_kind(out)
        assert found["Deployment"]["spec"]["replicas"] == 2
        assert not {"HorizontalPodAutoscaler", "PodMonitor"} & set(found)
        assert len(yaml.safe_load((out / "kustomization.yaml").read_text())["resources"]) == 4


def test_memory_follows_the_cache_of_every_text(bundle, deployed, tmp_path):
    """Four layers' keys and values, two heads of eight numbers of four bytes; 16 tokens of padding in front of each."""
    repository = read_repository(deployed / "triton" / "models")
    assert cache_bytes(bundle, repository, 100) == 4 * 2 * 2 * 8 * 4 * 116
    # Where a layer sees 6 tokens, these, and the part that is read.
    first, *others = (port for port in bundle.manifest.inputs if port.name.startswith("past_key_values."))
    ports = (dataclasses.replace(first, shape=(*first.shape[:2], "window_6", first.shape[3])), *others)
    sliding = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, inputs=ports))
    assert cache_bytes(sliding, repository, 1000) == 2 * 8 * 4 * (7 * 1016 + 6 - 1 + 256)

    def megabytes(**options: Any) -> int:
        out = deploy_kubernetes(bundle, tmp_path / "out", TritonOptions(**options))
        return int(pod_of(out)["containers"][0]["resources"]["requests"]["memory"].removesuffix("Mi"))

    # Of 144 tokens, and twice where the cache becomes longer.
    assert megabytes(batch=20_000, sequences=20_001) - megabytes() == pytest.approx(
        2 * 20_000 * 73_728 / 2**20, abs=256
    )


def run_compare(deployed: Path, repository: Path, scratch: Path) -> subprocess.CompletedProcess[str]:
    """The container that compares, with the pod's folders where they are here."""
    (container,) = (one for one in pod_of(deployed)["initContainers"] if one["name"] == "compare")
    sums = scratch / "SHA256SUMS"
    sums.write_text(by_kind(deployed)["ConfigMap"]["data"]["SHA256SUMS"])
    script, name, *_ = container["args"]
    command = [*container["command"], script.replace("/tmp/", f"{scratch}/"), name, repository, sums]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("change", ["nothing", "weights", "removed", "added", "link", "program", "renamed"])
def test_a_pod_starts_with_exactly_the_files_that_it_is_for(change, deployed, tmp_path):
    repository = tmp_path / "repository"
    shutil.copytree(deployed / "triton" / "models", repository)
    folder = repository / "3_Llamas.v2_text" / "1"
    if change == "weights":
        with (folder / "model.onnx.data").open("r+b") as file:
            file.write(b"\1")
    elif change == "removed":
        (folder / "chat.py").unlink()
    elif change == "added":
        (folder / "numpy.py").write_text("raise SystemExit")
    elif change == "link":
        (folder / "deploy.json").rename(tmp_path / "deploy.json")
        (folder / "deploy.json").symlink_to(tmp_path / "deploy.json")
    elif change == "program":
        with (folder / "model.py").open("a") as file:
            file.write("#")
    elif change == "renamed":
        folder.parent.rename(repository / "other_text")
    done = run_compare(deployed, repository, tmp_path)
    assert (done.returncode == 0) == (change == "nothing"), done.stderr
    assert (done.stdout + done.stderr == "") == (change == "nothing")


def test_another_adapter_is_another_version_and_the_same_one_is_the_same(bundle, make_base, deployed, tmp_path):
    base = make_base("llama")
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    write_adapter(random_adapter(base, targets, seed=5), tmp_path / "adapter")
    other = export_onnx(base.name, tmp_path / "adapter", tmp_path / "bundle", cache="in-place")
    options = TritonOptions(name="3_Llamas.v2", capacity=100)
    again = deploy_kubernetes(bundle, tmp_path / "again", options, source=SOURCES["oci"], replicas="3")
    others = deploy_kubernetes(other, tmp_path / "others", options)
    templates = [by_kind(folder)["Deployment"]["spec"]["template"] for folder in (deployed, others)]
    assert templates[0] != templates[1]
    names = [by_kind(folder)["ConfigMap"]["metadata"]["name"] for folder in (deployed, again, others)]
    assert names[0] == names[1] != names[2]
    version = names[0].rpartition("-")[2]
    (argument,) = (arg for arg in pod_of(deployed)["containers"][0]["args"] if arg.startswith("--model-repository="))
    assert argument == f"--model-repository=/repository/{version}"


def test_another_shelf_is_another_version_whose_files_are_listed_and_nothing_is_published_into_one(
    make_shelf, shelf_adapters, tmp_path
):
    """Pods start with these adapters, each by its hash, and no others."""
    shelf = make_shelf(cache="in-place")
    folder = Path(shutil.copytree(shelf.folder, tmp_path / "bundle"))
    options = TritonOptions(name="shelf", capacity=100)
    before, again = (deploy_kubernetes(read_bundle(folder), tmp_path / name, options) for name in ("one", "same"))
    add_adapter(folder, "late", shelf_adapters["small"])
    remove_adapter(folder, "moe")
    after = deploy_kubernetes(read_bundle(folder), tmp_path / "other", options)
    sums = [by_kind(out)["ConfigMap"]["data"]["SHA256SUMS"] for out in (before, again, after)]
    assert sums[0] == sums[1] != sums[2]
    for out, listed in ((before, sums[0]), (after, sums[2])):
        adapters = read_repository(out / "triton" / "models").described.shelf["adapters"]
        for adapter in adapters.values():
            assert f"{adapter['sha256']}  shelf_text/1/{adapter['file']}\n" in listed
        assert listed.count("/adapters/") == len(adapters) == 5
        done = run_compare(out, out / "triton" / "models", tmp_path)
        assert done.returncode == 0, done.stderr
    templates = [by_kind(out)["Deployment"]["spec"]["template"] for out in (before, after)]
    annotations = [template["metadata"]["annotations"]["teamlora-export/adapter-sha256"] for template in templates]
    assert annotations[0] != annotations[1]
    assert [
        volume["configMap"]["name"]
        for template in templates
        for volume in template["spec"]["volumes"]
        if volume["name"] == "expected"
    ] == [by_kind(out)["ConfigMap"]["metadata"]["name"] for out in (before, after)]
    for out in (before, before / "triton"):
        with pytest.raises(ExportError, match="another shelf is another version"):
            publish_shelf(read_bundle(folder), out)
    assert run_compare(before, before / "triton" / "models", tmp_path).returncode == 0
    assert "## 4. Another shelf" in (before / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_memory_has_room_for_the_adapters_of_every_slot(dtype, make_shelf, deployed):
    shelf = make_shelf(dtype=dtype)
    own, manifest = slot_bytes(shelf.manifest.refit, dtype), shelf.manifest
    assert own == sum(array[0].nbytes for array in Session(shelf.folder).adapters.memory.values())
    slots = {**manifest.shelf, "slots": 100_003}
    many = dataclasses.replace(shelf, manifest=dataclasses.replace(manifest, shelf=slots))
    repository = read_repository(deployed / "triton" / "models")

    def needed(bundle: Bundle, gpu: bool) -> int:
        return memory_bytes(bundle, repository, gpu, 8, 64, 100)

    assert needed(many, False) - needed(shelf, False) == pytest.approx(100_000 * own, abs=2**28)
    # Slots are in the GPU's own memory.
    assert needed(many, True) == needed(shelf, True)
    # An engine is read as a whole.
    plan = dataclasses.replace(repository.described, files={"model.plan": "0" * 64})
    engine = dataclasses.replace(repository, bytes=9 << 30, described=plan)
    assert memory_bytes(shelf, engine, True, 8, 64, 100) - needed(shelf, True) == pytest.approx(9 << 30, abs=2**28)


def test_what_somebody_changed_is_not_replaced(bundle, tmp_path):
    out = deploy_kubernetes(bundle, tmp_path / "out")
    deploy_kubernetes(bundle, out, replicas="3")
    assert not (out / "scaling.yaml").exists()
    for name in ("deployment.yaml", f"triton/models/{next((out / 'triton' / 'models').iterdir()).name}/config.pbtxt"):
        text = (out / name).read_text()
        (out / name).write_text(text + "# mine\n")
        with pytest.raises(ExportError, match=f"{name}: is not as it was written"):
            deploy_kubernetes(bundle, out)
        (out / name).write_text(text)
    (out / "overlay.yaml").write_text("mine")
    with pytest.raises(ExportError, match=r"overlay\.yaml: is not a file that teamlora-export wrote"):
        deploy_kubernetes(bundle, out)
    with pytest.raises(ExportError, match="which is read"):
        deploy_kubernetes(bundle, bundle.folder / "out")


@pytest.mark.parametrize("name", ["Llama-3.2_TEAM", "1", "_.-", "a" * 100, "a" * 39 + "--b", "x--y", "Ä", "É-7", "-"])
def test_names_become_labels_of_dns(name):
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", dns_label(name))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--source", "pvc://Claim"),
        ("--source", "pvc://claim/../other"),
        ("--source", 'pvc://claim"\n      hostPath: {path: /}'),
        ("--source", "s3://bucket/$(id)"),
        ("--source", "s3://bucket/a b"),
        ("--source", "oci://registry.example/models:latest"),
        ("--source", "https://example.com/models"),
        ("--source", "models"),
        ("--image", "Registry/x"),
        ("--image", 'x"\nhostNetwork: true'),
        ("--image", "x; id"),
        ("--image", ""),
        ("--replicas", "0"),
        ("--replicas", "5-2"),
        ("--replicas", "two"),
        ("--replicas", "٣"),
        ("--name", "a\nb"),
        ("--name", "{{ 7 }}"),
    ],
)
def test_what_is_no_name_is_refused_in_a_sentence(option, value, bundle, tmp_path):
    told = CliRunner().invoke(
        app, ["deploy", "kubernetes", str(bundle.folder), "-o", str(tmp_path / "o"), option, value]
    )
    assert isinstance(told.exception, ExportError) and str(told.exception).startswith(option)
    assert not list(tmp_path.iterdir())


def test_the_server_and_its_packages_are_those_of_deploy_triton(deployed):
    theirs = (TEMPLATES / "triton" / "README.md.j2").read_text()
    assert set(re.findall(r"nvcr\.io/nvidia/tritonserver:\S+", theirs)) == {SERVER_IMAGE}
    written = (deployed / "Dockerfile").read_text()
    assert f"FROM {SERVER_IMAGE}\n" in written
    (packages,) = re.findall(r"pip install (.*?) && tritonserver", (deployed / "triton" / "README.md").read_text())
    assert f"pip install --no-cache-dir {packages}\n" in written


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl")
def test_kubectl_builds_the_kustomization(deployed):
    told = subprocess.run(["kubectl", "kustomize", deployed], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    built = {document["kind"]: document for document in yaml.safe_load_all(told.stdout)}
    assert built == by_kind(deployed)
