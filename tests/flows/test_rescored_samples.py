"""Saved samples under another reward: every shard of every epoch, each beside its own reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpo.basics.images import decode_image
from ddpo.config import RewardConfig
from ddpo.prompts import Prompt
from ddpo.runs import Run, RunHandle, start_run
from ddpo.runs.forks.checks import saved_rollouts
from ddpo.store import manifests
from ddpo.store.keys import Partition
from ddpo.store.kinds import ROLLOUTS, SCORES
from ddpo.store.manifests import Ref
from ddpo.store.tables import decode_rewards, decode_rollouts
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.tracking import rescored as module
from ddpo_workflow.tasks.tracking.backlog import Backlog
from ddpo_workflow.tasks.tracking.rescored import track_disagreement, track_rescored
from ddpo_workflow.tasks.tracking.tracker import TrackingHandle
from tests.fold import as_in_a_new_process, run_epochs
from tests.tiny import tiny_config

pytestmark = pytest.mark.slow

EPOCHS = 2
REWARD = RewardConfig(name=f"{__name__}:redness")
NOWHERE = TrackingHandle(uri="", experiment_id="", mlflow_run_id="")


def redness(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
    """Reward = the mean of the red channel."""
    return [float(np.asarray(image, dtype=np.float64)[..., 0].mean()) for image in images]


@dataclass
class Page:
    """An MLflow page that keeps what it is told."""

    backlog: Backlog = field(default_factory=lambda: Backlog(NOWHERE))
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)
    texts: dict[str, str] = field(default_factory=dict)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics[step] = metrics

    def log_image(self, key: str, image: Image.Image, step: int) -> None:
        self.pictures[key] = image
        self.steps.add(step)

    def log_text(self, text: str, path: str) -> None:
        self.texts[path] = text

    def describe(self) -> None:
        """Do nothing: the description is MLflow's."""


@dataclass(frozen=True)
class Saved:
    """Samples as the store has them, read without the code under test."""

    pictures: dict[str, Image.Image]
    own: dict[str, float]

    @property
    def new(self) -> dict[str, float]:
        """Redness by sample."""
        return {name: redness([picture], [])[0] for name, picture in self.pictures.items()}


def saved_samples(run: Run, epochs: Sequence[int]) -> Saved:
    pictures, own = {}, {}
    for epoch in epochs:
        for shard in range(2):
            for key, role in (
                (ROLLOUTS.key(Partition("r", epoch, shard)), "rollouts"),
                (SCORES.key(Partition("r", epoch, shard, reward_id=run.reward_id)), "rewards"),
            ):
                found = manifests.find(run.store, key)
                assert found is not None
                table = run.store.get(found.manifest.objects[role])
                if role == "rollouts":
                    rows = decode_rollouts(table)
                    pictures |= {row.sample_id: decode_image(row.image_png) for row in rows}
                else:
                    own |= {row.sample_id: float(row.reward or 0) for row in decode_rewards(table)}
    return Saved(pictures, own)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    page = Page()
    monkeypatch.setattr(module, "tracker", lambda _: page)
    return page


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Run:
    as_in_a_new_process()
    config = tiny_config(
        tiny_model,
        sampler={"steps": 2},
        optimizer={"learning_rate": 1e-2},
        storage={"root": str(tmp_path / "store")},
    )
    run = start_run(config, "r")
    run_epochs(run, EPOCHS)
    return run


def under_redness(run: Run) -> tuple[RunHandle, list[list[Ref]]]:
    """Score all that is saved; returns the handle and each epoch's scores."""
    handle = run.handle
    return handle, [
        [
            score_shard.fn(handle, ref, epoch, shard, REWARD)
            for shard, ref in enumerate(saved_rollouts(run, epoch))
        ]
        for epoch in range(EPOCHS)
    ]


def test_agreement_is_that_of_all_samples_of_an_epoch_with_their_own_rewards(
    run: Run, page: Page
) -> None:
    handle, scores = under_redness(run)
    for epoch in range(EPOCHS):
        found = track_rescored.fn(handle, NOWHERE, scores[epoch], epoch)
        saved = saved_samples(run, [epoch])
        ids = sorted(saved.pictures)
        assert len(ids) == 8
        new, own = (np.array([rewards[i] for i in ids]) for rewards in (saved.new, saved.own))
        expected = ((new - new.mean()) * (own - own.mean())).mean() / (new.std() * own.std())
        assert abs(expected) < 0.999  # the two rewards are not one
        assert found["agreement/pearson"] == pytest.approx(expected, abs=1e-6)
        assert found["reward/mean"] == pytest.approx(new.mean(), rel=1e-6)
        assert page.metrics[epoch] == found


def test_the_samples_shown_are_those_that_the_two_rewards_disagree_on_most(
    run: Run, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_DISAGREEMENTS", 3)
    handle, _ = under_redness(run)
    shown = track_disagreement.fn(handle, NOWHERE, range(EPOCHS), REWARD)
    saved = saved_samples(run, range(EPOCHS))
    ids = sorted(saved.pictures)
    assert len(ids) == 16
    new, own = (np.array([rewards[i] for i in ids]) for rewards in (saved.new, saved.own))
    disagreement = (new - new.mean()) / new.std() - (own - own.mean()) / own.std()
    by_new = [ids[row] for row in np.argsort(-disagreement)]
    assert shown == by_new[:3] + by_new[:-4:-1]
    # Of more than one shard and epoch; else the test would not see that one is left out.
    assert {i.rsplit("/", 1)[0] for i in shown} == {"r/00000", "r/00001"}
    assert {int(i[-6:]) // 4 for i in shown} == {0, 1}
    sides = ("new-higher", "own-higher")
    names = [f"disagreement/epochs-0-1-{side}-{n}" for side in sides for n in range(3)]
    assert sorted(page.pictures) == names
    assert page.steps == {EPOCHS - 1}
    for name, sample in zip(names, shown, strict=True):
        width, height = 256, 256
        top = page.pictures[name].crop((0, 0, width, height))
        enlarged = saved.pictures[sample].resize((width, height), Image.Resampling.NEAREST)
        assert top.tobytes() == enlarged.tobytes(), name


def test_images_of_other_epochs_keep_their_own_legend(run: Run, page: Page) -> None:
    handle, _ = under_redness(run)
    first = track_disagreement.fn(handle, NOWHERE, [0, 1], REWARD)
    images, legends = dict(page.pictures), dict(page.texts)
    second = track_disagreement.fn(handle, NOWHERE, [1], REWARD)
    assert first != second
    # The images of a name and a step are logged once, and a legend is replaced by a newer one.
    assert (
        len(page.pictures) == len(first) + len(second) and page.pictures.items() >= images.items()
    )
    assert len(page.texts) == 2 and page.texts.items() >= legends.items()
    assert all(any(name in text for text in page.texts.values()) for name in page.pictures)
