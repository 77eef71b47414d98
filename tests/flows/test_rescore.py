"""`rescore`: saved samples under another reward. By the flow, with Prefect's server."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from ddpo.analysis.history import mean_rewards, open_history
from ddpo.analysis.report import reward_curve
from ddpo.basics.images import decode_image
from ddpo.errors import ConfigError, NotInHistory
from ddpo.prompts import Prompt
from ddpo.rewards import Scores
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES, ROLLOUTS
from ddpo.store.objects import Store
from ddpo.store.tables import decode_advantages, decode_rollouts
from ddpo.store.upkeep.epoch_retention import retire_epochs
from ddpo_workflow.flows.fork import fork
from ddpo_workflow.flows.rescore import rescore
from ddpo_workflow.flows.run_requests import rescorable_epochs
from tests.night import EPOCHS, NIGHT, Place, typed

pytestmark = pytest.mark.slow

_UNREADABLE: set[bytes] = set()


def picky(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
    """Reward = the first pixel's red; of pictures that are named, none."""
    return Scores(
        values=np.array([image.tobytes()[0] for image in images], dtype=np.float32),
        failed=np.array([image.tobytes() in _UNREADABLE for image in images]),
    )


def test_a_rescored_fork_has_the_advantages_of_one_that_had_that_reward_from_the_start(
    place: Place,
) -> None:
    """Its prompt statistics are rebuilt by the new reward, or reset, as its own were."""
    root = place.store.root
    for statistics in ("rebuild", "reset"):
        name, other = f"by-size-{statistics}", f"by-colour-{statistics}"
        fork(NIGHT, 1, fork_id=name, statistics=statistics, epochs=2, storage=root)
        reward_id = rescore(name, "colorfulness", storage=root)
        fork(NIGHT, 1, "colorfulness", fork_id=other, statistics=statistics, epochs=2, storage=root)
        rescored, had = (
            decode_advantages(place.store.get(found.manifest.objects["advantages"]))
            for run_id in (name, other)
            if (
                found := ADVANTAGES.commit_of(
                    place.store, Partition(run_id, 1, reward_id=reward_id)
                )
            )
        )
        assert [row.columns["advantage"] for row in rescored] == [
            row.columns["advantage"] for row in had
        ]
        assert [row.count for row in rescored] == [row.count for row in had]
        assert {row.count for row in had} != {0}
    before = {key: place.store.read(key) for key in place.store.list()}
    rescore("by-size-rebuild", "colorfulness", storage=root)
    assert {key: place.store.read(key) for key in place.store.list()} == before


def test_rescoring_is_what_the_run_would_have_had_and_happens_once(place: Place) -> None:
    reward_id = rescore(NIGHT, "jpeg_incompressibility", storage=place.store.root)
    own_id = place.run(NIGHT).reward.identity.reward_id
    for epoch in range(EPOCHS):
        own, new = (
            decode_advantages(place.store.get(found.manifest.objects["advantages"]))
            for each in (own_id, reward_id)
            if (found := ADVANTAGES.commit_of(place.store, Partition(NIGHT, epoch, reward_id=each)))
        )
        assert [row.columns["advantage"] for row in new] == pytest.approx(
            [-row.columns["advantage"] for row in own]
        )
        assert [row.count for row in new] == [row.count for row in own]
    page = place.page(f"{NIGHT}-by-{reward_id}")
    assert page.data.tags["mlflow.parentRunId"] == place.page(NIGHT).info.run_id
    metrics = page.data.metrics
    assert metrics["agreement/pearson"] == pytest.approx(-1)
    assert metrics["agreement/spearman"] == pytest.approx(-1)
    client = MlflowClient(place.uri)
    history = client.get_metric_history(page.info.run_id, "reward/mean")
    assert [(m.step, m.value) for m in history] == [
        (point.epoch, pytest.approx(-point.mean)) for point in reward_curve(place.run(NIGHT))
    ]
    pictures = [f.path for f in client.list_artifacts(page.info.run_id, "images")]
    assert any("disagreement" in name for name in pictures)

    before = {key: place.store.read(key) for key in place.store.list()}
    assert rescore(NIGHT, "jpeg_incompressibility", storage=place.store.root) == reward_id
    assert {key: place.store.read(key) for key in place.store.list()} == before
    assert client.get_metric_history(page.info.run_id, "reward/mean") == history
    assert [f.path for f in client.list_artifacts(page.info.run_id, "images")] == pictures


def brightness(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
    """Reward = the mean of all pixels."""
    return [float(np.asarray(image, dtype=np.float64).mean()) for image in images]


def test_advantages_of_later_epochs_come_once_those_before_are_scored(place: Place) -> None:
    def known() -> list[tuple[int, bool, bool]]:
        rows = open_history(place.store.root, NIGHT).samples(reward_id).to_pylist()
        found = {(r["epoch"], r["reward"] is not None, r["advantage"] is not None) for r in rows}
        return sorted(found)

    reward = f"{__name__}:brightness"
    reward_id = rescore(NIGHT, reward, epochs="1:", storage=place.store.root)
    assert known() == [(1, True, False), (2, True, False)]
    scored = place.store.list(f"rewards/reward_name={reward_id}")
    rescore(NIGHT, reward, storage=place.store.root)
    assert known() == [(0, True, True), (1, True, True), (2, True, True)]
    assert set(scored) < set(place.store.list(f"rewards/reward_name={reward_id}"))


def test_an_epoch_that_cannot_be_scored_ends_no_rescoring(place: Place) -> None:
    for shard in range(2):
        found = ROLLOUTS.commit_of(place.store, Partition(NIGHT, 1, shard))
        assert found is not None
        rows = decode_rollouts(place.store.get(found.manifest.objects["rollouts"]))
        _UNREADABLE.update(decode_image(row.image_png).tobytes() for row in rows)
    reward_id = rescore(NIGHT, f"{__name__}:picky", storage=place.store.root)
    history = open_history(place.store.root, NIGHT).samples(reward_id)
    by_epoch = {
        epoch: [row for row in history.to_pylist() if row["epoch"] == epoch]
        for epoch in range(EPOCHS)
    }
    assert all(row["advantage"] is not None for row in by_epoch[0])
    assert all((row["reward"], row["advantage"]) == (None, None) for row in by_epoch[1])
    # Prompt statistics after epoch 1 are not known, so that epoch 2 has rewards alone.
    assert all(row["reward"] is not None for row in by_epoch[2])
    assert all(row["advantage"] is None for row in by_epoch[2])


def test_only_epochs_with_saved_samples_are_rescored(place: Place) -> None:
    run = place.run(NIGHT)
    assert rescorable_epochs(run, None) == [0, 1, 2]
    assert rescorable_epochs(run, "1:") == [1, 2]
    assert rescorable_epochs(run, ":1") == [0]
    assert rescorable_epochs(run, "0:2") == [0, 1]
    assert rescorable_epochs(run, "1") == [1]
    with pytest.raises(NotInHistory, match="Committed epochs: 0-2"):
        rescorable_epochs(run, "5:9")
    with pytest.raises(ConfigError, match="nor a range"):
        rescorable_epochs(run, "one")
    with pytest.raises(ConfigError, match="the run's own reward"):
        rescore(NIGHT, "jpeg_compressibility", storage=place.store.root)


def test_what_retention_left_is_rescored_and_shown(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    kept = Path(
        shutil.copytree(place.store.root.removeprefix("file://"), tmp_path / "store", symlinks=True)
    )
    retire_epochs(Store.open(str(kept)), NIGHT, keep="checkpoints", older_than=2)
    typed(monkeypatch, "rescore", NIGHT, "--reward", "colorfulness", "--root", str(kept))
    screen = capsys.readouterr().out
    lines = [line.split("│")[1:-1] for line in screen.splitlines() if "│" in line]
    history = open_history(str(kept), NIGHT)
    first, second = (mean_rewards(history.samples(name)) for name in (None, "colorfulness"))
    assert [[cell.strip() for cell in line] for line in lines] == [
        [str(epoch), f"{first[epoch]:.4g}", f"{second[epoch]:.4g}"] for epoch in (1, 2)
    ]


def test_ranks_of_equal_rewards_are_shared() -> None:
    from ddpo_workflow.tasks.tracking.rescored import correlations

    some, others = np.array([1.0, 2.0, 2.0, 5.0]), np.array([10.0, 20.0, 30.0, 40.0])
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: by hand, covariance 4.5, variances 4.5 and 5.
    assert correlations(some, others)["agreement/spearman"] == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert correlations(some, np.ones(4)) == {}
