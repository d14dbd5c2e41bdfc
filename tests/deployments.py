"""For tests of deployment files: a description with nothing by default, and a host that runs what is rendered."""

import os
import subprocess
from pathlib import Path

import yaml

import cluster
from cluster.description import parse_description
from cluster.rendering import render

DEPLOY = Path(cluster.__file__).parent / "deploy"
BOTH = {
    "name": "atlas",
    "image": "registry.local/bitatlas:7",
    "set_env": "/opt/cann/set_env.sh",
    "shared_directory": "/mnt/everywhere",
    "token": {"file": "/mnt/secret/token", "secret": "atlas-token"},
    "ports": {"gcs": 6380, "dashboard": 8266, "metrics": 8081, "npu_exporter": 8083},
    "bare_metal": {
        "ssh_user": "me",
        "environment": "/opt/venv",
        "nodes": [{"address": f"10.1.0.{host}", "npus": 4 if host == 3 else 8} for host in range(1, 6)],
    },
    "kubernetes": {
        "namespace": "npus",
        "scheduler": "volcano",
        "node_selector": {"accelerator": "huawei-Ascend910"},
        "workers": [
            {"name": "large", "replicas": 4, "npus": 8, "cpus": 64, "memory": "512Gi"},
            {"name": "small", "replicas": 1, "npus": 4, "cpus": 32, "memory": "256Gi"},
        ],
    },
}


def rendered(**changes):
    return render(parse_description(BOTH | changes, "test"))


def example(name):
    return parse_description(yaml.safe_load((DEPLOY / "examples" / f"{name}.yaml").read_text(encoding="utf-8")), name)


def pods(text):
    """Pod specs of a RayCluster with their groups, the head's first."""
    spec = yaml.safe_load(text)["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [(group, group["template"]["spec"], group["template"]["spec"]["containers"][0]) for group in groups]


class Host:
    """Runs a rendered command as a host would, with a `ray` that writes down how it was called.

    Args:
        directory: with bin/, the programs that are found first, and set_env.sh.
    """

    def __init__(self, directory):
        self.directory = directory
        self._calls = directory / "calls"
        (directory / "bin").mkdir()
        (directory / "set_env.sh").write_text("export CANN=sourced\n")
        (directory / "bin" / "activate").write_text("export VENV=active\n")
        self.program("ray", 'printf "%s\\n" "$@" > "$CALLS"; env > "$CALLS.env"')
        self.program("ls", "for i in $(seq $NPUS); do echo /dev/davinci$i; done")
        self.program("hostname", 'echo "$ADDRESSES "')

    def program(self, name, body):
        path = self.directory / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def run(self, command, **variables):
        """The process that ended, and the arguments that `ray` was called with (None: it was not)."""
        path = f"{self.directory / 'bin'}:{os.environ['PATH']}"
        environment = {"PATH": path, "CALLS": str(self._calls), "HOME": "/h", **variables}
        self._calls.unlink(missing_ok=True)
        ran = subprocess.run(
            ["/bin/bash", "-c", "--", command], env=environment, capture_output=True, text=True, check=False
        )
        return ran, self._calls.read_text().splitlines() if self._calls.exists() else None

    @property
    def environment(self):
        """Lines of the environment that `ray` was called in."""
        return self._calls.with_suffix(".env").read_text().splitlines()


def accepted(arguments):
    """Whether Ray's own command line takes these arguments; only parsed, nothing is started."""
    from ray.scripts.scripts import start

    command, *options = arguments
    return command == "start" and start.make_context("ray start", options).params
