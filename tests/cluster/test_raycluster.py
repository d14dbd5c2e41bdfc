"""The manifest for KubeRay: its shape, what Ray's own code reads in it, and what the shell makes of it."""

import json
import shlex

import pytest
import yaml

from cluster.rendering import RAY_UP, RAYCLUSTER, render
from tests.deployments import BOTH, Host, accepted, example, pods, rendered

FILES = rendered()
RAYCLUSTERS = {"different names": FILES[RAYCLUSTER], "the example's": render(example("eight-servers"))[RAYCLUSTER]}
manifests = pytest.mark.parametrize("text", RAYCLUSTERS.values(), ids=RAYCLUSTERS)


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


MAP = dict[str, str]
CONTAINER = {
    "name": str, "image": str, "command": [str], "env": [{"name": str, "value": str}],
    "ports": [{"name": str, "containerPort": int}],
    "resources": {"limits": dict, "requests": dict},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly?": bool}],
}  # fmt: skip
VOLUME = {
    "name": str, "persistentVolumeClaim?": {"claimName": str}, "hostPath?": {"path": str, "type": str},
}  # fmt: skip
TEMPLATE = {
    "metadata": {"labels": MAP},
    "spec": {"schedulerName?": str, "nodeSelector?": MAP, "containers": [CONTAINER], "volumes": [VOLUME]},
}
# The part of RayCluster's definition (ray.io/v1 of KubeRay 1.5.1 to 1.7.0) that is used; `?`: may be left out.
SHAPE = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "namespace": str},
    "spec": {
        "rayVersion": str,
        "authOptions": {"mode": str, "secretName?": str},
        "headGroupSpec": {"rayStartParams": MAP, "template": TEMPLATE},
        "workerGroupSpecs": [
            {
                "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int,
                "rayStartParams": MAP, "template": TEMPLATE,
            }
        ],
    },
}  # fmt: skip


def misfits(value, shape, path="$"):
    """Where a document departs from a shape."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{path}: {value!r} is no mapping"]
        known = {key.rstrip("?"): part for key, part in shape.items()}
        wrong = [f"{path}.{key}: unknown" for key in value.keys() - known.keys()]
        wrong += [f"{path}.{key}: missing" for key in shape if not key.endswith("?") and key not in value]
        return wrong + [
            m for key in value.keys() & known.keys() for m in misfits(value[key], known[key], f"{path}.{key}")
        ]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{path}: {value!r} is no list"]
        return [m for index, item in enumerate(value) for m in misfits(item, shape[0], f"{path}[{index}]")]
    if shape is MAP:
        fits = isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair)
    else:
        fits = type(value) is shape
    return [] if fits else [f"{path}: {value!r} is no {shape}"]


@manifests
def test_a_manifest_has_the_shape_of_a_raycluster(text):
    manifest = yaml.safe_load(text)
    assert misfits(manifest, SHAPE) == []
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayCluster")
    manifest["spec"]["workerGroupSpecs"][0]["rayStartParams"]["metrics-export-port"] = 8080
    manifest["spec"]["auth"] = manifest["spec"].pop("authOptions")
    assert len(misfits(manifest, SHAPE)) == 3


@manifests
def test_ray_reads_the_npus_from_a_manifest(text):
    """By the code of its own autoscaler, which reads a RayCluster."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    manifest = yaml.safe_load(text)
    types = _derive_autoscaling_config_from_ray_cr(manifest)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    for group in manifest["spec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        found = types[group["groupName"]]
        assert found["resources"]["NPU"] == limits["huawei.com/Ascend910"]
        assert found["resources"]["CPU"] == int(limits["cpu"])
        assert found["min_workers"] == found["max_workers"] == group["replicas"]


def command_of(kind, group, container):
    """The shell command that KubeRay builds: the container's own, then `ray start` with every parameter pasted in."""
    parameters = " ".join(f" --{key}={value} " for key, value in sorted(group["rayStartParams"].items()))
    own = " ".join(container["command"])
    return f"{own} && ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; ray start {kind} {parameters} --block"


@manifests
def test_the_shell_that_kuberay_builds_gets_the_npus(text, host):
    for index, (group, _, container) in enumerate(pods(text)):
        command = command_of("" if index else "--head", group, container)
        source, _, _ = container["command"][0].partition(" ||")
        ran, seen = host.run(command.replace(source, f"source {host.directory}/set_env.sh"))
        assert ran.returncode == 0
        assert "CANN=sourced" in host.environment
        assert accepted(seen)["block"]
        given = dict(word.removeprefix("--").split("=", 1) for word in seen if "=" in word)
        if index:
            (count,) = {value for key, value in container["resources"]["limits"].items() if "/" in key}
            assert json.loads(given["resources"]) == {"NPU": count}
            assert group["rayStartParams"]["resources"] == f'"{{\\"NPU\\": {count}}}"'
            assert shlex.split(group["rayStartParams"]["resources"]) == [f'{{"NPU": {count}}}']
        else:
            assert seen[:2] == ["start", "--head"]
            assert (given["num-cpus"], given["dashboard-host"]) == ("0", "127.0.0.1")
        ran, seen = host.run(command.replace(source, "source /nowhere/set_env.sh"))
        assert (ran.returncode, seen) == (1, None)


@manifests
def test_limits_are_requests_and_the_head_has_no_npu(text):
    (_, _, head), *workers = pods(text)
    for _, _, container in pods(text):
        assert container["resources"]["limits"] == container["resources"]["requests"]
    assert set(head["resources"]["limits"]) == {"cpu", "memory"}
    assert {"name": "TORCH_DEVICE_BACKEND_AUTOLOAD", "value": "0"} in head["env"]
    for _, _, container in workers:
        assert set(container["resources"]["limits"]) == {"cpu", "memory", "huawei.com/Ascend910"}
        assert "TORCH_DEVICE_BACKEND_AUTOLOAD" not in {variable["name"] for variable in container["env"]}


def test_auth_options_by_the_secret_s_name():
    """A Secret of the cluster's name is what KubeRay 1.5.1 looks for; another's name it takes from 1.6.0 on."""
    own = rendered(token={})[RAYCLUSTER]
    assert yaml.safe_load(own)["spec"]["authOptions"] == {"mode": "token"}
    assert "KubeRay 1.5.1 or newer" in own
    assert "the Secret atlas with the key auth_token" in own
    assert "KubeRay 1.6.0 or newer" in FILES[RAYCLUSTER]


def test_the_dashboard_is_exposed_only_if_asked():
    def ports(text):
        return {port["name"]: port["containerPort"] for port in pods(text)[0][2]["ports"]}

    assert ports(FILES[RAYCLUSTER]) == {"gcs-server": 6380, "metrics": 8081}
    asked = rendered(dashboard_host="0.0.0.0")
    assert ports(asked[RAYCLUSTER]) == {"gcs-server": 6380, "dashboard": 8266, "metrics": 8081}
    assert "--dashboard-host=0.0.0.0 " in asked[RAY_UP]
    for name, text in FILES.items():
        said = [line for line in text.splitlines() if "0.0.0.0" in line]
        assert not [line for line in said if not line.lstrip().startswith("#")], name


def test_the_driver_may_be_left_to_the_container_runtime():
    without = rendered(kubernetes=BOTH["kubernetes"] | {"mount_driver": False})[RAYCLUSTER]
    assert "/usr/local/Ascend/driver" not in without
    for _, spec, container in pods(without):
        assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in spec["volumes"]]
    (_, head, _), (_, worker, _), _ = pods(FILES[RAYCLUSTER])
    assert [volume["name"] for volume in worker["volumes"]] == ["shared", "driver"]
    assert [volume["name"] for volume in head["volumes"]] == ["shared"]
