"""The moving average of the trained weights: its formula, and who sees it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ddpo.analysis.sample_image import draw as draw_one
from ddpo.basics.digests import tensors_digest
from ddpo.basics.images import decode_image
from ddpo.config import RunConfig
from ddpo.diffusion.sampling import sample
from ddpo.models import policy_digest
from ddpo.runs import Run, start_run
from ddpo.store import manifests
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.manifests import Ref
from ddpo.store.objects import Store
from ddpo.store.tables import RolloutRow, decode_rollouts
from ddpo.store.upkeep.retention import retire_checkpoints
from ddpo.training.ema import Ema
from ddpo.training.loop import initial_state, update
from ddpo.training.trajectory_gradient import TrajectoryGradient
from ddpo_workflow.tasks import export_weights as export
from ddpo_workflow.tasks.credit import credit_of
from ddpo_workflow.tasks.export_weights import export_weights
from ddpo_workflow.tasks.pictures import PictureSet, draw_pictures
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.tracking.backlog import Backlog
from ddpo_workflow.tasks.tracking.tracker import TrackingHandle
from ddpo_workflow.tasks.update import update_policy
from ddpo_workflow.tasks.worker import RunHandle, policy_at
from tests.fold import as_in_a_new_process, run_epoch, run_epochs
from tests.states import commit_state
from tests.tiny import (
    alternating_advantages,
    as_credit,
    assert_same_tensors,
    draw,
    flat,
    load_policy,
    rollouts_of,
    tiny_config,
)

pytestmark = pytest.mark.slow

ADVANTAGES = alternating_advantages(8)
DECAY = 0.9
FAST = {"learning_rate": 1e-2}
CAT = PictureSet(prompts=("a cat",), seeds=(0,))


def averaged(model: Path, root: Path | None = None, **optimizer: float) -> RunConfig:
    return tiny_config(
        model,
        optimizer={**FAST, "ema_decay": DECAY, **optimizer},
        storage={"root": str(root)} if root else {},
    )


def test_the_average_is_its_formula() -> None:
    source = torch.Generator().manual_seed(0)
    start, *steps = torch.randn((6, 3, 2), generator=source, dtype=torch.float64)
    ema = Ema({"a": start.float()}, DECAY, {"a": start})
    expected = start
    for weights in steps:
        ema.follow({"a": weights.float()})
        expected = DECAY * expected + (1 - DECAY) * weights
    assert ema.average["a"].dtype == torch.float32
    torch.testing.assert_close(ema.average["a"].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_update_averages_after_every_optimizer_step(tiny_model: Path, kind: str) -> None:
    config = tiny_config(
        tiny_model, trainable={"type": kind}, optimizer={**FAST, "ema_decay": DECAY}
    )
    policy = load_policy(config)
    state = initial_state(policy, ema=True)
    assert_same_tensors(state.ema, state.weights)
    drawn = rollouts_of(draw(policy, config))
    after, _ = update(policy, state, drawn, as_credit(ADVANTAGES), {}, config)

    plain = load_policy(config)
    parameters = list(plain.weights.parameters().values())
    adamw = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-4)
    gradient = TrajectoryGradient(plain, config.sampler, config.algorithm)
    expected = {name: value.double() for name, value in state.weights.items()}
    for samples in (range(4), range(4, 8)):
        gradient.accumulate(drawn, ADVANTAGES, samples, drawn.log_probs)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        adamw.zero_grad()
        for name, value in plain.weights.state().items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * value.detach().double()
    assert after.ema.keys() == after.weights.keys()
    for name, value in expected.items():
        torch.testing.assert_close(after.ema[name].double(), value, rtol=0, atol=1e-6)
    assert (flat(after.ema) - flat(after.weights)).abs().max() > 1e-3
    assert after.shown_weights is after.ema


def test_keeping_an_average_changes_nothing_that_is_trained(tiny_model: Path) -> None:
    states = []
    for config in (tiny_config(tiny_model, optimizer=FAST), averaged(tiny_model)):
        policy = load_policy(config)
        state = initial_state(policy, ema=config.optimizer.ema_decay is not None)
        drawn = rollouts_of(draw(policy, config))
        states.append(update(policy, state, drawn, as_credit(ADVANTAGES), {}, config)[0])
    without, with_average = states
    assert_same_tensors(with_average.weights, without.weights)
    assert_same_tensors(with_average.optimizer, without.optimizer)
    assert without.ema == {} and without.shown_weights is without.weights


def test_a_checkpoint_remembers_the_average_and_retirement_deletes_it(tiny_model: Path) -> None:
    config = averaged(tiny_model)
    policy = load_policy(config)
    first = initial_state(policy, ema=True)
    drawn = rollouts_of(draw(policy, config))
    second, _ = update(policy, first, drawn, as_credit(ADVANTAGES), {}, config)
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    refs = [commit_state(store, state) for state in (first, second)]
    assert_same_tensors(CHECKPOINT.load(store, refs[1]).state().ema, second.ema)
    assert retire_checkpoints(store, "r", keep_newest=1, keep_every=None) == [0]
    assert [key for key in store.list("checkpoints") if "/ema-" in key] == [
        manifests.load(store, refs[1]).objects["ema"].key
    ]


# Through the tasks


@pytest.fixture(autouse=True)
def fresh_process() -> None:
    as_in_a_new_process()


def a_run(model: Path, root: Path) -> tuple[Run, RunHandle]:
    run = start_run(averaged(model, root), "r")
    return run, RunHandle(root=run.store.root, run_id=run.run_id)


def rows_of(run: Run, ref: Ref, role: str) -> list[RolloutRow]:
    return decode_rollouts(run.store.get(manifests.load(run.store, ref).objects[role]))


def digests_of(run: Run, checkpoint: Ref) -> dict[str, str]:
    return CHECKPOINT.load(run.store, checkpoint).digests


def test_a_run_that_loads_its_state_anew_for_every_epoch_ends_in_the_same_bytes(
    tiny_model: Path, tmp_path: Path
) -> None:
    whole, _ = a_run(tiny_model, tmp_path / "one")
    run_epochs(whole, 3)
    resumed, handle = a_run(tiny_model, tmp_path / "many")
    checkpoint = start.fn(handle)
    for epoch in range(3):
        as_in_a_new_process()
        draw_pictures.fn(handle, checkpoint, CAT, epoch)
        checkpoint = run_epoch(resumed, checkpoint, epoch)
    one, many = bytes_of(whole), bytes_of(resumed)
    assert one == many
    assert sum("/ema-" in key for key in one) == 4


def bytes_of(run: Run) -> dict[str, bytes]:
    trees = ("checkpoints", "rollouts", "trajectories", "manifests/checkpoints")
    return {key: run.store.read(key) for tree in trees for key in run.store.list(tree)}


def test_pictures_are_drawn_with_the_average_and_rollouts_with_the_trained_weights(
    tiny_model: Path, tmp_path: Path
) -> None:
    run, handle = a_run(tiny_model, tmp_path / "store")
    checkpoint = run_epochs(run, 1)
    state = CHECKPOINT.load(run.store, checkpoint).state()
    # In turns: each has to get its own weights back.
    shard = sample_shard.fn(handle, checkpoint, 1, 0)
    pictures = draw_pictures.fn(handle, checkpoint, CAT, 1)
    second_shard = sample_shard.fn(handle, checkpoint, 1, 1)
    assert pictures is not None

    policy = load_policy(run.config)
    base, sampler = policy.base_digest, run.config.sampler
    policy.weights.load(state.ema)
    (row,) = rows_of(run, pictures, "pictures")
    (expected,) = sample(policy, ["a cat"], [row.seed], sampler).images
    assert decode_image(row.image_png).tobytes() == expected.tobytes()
    assert row.policy_digest == policy_digest(base, state.ema)
    policy.weights.load(state.weights)
    for ref in (shard, second_shard):
        rows = rows_of(run, ref, "rollouts")
        drawn = sample(policy, [r.prompt for r in rows], [r.seed for r in rows], sampler)
        for row, image in zip(rows, drawn.images, strict=True):
            assert decode_image(row.image_png).tobytes() == image.tobytes()
            assert row.policy_digest == policy_digest(base, state.weights)
    assert digests_of(run, checkpoint)["policy_digest"] == policy_digest(base, state.weights)
    assert digests_of(run, checkpoint)["ema_digest"] == policy_digest(base, state.ema)
    assert manifests.load(run.store, pictures).inputs["weights"] == "ema"


def test_pictures_of_one_checkpoint_after_another_are_each_of_its_own_average(
    tiny_model: Path, tmp_path: Path
) -> None:
    run, handle = a_run(tiny_model, tmp_path / "store")
    run_epochs(run, 2)
    as_in_a_new_process()
    policy = load_policy(run.config)
    seen = set()
    for epoch in range(3):
        checkpoint = checkpoint_of(run, epoch)
        pictures = draw_pictures.fn(handle, checkpoint, CAT, epoch)
        assert pictures is not None
        (row,) = rows_of(run, pictures, "pictures")
        policy.weights.load(CHECKPOINT.load(run.store, checkpoint).state().ema)
        (expected,) = sample(policy, ["a cat"], [row.seed], run.config.sampler).images
        assert decode_image(row.image_png).tobytes() == expected.tobytes(), epoch
        seen.add(expected.tobytes())
    assert len(seen) == 3


def test_an_update_right_after_pictures_is_of_the_trained_weights(
    tiny_model: Path, tmp_path: Path
) -> None:
    """As on a resume that asks for other pictures of an epoch whose samples are there."""
    straight, _ = a_run(tiny_model, tmp_path / "straight")
    expected = CHECKPOINT.load(straight.store, run_epochs(straight, 2)).state()
    as_in_a_new_process()
    run, handle = a_run(tiny_model, tmp_path / "interrupted")
    checkpoint = run_epochs(run, 1)
    rollouts = [
        sample_shard.fn(handle, checkpoint, 1, shard) for shard in range(run.shards_per_epoch)
    ]
    scores = [score_shard.fn(handle, ref, 1, shard) for shard, ref in enumerate(rollouts)]
    advantages = credit_of.fn(handle, checkpoint, rollouts, scores, 1)
    draw_pictures.fn(handle, checkpoint, CAT, 1)
    following = update_policy.fn(handle, checkpoint, rollouts, advantages, 1)
    found = CHECKPOINT.load(run.store, following).state()
    assert_same_tensors(found.weights, expected.weights)
    assert_same_tensors(found.ema, expected.ema)


def test_the_average_goes_on_where_the_last_epoch_left_it(tiny_model: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_model,
        algorithm={"updates_per_epoch": 1},
        optimizer={**FAST, "ema_decay": DECAY},
        storage={"root": str(tmp_path / "store")},
    )
    run = start_run(config, "r")
    run_epochs(run, 3)
    first, *states = [CHECKPOINT.load(run.store, checkpoint_of(run, k)).state() for k in range(4)]
    names = sorted(first.weights)  # files list theirs in orders of their own

    def joined(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return flat({name: tensors[name] for name in names})

    average, before = joined(first.ema), joined(first.weights)
    assert torch.equal(average, before)
    for epoch, state in enumerate(states):
        weights = joined(state.weights)
        average = DECAY * average + (1 - DECAY) * weights
        torch.testing.assert_close(joined(state.ema), average, rtol=0, atol=1e-6)
        if epoch:  # one that began anew at the epoch's own first weights is elsewhere
            anew = DECAY * before + (1 - DECAY) * weights
            assert (anew - average).abs().max() > 1e-3
        before = weights


def checkpoint_of(run: Run, epoch: int) -> Ref:
    found = CHECKPOINT.commit_of(run.store, Partition(run.run_id, epoch))
    assert found is not None
    return found.ref


NOWHERE = TrackingHandle(uri="", experiment_id="", mlflow_run_id="")


class Page:
    """An MLflow page that keeps what it is told."""

    def __init__(self) -> None:
        self.backlog = Backlog(NOWHERE)
        self.weights: dict[str, torch.Tensor] = {}
        self.metadata: dict[str, object] = {}

    def log_adapter(self, folder: Path, *, metadata: dict[str, object], **_: object) -> None:
        self.weights = safetensors.torch.load_file(folder / "pytorch_lora_weights.safetensors")
        self.metadata = metadata


@pytest.mark.parametrize("ema", [True, False], ids=["ema", "none"])
def test_what_is_exported_and_drawn_is_the_average_if_there_is_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: bool
) -> None:
    config = averaged(tiny_model, tmp_path / "store")
    if not ema:
        config = tiny_config(tiny_model, optimizer=FAST, storage={"root": str(tmp_path / "store")})
    run = start_run(config, "r")
    handle = RunHandle(root=run.store.root, run_id="r")
    checkpoint = run_epochs(run, 1)
    state = CHECKPOINT.load(run.store, checkpoint).state()
    shown = state.ema if ema else state.weights
    page = Page()
    monkeypatch.setattr(export, "tracker", lambda _: page)
    export_weights.fn(handle, NOWHERE, checkpoint, None, 1)
    exported = {f"unet.{name}": value for name, value in shown.items()}
    assert tensors_digest(page.weights) == tensors_digest(exported)
    digests = digests_of(run, checkpoint)
    assert page.metadata == {
        "epochs": 1,
        **{name: digests[name] for name in ("policy_digest", "ema_digest") if name in digests},
    }
    assert ("ema_digest" in page.metadata) == ema
    with policy_at(run, checkpoint) as lease:  # the export gave the trained weights back
        assert lease.policy.digest == digests["policy_digest"]

    policy = load_policy(run.config)
    policy.weights.load(shown)
    (expected,) = sample(policy, ["a cat"], [3], run.config.sampler).images
    assert draw_one(run, "a cat", seed=3).tobytes() == expected.tobytes()
