"""A cluster's description -> its deployment files, as text: Ray's launcher, KubeRay, Docker, Prometheus. Pure.

Every name, port and count comes from the description, so the files agree with each other.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cluster.description import BareMetal, Description

TEMPLATES = Path(__file__).parent / "deploy" / "templates"

STEPS = "STEPS.md"
RAY_UP = "bare-metal/ray-up.yaml"
PROMETHEUS = "bare-metal/prometheus.yml"
DOCKERFILE = "kubernetes/Dockerfile"
RAYCLUSTER = "kubernetes/raycluster.yaml"
KUBERNETES_PROMETHEUS = "kubernetes/prometheus.yml"

_TEMPLATE_OF = {
    STEPS: "STEPS.md",
    RAY_UP: "ray-up.yaml",
    PROMETHEUS: "prometheus-bare-metal.yml",
    DOCKERFILE: "Dockerfile",
    RAYCLUSTER: "raycluster.yaml",
    KUBERNETES_PROMETHEUS: "prometheus-kubernetes.yml",
}


def render(description: Description) -> dict[str, str]:
    """The files by their paths in the directory: those of hosts, of Kubernetes, and the steps that use them."""
    names = [STEPS]
    values = _common(description)
    if description.bare_metal:
        names += [RAY_UP, *([PROMETHEUS] if description.monitoring else [])]
        values |= _hosts(description.bare_metal)
    if description.kubernetes:
        names += [DOCKERFILE, RAYCLUSTER, *([KUBERNETES_PROMETHEUS] if description.monitoring else [])]
        values |= {name: getattr(description.kubernetes, name) for name in type(description.kubernetes).model_fields}
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # YAML and shell, no HTML; values are of plain characters
    )
    counts = npus_of(description)
    files = {}
    for name in names:
        count = counts.get(name.partition("/")[0]) or next(iter(counts.values()))
        files[name] = environment.get_template(f"{_TEMPLATE_OF[name]}.jinja").render(values, npus=count)
    return files


def npus_of(description: Description) -> dict[str, int]:
    """NPUs of the cluster by place: `bare-metal`, `kubernetes`."""
    counts = {}
    if description.bare_metal:
        counts["bare-metal"] = sum(node.npus for node in description.bare_metal.nodes)
    if description.kubernetes:
        counts["kubernetes"] = sum(group.replicas * group.npus for group in description.kubernetes.workers)
    return counts


def _common(description: Description) -> dict[str, Any]:
    values: dict[str, Any] = {name: getattr(description, name) for name in type(description).model_fields}
    derived = ("base", "secret", "claim", "token_file", "is_dashboard_local")
    return (
        values
        | {name: getattr(description, name) for name in derived}
        | {"kubernetes_npus": npus_of(description).get("kubernetes", 0)}
    )


def _hosts(hosts: BareMetal) -> dict[str, Any]:
    workers = hosts.nodes[1:]
    usual = Counter(node.npus for node in workers).most_common(1)[0][0] if workers else hosts.nodes[0].npus
    return {
        "nodes": hosts.nodes,
        "usual": usual,
        "unusual": [node for node in workers if node.npus != usual],
        "ssh_user": hosts.ssh_user,
        "ssh_key": hosts.ssh_key,
        "environment_directory": hosts.environment,
    }
