"""Sums of rewards that are normalised each in its group: formula, refusals, and a run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ddpo.algorithms.advantages import GroupAdvantages
from ddpo.algorithms.base import Scored, ScoredPart
from ddpo.errors import ConfigError
from ddpo.rewards import load_reward
from ddpo.rewards.base import group_weights
from ddpo.rewards.service.serving import serve
from ddpo.runs import start_run
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES, SCORES
from ddpo.store.objects import Store
from ddpo_workflow.flows.rescore import rescore
from ddpo_workflow.flows.train import train
from tests.configs import parse
from tests.fold import as_in_a_new_process, run_epochs
from tests.tiny import tiny_config

NAN = float("nan")
RNG = np.random.default_rng(0)
SIZES, COLOURS = RNG.normal(size=12) * 1e-3, RNG.normal(size=12) * 50 + 80
PARTS = (ScoredPart(1.0, SIZES), ScoredPart(-0.5, COLOURS))


def by_hand(
    parts: Sequence[tuple[float, Sequence[float]]], rewards: Sequence[float], spread: str
) -> list[float]:
    """Return the advantages of groups of four by the standard library's moments."""
    found = []
    for row, reward in enumerate(rewards):
        total = 0.0
        for weight, values in parts:
            known = [v for v, r in zip(values, rewards, strict=True) if r == r]
            group = [
                values[i] for i in range(row // 4 * 4, row // 4 * 4 + 4) if rewards[i] == rewards[i]
            ]
            std = statistics.pstdev(group if spread == "group" else known)
            total += weight * (values[row] - statistics.fmean(group)) / (std + 1e-6)
        found.append(total if reward == reward else 0.0)
    return found


def credit_of(algorithm: GroupAdvantages, rewards: np.ndarray, **scored: Any) -> np.ndarray:
    given = Scored(["a"] * 12, rewards, 4, parts=PARTS, **scored)
    return algorithm.compute(given, {}).columns["advantage"]


@pytest.mark.parametrize("deviation", ["group", "batch"])
@pytest.mark.parametrize("impute", [False, True])
def test_each_reward_counts_by_its_weight_whatever_its_unit(deviation: Any, impute: bool) -> None:
    rewards = SIZES - 0.5 * COLOURS
    rewards[[3, 4]] = NAN
    kind = GroupAdvantages(type="group", deviation=deviation, clip=100.0)
    found = credit_of(kind, rewards, impute=impute)
    hand = by_hand([(1.0, SIZES.tolist()), (-0.5, COLOURS.tolist())], rewards.tolist(), deviation)
    assert found.tolist() == pytest.approx(hand, rel=1e-9)
    assert found[[3, 4]].tolist() == [0.0, 0.0]
    summed = kind.compute(Scored(["a"] * 12, rewards, 4), {}).columns["advantage"]
    assert np.abs(summed - found).max() > 0.5  # which the colours alone decide
    clipped = credit_of(GroupAdvantages(type="group", deviation=deviation, clip=0.4), rewards)
    assert clipped.tolist() == pytest.approx(np.clip(hand, -0.4, 0.4).tolist(), rel=1e-9)


def test_a_reward_without_spread_in_a_group_counts_for_nothing_there() -> None:
    flat = np.array([0.1] * 4 + SIZES[4:].tolist())
    parts = (ScoredPart(3.0, flat), ScoredPart(1.0, COLOURS))
    kind = GroupAdvantages(type="group")
    scored = Scored(["a"] * 12, flat + COLOURS, 4, parts=parts)
    found = kind.compute(scored, {}).columns["advantage"]
    alone = kind.compute(Scored(["a"] * 12, COLOURS, 4), {}).columns["advantage"]
    assert found[:4].tolist() == alone[:4].tolist()


def test_a_shuffled_control_deals_the_same_advantages() -> None:
    rewards = SIZES - 0.5 * COLOURS
    own = credit_of(GroupAdvantages(type="group"), rewards)
    dealt = credit_of(GroupAdvantages(type="group", shuffle=True), rewards, shuffle_seed=1)
    assert sorted(dealt) == sorted(own) and dealt.tolist() != own.tolist()


# The reward

JPEG = {"name": "jpeg_compressibility", "weight": 2.0}
COLOUR = {"name": "colorfulness", "label": "colour", "weight": -1.0}
SUM = {"rewards": [JPEG, COLOUR], "normalise": "group"}
GROUPS = {
    "algorithm": {"type": "ddpo_is", "advantages": {"type": "group"}},
    "rollouts": {"samples_per_prompt": 2},
}


def test_the_weights_are_the_components_and_other_sums_are_what_they_were() -> None:
    by_group, plain = load_reward("weighted", SUM), load_reward("weighted", {"rewards": [JPEG]})
    assert group_weights(by_group) == {"jpeg_compressibility": 2.0, "colour": -1.0}
    assert group_weights(plain) == {} == group_weights(load_reward("colorfulness", {}))
    assert "normalise" not in str(plain.identity)
    constants = load_reward("weighted", {"rewards": [JPEG, COLOUR]})
    assert constants.identity.reward_id != by_group.identity.reward_id


def test_sums_that_would_not_be_normalised_are_refused() -> None:
    inner = {"name": "weighted", "parameters": SUM}
    for normalise in ("constants", "group"):
        with pytest.raises(ConfigError, match="component 'weighted' is a sum with `normalise: gr"):
            load_reward("weighted", {"rewards": [inner], "normalise": normalise})
    with pytest.raises(ConfigError, match="cannot be served; serve its components"):
        serve("weighted", SUM, host="127.0.0.1", port=0, say=lambda line: None)


@pytest.mark.parametrize(
    "algorithm",
    [{"type": "ddpo_is"}, {"type": "ddpo_sf", "advantages": {"type": "batch"}}, {"type": "rwr"}],
    ids=["per_prompt", "batch", "rwr"],
)
def test_an_algorithm_without_groups_is_refused(algorithm: dict[str, Any]) -> None:
    reward = {"name": "weighted", "parameters": SUM}
    with pytest.raises(ConfigError, match=r"compares samples with others; set `algorithm\.adv"):
        parse(reward=reward, algorithm=algorithm, rollouts={"samples_per_prompt": 2})
    assert parse(reward=reward, **GROUPS)


def test_a_sum_by_its_import_path_is_refused_before_credit_is_wrong(
    tiny_model: Path, tmp_path: Path
) -> None:
    as_in_a_new_process()
    name = "ddpo.rewards.builtin.weighted:Weighted"
    config = tiny_config(
        tiny_model,
        reward={"name": name, "parameters": SUM},
        storage={"root": str(tmp_path)},
    )
    with pytest.raises(ConfigError, match="compares samples with others"):
        run_epochs(start_run(config, "r"), 1)


@pytest.mark.slow
def test_a_run_and_its_rescoring_normalise_each_reward_in_its_group(
    tiny_model: Path, mlflow_database: Path, tmp_path: Path
) -> None:
    """By the flows; advantages are those of the stored columns, before and after a rescoring."""
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    config = tiny_config(
        tiny_model,
        reward={"name": "weighted", "parameters": SUM},
        sampler={"steps": 2},
        rollouts={"samples_per_epoch": 16, "shard_size": 8, "samples_per_prompt": 4},
        algorithm=GROUPS["algorithm"],
        storage={"root": str(tmp_path / "store")},
        tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db", "pictures": {"prompts": ["a cat"]}},
        outputs=str(tmp_path / "outputs"),
        epochs=1,
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.whole()))
    train(str(file), run_id="r")
    check(tmp_path, load_reward("weighted", SUM).identity.reward_id, (2.0, -1.0))
    other = {"rewards": [{**JPEG, "weight": -1.0}, {**COLOUR, "weight": 3.0}], "normalise": "group"}
    reward_id = rescore("r", "weighted", other, storage=str(tmp_path / "store"))
    check(tmp_path, reward_id, (-1.0, 3.0))


def check(folder: Path, reward_id: str, weights: tuple[float, float]) -> None:
    store = Store.open(str(folder / "store"))
    rows = [
        row
        for shard in range(2)
        for row in SCORES.require(store, Partition("r", 0, shard, reward_id)).rows()
    ]
    columns = [
        [float(row.columns[name]) for row in rows] for name in ("jpeg_compressibility", "colour")
    ]
    assert max(columns[1]) > min(columns[1])
    unclipped = by_hand(list(zip(weights, columns, strict=True)), [1.0] * 16, "group")
    hand = np.clip(unclipped, -5.0, 5.0).tolist()  # as advantages are by default
    table = ADVANTAGES.require(store, Partition("r", 0, reward_id=reward_id)).rows()
    assert [row.sample_id for row in table] == [row.sample_id for row in rows]
    assert [row.columns["advantage"] for row in table] == pytest.approx(hand, rel=1e-4, abs=1e-4)
