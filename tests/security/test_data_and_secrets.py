"""What data may do, and where secrets stay. Docstrings: docs/security.md."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest

import ddpo
from ddpo.analysis.history import History
from ddpo.analysis.query import query
from ddpo.basics.digests import sha256_bytes
from ddpo.config.files import read_config
from ddpo.errors import ConfigError, DdpoError, InvalidKey, ModelError, QueryError, UnreadableData
from ddpo.rewards import load_reward
from ddpo.rewards.service.serving import serve
from ddpo.store import runs
from ddpo.store.objects import Store, StoredObject
from ddpo.store.tensors import read_tensors
from ddpo_workflow.flows.cli import ui
from ddpo_workflow.tasks.tracking.connection import TrackingError, connect
from tests.recorded import record_run
from tests.rewards.served import TOKEN, serving
from tests.tiny import load_policy, tiny_config

SOURCE = Path(ddpo.__file__).parents[1]


def test_models(tiny_model: Path, tmp_path: Path) -> None:
    """A model's folder or repository may hold code, but none of it is run."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "unet" / "planted_net.py").write_text("raise SystemExit\n")
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["planted_net", "Net"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError):
        load_policy(tiny_config(folder))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """Nothing is ever unpickled: what is stored and loaded is safetensors, Parquet, PNG, JSON and
    YAML's plain values.
    """

    class Planted:
        def __reduce__(self):
            return sys.exit, ("unpickled",)

    (tmp_path / "tensors").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(UnreadableData):
        read_tensors(tmp_path / "tensors")
    loads = re.compile(
        r"^\s*(import pickle\b|from pickle\b)|(?<!safetensors\.)torch\.load\(|np\.load\(|joblib"
        r"|yaml\.(load|unsafe_load|full_load)\(|(?<![.\w])(eval|exec)\(",
        re.MULTILINE,
    )
    found = [
        f"{path.name}: {match.group()}"
        for room in ("ddpo", "tasks", "flows")
        for path in sorted((SOURCE / room).rglob("*.py"))
        if (match := loads.search(path.read_text()))
    ]
    assert not found


def test_digests(tiny_model: Path, tmp_path: Path) -> None:
    """Digests detect damage, but they are not signatures: anyone who can write to a store can
    change what it holds, so give write access only to people you trust.
    """
    run = record_run(tiny_model, tmp_path / "store")
    record = runs.load_run(run.store, "mine")
    changed = record.model_copy(update={"code": {"ddpo": "another"}})
    (tmp_path / "store" / "runs" / "mine" / "run.json").write_bytes(changed.to_bytes())
    assert runs.load_run(run.store, "mine").code == {"ddpo": "another"}


def test_keys(tmp_path: Path) -> None:
    """Whatever a store holds, no key in it leads out of its root."""
    (tmp_path / "secret").write_bytes(b"x")
    store = Store.open(str(tmp_path / "store"))
    for key in ("../secret", "/etc/passwd", "a/../../secret"):
        with pytest.raises(InvalidKey):
            store.read(key)
        with pytest.raises(ValueError):
            StoredObject(key=key, size=1, sha256=sha256_bytes(b"x"))


def test_queries(tiny_model: Path, tmp_path: Path) -> None:
    """A query in `ddpo query` can access the tables of one run and nothing else: no files, no
    network, no settings.
    """
    history = History(record_run(tiny_model, tmp_path / "store"))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for sql in (
        f"select * from '{tmp_path}/other.csv'",
        f"copy samples to '{tmp_path}/out.csv'",
        "select * from 'http://127.0.0.1:9/x.csv'",
        "install httpfs",
        "set enable_external_access = true",
    ):
        with pytest.raises(QueryError), query(history, sql) as answer:
            list(answer.rows)
    assert not (tmp_path / "out.csv").exists()


def test_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ddpo ui` and `ddpo serve-reward` listen on loopback; to listen elsewhere, `serve-reward`
    requires DDPO_REWARD_TOKEN.
    """
    started: list[tuple[str, ...]] = []

    def start(*command: str) -> None:
        started.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(ui, "_start", start)
    for tracking in ("sqlite:///mlflow.db", "http://127.0.0.1:9"):
        ui.serve_pages(tracking, mlflow_port=1, prefect_port=2)
    assert [command[command.index("--host") + 1] for command in started] == ["127.0.0.1"] * 2
    monkeypatch.delenv("DDPO_REWARD_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="no token"):
        serve("colorfulness", {}, host="0.0.0.0", port=0)


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://user:canary@host/db",
        "postgresql://user%3Acanary@host/db",
        "https://canary@host",
        "postgresql://host/db?user=u&password=canary",
        "postgresql://host/db?sslmode=require&sslPassword=canary",
        "mysql+pymysql://host/db?passwd=canary",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Dcanary",
        "https://host/mlflow?access_token=canary",
    ],
)
def test_addresses(uri: str, tmp_path: Path) -> None:
    """Credentials belong in the environment: the address of a store, of an S3 endpoint or of MLflow
    (`tracking.uri`) is refused if it contains any, without being quoted.
    """
    refused: list[DdpoError] = []
    for settings in (
        [f"tracking.uri={uri}"],
        ["storage.s3.endpoint_url=http://user:canary@host"],
        ["storage.s3.endpoint_url=http://host?key=canary"],
    ):
        with pytest.raises(ConfigError) as error:
            read_config(SOURCE / "configs" / "starter.yaml", settings)
        refused.append(error.value)
    with pytest.raises(TrackingError) as unreachable:
        connect(uri)
    with pytest.raises(DdpoError) as store:
        Store.open("s3://key:canary@bucket/prefix")
    assert not any("canary" in str(error) for error in [*refused, unreachable.value, store.value])


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///mlflow.db",
        "sqlite:////data/pass:word@home/mlflow.db?timeout=5",
        "postgresql://me@host/db?sslmode=require&options=-c%20search_path%3Dml",
        "https://host:5000",
        "databricks://profile",
    ],
)
def test_addresses_without_a_password_are_accepted(uri: str) -> None:
    config = read_config(SOURCE / "configs" / "starter.yaml", [f"tracking.uri={uri}"])
    assert config.tracking.uri == uri


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewards of a config may name only environment variables that begin with `DDPO_` or that
    `DDPO_REWARD_VARIABLES` lists, since their values leave this machine; the one exception is the
    default of `openai_vlm`, OPENAI_API_KEY.
    """
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    monkeypatch.setenv("MINE", TOKEN)
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    closed = {"endpoints": ["http://127.0.0.1:9"], "start_within_s": 0.1, "retries": 0}
    vlm = {**closed, "model": "m", "task": "vqa"}
    for name, parameters in (
        ("http", {**closed, "token_variable": "AWS_SECRET_ACCESS_KEY"}),
        ("http", {**closed, "token_variable": "OPENAI_API_KEY"}),
        ("http", {**closed, "endpoints_variable": "MINE"}),
        ("openai_vlm", {**vlm, "key_variable": "AWS_SECRET_ACCESS_KEY"}),
    ):
        with pytest.raises(ConfigError, match="DDPO_REWARD_VARIABLES") as refused:
            load_reward(name, parameters)
        assert "AWS_SECRET_ACCESS_KEY" not in str(refused.value)
    monkeypatch.setenv("DDPO_REWARD_VARIABLES", "OTHER, MINE")
    with pytest.raises(DdpoError, match="answered"):
        load_reward("http", {**closed, "token_variable": "MINE"})
    with pytest.raises(DdpoError, match="answered"):
        load_reward("openai_vlm", vlm)


def test_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token of a reward service is sent to the endpoints of that reward, not to where they
    redirect, and it is removed from every message.
    """
    from starlette.responses import PlainTextResponse, RedirectResponse
    from starlette.types import Receive, Scope, Send

    sent: list[bytes] = []

    async def thief(scope: Scope, receive: Receive, send: Send) -> None:
        sent.extend(value for _, value in scope["headers"])
        await PlainTextResponse("")(scope, receive, send)

    monkeypatch.setenv("DDPO_REWARD_TOKEN", TOKEN)
    with serving(thief) as there:

        async def redirecting(scope: Scope, receive: Receive, send: Send) -> None:
            await RedirectResponse(f"{there}/{TOKEN}")(scope, receive, send)

        with serving(redirecting) as here, pytest.raises(DdpoError) as refused:
            load_reward("http", {"endpoints": [here], "retries": 0, "start_within_s": 5.0})
    assert not sent and TOKEN not in str(refused.value)
