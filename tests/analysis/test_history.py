"""A run read as data: by manifest, verified, and as it was committed."""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import ddpo
from ddpo.analysis.history import History
from ddpo.config import ForkConfig
from ddpo.errors import (
    ConfigError,
    CorruptObject,
    MissingObject,
    NotInHistory,
    RetiredObject,
    RunNotFound,
    UnreadableData,
)
from ddpo.runs import Run, start_run
from ddpo.store import keys
from ddpo.store.arrow import join, union
from ddpo.store.documents import CHECKSUM, seal
from ddpo.store.keys import Partition
from ddpo.store.kinds import EPOCH
from ddpo.store.objects import Store
from ddpo.store.upkeep.epoch_retention import retire_epochs
from tests.fold import as_in_a_new_process, run_epochs
from tests.recorded import SAMPLES, folder_of, record_run, score_again
from tests.servers import BUCKET, ObjectStore

SHARD_0 = "run_id=mine/epoch=00001/shard-00000-*"


@pytest.fixture(scope="module")
def recorded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nobody changes."""
    run = record_run(tiny_model, tmp_path_factory.mktemp("recorded") / "store")
    score_again(run, "colorfulness")
    return run


@pytest.fixture(scope="module")
def history(recorded: Run) -> History:
    return ddpo.open_history(recorded.store.root, "mine")


@pytest.fixture
def copied(recorded: Run, tmp_path: Path) -> Path:
    """A copy of the store, to be damaged."""
    return Path(shutil.copytree(folder_of(recorded), tmp_path / "store"))


def stored_rows(store: Path, tree: str) -> list[dict]:
    """Read all rows of a table's files, one by one, in the order of their samples."""
    files = store.glob(f"{tree}/**/run_id=mine/**/*.parquet")
    rows = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
    return sorted(rows, key=lambda row: row["sample_id"])


def the_file(store: Path, pattern: str) -> Path:
    (file,) = store.glob(pattern)
    return file


def test_importing_the_package_loads_no_library():
    script = "import ddpo, sys; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    loaded = set(found.stdout.split())
    assert "ddpo" in loaded
    assert not loaded & {"torch", "pyarrow", "pydantic", "fsspec", "numpy"}
    with pytest.raises(AttributeError, match="no attribute 'open_rum'"):
        _ = ddpo.open_rum  # pyright: ignore[reportAttributeAccessIssue]


def test_a_history_tells_epochs_rewards_and_config(recorded: Run, history: History):
    assert history.epochs == (0, 1)
    assert history.retired_epochs == ()
    assert history.reward_id == recorded.reward.identity.reward_id
    assert [each.rpartition("-")[0] for each in history.rewards] == [
        "jpeg_compressibility",
        "colorfulness",
    ]
    assert history.config.identity() == recorded.config.identity()


def test_rollouts_are_the_committed_rows_with_run_and_epoch(recorded: Run, history: History):
    found = history.rollouts().to_table()
    assert found.schema.equals(history.rollouts().schema)
    expected = stored_rows(folder_of(recorded), "rollouts")
    assert len(expected) == 2 * SAMPLES
    for row in expected:
        run_id, epoch, _ = row["sample_id"].split("/")
        row |= {"run_id": run_id, "epoch": int(epoch)}
    assert found.to_pylist() == expected
    only = history.rollouts().to_table(columns=["sample_id"], filter=ds.field("epoch") == 1)
    assert only["sample_id"].to_pylist() == [row["sample_id"] for row in expected[SAMPLES:]]


def test_a_filter_on_the_epoch_reads_that_epoch_alone(copied: Path):
    the_file(copied, f"rollouts/{SHARD_0}").unlink()
    rollouts = ddpo.open_history(copied, "mine").rollouts()
    assert rollouts.to_table(filter=ds.field("epoch") == 0).num_rows == SAMPLES
    with pytest.raises(MissingObject):
        rollouts.to_table(columns=["prompt"])


def test_samples_join_scores_and_advantages_by_sample(recorded: Run, history: History):
    store = folder_of(recorded)
    found = history.samples().to_pylist()
    assert list(found[0]) == [
        "sample_id", "epoch", "prompt", "seed", "reward", "status", "advantage", "jpeg_kb",
    ]  # fmt: skip
    rollouts = {row["sample_id"]: row for row in stored_rows(store, "rollouts")}
    own = f"reward_name={history.reward_id}"
    scores = {row["sample_id"]: row for row in stored_rows(store, f"rewards/{own}")}
    advantages = {row["sample_id"]: row for row in stored_rows(store, f"advantages/{own}")}
    assert [row["sample_id"] for row in found] == sorted(rollouts)
    for row in found:
        key = row["sample_id"]
        assert row["epoch"] == int(key.split("/")[1])
        assert (row["prompt"], row["seed"]) == (rollouts[key]["prompt"], rollouts[key]["seed"])
        assert (row["reward"], row["jpeg_kb"]) == (scores[key]["reward"], scores[key]["jpeg_kb"])
        assert row["reward"] == -row["jpeg_kb"]
        assert row["advantage"] == advantages[key]["advantage"]
    assert len({row["advantage"] for row in found}) > 2


def test_samples_by_another_reward_have_its_scores_and_no_advantage(history: History):
    own, other = history.samples(), history.samples("colorfulness")
    assert other["sample_id"] == own["sample_id"]
    assert other["advantage"].null_count == len(other)
    first = np.asarray(history.image("mine/00000/000000"), float)
    rg = first[..., 0] - first[..., 1]
    assert other["rg_mean"][0].as_py() == pytest.approx(rg.mean(), abs=1e-3)
    assert history.samples(history.rewards[1]).equals(other)


def test_what_a_reward_has_not_scored_is_left_out_of_its_samples(copied: Path):
    for file in copied.glob(
        "manifests/rewards/reward_name=colorfulness-*/run_id=mine/epoch=00000/*"
    ):
        file.unlink()
    found = ddpo.open_history(copied, "mine").samples("colorfulness")
    assert set(found["epoch"].to_pylist()) == {1}


def test_an_unknown_or_ambiguous_reward_is_refused_with_the_list(copied: Path):
    history = ddpo.open_history(copied, "mine")
    with pytest.raises(NotInHistory, match=r"no reward 'colour'.*jpeg_\S+, colorfulness-\w{8}$"):
        history.samples("colour")
    run = history.run
    part = {"name": "colorfulness", "mean": 0.0, "std": 1.0}
    ids = [
        score_again(run, "weighted", range(1), rewards=[{**part, "weight": weight}])
        for weight in (1.0, 2.0)
    ]
    history = ddpo.open_history(copied, "mine")
    with pytest.raises(NotInHistory, match="2 rewards called 'weighted'") as told:
        history.samples("weighted")
    assert all(each in str(told.value) for each in ids)
    assert len(history.samples(ids[0])) == SAMPLES


def test_scores_of_other_rollouts_are_not_taken_for_scores_of_these(copied: Path):
    one, other = (
        the_file(copied, f"manifests/rewards/reward_name=colorf*/run_id=mine/epoch=0000{e}/*0.json")
        for e in (0, 1)
    )
    shutil.copy(one, other)
    with pytest.raises(UnreadableData, match="scores other rollouts"):
        ddpo.open_history(copied, "mine").samples("colorfulness")


def test_all_rewards_and_advantages_lie_below_each_other(recorded: Run, history: History):
    rewards = history.reward_table()
    assert rewards.num_rows == 2 * 2 * SAMPLES
    assert set(rewards["reward_name"].to_pylist()) == set(history.rewards)
    of_jpeg = rewards.filter(pa.compute.field("reward_name") == history.reward_id)
    assert of_jpeg["reward"].to_pylist() == history.samples()["reward"].to_pylist()
    assert of_jpeg["rg_mean"].null_count == of_jpeg.num_rows
    advantages = history.advantage_table()
    assert advantages["advantage"].to_pylist() == history.samples()["advantage"].to_pylist()
    assert advantages["epoch"].to_pylist() == history.samples()["epoch"].to_pylist()


def test_picture_latents_and_log_probs_are_the_very_committed_ones(recorded: Run, history: History):
    store = folder_of(recorded)
    rows = {row["sample_id"]: row for row in stored_rows(store, "rollouts")}
    for index in range(SAMPLES):
        sample_id = f"mine/00001/00000{index}"
        expected = Image.open(io.BytesIO(rows[sample_id]["image"]["bytes"]))
        found = history.image(sample_id)
        assert found.size == (16, 16) and found.tobytes() == expected.tobytes()
        shard, row = divmod(index, 2)
        file = the_file(store, f"trajectories/run_id=mine/epoch=00001/shard-0000{shard}-*")
        tensors = load_file(file)
        assert tensors["latents"].shape == (2, 3, 4, 8, 8)
        assert torch.equal(history.latents(sample_id), tensors["latents"][row])
        assert torch.equal(history.log_probs(sample_id), tensors["log_probs"][row])
        assert rows[sample_id]["log_prob_mean"] == pytest.approx(
            float(history.log_probs(sample_id).mean())
        )


def test_a_sample_that_a_fork_adopted_is_read_through_the_fork(
    recorded: Run, copied: Path, history: History
):
    branch = start_run(
        recorded.config.model_copy(
            update={
                "fork": ForkConfig(run_id="mine", epoch=1),
                "storage": recorded.config.storage.model_copy(update={"root": str(copied)}),
            }
        ),
        "branch",
    )
    as_in_a_new_process()
    run_epochs(branch, 2)
    found = ddpo.open_history(copied, "branch")
    ids = found.samples()["sample_id"].to_pylist()
    assert ids == [f"mine/00001/00000{index}" for index in range(SAMPLES)]
    for sample_id in ids:
        assert found.image(sample_id).tobytes() == history.image(sample_id).tobytes()
        assert torch.equal(found.latents(sample_id), history.latents(sample_id))
        assert torch.equal(found.log_probs(sample_id), history.log_probs(sample_id))
    with pytest.raises(NotInHistory, match="not committed sample branch/00001/000000"):
        found.image("branch/00001/000000")


def test_a_run_by_regression_has_clean_latents_and_says_that_no_log_probs_are_kept(
    tiny_model: Path, tmp_path: Path
):
    rwr = {"algorithm": {"type": "rwr", "inner_epochs": 1}}
    history = History(record_run(tiny_model, tmp_path / "store", **rwr))
    assert history.latents("mine/00000/000000").shape == (1, 4, 8, 8)
    with pytest.raises(NotInHistory, match="rwr trains on clean latents only"):
        history.log_probs("mine/00000/000000")


@pytest.mark.parametrize("given", ["mine/00001/000004", "mine/00002/000000", "other/00000/000000"])
def test_a_sample_that_is_not_there_is_refused_with_the_epochs_that_are(
    given: str, history: History
):
    with pytest.raises(NotInHistory, match=f"not committed sample {given}. Committed epochs: 0-1"):
        history.image(given)


def test_what_is_no_sample_id_is_told_how_one_looks(history: History):
    with pytest.raises(NotInHistory, match="such as mine/00003/000017"):
        history.latents("17")


def test_an_epoch_that_is_not_committed_is_refused(history: History):
    with pytest.raises(NotInHistory, match=r"not committed epoch 2, 4-5\. Committed epochs: 0-1"):
        history.samples(epochs=[1, 5, 4, 2])


def test_epochs_are_named_by_number_or_range(history: History):
    assert history.epochs_within(None) == history.epochs_within("0:2") == [0, 1]
    assert history.epochs_within("1") == history.epochs_within("1:") == [1]
    assert history.epochs_within(":1") == history.epochs_within("0:1") == [0]
    with pytest.raises(NotInHistory, match=r"not committed epochs 2:\. Committed epochs: 0-1"):
        history.epochs_within("2:")
    with pytest.raises(ConfigError, match="neither one epoch nor a range"):
        history.epochs_within("1:2:3")


def test_columns_alone_decode_no_picture(history: History, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ddpo.analysis.history.decode_image", lambda data: 1 / 0)
    monkeypatch.setattr(Image, "open", lambda *_: 1 / 0)
    assert history.samples().num_rows == 2 * SAMPLES
    assert history.rollouts().to_table(columns=["prompt"]).column_names == ["prompt"]
    with pytest.raises(ZeroDivisionError):
        history.image("mine/00000/000000")


@pytest.mark.parametrize(
    ("tree", "read"),
    [
        ("rollouts/run_id=mine", lambda h: h.rollouts().to_table(columns=["prompt"])),
        ("samples/run_id=mine", lambda h: h.samples()),
        ("rollouts/run_id=mine", lambda h: h.image("mine/00001/000000")),
        ("trajectories/run_id=mine", lambda h: h.latents("mine/00001/000000")),
        ("rewards/reward_name=jpeg*/run_id=mine", lambda h: h.samples()),
        ("rewards/reward_name=color*/run_id=mine", lambda h: h.reward_table()),
        ("advantages/reward_name=*/run_id=mine", lambda h: h.samples()),
        ("manifests/rollouts/run_id=mine", lambda h: h.samples()),
    ],
    ids=["dataset", "samples", "picture", "latents", "scores", "others", "advantages", "manifest"],
)
def test_damage_is_a_named_error_with_the_key(copied: Path, tree: str, read):
    file = sorted(copied.glob(f"{tree}/epoch=00001*/*"))[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1  # the size stays
    file.write_bytes(data)
    with pytest.raises(CorruptObject) as told:
        read(ddpo.open_history(copied, "mine"))
    assert told.value.key == str(file.relative_to(copied))


def test_what_was_written_and_never_committed_is_not_read(copied: Path):
    history = ddpo.open_history(copied, "mine")
    before = (history.rollouts().to_table(), history.samples(), history.reward_table())
    for tree in ("rollouts/run_id=mine", f"rewards/reward_name={history.reward_id}/run_id=mine"):
        for number in ("1", "2"):  # beside committed shards; and of an epoch that was killed
            folder = copied / tree / f"epoch=0000{number}"
            folder.mkdir(exist_ok=True)
            some = sorted((copied / tree / "epoch=00000").glob("shard-00000-*"))[0]
            shutil.copy(some, folder / "shard-00000-0123456789ab.parquet")
    history = ddpo.open_history(copied, "mine")
    after = (history.rollouts().to_table(), history.samples(), history.reward_table())
    assert all(a.equals(b) for a, b in zip(after, before, strict=True))
    seen = ds.dataset(copied / "rollouts", partitioning="hive").to_table(columns=["epoch"])
    assert seen.num_rows == before[0].num_rows + 4  # as a glob does


def test_retired_samples_are_left_out_with_a_said_count(copied: Path, caplog):
    store = ddpo.open_history(copied, "mine").run.store
    assert retire_epochs(store, "mine", keep="checkpoints", older_than=1) == [0]
    history = ddpo.open_history(copied, "mine")
    with caplog.at_level(logging.WARNING, "ddpo.analysis.history"):
        assert set(history.samples()["epoch"].to_pylist()) == {1}
        assert history.rollouts().count_rows() == SAMPLES
        assert set(history.reward_table()["epoch"].to_pylist()) == {1}
    (said,) = caplog.messages
    assert "samples of 1 of 2 epochs (0) were retired" in said
    assert (history.epochs, history.retired_epochs) == ((0, 1), (0,))
    record = keys.retired_key("samples", "mine", 0)
    for read in (
        lambda: history.samples(epochs=[0]),
        lambda: history.rollouts([0]),
        lambda: history.image("mine/00000/000000"),
    ):
        with pytest.raises(RetiredObject, match=r"was deleted from .* by retention") as told:
            read()
        assert record in str(told.value)


def test_retired_trajectories_leave_pictures_and_scores(copied: Path):
    store = ddpo.open_history(copied, "mine").run.store
    assert retire_epochs(store, "mine", keep="images_and_scores", older_than=1) == [0]
    history = ddpo.open_history(copied, "mine")
    assert history.retired_epochs == ()
    assert history.samples().num_rows == 2 * SAMPLES
    assert history.image("mine/00000/000000").size == (16, 16)
    assert history.latents("mine/00001/000000").shape == (3, 4, 8, 8)
    with pytest.raises(RetiredObject):
        history.latents("mine/00000/000000")


def test_a_run_without_an_epoch_is_empty_and_not_an_error(copied: Path):
    shutil.rmtree(copied / "manifests" / "epochs")
    history = ddpo.open_history(copied, "mine")
    assert history.epochs == ()
    assert history.reward_id is None
    assert history.samples().num_rows == history.rollouts().count_rows() == 0
    assert history.advantage_table().num_rows == 0
    with pytest.raises(NotInHistory, match="Committed epochs: none"):
        history.image("mine/00000/000000")
    with pytest.raises(NotInHistory, match="is empty"):
        history.epochs_within(None)


def test_an_unknown_run_names_the_nearest(recorded: Run):
    with pytest.raises(RunNotFound, match="Did you mean mine"):
        ddpo.open_history(recorded.store.root, "mines")


def test_a_commit_that_is_none_is_a_named_error(copied: Path):
    file = copied / EPOCH.key(Partition("mine", 1))
    document = json.loads(file.read_bytes())
    del document[CHECKSUM]
    document["inputs"]["rewards"] = []
    file.write_bytes(seal(document))
    with pytest.raises(UnreadableData, match="2 shards and scores of 0"):
        ddpo.open_history(copied, "mine").samples()


def test_columns_that_scorers_disagree_on_become_the_wider_kind():
    tables = [
        pa.table({"a": pa.array([1], pa.int64()), "b": ["x"], "c": pa.array([0.5], pa.float32())}),
        pa.table({"a": pa.array([0.5], pa.float32()), "b": pa.array([2], pa.int64())}),
    ]
    found = union(tables, pa.schema([("z", pa.string())]))
    assert found.to_pylist() == [
        {"z": None, "a": 1.0, "b": "x", "c": 0.5},
        {"z": None, "a": 0.5, "b": "2", "c": None},
    ]
    assert found.schema.field("a").type == pa.float64()


def test_a_scorers_column_gives_way_to_one_of_the_same_name():
    left = pa.table({"sample_id": ["b", "a", "c"], "prompt": ["B", "A", "C"]})
    right = pa.table({"sample_id": ["a", "b"], "prompt": [1, 2], "own": [3, 4]})
    assert join(left, right, prefix="reward.").to_pylist() == [
        {"sample_id": "b", "prompt": "B", "reward.prompt": 2, "own": 4},
        {"sample_id": "a", "prompt": "A", "reward.prompt": 1, "own": 3},
        {"sample_id": "c", "prompt": "C", "reward.prompt": None, "own": None},
    ]


def test_a_run_in_a_bucket_is_read_as_one_on_a_disk(
    recorded: Run, history: History, moto: ObjectStore, monkeypatch: pytest.MonkeyPatch
):
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    bucket = Store.open(f"s3://{BUCKET}/history")
    for key in recorded.store.list():
        bucket.replace(key, recorded.store.read(key))
    found = ddpo.open_history(bucket.root, "mine")
    assert found.samples().equals(history.samples())
    assert found.rollouts().to_table().equals(history.rollouts().to_table())
    assert torch.equal(found.latents("mine/00001/000003"), history.latents("mine/00001/000003"))
