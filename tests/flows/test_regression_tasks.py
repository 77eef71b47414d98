"""Training on final latents through the tasks: what is stored, and that a resume is byte-equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from ddpo.diffusion.sampling import sample
from ddpo.errors import ConfigError
from ddpo.runs import Run, RunHandle, check_run, open_run, start_run
from ddpo.runs.forks.plan import fork_config
from ddpo.store import manifests
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES, CHECKPOINT, ROLLOUTS
from ddpo.store.manifests import Ref
from ddpo.store.tables import decode_advantages, decode_rollouts
from ddpo.store.upkeep.verify import verify_run
from ddpo_workflow.tasks.credit import credit_of
from ddpo_workflow.tasks.repair import repair
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.tracking.metrics import _update_metrics
from ddpo_workflow.tasks.update import update_policy
from ddpo_workflow.tasks.worker import policy_at
from tests.fold import as_in_a_new_process, run_epochs
from tests.tiny import assert_same_tensors, load_policy, tiny_config

pytestmark = pytest.mark.slow

ALGORITHMS: dict[str, dict[str, Any]] = {
    "rwr": {"type": "rwr", "inner_epochs": 2, "updates_per_epoch": 4},
    "rwr_sparse": {"type": "rwr_sparse", "inner_epochs": 3, "updates_per_epoch": 3, "keep": 0.5},
    "nft": {
        "type": "nft",
        "updates_per_epoch": 2,
        "advantages": {"type": "batch"},
        "old_decay": {"per_step": 0.3, "most": 0.9},
    },
    "awm": {"type": "awm", "updates_per_epoch": 2, "advantages": {"type": "batch"}},
    "dpo": {"type": "dpo", "beta": 100.0, "pairing": "margin", "updates_per_epoch": 2},
}
SOLVERS = {"nft": {"type": "dpm_solver"}, "awm": {"type": "unipc", "order": 3}}
GROUPS = {"samples_per_prompt": 4}
REGRESSIONS = ("rwr", "rwr_sparse")
each_type = pytest.mark.parametrize("kind", list(ALGORITHMS))


@pytest.fixture(autouse=True)
def fresh_process() -> None:
    as_in_a_new_process()


def a_run(model: Path, root: Path | str, kind: str, **changes: Any) -> Run:
    if kind == "dpo":
        changes["rollouts"] = {**GROUPS, **changes.get("rollouts", {})}
    changes = {
        "storage": {"root": str(root)},
        "sampler": SOLVERS.get(kind, {}),
        "prompts": {"name": "prompt_list", "parameters": {"prompts": ["a cat", "a dog"]}},
        **changes,
    }
    algorithm = changes.pop("algorithm", ALGORITHMS[kind])
    return start_run(tiny_config(model, algorithm=dict(algorithm), **changes), "r")


def manifest_objects(run: Run, key: str) -> dict[str, bytes]:
    found = manifests.find(run.store, key)
    assert found is not None
    return {role: run.store.get(stored) for role, stored in found.manifest.objects.items()}


def advantage_table(run: Run) -> list[Any]:
    key = ADVANTAGES.key(Partition("r", 0, reward_id=run.reward.identity.reward_id))
    return decode_advantages(manifest_objects(run, key)["advantages"])


def content(run: Run) -> dict[str, bytes]:
    return {key: run.store.read(key) for key in run.store.list() if not key.startswith("runs/")}


def last_state(run: Run, epoch: int):
    found = CHECKPOINT.commit_of(run.store, Partition(run.run_id, epoch))
    assert found is not None
    return CHECKPOINT.load(run.store, found.ref).state()


@each_type
def test_a_new_process_for_every_task_changes_no_byte(
    tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    straight = a_run(tiny_model, tmp_path / "one", kind)
    run_epochs(straight, 2)

    as_in_a_new_process()
    resumed = a_run(tiny_model, tmp_path / "many", kind)
    handle = RunHandle(root=resumed.store.root, run_id="r")

    def alone(task: Any, *rest: Any) -> Ref:
        as_in_a_new_process()
        return task.fn(handle, *rest)

    checkpoint = alone(start)
    for epoch in range(2):
        drawn = [alone(sample_shard, checkpoint, epoch, shard) for shard in range(2)]
        scores = [alone(score_shard, ref, epoch, shard) for shard, ref in enumerate(drawn)]
        weights = alone(credit_of, checkpoint, drawn, scores, epoch)
        checkpoint = alone(update_policy, checkpoint, drawn, weights, epoch)
    commits = {key for key in content(straight) if key.startswith("manifests/epochs/")}
    assert {k: v for k, v in content(straight).items() if k not in commits} == content(resumed)
    first, second = last_state(straight, 1), last_state(straight, 2)
    assert any(not torch.equal(first.weights[name], v) for name, v in second.weights.items())
    assert second.updates == 2 * ALGORITHMS[kind]["updates_per_epoch"]


@each_type
def test_shards_hold_the_final_latents_alone_and_train_as_whole_trajectories_do(
    tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    shards, states = {}, {}
    for store_trajectories in ("auto", "full"):
        as_in_a_new_process()
        run = a_run(
            tiny_model,
            tmp_path / store_trajectories,
            kind,
            rollouts={"store_trajectories": store_trajectories},
        )
        run_epochs(run, 1)
        data = manifest_objects(run, ROLLOUTS.key(Partition("r", 0, 1)))["trajectories"]
        shards[store_trajectories] = load(data)
        states[store_trajectories] = last_state(run, 1)
    final, full = shards["auto"], shards["full"]
    assert set(final) == {"latents"} and final["latents"].shape == (4, 1, 4, 8, 8)
    assert full["latents"].shape == (4, 5, 4, 8, 8) and "log_probs" in full
    assert torch.equal(final["latents"][:, 0], full["latents"][:, -1])
    assert_same_tensors(states["auto"].weights, states["full"].weights)


def test_tables_hold_weights_where_ddpo_has_advantages(tiny_model: Path, tmp_path: Path) -> None:
    for kind in REGRESSIONS:
        as_in_a_new_process()
        run = a_run(tiny_model, tmp_path / kind, kind)
        run_epochs(run, 1)
        rows = advantage_table(run)
        assert {tuple(row.columns) for row in rows} == {("weight",)}
        assert all(row.status == "ok" and row.reward is not None for row in rows)
        weights = [row.columns["weight"] for row in rows]
        if kind == "rwr":
            assert sum(weights) / 8 == pytest.approx(1, rel=1e-6)
            best = max(rows, key=lambda row: row.reward)
            assert best.columns["weight"] == max(weights) > min(weights)
        else:
            prompts = [
                row.prompt
                for shard in range(2)
                for row in decode_rollouts(
                    manifest_objects(run, ROLLOUTS.key(Partition("r", 0, shard)))["rollouts"]
                )
            ]
            expected = sum(max(prompts.count(text) // 2, 1) for text in set(prompts))
            assert set(weights) == {0.0, 1.0} and sum(weights) == expected
        assert last_state(run, 1).statistics == {}


def test_metrics_of_importance_ratios_are_absent_and_not_zero(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = a_run(tiny_model, tmp_path, "rwr")
    following = run_epochs(run, 1)
    document = CHECKPOINT.load(run.store, following).metrics
    shown = _update_metrics(document)
    assert set(shown) == {
        f"update/{name}"
        for name in (
            "loss", "grad_norm", "learning_rate", "forwards", "sampling_forwards", "weight_max",
            "trained_samples", "effective_sample_size",
        )
    }  # fmt: skip
    assert "advantages" not in run.labels and run.labels["algorithm"] == "rwr"


@pytest.mark.parametrize("position", [None, "random", 1])
def test_regression_trains_on_deterministic_sampling(
    tiny_model: Path, tmp_path: Path, position: str | int | None
) -> None:
    """Whatever the window: it says which steps DDPO would train, and regression trains none."""
    window = None if position is None else {"steps": 1, "position": position}
    run = a_run(tiny_model, tmp_path, "rwr", sampler={"eta": 0, "window": window})
    run_epochs(run, 1)
    table = manifest_objects(run, ROLLOUTS.key(Partition("r", 0, 0)))["rollouts"]
    assert all(row.log_prob_mean is None for row in decode_rollouts(table))
    before, after = last_state(run, 0), last_state(run, 1)
    assert any(not torch.equal(before.weights[name], v) for name, v in after.weights.items())


def test_damaged_final_latents_and_weights_are_mended(tiny_model: Path, tmp_path: Path) -> None:
    run = a_run(tiny_model, tmp_path, "rwr_sparse")
    run_epochs(run, 1)
    before = content(run)
    damaged = [run.store.list("trajectories")[0], run.store.list("advantages")[0]]
    for key in damaged:
        path = Path(run.store.url(key).removeprefix("file://"))
        path.write_bytes(path.read_bytes()[:-7])
    damages = verify_run(run.store, "r").damages
    assert {damage.key for damage in damages} == set(damaged)
    assert all(mended.done for mended in repair(run, damages))
    assert content(run) == before


def test_a_fork_by_ddpo_is_refused_where_clean_latents_alone_were_saved(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = a_run(tiny_model, tmp_path, "rwr")
    run_epochs(run, 1)
    settings = ["algorithm={type: ddpo_is, updates_per_epoch: 2}"]
    with pytest.raises(ConfigError, match="rwr saved only the final latents"):
        check_run(fork_config(run, 0, overrides=settings), "fork")


def test_dpo_learns_from_what_another_run_saved_again_to_the_same_bytes(
    tiny_model: Path, tmp_path: Path
) -> None:
    parent = a_run(tiny_model, tmp_path, "rwr", rollouts=GROUPS, optimizer={"learning_rate": 1e-2})
    run_epochs(parent, 2)
    dpo = f"algorithm={json.dumps(ALGORITHMS['dpo'])}"
    settings = ["fork.rollouts=2", "fork.off_policy=true", dpo]
    for name in ("one", "two"):
        as_in_a_new_process()
        run_epochs(check_run(fork_config(parent, 0, overrides=settings), name).start(), 2)
    one, two = open_run(parent.store, "one"), open_run(parent.store, "two")
    for epoch in range(2):
        drawn = [
            ROLLOUTS.commit_of(parent.store, Partition(name, epoch, 0)) for name in ("r", "one")
        ]
        assert drawn[0] and drawn[1] and drawn[0].manifest.objects == drawn[1].manifest.objects
        after = last_state(one, epoch + 1)
        assert_same_tensors(after.weights, last_state(two, epoch + 1).weights)
        others = (last_state(parent, epoch + 1), last_state(one, epoch))
        for other in others:
            assert any(not torch.equal(after.weights[n], v) for n, v in other.weights.items())
    key = ADVANTAGES.key(Partition("one", 1, reward_id=one.reward.identity.reward_id))
    rows = decode_advantages(manifest_objects(one, key)["advantages"])
    pairs = {row.columns["pair"] for row in rows} - {-1}
    assert pairs
    for pair in pairs:
        (first, one_row), (second, other) = (
            (index // 4, row) for index, row in enumerate(rows) if row.columns["pair"] == pair
        )
        assert first == second
        better, worse = sorted((one_row, other), key=lambda row: -row.columns["preferred"])
        assert (better.columns["preferred"], worse.columns["preferred"]) == (1, 0)
        assert better.reward > worse.reward


def test_epochs_without_a_pair_leave_the_weights_and_say_so(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = a_run(tiny_model, tmp_path, "dpo", algorithm={"type": "dpo", "least_margin": 1e6})
    following = run_epochs(run, 2)
    assert "epoch 1 made no update: dpo found nothing to learn from in its 8" in caplog.text
    first, last = last_state(run, 0), last_state(run, 2)
    assert_same_tensors(last.weights, first.weights)
    assert (last.epoch, last.updates, last.samples) == (2, 0, 16)
    shown = _update_metrics(CHECKPOINT.load(run.store, following).metrics)
    drawn = 8 * run.config.sampler.steps * 2  # with guidance
    assert shown == {
        "update/learning_rate": 3e-4,
        "update/forwards": 0.0,
        "update/sampling_forwards": drawn,
        "update/pairs": 0.0,
    }
    assert not verify_run(run.store, "r").damages


def test_nft_samples_with_its_old_weights_which_the_samples_name(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = a_run(tiny_model, tmp_path, "nft", optimizer={"learning_rate": 1e-2})
    checkpoint = run_epochs(run, 1)
    state, saved = last_state(run, 1), CHECKPOINT.load(run.store, checkpoint)
    # After two optimizer steps, d is 0.6.
    first = last_state(run, 0)
    for name, value in state.old.items():
        expected = 0.6 * first.weights[name] + 0.4 * state.weights[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    assert saved.digests["old_digest"] != saved.digests["policy_digest"]
    shard = ROLLOUTS.load(run.store, sample_shard.fn(run.handle, checkpoint, 1, 0))
    policy = load_policy(run.config)
    policy.weights.load(state.old)
    prompts, seeds = ([getattr(row, n) for row in shard.samples()] for n in ("prompt", "seed"))
    drawn = sample(policy, prompts, seeds, run.config.sampler)
    assert torch.equal(shard.trajectories()["latents"][:, 0], drawn.latents[:, -1])
    assert {row.policy_digest for row in shard.samples()} == {saved.digests["old_digest"]}
    # The update that follows is of the trained weights.
    with policy_at(run, checkpoint) as lease:
        assert lease.policy.digest == saved.digests["policy_digest"]
