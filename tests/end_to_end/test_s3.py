"""A whole run on a real S3 server: the same bytes as on a disk, and no secret in anything."""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from ddpo.config.s3 import S3Options
from ddpo.store import keys
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.objects import Store
from tests.faults.processes import COMMAND
from tests.prefect_homes import prefect_home
from tests.servers import BUCKET, ObjectStore
from tests.zygote import zygote

SETTINGS = (
    "sampler.steps=3",
    "rollouts.samples_per_epoch=4",
    "rollouts.shard_size=2",
    "numerics.sample_batch_size=2",
    "numerics.micro_batch_size=2",
    "numerics.threads=1",
    "epochs=1",
    "tracking.system_metrics=false",
    "tracking.pictures.seeds=[0]",
    "tracking.pictures.prompts=[a cat]",
)


@dataclass(frozen=True)
class Trained:
    folder: Path
    screen: str
    store: Store


def ddpo(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "screen.log")
        status = zygote().start(COMMAND[1], [*words], environment, log).wait(900)
        return subprocess.CompletedProcess(words, status, log.read_text())


def train(
    folder: Path, model: Path, root: str, environment: dict[str, str], *settings: str
) -> subprocess.CompletedProcess[str]:
    command = ["train", "configs/starter.yaml", "--run-id", "r", "--root", root]
    everything = (
        *SETTINGS,
        f"model={{path: {model}}}",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        f"outputs={folder}/outputs",
        *settings,
    )
    for setting in everything:
        command += ["--set", setting]
    return ddpo(environment, *command)


@pytest.fixture(scope="module")
def on_s3(
    seaweedfs: ObjectStore, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    folder = tmp_path_factory.mktemp("s3")
    # The endpoint in the config, the credentials in the environment.
    environment = {
        **os.environ,
        **seaweedfs.environment,
        "PREFECT_HOME": prefect_home(folder / "prefect"),
    }
    del environment["AWS_ENDPOINT_URL"]
    root = f"s3://{BUCKET}/whole-run"
    endpoint = f"storage.s3.endpoint_url={seaweedfs.endpoint_url}"
    done = train(folder, tiny_model, root, environment, endpoint)
    assert done.returncode == 0, done.stdout
    with pytest.MonkeyPatch.context() as patch:
        for name, value in seaweedfs.environment.items():
            patch.setenv(name, value)
        store = Store.open(root, S3Options(endpoint_url=seaweedfs.endpoint_url))
        assert store.list()  # connects while the credentials are in the environment
    return Trained(folder, done.stdout, store)


@pytest.mark.slow
def test_a_run_on_s3_leaves_the_bytes_of_a_run_on_disk(
    on_s3: Trained, tiny_model: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PREFECT_HOME": prefect_home(tmp_path / "prefect")}
    done = train(tmp_path, tiny_model, str(tmp_path / "store"), environment)
    assert done.returncode == 0, done.stdout
    disk = Store.open(str(tmp_path / "store"))
    # How a start was operated differs: where the store is, is part of it.
    keys = [key for key in disk.list() if "/starts/" not in key]
    assert keys == [key for key in on_s3.store.list() if "/starts/" not in key]
    assert any(key.startswith("manifests/epochs/") for key in keys)
    for key in keys:
        assert on_s3.store.read(key) == disk.read(key), key


@pytest.mark.slow
def test_no_secret_is_in_anything_that_a_run_wrote(on_s3: Trained, seaweedfs: ObjectStore) -> None:
    secret = seaweedfs.secret_key.encode()
    assert secret not in on_s3.screen.encode()
    written = [path for path in on_s3.folder.rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"mlflow.db", "prefect.db", "report.png"} <= names, names
    for path in written:
        assert secret not in path.read_bytes(), path
    for key in on_s3.store.list():
        assert secret not in on_s3.store.read(key), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "canary-wrong-secret"}, "PermissionError"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "EndpointConnectionError"),
        ({"AWS_ENDPOINT_URL": "http://user:canary@127.0.0.1:9"}, "AWS_ENDPOINT_URL contains"),
    ],
    ids=["wrong secret", "nobody there", "secret in the address"],
)
def test_a_bucket_that_cannot_be_reached_is_named_without_its_secret(
    seaweedfs: ObjectStore, tiny_model: Path, tmp_path: Path, change: dict[str, str], said: str
) -> None:
    environment = {**os.environ, **seaweedfs.environment, **change}
    done = train(tmp_path, tiny_model, f"s3://{BUCKET}/refused", environment)
    screen = done.stdout
    assert done.returncode == 2
    assert f"s3://{BUCKET}/refused" in screen and said in screen, screen
    assert "Traceback" not in screen
    assert environment["AWS_SECRET_ACCESS_KEY"] not in screen
    assert "canary" not in screen
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    "setting",
    [
        "storage.root=s3://user:canary-secret@bucket/prefix",
        "storage.s3.endpoint_url=http://user:canary-secret/with/slashes@127.0.0.1:9000",
        "storage.s3.secret_key=canary-secret",
        "tracking.uri=https://user:canary-secret@127.0.0.1:9",
    ],
)
def test_credentials_in_a_config_are_refused_and_not_repeated(
    tmp_path: Path, tiny_model: Path, setting: str
) -> None:
    done = train(tmp_path, tiny_model, "", dict(os.environ), setting)
    screen = done.stdout
    assert done.returncode == 2
    assert "canary-secret" not in screen, screen
    ways = ("AWS_SECRET_ACCESS_KEY", "secret_key", "MLFLOW_TRACKING_PASSWORD")
    assert any(way in screen for way in ways), screen


@pytest.mark.slow
@pytest.mark.faults
def test_a_run_is_resumed_on_s3_and_keeps_only_its_newest_checkpoint(
    seaweedfs: ObjectStore, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing but `--root` and the AWS variables, from the last committed epoch on."""
    environment = {
        **os.environ,
        **seaweedfs.environment,
        "PREFECT_HOME": prefect_home(tmp_path / "prefect"),
    }
    root = f"s3://{BUCKET}/resumed"
    done = train(
        tmp_path, tiny_model, root, environment, "epochs=2", "storage.keep_newest_checkpoints=1"
    )
    assert done.returncode == 0, done.stdout
    for name, value in seaweedfs.environment.items():
        monkeypatch.setenv(name, value)
    store = Store.open(root, S3Options(endpoint_url=seaweedfs.endpoint_url))

    def weights() -> list[int]:
        found = (
            keys.parse_object(key)
            for key in store.list("checkpoints")
            if key.endswith(keys.TENSORS_SUFFIX)
        )
        return sorted({owner[1].epoch for owner in found if owner})

    assert weights() == [2]
    before = {key: store.read(key) for key in store.list("manifests")}
    done = ddpo(environment, "resume", "r", "--epochs", "3", "--root", root)
    assert done.returncode == 0, done.stdout
    assert weights() == [3]
    after = {key: store.read(key) for key in store.list("manifests")}
    assert before.items() <= after.items()
    assert CHECKPOINT.key(Partition("r", 3)) in after
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert sorted(metric.step for metric in history) == [0, 1, 2]


def test_a_command_on_a_bucket_that_nobody_serves_is_one_message(seaweedfs: ObjectStore) -> None:
    environment = {**os.environ, **seaweedfs.environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    done = ddpo(environment, "runs", "--root", f"s3://{BUCKET}/x")
    assert done.returncode == 2
    assert "Traceback" not in done.stdout
    assert "AWS_ENDPOINT_URL" in done.stdout
