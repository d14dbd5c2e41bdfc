"""The command line: what it says, what it refuses, its exit statuses, and what it does not import."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner

from cluster.devices import KINDS
from orchestrator import __version__
from orchestrator.cli import bitatlas, main
from orchestrator.errors import BitatlasError

COMMANDS = ("demo", "plan", "run", "status", "report", "search", "export", "fetch", "cluster", "doctor")


@pytest.fixture
def invoke(monkeypatch, capfd, tmp_path):
    """Run `bitatlas ARGUMENTS` in this process in an empty directory: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bitatlas", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capfd.readouterr()
        return caught.value.code, out, err

    return run


@pytest.fixture
def write_sweep(tmp_path, make_document):
    def write(**changes):
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(make_document(**changes)))
        return "study.yaml"

    return write


def files_in(directory):
    return sorted(path.name for path in directory.rglob("*"))


def test_every_contracted_command_is_there():
    assert set(bitatlas.commands) >= set(COMMANDS)


@pytest.mark.parametrize("command", sorted(bitatlas.commands))
def test_help(command):
    result = CliRunner().invoke(bitatlas, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.output) > 200
    assert result.output.startswith(f"Usage: bitatlas {command}")


def test_help_of_all_and_version(invoke):
    status, out, err = invoke("--help")
    assert (status, err) == (0, "")
    assert all(f"  {command} " in out for command in COMMANDS)
    assert invoke("--version") == (0, f"bitatlas, version {__version__}\n", "")


def refused(answer, *words):
    status, out, err = answer
    assert status == 2
    assert out.strip() == ""
    assert "Traceback" not in err
    for word in words:
        assert word in err
    return err


def one_line(err):
    assert err.startswith("bitatlas: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_sweep_file_that_is_not_there(invoke, tmp_path, command):
    one_line(refused(invoke(command, "nowhere.yaml"), "nowhere.yaml does not exist; give the path of a sweep file"))
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grids": []}, "study.yaml: unknown key 'grids'; did you mean 'grid'"),
        ({"grid": [{"method": "rtn", "weight_bits": 9}]}, "study.yaml: grid[0].weight_bits = 9"),
        ({"models": [{"name": "m", "source": "/nowhere"}]}, "models[0].source = '/nowhere' does not exist"),
        ({"models": [{"name": "m", "source": "package://no_such/x.gguf"}]}, "no Python package 'no_such'"),
    ],
)
def test_a_bad_sweep_is_one_line_and_nothing_is_written(invoke, tmp_path, write_sweep, command, changes, words):
    one_line(refused(invoke(command, write_sweep(**changes)), words))
    assert files_in(tmp_path) == ["study.yaml"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"grid": [{"method": "rtn", "weight_bits": 4, "group_size": 48}], "calibration": None},
            "group_size = 48 does not divide the 64 inputs of model.layers.0.self_attn.q_proj of tiny; use ",
        ),
        (
            {"calibration": {"corpus": "lambada", "sequence_length": 4096}},
            "calibration.sequence_length = 4096 is longer than the model's context of 2048 tokens",
        ),
        (
            {"evaluation": {"perplexity": [{"corpus": {"path": "no.txt"}}]}},
            "evaluation.perplexity[0]: no.txt cannot be read (No such file or directory)",
        ),
    ],
)
def test_what_only_the_model_can_tell_is_refused_before_anything_starts(
    invoke, tmp_path, write_sweep, tiny_checkpoint, changes, words
):
    models = [{"name": "tiny", "source": str(tiny_checkpoint)}]
    err = refused(invoke("run", write_sweep(models=models, **changes)), words)
    one_line(err)
    assert files_in(tmp_path) == ["study.yaml"]


def test_plan_shows_cells_and_writes_nothing(invoke, tmp_path, write_sweep, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("orchestrator.cost_store.observations_file", lambda _: tmp_path / "none")
    models = [{"name": "tiny", "source": str(tiny_checkpoint)}]
    status, out, _ = invoke("plan", write_sweep(models=models, workers={"device": "cpu", "count": 2}))
    assert status == 0
    assert "estimated time: under 1 min on 2 cpu workers; under 1 min of one worker's time\n" in out
    assert "analytic, not yet fitted to this machine: at a nominal 25 GFLOP/s per worker" in out
    assert "study: 4 cells, 11 jobs, 0 done" in out
    for word in ("tiny.fp", "tiny.rtn-w8-g64", "tiny.gptq-w4-g64", "16.000", "4.361", "8.375"):
        assert word in out
    assert files_in(tmp_path) == ["study.yaml"]


def test_an_outline_needs_neither_weights_nor_data(invoke, tmp_path, write_sweep, monkeypatch):
    monkeypatch.setattr("orchestrator.cost_store.observations_file", lambda _: tmp_path / "none")
    models = [{"name": "pangu", "source": "./models/openPangu-Embedded-1B-V1.1"}]
    evaluation = {"perplexity": [{"corpus": "c4"}]}
    file = write_sweep(models=models, evaluation=evaluation, workers={"device": "npu", "count": 8})
    status, out, _ = invoke("plan", "--outline", file)
    assert status == 0
    assert "study: 4 cells, 7 jobs" in out
    assert "done" not in out.splitlines()[0]
    for words in (
        "by number of npu devices:",
        "memory: a worker needs up to",
        "disk: ",
        "an outline, by configurations",
    ):
        assert words in out
    assert files_in(tmp_path) == ["study.yaml"]
    one_line(refused(invoke("plan", file), "models[0].source = './models/openPangu-Embedded-1B-V1.1' does not exist"))


def test_plan_warns_of_damaged_rates(invoke, tmp_path, write_sweep, tiny_checkpoint, monkeypatch):
    (tmp_path / "rates").write_text("{")
    monkeypatch.setattr("orchestrator.cost_store.observations_file", lambda _: tmp_path / "rates")
    status, out, _ = invoke("plan", write_sweep(models=[{"name": "tiny", "source": str(tiny_checkpoint)}]))
    assert status == 0
    assert "rates is damaged and not used for estimates" in out


@pytest.mark.parametrize("command", ["run", "plan"])
def test_an_output_that_belongs_to_something_else(invoke, tmp_path, write_sweep, command):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sweep.yaml").write_text("name: other\n")
    (tmp_path / "file").write_text("x")
    for out, words in (
        ("photos", "photos exists and is no sweep's output; choose another --out"),
        ("file", "file exists and is no sweep's output; choose another --out"),
        ("other", "other holds the sweep 'other', not 'study'; choose another --out"),
    ):
        one_line(refused(invoke(command, write_sweep(), "--out", out), words))
    assert files_in(tmp_path) == ["cat.jpg", "file", "other", "photos", "study.yaml", "sweep.yaml"]


@pytest.mark.parametrize("command", ["status", "report"])
@pytest.mark.parametrize("directory", [".", "nowhere"])
def test_a_directory_without_a_sweep(invoke, tmp_path, command, directory):
    one_line(refused(invoke(command, directory), "sweep"))
    assert files_in(tmp_path) == []


def test_export_of_what_is_not_there(invoke, tmp_path):
    one_line(refused(invoke("export", ".", "cell", "--format", "dense", "--to", "to"), "no quantized cell 'cell'"))
    refused(invoke("export", ".", "cell", "--format", "gguf", "--to", "to"), "'gguf' is not")
    refused(invoke("export", ".", "cell", "--format", "dense"), "Missing option '--to'")
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], "No such command 'rnu'"),
        (["run"], "Missing argument 'SWEEP.yaml'"),
        (["run", "x.yaml", "--workers", "0"], "0 is not in the range x>=1"),
        (["run", "x.yaml", "--wrokers", "1"], "No such option"),
        (["run", "x.yaml", "--out", ""], "Invalid value for '--out': it is empty; give a path"),
        (["run", "x.yaml", "--cache", ""], "Invalid value for '--cache': it is empty; give a path"),
        (["status", ""], "Invalid value for 'DIR': it is empty; give a path"),
    ],
)
def test_bad_usage(invoke, arguments, words):
    refused(invoke(*arguments), words)


def test_a_sweep_file_is_no_search_file(invoke, write_sweep, tmp_path):
    file = write_sweep()
    before = files_in(tmp_path)
    one_line(refused(invoke("search", file), "search is missing", "`bitatlas run` runs a sweep file"))
    assert files_in(tmp_path) == before


def test_fetch_refuses_a_directory_of_something_else(invoke, write_sweep, tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "letters").touch()
    one_line(refused(invoke("fetch", write_sweep(), "--to", "to"), "holds something else than a bundle"))
    one_line(refused(invoke("fetch", "no.yaml", "--to", "to"), "no.yaml does not exist"))
    assert files_in(tmp_path / "to") == ["letters"]


def test_a_cache_that_cannot_be_used(invoke, write_sweep, tmp_path):
    file = write_sweep()
    (tmp_path / "file").touch()
    one_line(refused(invoke("run", file, "--cache", "file"), "--cache file cannot be written (it is a file); give a"))
    one_line(refused(invoke("run", file, "--cache", "outputs/study"), "lies in the sweep's output"))
    one_line(refused(invoke("run", file, "--cache", "runtime_resources/working_dir_files/x"), "which Ray deletes"))
    assert files_in(tmp_path) == ["file", "study.yaml"]


def test_a_cluster_is_rendered(invoke, tmp_path):
    (tmp_path / "atlas.yaml").write_text(
        "name: atlas\nshared_directory: /shared\nbare_metal: {ssh_user: me, nodes: [{address: 10.0.0.1, npus: 8}]}\n"
    )
    status, out, err = invoke("cluster", "render", "atlas.yaml", "--to", "to")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "wrote to/STEPS.md",
        "wrote to/bare-metal/ray-up.yaml",
        "wrote to/bare-metal/prometheus.yml",
        "begin with to/STEPS.md",
    ]
    assert "10.0.0.1" in (tmp_path / "to" / "bare-metal" / "ray-up.yaml").read_text()


def test_a_bad_description_of_a_cluster(invoke, tmp_path):
    (tmp_path / "bad.yaml").write_text("nam: atlas\n")
    (tmp_path / "broken.yaml").write_text("a: b: c\n")
    one_line(refused(invoke("cluster", "render", "bad.yaml", "--to", "to"), "unknown key 'nam'; did you mean 'name'"))
    one_line(refused(invoke("cluster", "render", "broken.yaml", "--to", "to"), "broken.yaml: not valid YAML at line 1"))
    one_line(refused(invoke("cluster", "render", "no.yaml", "--to", "to"), "give the path of a cluster description"))
    refused(invoke("cluster", "render", "bad.yaml"), "Missing option '--to'")
    refused(invoke("cluster", "rendr"), "No such command 'rendr'")
    assert files_in(tmp_path) == ["bad.yaml", "broken.yaml"]


def test_data_that_is_no_bundle(invoke, write_sweep, tmp_path):
    file = write_sweep(data="nowhere")
    for command in ("plan", "run"):
        one_line(refused(invoke(command, file), "study.yaml: data = '"))
    assert files_in(tmp_path) == ["study.yaml"]


def test_an_error_of_our_own_keeps_its_traceback(invoke, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("orchestrator.commands.status_command", broken)
    monkeypatch.setattr(sys, "argv", ["bitatlas", "status", "."])
    with pytest.raises(ZeroDivisionError):
        main()


def test_a_torch_npu_that_does_not_load_is_one_line_with_its_remedy(invoke, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("Failed to load the backend extension: torch_npu. You can ...") from ImportError(
            "libhccl.so"
        )

    monkeypatch.setattr("orchestrator.commands.status_command", broken)
    words = "torch does not load, because torch_npu does not (libhccl.so)", "TORCH_DEVICE_BACKEND_AUTOLOAD=0"
    one_line(refused(invoke("status", "."), *words))


def test_doctor_s_arguments(invoke, monkeypatch):
    asked = []
    monkeypatch.setattr("orchestrator.doctor.command.doctor_command", lambda *a, **k: asked.append((*a, k)) or 1)
    nothing = {"out": None, "address": None, "workers": None, "as_json": False}
    assert invoke("doctor")[0] == 1
    given = ("--out", "d", "--address", "h:1", "--workers", 2, "--json")
    invoke("doctor", "study.yaml", *given)
    assert asked == [
        (None, nothing),
        (Path("study.yaml"), {"out": Path("d"), "address": "h:1", "workers": 2, "as_json": True}),
    ]


@pytest.mark.parametrize(("strict", "told"), [(None, "1"), (True, "1"), (False, "0")])
def test_workers_on_npus_are_told_whether_the_cpu_may_help(
    invoke, write_sweep, tiny_checkpoint, monkeypatch, strict, told
):
    @contextmanager
    def session(**_):
        yield SimpleNamespace(kind=KINDS["simulated-npu"], count=1, joined=None, dashboard=None)

    def pool(_, __, environment, **___):
        raise BitatlasError(f"workers get {environment}")

    monkeypatch.setattr("cluster.session.ray_session", session)
    monkeypatch.setattr("cluster.ray_pool.RayPool", pool)
    workers = {"device": "simulated-npu"} | ({} if strict is None else {"strict": strict})
    file = write_sweep(models=[{"name": "tiny", "source": str(tiny_checkpoint)}], workers=workers)
    refused(invoke("run", file), f"workers get {{'TORCH_NPU_FALLBACK_CPU_DISABLE': '{told}'}}")


def test_an_interrupt_is_status_130(invoke, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("orchestrator.commands.status_command", interrupted)
    assert invoke("status", ".")[0] == 130


LIGHT = """
import sys
import orchestrator, orchestrator.cli
try:
    orchestrator.cli.bitatlas.main(sys.argv[1:], standalone_mode=True)
except SystemExit as ended:
    assert ended.code == 0, ended.code
heavy = {"torch", "ray", "lm_eval", "transformers", "datasets", "pyarrow", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["cluster", "render", "--help"], ["--version"]])
def test_help_is_quick(arguments):
    ran = subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


SCRIPT = [Path(sys.executable).with_name("bitatlas")]
MODULE = [sys.executable, "-m", "orchestrator.cli"]


@pytest.mark.parametrize("command", [SCRIPT, MODULE], ids=["script", "module"])
def test_the_installed_command(tmp_path, command):
    ran = subprocess.run([*command, "run", "no.yaml"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "bitatlas: no.yaml does not exist; give the path of a sweep file\n"
    assert not list(tmp_path.iterdir())
