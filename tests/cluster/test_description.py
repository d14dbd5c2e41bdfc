"""The description of a cluster: what is filled in, and one sentence for everything that is wrong."""

import copy

import pytest

from cluster.description import parse_description
from cluster.errors import ClusterError

HOSTS = {
    "name": "atlas",
    "shared_directory": "/shared",
    "bare_metal": {"ssh_user": "me", "nodes": [{"address": "10.0.0.1", "npus": 8}, {"address": "10.0.0.2", "npus": 8}]},
}
PODS = {
    "name": "atlas",
    "image": "registry.local:5000/team/bitatlas:0.1.0",
    "shared_directory": "/shared",
    "kubernetes": {"workers": [{"replicas": 8, "npus": 8, "cpus": 64, "memory": "512Gi"}]},
}


def parse(document):
    return parse_description(document, "cluster.yaml")


def changed(document, path, value):
    """A copy with one value at a dotted path set, or removed where it is None."""
    document = copy.deepcopy(document)
    *parents, last = path.split(".")
    place = document
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    key = int(last) if isinstance(place, list) else last
    if value is None:
        del place[key]
    else:
        place[key] = value
    return document


def test_what_is_not_said_is_filled_in():
    hosts = parse(HOSTS)
    assert hosts.token_file == "/shared/secret/ray-token"
    assert hosts.dashboard_host == "127.0.0.1"
    assert hosts.is_dashboard_local
    assert hosts.base == "quay.io/ascend/cann:9.1.0-910b-ubuntu22.04-py3.11"
    pods = parse(PODS)
    assert (pods.secret, pods.claim) == ("atlas", "atlas-shared")
    assert pods.kubernetes.npu_resource == "huawei.com/Ascend910"


def test_what_is_said_counts():
    document = changed(PODS, "token.secret", "mine")
    document = changed(document, "kubernetes.shared_claim", "disk")
    document = changed(document, "base_image", "r.local/cann:8.5.0")
    pods = parse(changed(document, "dashboard_host", "0.0.0.0"))
    assert (pods.secret, pods.claim, pods.base) == ("mine", "disk", "r.local/cann:8.5.0")
    assert not pods.is_dashboard_local
    versions = {"cann": "8.5.0", "torch": "2.9.0", "torch_npu": "2.9.0.post2", "python": "3.12"}
    assert parse(changed(PODS, "versions", versions)).base.endswith("/cann:8.5.0-910b-ubuntu22.04-py3.12")


@pytest.mark.parametrize(
    ("document", "path", "value", "sentence"),
    [
        (HOSTS, "bare_metal.nodes.1.npus", 0, "bare_metal.nodes[1].npus = 0 must be greater than or equal to 1"),
        (PODS, "kubernetes.workers.0.npus", 0, "kubernetes.workers[0].npus = 0 must be greater than or equal to 1"),
        (HOSTS, "dashbord_host", "x", "unknown key 'dashbord_host'; did you mean 'dashboard_host'; the keys here are "),
        (HOSTS, "bare_metal.ssh_usr", "x", "bare_metal: unknown key 'ssh_usr'; did you mean 'ssh_user'; the keys here"),
        (HOSTS, "token", "c2VjcmV0", "token is a text; a description holds no token: give {file: PATH} or {secret: "),
        (HOSTS, "token.value", "c2VjcmV0", "token: value is given; a description holds no token: give file or secret"),
        (HOSTS, "bare_metal.nodes.1.address", "10.0.0.1", "bare_metal.nodes[1].address = 10.0.0.1 is nodes[0] too; "),
        (
            HOSTS,
            "bare_metal.nodes.1.address",
            "node-2",
            "nodes[1].address = 'node-2' is no IPv4 address; Ray's launcher",
        ),
        (HOSTS, "bare_metal.nodes", [], "bare_metal.nodes is empty; give at least one"),
        (HOSTS, "shared_directory", "shared", "shared_directory = 'shared' is not absolute; give the path that every "),
        (HOSTS, "shared_directory", "/my disk", "shared_directory = '/my disk' must be made of letters, digits and "),
        (HOSTS, "set_env", "/x; rm -rf /", "set_env = '/x; rm -rf /' must be made of letters, digits and"),
        (HOSTS, "token.file", "$(id)", "token.file must be an absolute path of letters, digits and . _ - + /"),
        (HOSTS, "token.secret", 5, "token.secret must be the name of a Secret, a DNS label; the token itself is never"),
        (HOSTS, "name", "on", "name = 'on' is a word that YAML takes for something else; choose another"),
        (HOSTS, "bare_metal.ssh_user", "no", "bare_metal.ssh_user = 'no' is a word that YAML takes for something else"),
        (HOSTS, "shared_directory", None, "shared_directory is missing"),
        (HOSTS, "name", "My_Cluster", "name = 'My_Cluster' must be a DNS label: at most 40 lowercase letters, digits"),
        (HOSTS, "name", "8x8", "name = '8x8' must be a DNS label"),
        (HOSTS, "name", "a" * 41, "must be a DNS label: at most 40 lowercase letters"),
        (HOSTS, "name", "atlas\n", "must be a DNS label"),
        (HOSTS, "device", "Ascend910B5", "device = 'Ascend910B5' is not known; use one of Ascend910B1, Ascend910B2"),
        (HOSTS, "dashboard_host", "::", "dashboard_host = '::' must be '127.0.0.1' or '0.0.0.0'"),
        (HOSTS, "ports", {"metrics": 8265}, "ports: dashboard and metrics are both 8265; give each its own"),
        (HOSTS, "ports", {"gcs": 80}, "ports.gcs = 80 must be greater than or equal to 1024"),
        (HOSTS, "bare_metal", None, "it names neither bare_metal nor kubernetes; say where the cluster is to run"),
        (HOSTS, "bare_metal", [1], "bare_metal = (1,) must be a mapping of its fields"),
        (PODS, "image", None, "image is missing; pods need one"),
        (PODS, "image", "registry.local/bitatlas", "must be an image with its tag or digest, such as registry.local/"),
        (
            PODS,
            "kubernetes.workers.0.memory",
            "512G",
            "workers[0].memory = '512G' must be a whole number of Mi, Gi or Ti",
        ),
        (PODS, "kubernetes.workers.0.replicas", "8", "workers[0].replicas = '8' must be a whole number"),
        (PODS, "kubernetes.workers", [PODS["kubernetes"]["workers"][0]] * 2, "workers[1].name = 'npu' is used twice"),
        (HOSTS, "monitoring", "yes", "monitoring = 'yes' must be true or false"),
        (PODS, "versions", {"python": 3.11}, "versions.python = 3.11 must be a text; put it in quotes"),
        (PODS, "versions", {"python": "3.9"}, "versions.python = '3.9' must be 3.11 or newer"),
        (PODS, "versions", {"ray": "2.9.0"}, "versions: ray 2.9.0 is too old; Bitatlas needs 2.55 or newer"),
        (
            PODS,
            "versions",
            {"torch": "2.13.0"},
            "versions: torch_npu 2.12.0.post3 is made for torch 2.12.*, not 2.13.0; give",
        ),
    ],
)
def test_a_bad_description_is_one_sentence(document, path, value, sentence):
    with pytest.raises(ClusterError) as caught:
        parse(changed(document, path, value))
    assert str(caught.value).startswith("cluster.yaml: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value).replace("\\n", "")


@pytest.mark.parametrize("document", [None, [], "name: x"])
def test_no_mapping(document):
    with pytest.raises(
        ClusterError, match=r"^cluster.yaml (is empty|holds a \w+); a cluster description is a mapping of"
    ):
        parse(document)


def test_a_token_is_not_repeated_in_the_complaint():
    for bad in ("c2VjcmV0", {"value": "c2VjcmV0"}, {"file": "c2VjcmV0"}, {"secret": "c2VjcmV0"}):
        with pytest.raises(ClusterError) as caught:
            parse(HOSTS | {"token": bad})
        assert "c2VjcmV0" not in str(caught.value)
