"""What is rendered is read as its users read it: Ray's launcher, KubeRay's shell, Prometheus. And it all agrees."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.description import parse_description
from cluster.rendering import DOCKERFILE, KUBERNETES_PROMETHEUS, PROMETHEUS, RAY_UP, RAYCLUSTER, STEPS, npus_of, render
from tests.deployments import BOTH, DEPLOY, Host, accepted, example, pods, rendered

ROOT = Path(__file__).parents[2]
FILES = rendered()


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def test_which_files():
    everything = {STEPS, RAY_UP, PROMETHEUS, DOCKERFILE, RAYCLUSTER, KUBERNETES_PROMETHEUS}
    assert set(FILES) == everything
    assert set(rendered(kubernetes=None)) == {STEPS, RAY_UP, PROMETHEUS}
    assert set(rendered(bare_metal=None)) == everything - {RAY_UP, PROMETHEUS}
    assert set(rendered(monitoring=False)) == everything - {PROMETHEUS, KUBERNETES_PROMETHEUS}
    assert next(iter(FILES)) == STEPS


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("one-server", {"bare-metal": 8}),
        ("eight-servers", {"bare-metal": 64, "kubernetes": 64}),
    ],
)
def test_the_examples(name, counts):
    assert npus_of(example(name)) == counts
    for file, text in render(example(name)).items():
        assert text.endswith("\n")
        assert not re.search(r"[ \t]$", text, re.MULTILINE), file
        assert "{{" not in text
        assert "{%" not in text


def test_names_agree():
    up, manifest = yaml.safe_load(FILES[RAY_UP]), yaml.safe_load(FILES[RAYCLUSTER])
    assert up["cluster_name"] == manifest["metadata"]["name"] == "atlas"
    dockerfile, steps = FILES[DOCKERFILE], FILES[STEPS]
    for _, spec, container in pods(FILES[RAYCLUSTER]):
        assert f"--tag {container['image']} ." in dockerfile
        assert f"--tag {container['image']} ." in steps
        assert container["command"] == ["source /opt/cann/set_env.sh || exit 1"]
        assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}["shared"] == "/mnt/everywhere"
        assert spec["volumes"][0] == {"name": "shared", "persistentVolumeClaim": {"claimName": "atlas-shared"}}
        assert spec["schedulerName"] == "volcano"
    assert dockerfile.count("source /opt/cann/set_env.sh") == 2
    starts = [*up["head_start_ray_commands"], *up["worker_start_ray_commands"]]
    for start in starts[1::2]:
        assert start.startswith("source /opt/cann/set_env.sh && source /opt/venv/bin/activate && ")
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/mnt/secret/token " in start
    assert manifest["spec"]["authOptions"] == {"mode": "token", "secretName": "atlas-token"}
    assert "secret generic atlas-token " in steps
    assert "> /mnt/secret/token)" in steps
    for place in ("claim `atlas-shared`", "namespace `npus`", "--out /mnt/everywhere/mine", "10.1.0.1:6380"):
        assert place in steps
    for _, text in (item for item in FILES.items() if item[0] != STEPS):
        for port in re.findall(r"(?<![\d.])(?:6379|8265|8080|8082)(?!\d)", text):
            pytest.fail(f"{port} is another cluster's port")


def test_no_token_is_written():
    for name, text in FILES.items():
        assert "auth_token: " not in text, name
        assert not re.search(r"RAY_AUTH_TOKEN=(?!\$\()", text), name


# -- ray up --


def test_ray_s_launcher_takes_it():
    from ray.autoscaler._private.util import prepare_config, validate_config

    for files, workers in ((FILES, 4), (render(example("eight-servers")), 7), (render(example("one-server")), 0)):
        config = prepare_config(yaml.safe_load(files[RAY_UP]))
        validate_config(config)  # by ray-schema.json
        assert config["max_workers"] == len(config["provider"]["worker_ips"]) == workers
        assert config["available_node_types"]["local.cluster.node"]["min_workers"] == workers


def test_ray_s_launcher_would_refuse_what_it_does_not_know():
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(FILES[RAY_UP])
    with pytest.raises(ValidationError, match="worker_start_commands"):
        validate_config(prepare_config(config | {"worker_start_commands": []}))


@pytest.fixture
def ray_up(host):
    place = host.directory
    (place / "token").write_text("t")
    hosts = BOTH["bare_metal"] | {"environment": str(place)}
    files = rendered(set_env=f"{place}/set_env.sh", token={"file": f"{place}/token"}, bare_metal=hosts, kubernetes=None)
    return yaml.safe_load(files[RAY_UP])


def test_the_head_s_command_runs(host, ray_up):
    stale = {
        "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": "1",
        "ASCEND_RT_VISIBLE_DEVICES": "0",
        "RAY_AUTH_TOKEN": "x",
    }
    ran, seen = host.run(ray_up["head_start_ray_commands"][1], NPUS="8", ADDRESSES="10.1.0.1", **stale)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert seen == [
        "start", "--head", "--node-ip-address=10.1.0.1", "--port=6380", "--dashboard-host=127.0.0.1",
        "--dashboard-port=8266", "--metrics-export-port=8081", "--autoscaling-config=~/ray_bootstrap_config.yaml",
    ]  # fmt: skip
    assert accepted(seen)["dashboard_port"] == 8266
    given = host.environment
    for line in ("CANN=sourced", "VENV=active", "RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN_PATH={host.directory}/token"):
        assert line in given
    assert not [line for line in given if line.partition("=")[0] in stale]
    assert host.run(ray_up["head_start_ray_commands"][0])[1] == ["stop"]


@pytest.mark.parametrize(
    ("address", "npus", "starts"),
    [
        ("10.1.0.2", "8", True),
        ("10.1.0.2", "7", False),
        ("10.1.0.2", "0", False),
        ("10.1.0.3", "4", True),
        ("10.1.0.3", "8", False),
        ("172.17.0.1 10.1.0.3 10.9.0.1", "4", True),
        ("10.1.0.30", "8", True),  # not 10.1.0.3
        ("110.1.0.3", "8", True),
    ],
)
def test_a_worker_s_command_counts_the_npus_of_its_host(host, ray_up, address, npus, starts):
    ran, seen = host.run(ray_up["worker_start_ray_commands"][1], NPUS=npus, ADDRESSES=address, RAY_HEAD_IP="10.1.0.1")
    if starts:
        assert seen == ["start", "--address=10.1.0.1:6380", "--metrics-export-port=8081"]
        assert accepted(seen)["metrics_export_port"] == 8081
    else:
        assert (ran.returncode, seen) == (1, None)
        expected = 4 if address == "10.1.0.3" else 8
        assert ran.stderr == f"atlas: this host has {npus} NPUs, not {expected}\n"


def test_a_host_without_the_token_does_not_start(host, ray_up):
    place = host.directory
    (place / "token").unlink()
    ran, seen = host.run(ray_up["worker_start_ray_commands"][1], NPUS="8", ADDRESSES="10.1.0.2", RAY_HEAD_IP="10.1.0.1")
    assert (ran.returncode, seen) == (1, None)
    assert ran.stderr == f"atlas: no token in {place}/token\n"


# -- Docker --


def test_the_dockerfile_s_versions():
    versions = parse_description(BOTH, "test").versions
    lines = FILES[DOCKERFILE].splitlines()
    (base,) = [line for line in lines if line.startswith("FROM ")]
    assert base == f"FROM quay.io/ascend/cann:{versions.cann}-910b-ubuntu22.04-py{versions.python}"
    text = FILES[DOCKERFILE]
    for requirement in (
        f"ray[default]=={versions.ray}",
        f"torch=={versions.torch}",
        f"torch-npu=={versions.torch_npu}",
    ):
        assert f"'{requirement}'" in text
        assert f"'{requirement}'" in FILES[STEPS]
    assert f'!= "{versions.python}"' in text
    assert "import torch" not in text


def test_the_default_versions_are_the_project_s():
    versions = parse_description(BOTH, "test").versions
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"\nray=={versions.ray}\n" in constraints
    assert f"Python {versions.python}," in constraints.splitlines()[0]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (least,) = re.findall(r'requires-python = ">=3\.(\d+)"', project)
    assert int(versions.python.split(".")[1]) >= int(least)
    for name, version in (
        ("torch", versions.torch),
        ("torch-npu", versions.torch_npu),
        (r"ray\[default\]", versions.ray),
    ):
        (lower,) = re.findall(rf'"{name}>=([\d.]+)"', project)
        assert tuple(map(int, version.split(".")[:2])) >= tuple(map(int, lower.split(".")[:2]))


def test_the_dockerfile_s_installation_runs(host):
    """Its RUN line, with a pip that writes down what it was told."""
    place = host.directory
    host.program("python3", f'[ "$1" = -c ] && exec {sys.executable} "$@"; printf "%s\\n" "$@" >> "$CALLS"')
    host.program("wget", "exit 1")  # it is only looked for
    (place / "files").mkdir()
    (place / "files" / "constraints.txt").write_text("ray==2.60.0\ntorch==2.13.0\ntorchmetrics==1\nnumpy==2\n")
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for python, status in ((here, 0), ("3.99", 1)):
        text = rendered(set_env=f"{place}/set_env.sh", versions={"python": python})[DOCKERFILE]
        (line,) = re.findall(r"^RUN (.*?[^\\])$", text.replace("\\\n", " "), re.MULTILINE)
        kept = line.replace("/tmp/bitatlas", str(place / "files")).replace(f"&& rm -r {place}/files", "")
        ran, seen = host.run(kept, TORCH_INDEX="https://index.invalid")
        assert ran.returncode == status
        if status:
            assert ran.stderr == f"Python {here}\n"
            assert seen is None
        else:
            assert seen.count("install") == 2
            for word in ("ray[default]==2.60.0", "torch==2.12.0", "torch-npu==2.12.0.post3", "https://index.invalid"):
                assert word in seen
            assert (place / "files" / "constraints.txt").read_text() == "torchmetrics==1\nnumpy==2\n"


def test_what_the_dockerfile_copies_is_there():
    (line,) = [line for line in FILES[DOCKERFILE].splitlines() if line.startswith("COPY ")]
    _, *sources, _ = line.split()
    assert [source for source in sources if not (ROOT / source).exists()] == ["dist/bitatlas-*.whl"]


# -- Prometheus --


def jobs(text):
    return {job["job_name"]: job for job in yaml.safe_load(text)["scrape_configs"]}


def test_prometheus_on_the_hosts():
    shipped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    found = jobs(FILES[PROMETHEUS])
    assert list(found) == ["ray", "npu-exporter"]
    assert found["ray"] == shipped["scrape_configs"][0]
    assert yaml.safe_load(FILES[PROMETHEUS])["global"] == shipped["global"]
    assert found["npu-exporter"]["static_configs"] == [{"targets": [f"10.1.0.{host}:8083" for host in range(1, 6)]}]


def test_prometheus_in_kubernetes_finds_the_pods_of_this_cluster():
    found = jobs(FILES[KUBERNETES_PROMETHEUS])
    assert set(found) == set(jobs(FILES[PROMETHEUS]))
    (discovery,), (rule, *_) = found["ray"]["kubernetes_sd_configs"], found["ray"]["relabel_configs"]
    assert discovery == {"role": "pod", "namespaces": {"names": ["npus"]}}
    for _, _, container in pods(FILES[RAYCLUSTER]):
        metrics = [port["name"] for port in container["ports"] if port["containerPort"] == 8081]
        kept = [name for name in metrics if re.fullmatch(rule["regex"], f"atlas;{name}")]
        assert kept == ["metrics"]
    assert not re.fullmatch(rule["regex"], "other;metrics")
    (discovery,), (rule, *_) = found["npu-exporter"]["kubernetes_sd_configs"], found["npu-exporter"]["relabel_configs"]
    assert discovery["namespaces"]["names"] == ["npu-exporter"]
    assert re.fullmatch(rule["regex"], "npu-exporter;8083")


# -- the steps --


def test_the_steps_count_what_there_is():
    steps = FILES[STEPS]
    assert "`ray status` shows 36 NPU" in steps
    assert "# shows 36 NPU" in steps
    assert "on the others" in steps
    assert "on the others" not in render(example("one-server"))[STEPS]
    assert "Kubernetes" not in rendered(kubernetes=None)[STEPS]
    assert "On the host" not in rendered(bare_metal=None)[STEPS]
    assert ("On the hosts (5)" in steps, "no cluster is needed" in steps) == (True, False)
    assert "no cluster is needed" in render(example("one-server"))[STEPS]
    assert "Prometheus" not in rendered(monitoring=False)[STEPS].title()


def test_the_shell_can_read_every_step():
    for block in re.findall(r"```\n(.*?)```", FILES[STEPS], re.DOTALL):
        subprocess.run(["/bin/bash", "-n", "-c", block], check=True)
