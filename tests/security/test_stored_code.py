"""What a run from elsewhere may name, and which commands run it. Docstrings: docs/security.md."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from ddpo.analysis.history import open_history
from ddpo.basics import plugins, trust
from ddpo.errors import NotTrusted
from ddpo.rewards import load_reward
from ddpo.runs import open_run
from ddpo.store import keys, runs
from ddpo.store.objects import Store
from ddpo_workflow.flows import fork, rescore
from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.flows.cli import overview
from ddpo_workflow.flows.run_requests import (
    EvaluateRequest,
    ForkRequest,
    RescoreRequest,
    ResumeRequest,
    TrainRequest,
)
from ddpo_workflow.flows.train import resume
from tests.recorded import record_run

REPOSITORY = Path(plugins.__file__).parents[2]
PLANTED = "planted_code"
CODE = """
from os import system  # noqa: F401

def score(images, prompts):
    return [1.0] * len(images)

def prompts():
    return ["a cat", "a dog"]
"""


def imported() -> bool:
    return PLANTED in sys.modules


@dataclass(frozen=True)
class Elsewhere:
    """A copy of a store that another machine wrote, with runs of its own code and of none."""

    root: Path

    @property
    def store(self) -> Store:
        return Store.open(str(self.root))

    def craft(self, run_id: str, **identity: Any) -> None:
        """Change a run's identity as whoever can write to the store may, checksum and all."""
        record = runs.load_run(self.store, run_id)
        changed = record.model_copy(update={"identity": {**record.identity, **identity}})
        (self.root / keys.run_key(run_id)).write_bytes(changed.to_bytes())

    def operate(self, run_id: str, **operation: Any) -> None:
        """Add a start with other operation settings."""
        last = runs.list_operations(self.store, run_id)[-1]
        assert isinstance(last, dict)
        runs.append_operation(self.store, run_id, {**last, **operation})

    def resume(self, run_id: str, *, trust: bool = False) -> None:
        """Check all that `ddpo resume` checks before it starts."""
        request = ResumeRequest(run_id=run_id, storage=str(self.root), trust=trust)
        assert request.resolve().run_id == run_id


@pytest.fixture(scope="module")
def written(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the other machine wrote: the run `own`, whose code is its own, and `plain`."""
    folder = tmp_path_factory.mktemp("elsewhere")
    with pytest.MonkeyPatch.context() as there:
        there.setenv("XDG_STATE_HOME", str(folder / "state"))
        there.setattr(trust, "_trusted_here", set())
        (folder / "code").mkdir()
        (folder / "code" / f"{PLANTED}.py").write_text(CODE)
        there.syspath_prepend(folder / "code")
        shown = {"tracking": {"uri": "sqlite:///mlflow.db"}, "outputs": "outputs"}
        own = {
            "reward": {"name": f"{PLANTED}:score"},
            "prompts": {"name": f"{PLANTED}:prompts"},
        }
        record_run(tiny_model, folder / "store", "own", **own, **shown)
        record_run(tiny_model, folder / "store", "plain", **shown)
        yield folder


@pytest.fixture
def elsewhere(
    written: Path, mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Elsewhere:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(trust, "_trusted_here", set())
    monkeypatch.delitem(sys.modules, PLANTED, raising=False)
    monkeypatch.chdir(tmp_path)
    return Elsewhere(Path(shutil.copytree(written / "store", tmp_path / "store")))


def ddpo(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ddpo", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_config(elsewhere: Elsewhere, tiny_model: Path) -> None:
    """A config is a program: it may name a reward or a prompt set by import path, and whoever
    starts a run with it runs that code.
    """
    (elsewhere.root / "config.yaml").write_text(
        f"model: {{path: {tiny_model}}}\nprompts: {{name: simple_animals}}\n"
        f"reward: {{name: '{PLANTED}:score'}}\nnumerics: {{device: cpu}}\noutputs: outputs\n"
    )
    config = str(elsewhere.root / "config.yaml")
    TrainRequest(
        config_file=config,
        run_id="new",
        storage=str(elsewhere.root),
        tracking="sqlite:///mlflow.db",
    ).resolve()
    assert imported()


@pytest.mark.parametrize(
    "words",
    [
        ("runs",),
        ("runs", "--tree"),
        ("runs", "--json"),
        ("show", "own"),
        ("show", "own", "--json"),
        ("diff", "own", "plain"),
        ("watch", "own"),
        ("query", "own", "select count(*) from samples"),
        ("export", "own", "--to-hf-dataset", "dataset"),
        ("report", "own", "--out", "own.html"),
        ("verify", "own"),
        ("gc", "own", "--dry-run"),
    ],
    ids=" ".join,
)
def test_reading(
    elsewhere: Elsewhere, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a run imports nothing that the store names: `ddpo runs`, `show`, `watch`, `diff`,
    `query`, `export`, `report`, `gc` and `verify` do not, nor does `open_history`.
    """
    elsewhere.craft("plain", reward={"name": f"{PLANTED}:score", "parameters": {}})
    monkeypatch.setattr(overview.time, "sleep", lambda _: signal.default_int_handler(2, None))
    status = 130 if words[0] == "watch" else 0
    assert ddpo(monkeypatch, *words, "--root", elsewhere.root) == status
    assert len(open_history(elsewhere.root, "own").samples())
    assert not imported()


def test_sample_and_rescore(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ddpo sample` and `ddpo rescore` import nothing that the store names either: a rescoring runs
    the reward that its user names.
    """
    words = ("sample", "own", "--prompt", "a cat", "--out", "cat.png")
    assert ddpo(monkeypatch, *words, "--root", elsewhere.root) == 0
    request = RescoreRequest(run_id="own", reward="colorfulness", storage=str(elsewhere.root))
    assert request.resolve().epochs == [0, 1]
    assert not imported()


def test_what_runs_code(
    elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ddpo resume`, `ddpo fork`, `ddpo evaluate` and `ddpo verify --repair` run the code that a
    run names. If the run was not started on this machine, by this user, they refuse that code
    before it is imported.
    """
    next(elsewhere.root.glob("rewards/**/*.parquet")).unlink()
    for words in (
        ("resume", "own"),
        ("fork", "own", "--epoch", 1),
        ("evaluate", "own"),
        ("verify", "own", "--repair"),
    ):
        status = ddpo(monkeypatch, *words, "--root", elsewhere.root)
        screen = " ".join(capsys.readouterr().out.split())
        assert status == 2, screen
        assert "NotTrusted" in screen and "--trust" in screen and "'own'" in screen
        assert f"{PLANTED}:" in screen
        assert not imported()
    # A reward that the user names is the user's, but the prompts are still the run's.
    with pytest.raises(NotTrusted, match="prompt set"):
        ForkRequest(
            run_id="own", epoch=1, reward="colorfulness", storage=str(elsewhere.root)
        ).resolve()
    assert not imported()


def test_started_here(written: Path, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that this user started on this machine needs no `--trust`."""
    monkeypatch.setenv("XDG_STATE_HOME", str(written / "state"))
    monkeypatch.setattr(trust, "_trusted_here", set())  # as in another process
    elsewhere.resume("own")


def test_said_once(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--trust` is needed once per run: this machine remembers it for this user, in
    `$XDG_STATE_HOME/ddpo/trusted` (by default below `~/.local/state`).
    """
    elsewhere.resume("own", trust=True)
    monkeypatch.setattr(trust, "_trusted_here", set())  # as in another process
    elsewhere.resume("own")
    assert list((elsewhere.root.parent / "state" / "ddpo" / "trusted").iterdir())


def test_bound_to_settings(elsewhere: Elsewhere) -> None:
    """Trust covers the run's settings as they are: if somebody changes one in the store, the run is
    refused again.
    """
    elsewhere.resume("own", trust=True)
    elsewhere.craft("own", prompts={"name": f"{PLANTED}:other", "parameters": {}})
    with pytest.raises(NotTrusted, match=PLANTED):
        elsewhere.resume("own")


@pytest.mark.parametrize(
    "part",
    [
        {"rewards": [{"name": f"{PLANTED}:score"}]},
        {"prompts": {"name": f"{PLANTED}:prompts", "parameters": {}}},
    ],
    ids=["rewards", "prompts"],
)
def test_evaluations(elsewhere: Elsewhere, part: dict[str, Any]) -> None:
    """What a run is evaluated on belongs to these settings: a start that somebody else has added to
    a trusted run, and that names other code for its evaluation, is refused by `ddpo resume` and
    `ddpo evaluate`.
    """
    elsewhere.resume("plain", trust=True)
    elsewhere.operate("plain", evaluation=part)
    with pytest.raises(NotTrusted, match=PLANTED):
        elsewhere.resume("plain")
    with pytest.raises(NotTrusted, match=PLANTED):
        EvaluateRequest(run_id="plain", storage=str(elsewhere.root)).resolve()
    assert not imported()
    elsewhere.resume("plain", trust=True)
    assert imported()


def test_listed_modules(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment variable `DDPO_TRUSTED_MODULES` lists modules and packages, separated by
    commas, whose code any run may name; what such a module has imported from elsewhere is not
    included.
    """
    monkeypatch.setenv("DDPO_TRUSTED_MODULES", "planted, other.package")
    with pytest.raises(NotTrusted, match=PLANTED):
        elsewhere.resume("own")
    assert not imported()
    monkeypatch.setenv("DDPO_TRUSTED_MODULES", f"other.package, {PLANTED}")
    elsewhere.resume("own")
    for path in (f"{PLANTED}:system", f"{PLANTED}:prompts.__globals__.get", "os:system"):
        with pytest.raises(NotTrusted), open_run(elsewhere.store, "own").naming():
            load_reward(path, {})


def test_known_code(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards and prompt sets of this project, and those that an installed package registers as
    entry points, need no trust.
    """
    elsewhere.resume("plain")
    point = EntryPoint(name="packaged", value=f"{PLANTED}:score", group="ddpo.rewards")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    with open_run(elsewhere.store, "own").naming():
        load_reward("packaged", {})
        load_reward(point.value, {})
        load_reward("ddpo.rewards.builtin.jpeg:JpegCompressibility", {})
        # Other names in this project's modules are not meant to be called with parameters.
        with pytest.raises(NotTrusted):
            load_reward("ddpo.basics.plugins:importlib.import_module", {"name": "antigravity"})
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("identity", "named"),
    [
        ({"reward": {"name": "http", "parameters": {"endpoints": ["http://h:1"]}}}, "addresses"),
        (
            {
                "reward": {
                    "name": "openai_vlm",
                    "parameters": {"endpoints": ["http://h:1"], "model": "m", "task": "vqa"},
                }
            },
            "addresses",
        ),
        (
            {
                "reward": {
                    "name": "weighted",
                    "parameters": {"rewards": [{"name": f"{PLANTED}:score"}]},
                }
            },
            PLANTED,
        ),
        ({"prompts": {"name": "text_file", "parameters": {"path": "~/.netrc"}}}, "lines of a file"),
        (
            {
                "preferences": {"path": "~/pairs"},
                "algorithm": {"type": "dpo"},
                "rollouts": {"samples_per_epoch": 8, "shard_size": 4, "samples_per_prompt": 2},
            },
            "preference pairs are files",
        ),
    ],
    ids=["http", "openai_vlm", "weighted", "text_file", "preferences"],
)
def test_addresses_and_files(elsewhere: Elsewhere, identity: dict[str, Any], named: str) -> None:
    """As long as a run from elsewhere is not trusted, its rewards send images to no address that it
    names, and neither prompts nor preference pairs are read from files of this machine.
    """
    elsewhere.craft("plain", **identity)
    with pytest.raises(NotTrusted, match=named):
        elsewhere.resume("plain")
    assert not imported()


@pytest.mark.parametrize(
    "operation",
    [
        {"tracking": {"uri": "http://127.0.0.1:9"}},
        {"tracking": {"uri": "sqlite:////tmp/elsewhere/mlflow.db"}},
        {"outputs": "/tmp/elsewhere"},
        {"outputs": "../elsewhere"},
    ],
    ids=str,
)
def test_places(elsewhere: Elsewhere, operation: dict[str, Any]) -> None:
    """Nor is it shown on an MLflow server that it names, and it writes its outputs and MLflow's
    database only below the working directory; the same holds for a start that somebody else has
    added to a trusted run.
    """
    elsewhere.resume("plain", trust=True)
    elsewhere.operate("plain", **operation)
    with pytest.raises(NotTrusted, match=r"MLflow at|report and weights"):
        elsewhere.resume("plain")
    assert not (elsewhere.root.parent.parent / "elsewhere").exists()


def test_forms(elsewhere: Elsewhere) -> None:
    """Anyone who can reach Prefect's API can run code on its workers: a form takes any config and
    any overrides, which may name code, and has the field `trust`. Serve the API on loopback, or
    behind a proxy that authenticates its users.
    """
    overrides = (f"reward.name={PLANTED}:score", "outputs=outputs")
    request = TrainRequest(
        config_file=str(REPOSITORY / "configs" / "starter.yaml"),
        run_id="by-form",
        storage=str(elsewhere.root),
        tracking="sqlite:///mlflow.db",
        overrides=overrides,
    )
    request.resolve()
    assert imported()
    for flow in (resume, fork.fork, rescore.rescore):
        assert "trust" in flow.parameters.properties
