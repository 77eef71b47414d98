"""Lines between the rooms that nobody crosses by accident."""

from __future__ import annotations

import ast
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ddpo

REPOSITORY = Path(__file__).parents[1]
ROOMS = ("ddpo", "tasks", "flows", "bench")

_IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys
import ddpo

names = [m.name for m in pkgutil.walk_packages(ddpo.__path__, "ddpo.")]
for name in names:
    importlib.import_module(name)
roots = {name.partition(".")[0] for name in sys.modules}
print(json.dumps({"imported": names, "found": sorted(roots & {"prefect", "mlflow"})}))
"""


def sources(*rooms: str) -> list[Path]:
    return [file for room in rooms for file in sorted((REPOSITORY / room).rglob("*.py"))]


def imported_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def called_name(node: ast.Call) -> str:
    return ast.unparse(node.func)


def test_the_library_imports_neither_prefect_nor_mlflow_at_any_depth() -> None:
    found = subprocess.run(
        [sys.executable, "-c", _IMPORT_EVERYTHING],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    report = json.loads(found.stdout.splitlines()[-1])
    expected = [module.name for module in pkgutil.walk_packages(ddpo.__path__, "ddpo.")]
    assert report["imported"] == expected and "ddpo.store.checkpoints" in expected
    assert report["found"] == []


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("ddpo", {"prefect", "mlflow", "tasks", "flows", "bench"}),
        ("tasks", {"flows", "bench"}),
        ("flows", {"bench"}),
    ],
)
def test_a_room_imports_only_what_lies_below_it(room: str, forbidden: set[str]) -> None:
    """Imports inside functions count too."""
    files = sources(room)
    assert files
    for file in files:
        roots = {name.partition(".")[0] for name in imported_names(ast.parse(file.read_text()))}
        assert not roots & forbidden, file


def unpickling(source: str) -> list[str]:
    """Return what a source has that could run code found in data."""
    tree = ast.parse(source)
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}
    found = [n for n in imported_names(tree) if n.partition(".")[0] in modules]
    for node in ast.walk(tree):
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


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_is_unpickled_or_evaluated(room: str) -> None:
    files = sources(room)
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
        if "starter" in file.parts:  # a training script on files of its own
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not called_name(node).endswith("from_pretrained"):
                continue
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("use_safetensors") == "True", file
            assert keywords.get("local_files_only") == "True", file
            loads += 1
    assert loads
