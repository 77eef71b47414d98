"""A value function in the fold: what the update makes of it, and what a run remembers of it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ddpo_workflow.tasks.update
from ddpo.config import RunConfig
from ddpo.prompts import Prompt
from ddpo.rewards import Scores
from ddpo.runs import Run, RunHandle, start_run
from ddpo.runs.forks.plan import fork_config
from ddpo.store import manifests
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.manifests import Ref
from ddpo.store.objects import Store
from ddpo.store.tables import decode_advantages
from ddpo.store.upkeep.retention import retire_checkpoints
from ddpo.training.critic import Critic
from ddpo.training.loop import initial_state, update
from ddpo.training.state import TrainState
from ddpo.training.trajectory_gradient import TrajectoryGradient
from ddpo_workflow.tasks.start import start
from tests.fold import as_in_a_new_process, run_epoch, run_epochs
from tests.states import commit_state
from tests.tiny import (
    alternating_advantages,
    as_credit,
    assert_same_tensors,
    build_tiny_model,
    ddim_on,
    draw,
    flat,
    load_policy,
    rollouts_of,
    tiny_config,
)

pytestmark = pytest.mark.slow

REWARDS = alternating_advantages(8)
VALUE = {"type": "value", "value_learning_rate": 1e-2}
FAST = {"learning_rate": 1e-2}
METRICS = ("value_loss", "value_explained_variance")


def with_value(model: Path, root: Path | None = None, **changes: Any) -> RunConfig:
    storage = {"root": str(root)} if root else {}
    return tiny_config(
        model, **{"algorithm": {"advantages": VALUE}, "optimizer": FAST, **changes}, storage=storage
    )


# The update


@pytest.mark.parametrize(
    ("algorithm", "position"),
    [("ddpo_is", None), ("ddpo_sf", 1)],
    ids=["is, all steps", "sf, window"],
)
def test_an_update_trains_on_rewards_less_v_and_v_after_it(
    tiny_model: Path, algorithm: str, position: int | None
) -> None:
    updates = {"ddpo_is": 2, "ddpo_sf": 1}[algorithm]
    window = {} if position is None else {"window": {"steps": 2, "position": position}}
    config = with_value(
        tiny_model,
        algorithm={"type": algorithm, "updates_per_epoch": updates, "advantages": VALUE},
        sampler=window,
    )
    policy = load_policy(config)
    scored = torch.tensor([True] * 7 + [False])
    state = initial_state(policy)
    assert state.value == {}
    drawn = rollouts_of(draw(policy, config))
    state, _ = update(policy, state, drawn, as_credit(REWARDS, scored), {}, config)
    after, metrics = update(policy, state, drawn, as_credit(REWARDS, scored), {}, config)

    plain = load_policy(config)
    plain.weights.load(state.weights)
    settings = config.algorithm.advantages.critic
    critic = Critic(plain, ddim_on(plain), drawn.prompts, state.value, settings, seed=config.seed)
    values = critic.values().detach()
    advantages = (REWARDS[:, None] - values).clamp(-5, 5)
    advantages[7] = 0.0
    assert values.std(dim=0).min() > 1e-3 and values.std(dim=1).min() > 1e-5
    parameters = list(plain.weights.parameters().values())
    adamw = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-4)
    for name, parameter in plain.weights.parameters().items():
        adamw.state[parameter] = {
            moment: state.optimizer[f"{moment}/{name}"].clone()
            for moment in ("step", "exp_avg", "exp_avg_sq")
        }
    gradient = TrajectoryGradient(plain, config.sampler, config.algorithm)
    for samples in torch.arange(8).chunk(updates):
        # One column at a time, each with its own [S]: the mean over columns is the update's.
        for column in gradient.trained_steps():
            alone = TrajectoryGradient(plain, config.sampler, config.algorithm)
            alone.trained_steps = lambda column=column: [column]
            alone.accumulate(drawn, advantages[:, column], samples.tolist(), drawn.log_probs)
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad /= len(gradient.trained_steps())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        adamw.zero_grad()
    for name, value in plain.weights.state().items():
        torch.testing.assert_close(after.weights[name], value, rtol=0, atol=2e-5)
    assert (flat(after.weights) - flat(state.weights)).abs().max() > 1e-3
    critic.learn(REWARDS, scored)
    assert_same_tensors(after.value, critic.state())
    errors = (REWARDS[:7, None] - values[:7]).double()
    assert metrics["value_loss"] == pytest.approx(float((errors**2).mean()), rel=1e-5)
    spread = float(np.var(REWARDS[:7].double().numpy()))
    explained = 1 - float(np.var(errors.numpy())) / spread
    assert metrics["value_explained_variance"] == pytest.approx(explained, rel=1e-5)


def test_a_checkpoint_remembers_v_and_retirement_deletes_it() -> None:
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    refs = []
    for epoch in range(3):
        value = {"weight/hidden.bias": torch.full((2,), float(epoch))} if epoch else {}
        weights = {"a": torch.full((2,), float(epoch))}
        state = TrainState(weights, {}, {}, epoch, updates=0, samples=0, value=value)
        refs.append(commit_state(store, state))
        assert_same_tensors(CHECKPOINT.load(store, refs[-1]).state().value, value)
    assert retire_checkpoints(store, "r", keep_newest=1, keep_every=None) == [0, 1]
    assert [key for key in store.list("checkpoints") if "/value-" in key] == [
        manifests.load(store, refs[2]).objects["value"].key
    ]


# Through the tasks


@pytest.fixture(autouse=True)
def fresh_process() -> None:
    as_in_a_new_process()


def bytes_of(run: Run) -> dict[str, bytes]:
    trees = ("checkpoints", "rollouts", "advantages", "manifests/checkpoints")
    return {key: run.store.read(key) for tree in trees for key in run.store.list(tree)}


def test_a_run_that_loads_its_state_anew_for_every_epoch_ends_in_the_same_bytes(
    tiny_model: Path, tmp_path: Path
) -> None:
    whole = start_run(with_value(tiny_model, tmp_path / "one"), "r")
    run_epochs(whole, 3)
    resumed = start_run(with_value(tiny_model, tmp_path / "many"), "r")
    handle = RunHandle(root=resumed.store.root, run_id="r")
    checkpoint = start.fn(handle)
    for epoch in range(3):
        as_in_a_new_process()
        checkpoint = run_epoch(resumed, checkpoint, epoch)
    one, many = bytes_of(whole), bytes_of(resumed)
    assert one == many
    # There is none before the first training.
    assert {key.split("/")[2] for key in one if "/value-" in key} == {
        "epoch=00001",
        "epoch=00002",
        "epoch=00003",
    }


def test_the_first_epoch_is_that_of_batch_advantages_and_the_second_is_not(
    tiny_model: Path, tmp_path: Path
) -> None:
    weights, tables, measured = [], [], []
    for kind in ("batch", "value"):
        advantages = VALUE if kind == "value" else {"type": kind}
        run = start_run(
            with_value(tiny_model, tmp_path / kind, algorithm={"advantages": advantages}), "r"
        )
        run_epochs(run, 2)
        tables.append([run.store.read(key) for key in run.store.list("advantages")])
        listed = [
            manifests.find(run.store, key)
            for key in sorted(run.store.list("manifests/checkpoints"))
        ]
        loaded = [manifest for manifest in listed if manifest is not None]
        weights.append([CHECKPOINT.load(run.store, m.ref).state().weights for m in loaded])
        measured.append([CHECKPOINT.read(run.store, m.manifest).metrics for m in loaded[1:]])
        with_object = ["value" in m.manifest.objects for m in loaded]
        assert with_object == ([False, True, True] if kind == "value" else [False] * 3)
    batch, value = weights
    assert_same_tensors(value[1], batch[1])
    assert not torch.equal(flat(value[2]), flat(batch[2]))
    assert tables[0][0] == tables[1][0]
    assert not any(name in document for document in measured[0] for name in METRICS)
    assert measured[1][0]["value_loss"] == pytest.approx(1.0, abs=0.01)  # V is 0
    assert measured[1][0]["value_explained_variance"] == pytest.approx(0.0, abs=1e-9)
    assert measured[1][1]["value_loss"] != measured[1][0]["value_loss"]


def every_third_fails(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
    """Reward = the picture's brightness; of every third there is none."""
    failed = np.arange(len(images)) % 3 == 0
    return Scores(np.array([np.asarray(image).mean() for image in images]), failed)


@pytest.mark.parametrize("on_failure", ["drop", "impute"])
def test_samples_without_a_reward_are_told_to_the_update(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_failure: str
) -> None:
    reward = {"name": f"{__name__}:every_third_fails", "on_failure": on_failure, "tries": 1}
    run = start_run(with_value(tiny_model, tmp_path / "store", reward=reward), "r")
    told: list[torch.Tensor] = []
    right = update

    def spying(*arguments: Any, **named: Any) -> Any:
        told.append(arguments[3]["reward"].isfinite())
        return right(*arguments, **named)

    monkeypatch.setattr(ddpo_workflow.tasks.update, "update", spying)
    run_epochs(run, 1)
    (table,) = [run.store.read(key) for key in run.store.list("advantages")]
    rewards = [row.reward for row in decode_advantages(table)]
    assert told[0].tolist() == [reward is not None for reward in rewards]
    assert rewards.count(None) == 4  # two in each shard


class Brightness:
    """Reward = the picture's brightness times a factor."""

    version = "1"

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        return Scores(np.array([self.factor * np.asarray(image).mean() for image in images]))


def forked(parent: Run, fork_id: str, **changes: Any) -> tuple[Run, Ref]:
    as_in_a_new_process()
    fork = start_run(fork_config(parent, 1, **changes), fork_id)
    return fork, start.fn(RunHandle(root=fork.store.root, run_id=fork_id))


def value_of(run: Run, checkpoint: Ref) -> str | None:
    stored = manifests.load(run.store, checkpoint).objects.get("value")
    return stored and stored.key


def test_a_fork_takes_v_over_where_it_foretells_the_forks_own_reward(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = {"name": f"{__name__}:Brightness"}
    parent = start_run(with_value(tiny_model, tmp_path / "store", reward=reward), "r")
    run_epochs(parent, 2)
    (own,) = [key for key in parent.store.list("checkpoints") if "epoch=00001/value-" in key]
    fork, first = forked(parent, "same", overrides=["optimizer.learning_rate=1e-3"])
    assert value_of(fork, first) == own
    following = run_epoch(fork, first, 1)
    state = CHECKPOINT.load(fork.store, following).state()
    assert {float(v) for name, v in state.value.items() if name.startswith("step/")} == {20.0}
    other = build_tiny_model(tmp_path / "other", seed=5)
    for fork_id, changes in {
        "reward": {"reward": "jpeg_incompressibility"},
        "parameters": {"reward": parent.config.reward.name, "parameters": {"factor": -1.0}},
        "base": {"overrides": [f"model.path={other}", "fork.off_policy=true"]},
        "reset": {"statistics": "reset"},
        "off": {"overrides": ["algorithm.advantages={type: batch}"]},
    }.items():
        assert value_of(*forked(parent, fork_id, **changes)) is None, fork_id
    with monkeypatch.context() as exchanged:
        exchanged.setattr(Brightness, "version", "2")  # another reward of the same name
        assert value_of(*forked(parent, "exchanged")) is None
    fork, first = forked(parent, "other", reward="jpeg_incompressibility")
    following = run_epoch(fork, first, 1)
    state = CHECKPOINT.load(fork.store, following).state()
    assert {float(v) for name, v in state.value.items() if name.startswith("step/")} == {10.0}
