"""Kubernetes' own schemas, and those of what is not its own, for manifests in YAML."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from get_kserve_models import get_kserve_models

# The oldest that README.md promises, and the newest that has schemas.
VERSIONS = ("1.30", "1.37")
# What is no manifest of the cluster: read by kubectl alone, and by prometheus-adapter's chart.
_OTHERS = {"kustomization.yaml", "adapter.yaml"}
# By the CRD of prometheus-operator 0.80: the fields that a PodMonitor of ours may have, with their types.
_POD_MONITOR = {
    "selector": {"matchLabels": dict},
    "podMetricsEndpoints": [{"port": str, "path": str, "interval": re.compile(r"\d+(ms|s|m|h)")}],
}


def manifests(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of a file in a `folder`, and each of its documents."""
    for path in sorted(folder.glob("*.yaml")):
        if path.name not in _OTHERS:
            for document in yaml.safe_load_all(path.read_text()):
                yield path.name, document


def check(document: Mapping[str, Any], oldest: str = VERSIONS[0]) -> None:
    """Fails where a manifest is not what its API takes; every field must be known there."""
    api = document["apiVersion"]
    if api == "serving.kserve.io/v1beta1":
        _check_inference_service(document, oldest)
    elif api == "monitoring.coreos.com/v1":
        assert document["kind"] == "PodMonitor"
        _check_fields(document["spec"], _POD_MONITOR)
    else:
        for version in (oldest, VERSIONS[-1]):
            kubernetes_validate.validate(document, version, strict=True)


def _check_inference_service(document: Mapping[str, Any], oldest: str) -> None:
    """KServe's fields by its own package; those of the pod by Kubernetes' schema."""
    assert set(document) <= set(_kserve_fields("inference_service"))
    assert set(document["spec"]) <= set(_kserve_fields("inference_service_spec"))
    known, predictor = _kserve_fields("predictor_spec"), document["spec"]["predictor"]
    assert set(predictor) <= set(known)
    own = {"minReplicas", "maxReplicas"}
    assert all(known[field] == "int" and type(predictor[field]) is int for field in own & set(predictor))
    pod = {field: value for field, value in predictor.items() if field not in own}
    check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}, oldest)


def _kserve_fields(name: str) -> dict[str, str]:
    """Names of a class's fields in JSON -> their types."""
    source = (get_kserve_models() / f"v1beta1_{name}.py").read_text()
    (found,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    tables = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in found.body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("openapi_types", "attribute_map")
    }
    return {tables["attribute_map"][field]: kind for field, kind in tables["openapi_types"].items()}


def _check_fields(value: Any, kind: Any) -> None:
    if isinstance(kind, dict):
        assert set(value) <= set(kind)
        for field, inner in value.items():
            _check_fields(inner, kind[field])
    elif isinstance(kind, list):
        for inner in value:
            _check_fields(inner, kind[0])
    elif isinstance(kind, re.Pattern):
        assert kind.fullmatch(value)
    else:
        assert type(value) is kind
