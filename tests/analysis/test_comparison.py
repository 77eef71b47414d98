"""A comparison's plan and numbers: what is rejected before anything runs, intervals by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddpo.analysis.comparison.budgets import at_equal_budget
from ddpo.analysis.comparison.plan import Comparison, check_not_shared, read_comparison
from ddpo.analysis.comparison.result import compare_curves
from ddpo.analysis.intervals import interval, t_quantile
from ddpo.errors import ConfigError
from ddpo.runs import start_run
from ddpo.store.objects import Store
from tests.recorded import start_unchecked

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = CONFIGS / "starter_compare.yaml"
RECOMPUTE = {"old_log_probs": "recompute"}
RWR = {"algorithm": {"type": "rwr"}}


def comparison(folder: Path, **changes: Any) -> Comparison:
    raw: dict[str, Any] = {
        "base": str(CONFIGS / "starter.yaml"),
        "variants": {"is": {}, "rwr": RWR},
        "seeds": [3, 5],
        "epochs": 4,
    }
    file = folder / "my_comparison.yaml"
    file.write_text(yaml.safe_dump({**raw, **changes}))
    return read_comparison(file)


@pytest.mark.parametrize(
    ("freedom", "published"),
    # Upper 2.5% points, as printed in NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2.
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (100, 1.984)],
)
def test_t_quantiles_are_the_published_ones(freedom: int, published: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(published, abs=5e-4)


def test_an_interval_of_three_seeds_is_the_one_computed_by_hand() -> None:
    # Mean 2; squared deviations 1, 0, 1; s² = 2 / 2 = 1.
    estimate = interval([1.0, 2.0, 3.0])
    assert estimate.mean == 2.0
    assert estimate.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_one_value_has_no_interval() -> None:
    assert interval([0.25]).half_width is None
    assert str(interval([0.25])) == "0.2500"


def test_gains_and_differences_are_taken_seed_by_seed() -> None:
    first, second, third = compare_curves(
        {
            "a": [[0.0, 1.0], [10.0, 12.0]],
            "b": [[0.0, 2.0], [10.0, 13.5]],
            "c": [[0.0, 1.5], [10.0, 12.0]],
        },
        controls={"b": "c"},
    )
    assert first.difference is None and second.difference is not None
    # Last epochs: 1 and 12 of a, 2 and 13.5 of b: 1 and 1.5 apart, s = 0.5 / sqrt(2).
    assert second.difference.mean == 1.25
    expected = 12.7062 * (0.5 / math.sqrt(2)) / math.sqrt(2)
    assert second.difference.half_width == pytest.approx(expected, rel=1e-4)
    assert (first.gain.mean, second.gain.mean) == (1.5, 2.75)
    assert [point.mean for point in second.curve] == [5.0, 7.75]
    assert second.by_seed == ((0.0, 2.0), (10.0, 13.5))
    # Last epochs of b and of its control c: 0.5 and 1.5 apart.
    assert first.beyond_control is None and third.beyond_control is None
    assert second.beyond_control is not None and second.beyond_control.mean == 1.0
    expected = 12.7062 * math.sqrt(0.5) / math.sqrt(2)
    assert second.beyond_control.half_width == pytest.approx(expected, rel=1e-4)


def test_at_an_equal_budget_rewards_are_those_where_it_is_spent() -> None:
    costs = {
        "a": [(0.0, 10.0, 20.0), (0.0, 10.0, 20.0)],
        "b": [(0.0, 40.0, 80.0), (0.0, 20.0, 40.0)],
    }
    curves = {"a": [[0.0, 1.0, 5.0], [0.0, 2.0, 6.0]], "b": [[0.0, 4.0, 8.0], [1.0, 4.0, 8.0]]}
    budget = at_equal_budget("forwards", costs, curves)
    assert budget.amount == 20.0  # all that a spends
    # Of b, the first seed is half an epoch far, the second a whole one.
    assert {name: spent.epochs for name, spent in budget.variants.items()} == {"a": 2.0, "b": 0.75}
    assert budget.variants["a"].reward == interval([5.0, 6.0])
    assert budget.variants["b"].reward == interval([2.0, 4.0])


def test_the_shipped_comparison_gives_the_four_algorithms_of_the_paper_equal_terms() -> None:
    planned = read_comparison(SHIPPED)
    assert planned.name == "starter-compare"
    settings = {name: runs[0].config for name, runs in planned.variants.items()}
    for name in ("ddpo_is", "ddpo_sf", "rwr", "rwr_sparse"):
        assert settings[name].algorithm.type == name
    configs = [run.config for runs in planned.variants.values() for run in runs]
    assert len(configs) == 6 * 5
    for part in ("model", "prompts", "reward", "sampler", "numerics", "epochs"):
        assert len({repr(getattr(config, part)) for config in configs}) == 1


def test_the_shipped_controls_differ_from_what_they_control_by_the_reward_alone() -> None:
    planned = read_comparison(SHIPPED)
    blind = {
        "ddpo_is": {"advantages": {"shuffle": True}},
        "rwr": {"beta": 0.0},
    }
    assert planned.config.controls.keys() == blind.keys()
    for name, change in blind.items():
        control = planned.config.controls[name]
        for real, without in zip(planned.variants[name], planned.variants[control], strict=True):
            changed = with_changes(real.config.algorithm, change)
            assert without.config == real.config.model_copy(update={"algorithm": changed})


def with_changes(part: Any, changes: dict[str, Any]) -> Any:
    """Return a part of a config with some settings changed, in nested parts too."""
    update = {
        name: with_changes(getattr(part, name), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return part.model_copy(update=update)


def test_each_variant_forks_its_seeds_shared_run_before_epoch_0(tmp_path: Path) -> None:
    planned = comparison(tmp_path)
    assert [run.run_id for run in planned.members] == [
        f"my-comparison-seed{seed}-{each}" for seed in (3, 5) for each in ("shared", "is", "rwr")
    ]
    for runs in planned.variants.values():
        for run in runs:
            fork = run.config.fork
            assert fork is not None
            assert (fork.run_id, fork.epoch, fork.rollouts, fork.off_policy) == (
                f"my-comparison-seed{run.seed}-shared", 0, 1, False,
            )  # fmt: skip
            assert (run.config.seed, run.config.epochs) == (run.seed, 4)
            assert run.config.tracking.parent == "my-comparison"


def test_the_shared_run_stores_what_any_variant_needs_and_retires_nothing(tmp_path: Path) -> None:
    ddpo = {"algorithm": {"type": "ddpo_sf"}}
    base = yaml.safe_load((CONFIGS / "starter.yaml").read_text())
    base["storage"] = {"keep_newest_checkpoints": 1, "retention": {"keep": "checkpoints"}}
    for variants, stored in (({"rwr": RWR, "sf": ddpo}, "full"), ({"a": RWR, "b": RWR}, "final")):
        shared = comparison(tmp_path, base=base, variants=variants).shared[3].config
        assert shared.stored_trajectories == stored
        assert shared.fork is None and shared.epochs == 1
        assert shared.storage.keep_newest_checkpoints is None
        assert shared.storage.retention.keep == "everything"


def test_the_shared_run_alone_is_not_to_be_trained(tmp_path: Path) -> None:
    base = yaml.safe_load((CONFIGS / "starter.yaml").read_text())
    base |= {"storage": {"root": str(tmp_path / "store")}, "outputs": str(tmp_path / "outputs")}
    planned = comparison(tmp_path, base=base)
    store = Store.open(str(tmp_path / "store"))
    shared, variant = planned.shared[3], planned.variants["is"][0]
    check_not_shared(store, shared.run_id)  # does not exist yet
    for member in (shared, variant):
        start_unchecked(member.config, member.run_id)
    check_not_shared(store, variant.run_id)
    with pytest.raises(ConfigError, match="ddpo compare CONFIG --name my-comparison") as refused:
        check_not_shared(store, shared.run_id)
    assert f"'{shared.run_id}'" in str(refused.value)
    # An unrelated run may have a similar name, or be nested under another's page.
    tracking = shared.config.tracking
    for run_id, parent in (("mine-seed3-shared", None), ("mine-seed3-draw", "mine")):
        changed = {"tracking": tracking.model_copy(update={"parent": parent})}
        start_run(shared.config.model_copy(update=changed), run_id)
        check_not_shared(store, run_id)


def test_offline_all_epochs_but_the_last_are_shared_and_ratios_are_to_who_drew(
    tmp_path: Path,
) -> None:
    planned = comparison(tmp_path, offline=True)
    assert planned.shared[3].config.epochs == 3
    config = planned.variants["is"][0].config
    assert config.fork is not None
    assert (config.fork.rollouts, config.fork.off_policy) == (3, True)
    assert config.algorithm.model_dump()["old_log_probs"] == "stored"
    uncorrected = {"is": {}, "sf": {"algorithm": {"type": "ddpo_sf"}}}
    comparison(tmp_path, offline=True, variants=uncorrected)


def test_samples_that_are_drawn_ahead_are_refused(tmp_path: Path) -> None:
    comparison(tmp_path)
    ahead = ["rollouts.sample_ahead=true"]
    with pytest.raises(ConfigError, match=r"has rollouts\.sample_ahead, but a comparison measures"):
        read_comparison(tmp_path / "my_comparison.yaml", overrides=ahead)


def test_a_part_with_a_type_replaces_and_one_without_changes(tmp_path: Path) -> None:
    changed = {"algorithm": {"clip_range": 0.5}, "optimizer": {"max_grad_norm": 2.0}}
    planned = comparison(
        tmp_path, variants={"is": changed, "sf": {"algorithm": {"type": "ddpo_sf"}}}
    )
    config = planned.variants["is"][0].config
    assert config.algorithm.model_dump(include={"clip_range", "updates_per_epoch"}) == {
        "clip_range": 0.5, "updates_per_epoch": 2,
    }  # fmt: skip
    assert (config.optimizer.learning_rate, config.optimizer.max_grad_norm) == (2e-3, 2.0)
    assert planned.variants["sf"][0].config.algorithm.model_dump()["updates_per_epoch"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"is": {}}}, "expected at least two variants"),
        ({"variants": {"is": {}, "b": {"sampler": {"steps": 5}}}}, "variant 'b' changes sampler"),
        ({"variants": {"is": {}, "b": {"reward": {"name": "x"}}}}, "variant 'b' changes reward"),
        ({"variants": {"is": {}, "shared": {}}}, "cannot be a variant's name"),
        ({"variants": {"is": {}, "a b": {}}}, "cannot be a variant's name"),
        ({"variants": {"is": {}, "b": 3}}, "variants.b: found 3"),
        (
            {"variants": {"is": {}, "b": {"algorithm": {"type": "rwr", "advantages": {}}}}},
            "algorithm.advantages: there is no such key",
        ),
        ({"variants": {"is": {}, "b": {"advantages": {}}}}, "variant 'b' changes advantages"),
        ({"variants": {"is": {}, "b": {"optimizer": {"lr": 1}}}}, "there is no such key"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": []}, "expected at least one"),
        ({"epochs": 1}, "greater than or equal to 2"),
        ({"epoch": 4}, "did you mean `epochs`?"),
        ({"controls": {"is": "shuffled"}}, "there is no variant 'shuffled'"),
        ({"controls": {"sf": "is"}}, "there is no variant 'sf'"),
        ({"controls": {"is": "is"}}, "'is' is itself controlled"),
        ({"base": "nowhere.yaml"}, "there is no config file"),
        ({"base": {"model": "starter"}}, "prompts: missing"),
        ({"base": {"fork": {"run_id": "r", "epoch": 1}}}, "remove `fork`"),
        (
            {"offline": True, "variants": {"a": {"algorithm": RECOMPUTE}, "b": {}}},
            "every ratio would be 1",
        ),
    ],
    ids=[
        "one_variant", "sampler", "reward", "shared", "name", "no_mapping", "no_advantages",
        "above_its_place", "unknown",
        "same_seeds", "no_seed", "one_epoch", "misspelt", "no_control", "no_controlled",
        "own_control", "no_base", "bad_base", "fork",
        "recompute",
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_by_one_message(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        comparison(tmp_path, **changes)
    assert message in str(refused.value)
