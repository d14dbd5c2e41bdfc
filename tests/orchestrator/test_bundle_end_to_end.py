"""A bundle from a made-up Hub on localhost, and a sweep that runs from it with the network denied."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pytest
import yaml

from evaluators.recipes import RECIPES
from orchestrator.schema import ITEMS, RESULTS
from orchestrator.store import read_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

BITATLAS = [sys.executable, "-c", "from orchestrator.cli import main; main()"]
COMMIT = "c" * 40
# Nobody answers there, so that whoever asks the network anyway fails at once.
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}


class Hub(BaseHTTPRequestHandler):
    """The few endpoints that `huggingface_hub` and `datasets` ask."""

    protocol_version = "HTTP/1.1"
    repositories: ClassVar = {}  # "models/org/name" -> (commit, {path: bytes})
    fails_after = None  # files that are still served before every further one breaks off
    asked: ClassVar = []
    served: ClassVar = []  # files

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Type", "").startswith("application/json"):
            self.answer(wanted=json.loads(body)["paths"])
        else:
            self.answer(wanted=parse_qs(body.decode())["paths"])

    def answer(self, *, with_body=True, wanted=None):
        path = unquote(urlsplit(self.path).path).strip("/").replace("refs/convert/parquet", "converted")
        type(self).asked.append(f"{self.command} {path}")
        api = path.startswith("api/")
        path = path.removeprefix("api/")
        if not path.startswith(("models/", "datasets/")):
            path = f"models/{path}"
        name = "/".join(path.split("/")[:3])
        if name not in self.repositories:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body=with_body)
        commit, files = self.repositories[name]
        rest = path.split("/")[3:]
        if not api and rest[0] == "resolve":
            return self.file(files, commit, "/".join(rest[2:]), with_body=with_body)
        if rest and rest[0] in {"tree", "paths-info"}:
            under = "/".join(rest[2:])
            listed = [
                {"type": "file", "path": file, "size": len(content), "oid": "0" * 40}
                for file, content in files.items()
                if file.startswith(under) and (wanted is None or file in wanted)
            ]
            return self.send(200, json.dumps(listed).encode(), {}, with_body=with_body)
        if rest and rest[0] != "revision":
            return self.send(404, b"{}", {}, with_body=with_body)
        facts = {"id": name.partition("/")[2], "sha": commit, "siblings": [{"rfilename": file} for file in files]}
        return self.send(200, json.dumps(facts | {"tags": [], "private": False}).encode(), {}, with_body=with_body)

    def file(self, files, commit, file, *, with_body):
        if file not in files:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, with_body=with_body)
        cls = type(self)
        if with_body and cls.fails_after is not None:
            cls.fails_after -= 1
            if cls.fails_after < 0:
                return self.send(500, b"", {}, with_body=with_body)
        cls.served += [self.path] if with_body else []
        content = files[file]
        told = {"ETag": f'"{abs(hash(content)):040x}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0] or 0)
        return self.send(206 if "Range" in self.headers else 200, content[start:], told, with_body=with_body)

    def send(self, status, body, headers, *, with_body):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def parquet(rows):
    import io

    buffer = io.BytesIO()
    datasets.Dataset.from_list(rows).to_parquet(buffer)
    return buffer.getvalue()


def race(count):
    problem = [{"question": "What does Ann have?", "options": ["cats", "a bird", "fish", "nothing"], "answer": "A"}]
    return [{"article": f"Ann has {n} cats.", "problems": str(problem)} for n in range(count)]


def configured(config, **splits):
    files = [{"split": split, "path": f"{config}/{split}.parquet"} for split in splits]
    card = "---\n" + yaml.safe_dump({"configs": [{"config_name": config, "data_files": files}]}) + "---\n"
    return {"README.md": card.encode()} | {f"{config}/{split}.parquet": parquet(rows) for split, rows in splits.items()}


@pytest.fixture(scope="module")
def hub(tiny_checkpoint):
    model = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
    model |= {"pytorch_model.bin": b"a pickle", "modeling_tiny.py": b"print('no')"}
    text = [{"text": f"line {n} of a text that goes on and on"} for n in range(200)]
    Hub.repositories = {
        "models/somebody/tiny": (COMMIT, model),
        "datasets/EleutherAI/race": (COMMIT, configured("high", test=race(8))),
        "datasets/baber/piqa": (
            COMMIT,
            configured(
                "default",
                train=[{"goal": f"goal {n}", "sol1": "one", "sol2": "two", "label": n % 2} for n in range(9)],
            ),
        ),
        "datasets/Salesforce/wikitext": (
            RECIPES["wikitext2"].evaluation.revision,
            configured("wikitext-2-raw-v1", train=text, test=text),
        ),
        "datasets/ptb-text-only/ptb_text_only": (
            COMMIT,
            {
                RECIPES["ptb-new"].evaluation.file: parquet([{"sentence": row["text"]} for row in text]),
                "README.md": b"",
            },
        ),
        "datasets/allenai/c4": (
            RECIPES["c4-new"].evaluation.revision,
            {
                RECIPES["c4-new"].evaluation.file: gzip.compress(
                    "".join(json.dumps(row) + "\n" for row in text).encode()
                ),
                "README.md": b"",
            },
        ),
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def bitatlas(*arguments, **variables):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [*BITATLAS, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment | {"COLUMNS": "200", "RAY_ADDRESS": "127.0.0.1:9"} | variables,
        check=False,
    )


def write_sweep(path, **changes):
    document = {
        "name": "far",
        "models": [{"name": "tiny", "source": "somebody/tiny"}],
        "grid": [{"method": "gptq", "weight_bits": 4, "group_size": 32}],
        "calibration": {"corpus": "wikitext2", "samples": 4, "sequence_length": 64},
        "evaluation": {
            "perplexity": [
                {"corpus": "wikitext2", "sequence_length": 128, "max_windows": 4},
                {"corpus": "c4-new", "sequence_length": 128, "max_windows": 2},
                {"corpus": "ptb-new", "sequence_length": 128, "max_windows": 2},
                {"corpus": {"path": str(path.parent / "own.txt")}, "sequence_length": 32},
            ],
            "tasks": [{"name": "race", "limit": 6}, {"name": "piqa", "limit": 4, "num_fewshot": 2}],
        },
        "workers": {"device": "cpu", "count": 1},
    }
    path.write_text(yaml.safe_dump(document | changes))
    return path


@pytest.fixture(scope="module")
def fetched(hub, tmp_path_factory):
    """A sweep file and the bundle that was fetched for it, the first time in vain."""
    folder = tmp_path_factory.mktemp("connected")
    (folder / "own.txt").write_text("a text of one's own\n\n" * 40)
    sweep = write_sweep(folder / "far.yaml")
    Hub.fails_after = 3
    first = bitatlas("fetch", sweep, "--to", folder / "bundle", HF_ENDPOINT=hub)
    Hub.fails_after = None
    interrupted = list(Hub.served)
    Hub.served.clear()
    second = bitatlas("fetch", sweep, "--to", folder / "bundle", HF_ENDPOINT=hub)
    return sweep, folder / "bundle", first, second, interrupted


def test_fetch_is_resumed_and_takes_no_code(fetched):
    _, bundle, first, second, interrupted = fetched
    assert first.returncode == 2, first.stdout + first.stderr
    assert "is neither in the local cache nor to be had from the Hub" in first.stderr
    assert second.returncode == 0, second.stdout + second.stderr
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert manifest["models"] == {"somebody/tiny": COMMIT}
    assert manifest["data"]["race"] == f"EleutherAI/race @ {COMMIT}"
    assert manifest["data"]["piqa"] == f"baber/piqa @ {COMMIT}"
    assert not any(name.endswith((".bin", ".py")) for name in manifest["files"])
    assert any(name.endswith("model.safetensors") for name in manifest["files"])
    assert len(interrupted) == 3
    assert set(Hub.served).isdisjoint(interrupted)
    assert "model somebody/tiny" in second.stdout


@pytest.fixture(scope="module")
def far(fetched, tmp_path_factory):
    """The bundle and the sweep file on another machine, where the connected one's files are not."""
    sweep, bundle, *_ = fetched
    folder = tmp_path_factory.mktemp("far")
    shutil.copytree(bundle, folder / "bundle", symlinks=True)
    document = yaml.safe_load(sweep.read_text()) | {"data": "bundle"}
    (folder / "far.yaml").write_text(yaml.safe_dump(document))
    return folder


def test_a_sweep_runs_from_its_bundle_without_a_network(far, fetched, hub):
    sweep = fetched[0]
    (sweep.parent / "own.txt").rename(sweep.parent / "moved.txt")
    out = far / "out"
    run = bitatlas("run", far / "far.yaml", "--out", out, "--no-report", **NOWHERE)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = read_table(out, RESULTS).to_pylist()
    assert {row["task"] for row in rows} == {"wikitext2", "c4-new", "ptb-new", "own", "race", "piqa"}
    assert {row["status"] for row in rows} == {"ok"}
    assert len(read_table(out, ITEMS).to_pylist()) > 0
    # the resolved sweep file finds the bundle too; and where the Hub could be asked, it is not
    Hub.asked.clear()
    again = bitatlas("plan", out / "sweep.yaml", "--out", out, HF_ENDPOINT=hub)
    assert Hub.asked == []
    assert again.returncode == 0, again.stdout + again.stderr
    assert "13 jobs, 13 done" in again.stdout
    cell = next(row["cell_id"] for row in rows if row["method"] == "gptq")
    export = bitatlas("export", out, cell, "--format", "dense", "--to", far / "dense", **NOWHERE)
    assert export.returncode == 0, export.stdout + export.stderr


@pytest.mark.parametrize("harm", ["missing", "shorter", "other"])
def test_a_damaged_bundle_is_refused_by_the_file(far, tmp_path, harm):
    shutil.copytree(far / "bundle", tmp_path / "bundle", symlinks=True)
    shutil.copy(far / "far.yaml", tmp_path)
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    name = next(name for name in manifest["files"] if "snapshots" in name and name.endswith("model.safetensors"))
    weights = (tmp_path / "bundle" / name).resolve()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    if harm == "missing":
        weights.unlink()
    else:
        weights.write_bytes(content if harm == "other" else content[:-1])
    run = bitatlas("run", tmp_path / "far.yaml", "--out", tmp_path / "out", **NOWHERE)
    assert run.returncode == 2
    words = {"missing": "is missing", "shorter": "bytes instead of", "other": "has another content than was gathered"}
    assert words[harm] in run.stderr
    assert "hub/models--somebody--tiny/" in run.stderr
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_sweep_that_names_more_than_its_bundle(far, tmp_path):
    document = yaml.safe_load((far / "far.yaml").read_text()) | {"data": str(far / "bundle")}
    document["models"].append({"name": "other", "source": "somebody/other"})
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(document))
    run = bitatlas("plan", tmp_path / "more.yaml", **NOWHERE)
    assert run.returncode == 2
    assert "models[1].source = 'somebody/other' is not in the bundle" in run.stderr


def test_what_the_hub_does_not_have(hub, tmp_path):
    (tmp_path / "own.txt").write_text("text")
    sweep = write_sweep(tmp_path / "no.yaml", models=[{"name": "none", "source": "somebody/none"}])
    run = bitatlas("fetch", sweep, "--to", tmp_path / "bundle", HF_ENDPOINT=hub)
    assert run.returncode == 2
    assert "models[0].source = 'somebody/none' is no local directory and could not be had from the Hub" in run.stderr
    assert not (tmp_path / "bundle" / "bundle.json").exists()
