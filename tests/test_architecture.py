"""The arrows between the packages, and what none of them may do. Read from the source; nothing is imported."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = ("quantizers", "evaluators", "cluster")
PACKAGES = (*LEAVES, "orchestrator")
MAX_LINES = 450
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> set[str]:
    """Top-level names of the modules that a file imports anywhere, `importlib.import_module("x.y")` included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found.add(node.module)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith(("import_module", "__import__")):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return {module.split(".")[0] for module in found}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


every_file = pytest.mark.parametrize("file", FILES, ids=name_of)


def test_the_packages_are_found():
    assert {name_of(file).split("/")[0] for file in FILES} == set(PACKAGES)
    assert len(FILES) > 40


def test_imports_are_seen():
    tree = ast.parse("import a.b, c\ndef f():\n    from d.e import g\n    importlib.import_module('h.i')")
    assert imports(tree) == {"a", "c", "d", "h"}


@every_file
def test_leaves_know_no_sibling_and_not_the_orchestrator(file):
    own = file.relative_to(ROOT).parts[0]
    if own in LEAVES:
        assert not imports(TREES[file]) & set(PACKAGES) - {own}


@every_file
def test_ray_is_imported_in_cluster_alone(file):
    if file.relative_to(ROOT).parts[0] != "cluster":
        assert "ray" not in imports(TREES[file])


@every_file
def test_tests_are_not_imported(file):
    assert "tests" not in imports(TREES[file])


@every_file
def test_nothing_runs_or_unpickles_what_it_reads(file):
    modules = imports(TREES[file])
    assert not modules & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    for call in calls(TREES[file]):
        name = dotted(call.func)
        assert name not in {"eval", "exec", "compile", "torch.load", "yaml.unsafe_load", "os.system", "os.popen"}, (
            f"line {call.lineno}"
        )
        for keyword in call.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
            if keyword.arg in {"trust_remote_code", "allow_pickle"}:
                assert value is False, f"line {call.lineno}: {keyword.arg}"
            if keyword.arg == "shell":
                assert value is False, f"line {call.lineno}: shell"


def test_numpy_files_are_opened_without_pickles():
    for file, tree in TREES.items():
        for call in calls(tree):
            if dotted(call.func) in {"np.load", "numpy.load"}:
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert given.get("allow_pickle") == "False", f"{name_of(file)} line {call.lineno}"


def test_yaml_is_loaded_safely():
    """`yaml.load` stands once, with a subclass of SafeLoader."""
    loads = [
        (name_of(file), call)
        for file, tree in TREES.items()
        for call in calls(tree)
        if dotted(call.func) == "yaml.load"
    ]
    for file, call in loads:
        assert file == "orchestrator/config.py"
        (loader,) = [keyword.value.id for keyword in call.keywords if keyword.arg == "Loader"]
        bases = {
            node.name: [dotted(base) for base in node.bases]
            for node in ast.walk(TREES[ROOT / file])
            if isinstance(node, ast.ClassDef)
        }
        assert bases[loader] == ["yaml.SafeLoader"]


@every_file
def test_no_file_is_too_long(file):
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: split it"


@every_file
def test_every_file_says_what_it_is(file):
    assert ast.get_docstring(TREES[file])


@every_file
def test_no_path_of_one_machine(file):
    text = file.read_text(encoding="utf-8")
    for place in ("/home/", "/root/", "/Users/", "/work/"):
        assert place not in text


def test_module_names_of_tests_are_unique():
    """The folders of tests are no packages, so two files of one name would hide each other."""
    names = [file.stem for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
    assert not set(names) & set(sys.stdlib_module_names)
