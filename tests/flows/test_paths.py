"""One rule for every path: `~` is the home, `$NAME` is the environment's, and unset is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from ddpo.analysis.comparison.plan import read_comparison
from ddpo.basics import trust
from ddpo.basics.paths import expand
from ddpo.config import ModelConfig
from ddpo.config.files import read_config
from ddpo.config.s3 import S3Options
from ddpo.errors import ConfigError, NotTrusted
from ddpo.models import check_model
from ddpo.prompts import load_prompts
from ddpo.runs import open_run, start_run
from ddpo.runs.outputs import outputs_folder, own_outputs_folder
from ddpo.store.objects import Store
from ddpo_workflow.flows.run_requests import TrainRequest
from ddpo_workflow.tasks.tracking.connection import connect, sqlite_file, whole_address
from tests.configs import MINIMAL
from tests.tiny import tiny_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    home = tmp_path / "home of #1"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("DATA", str(home / "data"))
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.chdir(tmp_path)
    return home


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~/x", "{home}/x"),
        ("~", "{home}"),
        ("$HOME/x", "{home}/x"),
        ("${HOME}/x", "{home}/x"),
        ("file://~/x", "file://{home}/x"),
        ("s3://$NAME/x", "s3://bucket/x"),
        ("s3://b/~", "s3://b/~"),
        ("/a/~/x", "/a/~/x"),
        ("/costs $5/x", "/costs $5/x"),
        ("/ends in $", "/ends in $"),
        ("~no-such-user-here/x", "~no-such-user-here/x"),
    ],
)
def test_a_path_is_expanded(
    monkeypatch: pytest.MonkeyPatch, home: Path, path: str, expected: str
) -> None:
    monkeypatch.setenv("NAME", "bucket")
    monkeypatch.setenv("5", "of no name")
    assert expand(path) == expected.format(home=home)


@pytest.mark.parametrize("path", ["$UNSET/x", "/a/${UNSET}/x", "s3://$UNSET/x", "/a/${}/x"])
def test_a_variable_that_is_not_set_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no environment variable '(UNSET)?'"):
        expand(path)
    with pytest.raises(ConfigError, match="there is no environment variable"):
        Store.open(path)


@pytest.mark.parametrize("short", ["~", "$HOME", "${HOME}"])
def test_all_paths_of_a_run_are_expanded_by_one_rule(
    home: Path, mlflow_database: Path, short: str
) -> None:
    shutil.copy(mlflow_database, home / "mlflow.db")
    shutil.copy(CONFIGS / "starter.yaml", home / "config.yaml")
    request = TrainRequest(
        config_file=f"{short}/config.yaml",
        run_id="mine",
        overrides=(f"outputs={short}/out",),
        storage=f"{short}/store",
        tracking=f"sqlite:///{short}/mlflow.db",
    )
    run = request.plan().start()
    assert run.store.root == f"file://{home}/store"
    assert outputs_folder(run.config, "mine", run.uid) == home / "out/mine"
    assert sqlite_file(run.config.tracking.uri) == home / "mlflow.db"
    assert whole_address(run.config.tracking.uri) == f"sqlite:///{home}/mlflow.db"
    # Recorded as written: another machine has another home.
    assert open_run(run.store, "mine").config.outputs == f"{short}/out"
    assert not {short, "~", "$HOME"} & {each.name for each in Path.cwd().iterdir()}


def test_outputs_of_another_run_of_the_same_name_are_left_alone(
    tiny_model: Path, tmp_path: Path
) -> None:
    """In another store, or deleted since."""
    runs = [
        start_run(
            tiny_config(
                tiny_model,
                storage={"root": str(tmp_path / store)},
                outputs=str(tmp_path / "outputs"),
            ),
            "r",
        )
        for store in ("one", "other")
    ]
    first, second = (own_outputs_folder(run.config, "r", run.uid) for run in runs)
    assert first == tmp_path / "outputs" / "r"
    assert second == tmp_path / "outputs" / f"r-{runs[1].uid[:8]}"
    assert [outputs_folder(run.config, "r", run.uid) for run in runs] == [first, second]


@pytest.mark.parametrize("short", ["~", "$HOME"])
def test_paths_of_models_prompts_and_certificates_too(
    home: Path, tiny_model: Path, short: str
) -> None:
    (home / "model").symlink_to(tiny_model)
    check_model(ModelConfig(path=f"{short}/model"))
    (home / "prompts.txt").write_text("a cat\n")
    (prompt,) = load_prompts("text_file", {"path": f"{short}/prompts.txt"})
    assert prompt.text == "a cat"
    options = S3Options(ca_bundle=Path(f"{short}/ca.pem"))
    assert options.environment()["AWS_CA_BUNDLE"] == f"{home}/ca.pem"


@pytest.mark.parametrize(
    "setting", ["outputs=$UNSET/out", "storage.root=$UNSET/store", "outputs=a\0b"]
)
def test_a_start_names_a_variable_that_is_not_set(setting: str) -> None:
    config = read_config(CONFIGS / "starter.yaml", ["storage.root=store", setting])
    with pytest.raises(ConfigError, match=r"no environment variable 'UNSET'|NUL character"):
        start_run(config, "mine")
    assert not list(Path.cwd().rglob("run.json"))


@pytest.mark.parametrize("short", ["~", "$HOME", "$DATA"])
def test_a_stored_run_hides_no_place_behind_a_variable(
    monkeypatch: pytest.MonkeyPatch, home: Path, short: str
) -> None:
    (home / "work").mkdir()
    monkeypatch.chdir(home / "work")
    config = read_config(
        CONFIGS / "starter.yaml", ["storage.root=store", f"outputs={short}/hidden"]
    )
    with trust.acting_for("run 'mine'", "0" * 64):
        with pytest.raises(NotTrusted, match="its report and weights go to"):
            start_run(config, "mine")
        with pytest.raises(NotTrusted, match="it is shown in MLflow at"):
            connect(f"sqlite:///{short}/hidden.db")
    assert not (home / "hidden").exists() and not (home / "data").exists()


def test_an_address_that_is_no_path_stays_as_it_is() -> None:
    for uri in ("http://host:5000", "postgresql://$USER@host/db", "sqlite://"):
        assert whole_address(uri) == uri
    with pytest.raises(ConfigError, match="no environment variable 'UNSET'"):
        connect("sqlite:///$UNSET/mlflow.db")


def test_a_config_names_its_base_by_the_same_rule(home: Path) -> None:
    (home / "base.yaml").write_text(yaml.safe_dump({**MINIMAL, "epochs": 3}))
    (home / "compare.yaml").write_text(
        yaml.safe_dump({"base": "~/base.yaml", "variants": {"a": {}, "b": {}}, "seeds": [0]})
    )
    assert read_comparison("~/compare.yaml").epochs == 3
