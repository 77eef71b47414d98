"""Groups of samples that share a prompt, and advantages relative to them."""

from __future__ import annotations

import re
import statistics
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ddpo.algorithms.advantages import GroupAdvantages
from ddpo.errors import ConfigError, RewardError
from ddpo.runs import check_run, start_run
from ddpo.runs.forks.plan import fork_config
from ddpo.store import manifests
from ddpo.store.epochs import read_epoch
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.tables import AdvantageRow, decode_advantages
from ddpo_workflow.tasks.sample import prompt_of
from tests.configs import parse
from tests.fold import as_in_a_new_process, run_epochs
from tests.scored import compute_advantages
from tests.tiny import tiny_config

NAN = float("nan")
GROUP = GroupAdvantages(type="group")
BATCH = GroupAdvantages(type="group", deviation="batch")
GROUP_OF_4 = {"type": "ddpo_is", "advantages": {"type": "group"}}


@pytest.mark.parametrize("config", [GROUP, BATCH], ids=["group", "batch"])
def test_advantages_are_those_of_the_standard_librarys_moments(config: GroupAdvantages) -> None:
    rewards = (np.random.default_rng(0).normal(size=24) * 3 + 7).tolist()
    # The same prompt twice: groups are told apart by their place, and not by their text.
    prompts = ["a"] * 4 + ["b"] * 4 + ["a"] * 4 + ["c"] * 12
    found = compute_advantages(config, {}, prompts, np.array(rewards), samples_per_prompt=4)
    for row, reward in enumerate(rewards):
        group = rewards[row // 4 * 4 : row // 4 * 4 + 4]
        spread = group if config.deviation == "group" else rewards
        mean, std = statistics.fmean(group), statistics.pstdev(spread)
        assert found.advantages[row] == pytest.approx((reward - mean) / (std + 1e-6), rel=1e-12)
        assert (found.mean[row], found.std[row]) == (pytest.approx(mean), pytest.approx(std))
    assert found.count.tolist() == [4] * 24 and found.statistics == {}


@pytest.mark.parametrize("config", [GROUP, BATCH], ids=["group", "batch"])
def test_a_group_without_spread_gets_exactly_0(config: GroupAdvantages) -> None:
    # Three times 0.1 have a mean that is not 0.1.
    rewards = np.array([0.1, 0.1, 0.1, 1.0, 2.0, 6.0, NAN, 0.7, NAN, NAN, NAN, NAN])
    for impute in (False, True):
        found = compute_advantages(
            config, {}, ["a"] * 12, rewards, samples_per_prompt=3, impute=impute
        )
        assert found.advantages[[0, 1, 2, 6, 7, 8, 9, 10, 11]].tolist() == [0.0] * 9
        assert (found.advantages[3:6] != 0).all()
    table = {"reward": torch.tensor(rewards, dtype=torch.float32)}
    assert config.metrics(table, 3) == {"zero_spread_groups": 3}
    assert config.metrics({"reward": torch.tensor([1.0, 1.5, NAN, 2.0, 1.0, NAN])}, 3) == {
        "zero_spread_groups": 0
    }


@pytest.mark.parametrize("config", [GROUP, BATCH], ids=["group", "batch"])
def test_failed_samples_stay_out_of_their_groups_moments(config: GroupAdvantages) -> None:
    rewards = np.array([1.0, NAN, 4.0, 2.0, 8.0, 8.5, NAN, 9.5])
    dropped = compute_advantages(config, {}, ["a"] * 8, rewards, samples_per_prompt=4)
    scored = [1.0, 4.0, 2.0]
    spread = scored if config.deviation == "group" else rewards[np.isfinite(rewards)]
    std = statistics.pstdev(map(float, spread))
    expected = [(r - statistics.fmean(scored)) / (std + 1e-6) for r in scored]
    assert dropped.advantages[[0, 2, 3]] == pytest.approx(expected, rel=1e-12)
    assert dropped.advantages[[1, 6]].tolist() == [0.0, 0.0]
    assert dropped.count.tolist() == [3] * 8 and not dropped.imputed.any()
    # As its group's mean a sample is neither better nor worse.
    imputed = compute_advantages(config, {}, ["a"] * 8, rewards, samples_per_prompt=4, impute=True)
    assert imputed.imputed.tolist() == np.isnan(rewards).tolist()
    assert imputed.advantages.tolist() == dropped.advantages.tolist()


def test_advantages_of_groups_are_clipped_and_shuffled() -> None:
    rewards = np.array([*[0.0] * 9, 100.0, *np.arange(10.0)])
    clipped = GroupAdvantages(type="group", clip=2.5)
    found = compute_advantages(clipped, {}, ["a"] * 20, rewards, samples_per_prompt=10)
    assert found.advantages.max() == 2.5
    shuffled = clipped.model_copy(update={"shuffle": True})
    dealt = compute_advantages(shuffled, {}, ["a"] * 20, rewards, samples_per_prompt=10)
    assert sorted(dealt.advantages) == sorted(found.advantages)
    assert dealt.advantages.tolist() != found.advantages.tolist()


def test_groups_without_any_reward_are_refused() -> None:
    with pytest.raises(RewardError, match="none of the 4 samples"):
        compute_advantages(GROUP, {}, ["a"] * 4, np.full(4, NAN), samples_per_prompt=2)


def test_groups_of_one_are_refused_since_nothing_could_be_learned() -> None:
    with pytest.raises(ConfigError, match=r"set rollouts\.samples_per_prompt to at least 2"):
        parse(algorithm=GROUP_OF_4)
    assert parse(algorithm=GROUP_OF_4, rollouts={"samples_per_prompt": 2})


def test_the_examples_of_the_docs_are_configs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
    groups, pairs = (
        parse(**yaml.safe_load(example))
        for example in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    )
    assert groups.rollouts.samples_per_prompt == 8
    assert groups.algorithm.advantages == GROUP
    assert pairs.preferences and pairs.reward.name == "preference"


def test_samples_of_a_group_share_a_prompt_and_groups_draw_independently(
    tiny_model: Path,
) -> None:
    def prompts(size: int, run_id: str) -> list[str]:
        config = tiny_config(
            tiny_model,
            rollouts={"samples_per_epoch": 24, "samples_per_prompt": size},
            storage={"root": f"memory://{uuid.uuid4().hex}"},
        )
        run = start_run(config, run_id)
        return [prompt_of(run, 3, index).text for index in range(24)]

    alone, together = prompts(1, "one"), prompts(4, "four")
    # A shard has four samples here, a group too; and groups are numbered over the whole epoch.
    assert together == [alone[index // 4] for index in range(24)]
    assert len(set(together)) > 3 and prompts(6, "six") == [alone[i // 6] for i in range(24)]


def test_a_run_by_groups_stores_their_advantages_and_counts_those_that_teach_nothing(
    tiny_model: Path, tmp_path: Path
) -> None:
    as_in_a_new_process()
    config = tiny_config(
        tiny_model,
        algorithm={"advantages": {"type": "group"}},
        rollouts={"samples_per_prompt": 4},
        storage={"root": str(tmp_path)},
    )
    run = start_run(config, "r")
    after = run_epochs(run, 1)
    rows = credit_rows(run)
    for first in (0, 4):
        group = [row.reward for row in rows[first : first + 4] if row.reward is not None]
        expected = [
            (reward - statistics.fmean(group)) / (statistics.pstdev(group) + 1e-6)
            for reward in group
        ]
        found = [row.columns["advantage"] for row in rows[first : first + 4]]
        assert found == pytest.approx(expected, rel=1e-5) and len(group) == 4
    document = CHECKPOINT.load(run.store, after).metrics
    spreads = [{row.reward for row in rows[first : first + 4]} for first in (0, 4)]
    assert document["zero_spread_groups"] == sum(len(rewards) == 1 for rewards in spreads)


def credit_rows(run) -> list[AdvantageRow]:
    manifest = manifests.load(run.store, read_epoch(run.store, run.run_id, 0).commit.advantages)
    return decode_advantages(run.store.get(manifest.objects["advantages"]))


def test_a_fork_keeps_the_groups_of_the_samples_that_it_inherits(
    tiny_model: Path, tmp_path: Path
) -> None:
    as_in_a_new_process()
    config = tiny_config(
        tiny_model,
        rollouts={"samples_per_prompt": 4},
        storage={"root": str(tmp_path)},
    )
    run = start_run(config, "r")
    run_epochs(run, 1)
    assert fork_config(run, 0).rollouts.samples_per_prompt == 4
    message = r"rollouts\.samples_per_prompt is 2, but the saved samples have 4"
    with pytest.raises(ConfigError, match=message):
        check_run(fork_config(run, 0, overrides=["rollouts.samples_per_prompt=2"]), "fork")
