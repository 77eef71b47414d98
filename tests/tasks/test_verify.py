"""`verify_run` finds every kind of damage by name; `repair` makes again what can be made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ddpo.config.files import read_config
from ddpo.runs import Run, start_run
from ddpo.store import keys
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, ROLLOUTS
from ddpo.store.runs import append_operation, record_end
from ddpo.store.upkeep.verify import NOTHING, Damage, repairable_part, verify_run
from ddpo_workflow.tasks.repair import repair
from tests.fold import run_epochs

SETTINGS = (
    "sampler.steps=2",
    "sampler.window=null",
    "rollouts.samples_per_epoch=4",
    "rollouts.shard_size=2",
    "numerics.sample_batch_size=2",
    "numerics.micro_batch_size=2",
    "numerics.threads=1",
    "epochs=2",
)
TABLES, SAMPLES, TRAJECTORIES = "rollouts", "samples", "trajectories"
REWARDS, ADVANTAGES = "rewards", "advantages"


SAMPLE = "ddpo_workflow.tasks.sample"


def _round_otherwise(tensors: object) -> bytes:
    return b"rounded otherwise"


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "store"
    settings = [*SETTINGS, f"model={{path: {tiny_model}}}", f"storage.root={folder}"]
    run_epochs(start_run(read_config("configs/starter.yaml", settings), "r"), 2)
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path, tiny_model: Path) -> Run:
    """A copy of the whole run, to be damaged."""
    import shutil

    shutil.copytree(whole, tmp_path / "store")
    settings = [*SETTINGS, f"model={{path: {tiny_model}}}", f"storage.root={tmp_path}/store"]
    return start_run(read_config("configs/starter.yaml", settings), "r")


def content(run: Run) -> dict[str, bytes]:
    return {key: run.store.read(key) for key in run.store.list() if "/starts/" not in key}


def kind_of(manifest: str) -> str:
    (kind, _) = repairable_part(manifest) or pytest.fail(manifest)
    return kind.name


def objects(run: Run, table: str, epoch: int = 1) -> list[str]:
    return [key for key in run.store.list(table) if f"epoch={epoch:05d}" in key]


def path_of(run: Run, key: str) -> Path:
    return Path(run.store.url(key).removeprefix("file://"))


def round_otherwise(tensors: object, file: Path) -> None:
    file.write_bytes(b"rounded otherwise")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


def test_a_whole_run_is_whole_and_every_object_is_read(run: Run) -> None:
    found = verify_run(run.store, "r")
    assert found.damages == ()
    stored = content(run)
    read = [key for key in stored if not key.startswith("runs/")]
    # Records are read as documents; manifests and objects by their bytes.
    assert found.objects == len(read) + 2
    assert found.bytes >= sum(len(stored[key]) for key in read if not key.startswith("manifests/"))


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("table", [TABLES, SAMPLES, TRAJECTORIES, REWARDS, ADVANTAGES])
def test_damage_to_what_is_derivable_is_named_and_mended(run: Run, table: str, how: str) -> None:
    before = content(run)
    key = objects(run, table)[-1]
    DAMAGES[how](path_of(run, key))
    (damage,) = verify_run(run.store, "r").damages
    assert damage.key == key
    assert damage.expected[:12] in key
    assert (damage.found == NOTHING) == (how == "missing")
    (mended,) = repair(run, [damage])
    assert mended.done, mended.reason
    assert content(run) == before
    assert verify_run(run.store, "r").damages == ()


def test_swapped_shards_are_both_damaged_and_both_mended(run: Run) -> None:
    before = content(run)
    first, second = (path_of(run, key) for key in objects(run, TRAJECTORIES))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    damages = verify_run(run.store, "r").damages
    assert [damage.key for damage in damages] == objects(run, TRAJECTORIES)
    assert all(mended.done for mended in repair(run, damages))
    assert content(run) == before


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("kind", ["rollouts", "rewards", "advantages"])
def test_a_damaged_manifest_is_named_and_made_again(run: Run, kind: str, how: str) -> None:
    before = content(run)
    (key, *_) = [key for key in objects(run, f"manifests/{kind}", epoch=1)]
    DAMAGES[how](path_of(run, key))
    damages = verify_run(run.store, "r").damages
    assert [damage.key for damage in damages] == [key]
    (mended,) = repair(run, damages)
    assert mended.done, mended.reason
    assert content(run) == before


def test_all_derivable_parts_of_an_epoch_are_mended_in_their_order(run: Run) -> None:
    before = content(run)
    for table in (TABLES, SAMPLES, TRAJECTORIES, REWARDS, ADVANTAGES):
        for key in objects(run, table):
            path_of(run, key).unlink()
    damages = verify_run(run.store, "r").damages
    repairs = repair(run, damages)
    assert [kind_of(mended.manifest) for mended in repairs] == [
        "rollouts", "rollouts", "rewards", "rewards", "advantages",
    ]  # fmt: skip
    assert all(mended.done for mended in repairs)
    assert content(run) == before


def test_a_damaged_checkpoint_is_named_and_is_not_made_again(run: Run) -> None:
    key = next(key for key in objects(run, "checkpoints", epoch=1) if "weights" in key)
    flip(path_of(run, key))
    (damage,) = verify_run(run.store, "r").damages
    assert damage.key == key and damage.manifest == CHECKPOINT.key(Partition("r", 1))
    assert repair(run, [damage]) == []


def test_a_part_whose_origin_is_damaged_too_says_so(run: Run) -> None:
    path_of(run, CHECKPOINT.key(Partition("r", 1))).unlink()
    path_of(run, objects(run, TABLES)[0]).unlink()
    before = content(run)
    damages = verify_run(run.store, "r").damages
    assert CHECKPOINT.key(Partition("r", 1)) in [damage.key for damage in damages]
    (mended,) = repair(run, damages)
    assert not mended.done and "missing too" in mended.reason
    assert content(run) == before


def test_what_comes_out_otherwise_is_said_and_nothing_is_touched(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another kind of device: the damaged shard may still be of use to someone."""
    flip(path_of(run, objects(run, TRAJECTORIES)[0]))
    before = content(run)
    damages = verify_run(run.store, "r").damages
    monkeypatch.setattr("ddpo_workflow.tasks.sample.write_tensors", round_otherwise)
    (mended,) = repair(run, damages)
    assert not mended.done and "differ from the committed" in mended.reason
    assert content(run) == before


def test_no_manifest_is_made_again_that_would_list_what_nobody_wrote(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a killed run's last shard no digest is known, since nothing refers to its manifest yet."""
    for key in run.store.list("manifests"):
        kind, last = key.split("/")[1], "epoch=00001" in key
        if (last and kind in ("rewards", "advantages", "epochs")) or "epoch=00002" in key:
            run.store.delete(key)
    manifest = ROLLOUTS.key(Partition("r", 1, 0))
    flip(path_of(run, manifest))
    before = content(run)
    damages = verify_run(run.store, "r").damages
    assert [damage.key for damage in damages] == [manifest]
    with monkeypatch.context() as another_device:
        another_device.setattr("ddpo_workflow.tasks.sample.write_tensors", round_otherwise)
        (mended,) = repair(run, damages)
    assert not mended.done and "differ from the committed" in mended.reason
    assert content(run) == before
    (mended,) = repair(run, damages)
    assert mended.done and not verify_run(run.store, "r").damages


def test_an_error_of_any_kind_stops_no_other_repair(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(path_of(run, objects(run, REWARDS)[0]))
    flip(path_of(run, objects(run, ADVANTAGES)[0]))
    damages = verify_run(run.store, "r").damages
    monkeypatch.setattr("ddpo_workflow.tasks.repair.scores_of", lambda *_: 1 / 0)
    first, second = repair(run, damages)
    assert not first.done and "ZeroDivisionError" in first.reason
    assert not second.done  # made from the rewards, which are still damaged
    monkeypatch.undo()
    assert all(mended.done for mended in repair(run, verify_run(run.store, "r").damages))


def test_parts_of_another_reward_are_left_alone(run: Run) -> None:
    (key, *_) = objects(run, f"manifests/{REWARDS}")
    other = key.replace("jpeg_compressibility", "another_reward")
    (mended,) = repair(run, [Damage(other, other, "0" * 64, NOTHING)])
    assert not mended.done and "another reward" in mended.reason


def test_damage_to_samples_that_a_fork_adopted_is_mended_in_the_run_that_drew_them(
    run: Run,
) -> None:
    settings = ["fork={run_id: r, epoch: 1}", f"model={{path: {run.config.model.path}}}"]
    root = run.store.root.removeprefix("file://")
    read = read_config("configs/starter.yaml", [*SETTINGS, *settings, f"storage.root={root}"])
    fork = start_run(read, "fork")
    run_epochs(fork, 2)
    before = content(run)
    flip(path_of(run, objects(run, TRAJECTORIES)[0]))
    (damage,) = verify_run(run.store, "fork").damages
    (mended,) = repair(fork, [damage])
    assert not mended.done and "`ddpo verify r --repair` rebuilds it" in mended.reason
    assert repair(run, verify_run(run.store, "r").damages)[0].done
    assert content(run) == before
    # Its own manifest of them is made again as it was: it names what is adopted.
    path_of(run, ROLLOUTS.key(Partition("fork", 1, 0))).unlink()
    (mended,) = repair(fork, verify_run(run.store, "fork").damages)
    assert mended.done, mended.reason
    # Where the other run's own manifest is gone, so is what a fork's is made from.
    path_of(run, ROLLOUTS.key(Partition("r", 1, 0))).unlink()
    (mended,) = repair(fork, verify_run(run.store, "fork").damages)
    assert not mended.done and "belongs to run 'r'" in mended.reason
    assert repair(run, verify_run(run.store, "r").damages)[0].done
    assert content(run) == before


@pytest.mark.parametrize("kind", ["epochs", "checkpoints"])
def test_a_gap_in_the_commits_is_seen(run: Run, kind: str) -> None:
    key = f"manifests/{kind}/run_id=r/epoch=00000.json"
    path_of(run, key).unlink()
    assert key in [damage.key for damage in verify_run(run.store, "r").damages]


def test_a_flipped_record_is_named(run: Run) -> None:
    flip(path_of(run, keys.run_key("r")))
    assert [damage.key for damage in verify_run(run.store, "r").damages] == [keys.run_key("r")]


def test_a_run_whose_starts_have_ended_is_whole(run: Run) -> None:
    """The records of the ends are no starts."""
    record_end(run.store, "r", 1, "stopped")
    record_end(run.store, "r", append_operation(run.store, "r", {}), "finished")
    assert verify_run(run.store, "r").damages == ()
    run.store.delete(keys.start_key("r", 1))
    assert keys.start_key("r", 1) in {damage.key for damage in verify_run(run.store, "r").damages}
