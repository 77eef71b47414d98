"""Which room may import which, and what no room may do."""

from __future__ import annotations

import ast
import itertools
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ddpo

REPOSITORY = Path(__file__).parents[1]

# What may import what, from the ground up: a room may import itself and the rooms before it.
# Imports inside functions and for type checkers count like any other.
LAYERS = (
    "ddpo.errors",
    "ddpo.basics",
    "ddpo.starter",
    "ddpo.prompts",
    "ddpo.rewards",
    "ddpo.preferences",
    "ddpo.algorithms",
    "ddpo.config",
    "ddpo.models",
    "ddpo.diffusion",
    "ddpo.training",
    "ddpo.memory",
    "ddpo.store",
    "ddpo.runs",
    "ddpo.analysis",
    "ddpo",  # ddpo/__init__.py, the front door
    "ddpo_workflow.tasks",
    "ddpo_workflow.flows",
    "ddpo_workflow.flows.cli",
    "starter_training",
    "bench",
    "tests",
)

# The folder of each package, and the name it is imported by.
PACKAGES = {
    "ddpo": "ddpo",
    "tasks": "ddpo_workflow.tasks",
    "flows": "ddpo_workflow.flows",
    "starter_training": "starter_training",
    "bench": "bench",
    "tests": "tests",
}
PRODUCT = ("ddpo", "tasks", "flows", "bench")  # what the bans on running foreign code hold for


class Import(NamedTuple):
    """Where a module imports another one of this repository."""

    module: str
    imported: str
    line: int
    at_import: bool  # not only when a function runs, and not only for type checkers


def sources(*folders: str, root: Path = REPOSITORY) -> list[Path]:
    return [file for folder in folders for file in sorted((root / folder).rglob("*.py"))]


def modules(root: Path = REPOSITORY) -> dict[str, Path]:
    """Return the file of every module, by the name it is imported by."""
    files = {}
    for folder, package in PACKAGES.items():
        for file in sources(folder, root=root):
            parts = file.relative_to(root / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            files[".".join((package, *parts))] = file
    return files


def imported_names(node: ast.AST, package: str = "") -> Iterator[str]:
    """Yield what one node imports; of `from a import b` both `a` and `a.b`: b may be a module.

    Args:
        node: Any node; one that is no import yields nothing.
        package: The package of the module, to resolve relative imports.
    """
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        source = ".".join([*above, *([node.module] if node.module else [])])
        yield source
        yield from (f"{source}.{alias.name}" for alias in node.names)
    elif (
        isinstance(node, ast.Call)
        and called_name(node).endswith(("import_module", "__import__"))
        and node.args
        and isinstance(node.args[0], ast.Constant)
    ):
        yield str(node.args[0].value)


def called_name(node: ast.Call) -> str:
    return ast.unparse(node.func)


def nodes(tree: ast.AST, at_import: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every node, and whether it runs when its module is imported."""
    for child in ast.iter_child_nodes(tree):
        runs = at_import and not isinstance(
            tree, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        )
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            runs = False
        yield child, runs
        yield from nodes(child, runs)


def imports(root: Path = REPOSITORY) -> list[Import]:
    """Return all imports of modules of this repository by one another."""
    files = modules(root)
    found = []
    for module, file in files.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for node, at_import in nodes(ast.parse(file.read_text())):
            names = list(imported_names(node, package))
            if isinstance(node, ast.ImportFrom):  # the module, or the modules taken out of it
                inner = [name for name in names[1:] if name in files]
                names = inner + ([names[0]] if len(inner) < len(names) - 1 else [])
            found += [
                Import(module, name, node.lineno, at_import)
                for name in names
                if name in files or name.partition(".")[0] in ("ddpo_workflow", *PACKAGES)
            ]
    return found


def room_of(module: str) -> str:
    """Return the room of a module: the longest name in `LAYERS` that it lies under."""
    parents = itertools.accumulate(module.split("."), lambda a, b: f"{a}.{b}")
    rooms = [name for name in parents if name in LAYERS]
    if not rooms or (rooms[-1] == "ddpo" and module != "ddpo"):
        raise AssertionError(f"{module} is in no room of LAYERS")
    return rooms[-1]


def upward(root: Path = REPOSITORY) -> dict[tuple[str, str], list[str]]:
    """Return the imports of rooms that stand higher, by the two rooms."""
    found: dict[tuple[str, str], list[str]] = {}
    for each in imports(root):
        lower, higher = room_of(each.module), room_of(each.imported)
        if LAYERS.index(higher) > LAYERS.index(lower):
            line = f"{each.module}:{each.line} imports {each.imported}"
            found.setdefault((lower, higher), []).append(line)
    return found


def circle(root: Path = REPOSITORY) -> list[str]:
    """Return modules that import one another while they are imported, or nothing."""
    graph: dict[str, set[str]] = {}
    for each in imports(root):
        if each.at_import and each.module != each.imported:
            graph.setdefault(each.module, set()).add(each.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def bare_names(source: str) -> list[str]:
    """Return imports of `flows` and `tasks` by names that only a checkout's root would have."""
    names = {name for node in ast.walk(ast.parse(source)) for name in imported_names(node)}
    return sorted(name for name in names if name.partition(".")[0] in ("flows", "tasks"))


def test_no_room_imports_a_higher_one() -> None:
    assert not upward()


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert not circle()


def test_every_room_is_there() -> None:
    assert set(LAYERS) - {"ddpo"} <= {room_of(module) for module in modules()}


def shadowed(folder: Path) -> list[str]:
    """Return the modules and packages of a folder that hide an installed one, were it on the path.

    A folder without Python files hides nothing: the one installed is preferred to it.
    """
    packages = (file.parent for file in folder.glob("*/__init__.py"))
    modules = (file for file in folder.glob("*.py") if file.stem != "__init__")
    names = sorted(path.stem for path in (*packages, *modules))
    code = "import importlib.util, sys; print(*filter(importlib.util.find_spec, sys.argv[1:]))"
    # Isolated: neither the checkout nor the folder itself is on the path.
    command = [sys.executable, "-I", "-c", code, *names]
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd="/", timeout=900
    )
    return found.stdout.split()


def test_no_flow_hides_an_installed_module() -> None:
    """Prefect puts the folder of a deployment's entrypoint at the front of the path."""
    assert not shadowed(REPOSITORY / "flows")


def test_a_flow_that_hides_an_installed_module_is_found(tmp_path: Path) -> None:
    (tmp_path / "requests.py").touch()
    (tmp_path / "epoch.py").touch()
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "numpy").mkdir()
    assert shadowed(tmp_path) == ["requests", "torch"]


def test_few_modules_lie_loose_in_the_library() -> None:
    assert len(list((REPOSITORY / "ddpo").glob("*.py"))) <= 3


def test_the_workflow_is_imported_by_its_installed_name() -> None:
    files = sources(*PACKAGES, "examples")
    assert len(files) > 300
    assert not {str(file): bad for file in files if (bad := bare_names(file.read_text()))}


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """Two modules in each of four rooms, which import as they may."""
    for name, source in {
        "ddpo/__init__.py": "from ddpo.errors import A\n",
        "ddpo/errors.py": "import json\n",
        "ddpo/store/__init__.py": "from ddpo.store.objects import A\n",
        "ddpo/store/objects.py": "import ddpo.errors\n",
        "ddpo/store/keys.py": "from . import objects\nfrom ddpo.errors import A\n",
        "tasks/__init__.py": "",
        "tasks/sample.py": "from ddpo.store import A, keys\n",
        "flows/__init__.py": "",
        "flows/epoch.py": "from ddpo_workflow.tasks import sample\n",
        "flows/cli/__init__.py": "",
        "flows/cli/app.py": "from ddpo_workflow.flows.epoch import A\n",
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return tmp_path


def test_a_tree_whose_arrows_run_down_passes(small_tree: Path) -> None:
    assert len(imports(small_tree)) == 9
    assert not upward(small_tree) and not circle(small_tree)


@pytest.mark.parametrize(
    ("file", "planted", "arrow"),
    [
        ("ddpo/errors.py", "import ddpo.store.keys", "ddpo.errors > ddpo.store"),
        ("ddpo/errors.py", "from ddpo.store import keys", "ddpo.errors > ddpo.store"),
        ("ddpo/errors.py", "from ddpo import store", "ddpo.errors > ddpo.store"),
        ("ddpo/errors.py", "from .store.keys import A", "ddpo.errors > ddpo.store"),
        ("ddpo/store/keys.py", "from ddpo import A", "ddpo.store > ddpo"),
        ("ddpo/store/keys.py", "def f():\n    import bench", "ddpo.store > bench"),
        (
            "ddpo/store/keys.py",
            "if TYPE_CHECKING:\n    from ddpo_workflow.tasks.sample import A",
            "ddpo.store > ddpo_workflow.tasks",
        ),
        (
            "ddpo/store/keys.py",
            "importlib.import_module('ddpo_workflow.flows')",
            "ddpo.store > ddpo_workflow.flows",
        ),
        (
            "tasks/sample.py",
            "from ddpo_workflow.flows.epoch import A",
            "ddpo_workflow.tasks > ddpo_workflow.flows",
        ),
        (
            "flows/epoch.py",
            "from ddpo_workflow.flows.cli import app",
            "ddpo_workflow.flows > ddpo_workflow.flows.cli",
        ),
        ("flows/epoch.py", "from tests import tiny", "ddpo_workflow.flows > tests"),
    ],
)
def test_a_planted_import_across_layers_is_found(
    small_tree: Path, file: str, planted: str, arrow: str
) -> None:
    with (small_tree / file).open("a") as source:
        source.write(planted + "\n")
    assert [" > ".join(rooms) for rooms in upward(small_tree)] == [arrow]


def test_a_module_outside_all_rooms_is_found(small_tree: Path) -> None:
    (small_tree / "ddpo/loose.py").write_text("import ddpo.errors\n")
    with pytest.raises(AssertionError, match=r"ddpo\.loose is in no room"):
        upward(small_tree)


def test_a_planted_circle_is_found(small_tree: Path) -> None:
    objects = small_tree / "ddpo/store/objects.py"
    objects.write_text("def f():\n    import ddpo.store.keys\n")
    assert not circle(small_tree)
    objects.write_text("try:\n    import ddpo.store.keys\nexcept ImportError:\n    pass\n")
    assert set(circle(small_tree)) == {"ddpo.store.keys", "ddpo.store.objects"}


@pytest.mark.parametrize("source", ["import tasks", "def f():\n    from flows.epoch import A"])
def test_bare_names_of_the_workflow_are_found(source: str) -> None:
    assert bare_names(source)
    assert not bare_names("from ddpo_workflow.tasks import sample\nimport tasks_of_others")


def place_of(room: str) -> str:
    """Return where a room lies, as the table in docs/architecture.md writes it."""
    if room == "ddpo":
        return "ddpo/__init__.py"
    folder, package = next(
        (f, p) for f, p in PACKAGES.items() if room == p or room.startswith(f"{p}.")
    )
    path = Path(folder, *room.removeprefix(package).strip(".").split("."))
    return f"{path}/" if (REPOSITORY / path).is_dir() else f"{path}.py"


def test_the_table_of_rooms_says_what_the_layers_say() -> None:
    text = (REPOSITORY / "docs/architecture.md").read_text()
    section = text.partition("\n## Rooms\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \|.*\| ([^|]+) \|$", section, re.MULTILINE)
    places = [place_of(room) for room in LAYERS]
    assert rows == list(
        zip(places, ["nothing", *(f"up to `{place}`" for place in places)], strict=False)
    )


_IMPORT_CONFIG = """
import json, sys
import ddpo.config
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def output_of(code: str) -> Any:
    """Return what a fresh process prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_config_is_checked_without_anything_heavy() -> None:
    imported = output_of(_IMPORT_CONFIG)
    assert {"ddpo", "pydantic"} <= set(imported)
    assert not {"torch", "diffusers", "transformers", "pyarrow", "prefect", "mlflow"} & set(
        imported
    )


_IMPORT_FLOW = """
import json, sys
import ddpo_workflow.flows.train
print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.slow
def test_a_flow_is_imported_without_model_libraries() -> None:
    imported = output_of(_IMPORT_FLOW)
    assert {"torch", "prefect", "mlflow"} <= set(imported)
    assert not {"diffusers", "transformers", "peft", "inflect", "matplotlib"} & set(imported)
    assert "torch.distributed.fsdp" not in imported


_IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys
import ddpo

names = [m.name for m in pkgutil.walk_packages(ddpo.__path__, "ddpo.")]
for name in names:
    importlib.import_module(name)
roots = {name.partition(".")[0] for name in sys.modules}
print(json.dumps({"imported": names, "workflow": sorted(roots & {"prefect", "mlflow"})}))
"""


@pytest.mark.slow
def test_the_library_imports_neither_prefect_nor_mlflow_at_any_depth() -> None:
    report = output_of(_IMPORT_EVERYTHING)
    expected = [module.name for module in pkgutil.walk_packages(ddpo.__path__, "ddpo.")]
    assert report["imported"] == expected and "ddpo.store.checkpoints" in expected
    assert report["workflow"] == []


def unpickling(source: str) -> list[str]:
    """Return what a source has that could run code found in data."""
    tree = ast.parse(source)
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}
    found = []
    for node in ast.walk(tree):
        found += [n for n in imported_names(node) if n.partition(".")[0] in modules]
        if isinstance(node, ast.Call):
            name = called_name(node)
            found += [name] if name in calls else []
            found += [
                f"{name}({keyword.arg}=...)"
                for keyword in node.keywords
                if keyword.arg in ("trust_remote_code", "allow_pickle")
                and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            ]
        elif isinstance(node, ast.ImportFrom) and node.module in ("torch", "yaml"):
            bad = {"load", "unsafe_load", "full_load"}
            found += [f"{node.module}.{a.name}" for a in node.names if a.name in bad]
    return found


@pytest.mark.parametrize("folder", PRODUCT)
def test_nothing_is_unpickled_or_evaluated(folder: str) -> None:
    files = sources(folder)
    assert files
    found = {str(file): bad for file in files if (bad := unpickling(file.read_text()))}
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from joblib import load",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import yaml\nyaml.load('x', yaml.Loader)",
        "eval('1')",
        "model.from_pretrained('x', trust_remote_code=True)",
        "np.load('x', allow_pickle=flag)",
    ],
)
def test_the_ban_would_see_it(source: str) -> None:
    assert unpickling(source)


@pytest.mark.parametrize(
    "source",
    ["import yaml\nyaml.safe_load('x')", "model.eval()", "f(trust_remote_code=False)"],
)
def test_the_ban_lets_pass_what_is_safe(source: str) -> None:
    assert not unpickling(source)


def test_pipelines_are_loaded_from_safetensors_only() -> None:
    """`from_pretrained` of diffusers falls back to pickles unless it is told not to."""
    loads = 0
    for file in sources("ddpo", "tasks", "flows"):
        if "starter" in file.parts:  # the judge's files come with the package
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not called_name(node).endswith("from_pretrained"):
                continue
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("use_safetensors") == "True", file
            assert keywords.get("local_files_only") == "True", file
            loads += 1
    assert loads
