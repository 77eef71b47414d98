"""What `pip install ddpo` puts on a machine: from a wheel, and from an sdist, built right here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import ddpo

REPOSITORY = Path(__file__).parents[1]
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]

pytestmark = pytest.mark.slow


def build(source: Path, kind: str, out: Path) -> Path:
    """Build a distribution of a source tree with setuptools alone: no network, no isolation."""
    out.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout, so that a build leaves nothing in the real one."""
    folder = tmp_path_factory.mktemp("built") / "checkout"
    hidden = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "ddpo-data")
    shutil.copytree(REPOSITORY, folder, symlinks=True, ignore=hidden)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    return build(checkout, "wheel", checkout.parent / "wheel")


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The wheel, unpacked as pip does it."""
    folder = wheel.parent.parent / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_installed(installed: Path, folder: Path, code: str, *words: str) -> str:
    """Run code in a bare folder, with the wheel and not the checkout on the path."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed), "PREFECT_HOME": str(folder / "prefect")},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_site_packages_gets_two_names_and_no_common_ones(installed: Path) -> None:
    """A module `tasks` or `flows` of ours would hide the one of somebody's own project."""
    names = {path.name for path in installed.iterdir()}
    assert names == {"ddpo", "ddpo_workflow", f"ddpo-{VERSION}.dist-info"}


@pytest.mark.parametrize("room", ["flows", "tasks"])
def test_links_of_the_checkout_are_folders_of_the_wheel(installed: Path, room: str) -> None:
    folder = installed / "ddpo_workflow" / room
    assert folder.is_dir() and not folder.is_symlink()
    shipped = {path.relative_to(folder) for path in folder.rglob("*.py")}
    assert shipped == {
        path.relative_to(REPOSITORY / room) for path in (REPOSITORY / room).rglob("*.py")
    }


def test_every_file_of_the_library_is_shipped(installed: Path) -> None:
    """Weights, prompts and the marker of types as much as the code, byte by byte."""
    source = REPOSITORY / "ddpo"
    files = [f for f in source.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert {"py.typed", "simple_animals.txt", "glyphs.png", "heads.safetensors"} <= {
        file.name for file in files
    }
    for file in files:
        shipped = installed / "ddpo" / file.relative_to(source)
        assert shipped.is_file(), file
        assert shipped.read_bytes() == file.read_bytes(), file
    assert (installed / "ddpo_workflow" / "py.typed").is_file()


def test_an_sdist_builds_the_same_wheel(checkout: Path, wheel: Path) -> None:
    archive = build(checkout, "sdist", checkout.parent / "sdist")
    with tarfile.open(archive) as packed:
        # Python knows filters from 3.11.4 on; 3.11.2 is Debian 12's.
        filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        packed.extractall(checkout.parent / "unpacked", **filters)
    (unpacked,) = (checkout.parent / "unpacked").iterdir()
    again = build(unpacked, "wheel", checkout.parent / "again")

    def contents(file: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if not name.endswith("RECORD")]
            return {name: archive.read(name) for name in names}

    assert contents(again) == contents(wheel)


def test_flows_and_the_starter_work_from_an_installed_wheel(
    installed: Path, tmp_path: Path
) -> None:
    code = (
        "import ddpo, ddpo_workflow.flows.train, ddpo_workflow.flows as flows\n"
        "from ddpo.prompts import load_prompts\n"
        "from ddpo.starter.judge import Judge\n"
        "from ddpo.starter import JUDGE_PATH\n"
        "Judge.load(JUDGE_PATH)\n"
        "print(ddpo.__file__, flows.__file__, len(load_prompts('simple_animals', {})),"
        " ddpo.__version__, sep='\\n')\n"
    )
    library, workflow, prompts, version = run_installed(installed, tmp_path, code).splitlines()
    assert Path(library) == installed / "ddpo" / "__init__.py"
    assert Path(workflow) == installed / "ddpo_workflow" / "flows" / "__init__.py"
    assert (prompts, version) == ("45", VERSION)


def test_the_command_works_from_an_installed_wheel(installed: Path, tmp_path: Path) -> None:
    (points,) = installed.glob("*.dist-info/entry_points.txt")
    (target,) = re.findall(r"^ddpo = (\S+)$", points.read_text(), re.MULTILINE)
    module, _, function = target.partition(":")
    code = f"import sys; sys.argv[0] = 'ddpo'\nfrom {module} import {function} as main\nmain()"
    screen = run_installed(installed, tmp_path, code, "--help")
    assert "train" in screen and "resume" in screen


def test_the_version_is_that_of_the_package() -> None:
    assert ddpo.__version__ == VERSION


def test_a_checkout_that_is_not_installed_says_so(tmp_path: Path) -> None:
    (tmp_path / "ddpo" / "basics").mkdir(parents=True)
    for file in ("__init__.py", "basics/__init__.py", "basics/version.py"):
        shutil.copy(REPOSITORY / "ddpo" / file, tmp_path / "ddpo" / file)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import ddpo; print(ddpo.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0+not.installed"
