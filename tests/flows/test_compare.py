"""`ddpo compare`: real runs of a tiny model, what they share, what a repetition leaves alone."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import yaml
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from ddpo.analysis.comparison.plan import Comparison, Member, read_comparison
from ddpo.analysis.comparison.report import EQUAL_BUDGETS, markdown
from ddpo.analysis.comparison.result import read_result
from ddpo.analysis.history import open_history
from ddpo.analysis.intervals import interval
from ddpo.basics.digests import sha256_bytes
from ddpo.errors import ConfigError
from ddpo.runs import open_run, start_run
from ddpo.runs.forks.checks import saved_rollouts
from ddpo.store import manifests
from ddpo.store.epochs import read_epoch
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.manifests import Manifest
from ddpo.store.objects import Store
from ddpo.store.tables import decode_rollouts
from ddpo.store.upkeep.verify import verify_run
from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.flows.compare import sample_shared
from ddpo_workflow.flows.run_requests import check_comparison
from ddpo_workflow.flows.train import resume, train
from ddpo_workflow.tasks.repair import repair
from ddpo_workflow.tasks.tracking.connection import (
    RUN_ID_TAG,
    connect,
    find_page,
)
from ddpo_workflow.tasks.tracking.experiment import find_or_create_experiment
from ddpo_workflow.tasks.tracking.page import open_page, tags_of
from tests.fold import as_in_a_new_process, run_epochs

pytestmark = pytest.mark.slow

STEP = {"optimizer": {"learning_rate": 0.01}}
VARIANTS = {
    "is": STEP,
    "rwr": {
        **STEP,
        "algorithm": {"type": "rwr", "beta": 5.0, "inner_epochs": 1, "updates_per_epoch": 2},
    },
}


@dataclass(frozen=True)
class Compared:
    """A comparison whose runs have run."""

    file: Path
    comparison: Comparison
    store: Store
    screen: str


def written(folder: Path, model: Path, **changes: Any) -> Path:
    base = {
        "model": {"path": str(model)},
        "prompts": {"name": "simple_animals"},
        "reward": {"name": "jpeg_compressibility"},
        "sampler": {"steps": 2},
        "rollouts": {"samples_per_epoch": 4, "shard_size": 2},
        "algorithm": {"type": "ddpo_is", "updates_per_epoch": 2},
        "numerics": {"device": "cpu", "dtype": "float32", "threads": 1}
        | {"sample_batch_size": 2, "micro_batch_size": 2},
        "tracking": {"system_metrics": False, "uri": f"sqlite:///{folder}/mlflow.db"}
        | {"pictures": {"prompts": ["a cat"]}},
        "storage": {"root": str(folder / "store")},
        "outputs": str(folder / "outputs"),
    }
    raw = {"base": base, "variants": VARIANTS, "seeds": [0, 1], "epochs": 2, **changes}
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def typed(*words: str, status: int = 0) -> str:
    """Type a `ddpo` command that ends with a status; returns its screen."""
    before, sys.argv = sys.argv, ["ddpo", *words]
    screen = io.StringIO()
    try:
        with contextlib.redirect_stdout(screen), pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    assert (ended.value.code or 0) == status, screen.getvalue()
    return screen.getvalue()


@pytest.fixture(scope="module")
def online(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    folder = tmp_path_factory.mktemp("compare")
    file = written(folder, tiny_model, controls={"rwr": "is"})
    screen = typed("compare", str(file))
    return Compared(file, read_comparison(file), Store.open(str(folder / "store")), screen)


def rollouts(store: Store, member: Member, epoch: int) -> list[Manifest]:
    refs = saved_rollouts(open_run(store, member.run_id), epoch)
    return [manifests.load(store, ref) for ref in refs]


def test_the_first_epoch_is_the_same_objects_in_all_variants(online: Compared):
    for place, seed in enumerate(online.comparison.config.seeds):
        shared = rollouts(online.store, online.comparison.shared[seed], 0)
        for members in online.comparison.variants.values():
            adopted = rollouts(online.store, members[place], 0)
            assert [m.objects for m in adopted] == [m.objects for m in shared]
            assert rollouts(online.store, members[place], 1)[0].objects.keys() == {
                "rollouts", "samples", "trajectories",
            }  # fmt: skip


def test_every_variant_asks_the_reward_as_often_and_shares_the_first_answers(online: Compared):
    for seed, shared in online.comparison.shared.items():
        answers = open_history(online.store.root, shared.run_id).samples().column("reward")
        for members in online.comparison.variants.values():
            (member,) = (m for m in members if m.seed == seed)
            samples = open_history(online.store.root, member.run_id).samples()
            assert samples.num_rows == 2 * 4
            assert samples.column("reward").to_pylist()[:4] == answers.to_pylist()


def test_the_table_is_what_the_samples_say(online: Compared):
    last = {
        name: [
            mean(
                open_history(online.store.root, member.run_id)
                .samples(epochs=[1])
                .column("reward")
                .to_pylist()
            )
            for member in members
        ]
        for name, members in online.comparison.variants.items()
    }
    # Of two values, s = |a - b| / sqrt(2), so the half-width is 12.7062 |a - b| / 2.
    apart = [b - a for a, b in zip(last["is"], last["rwr"], strict=True)]
    page = (online.file.parent / "outputs" / "tiny" / "comparison.md").read_text()
    for a, b in (*last.values(), apart):
        half = 12.7062047 * abs(a - b) / 2
        assert f"{(a + b) / 2:.4f} ± {half:.4f}" in page
    assert "| vs is | vs its control |" in page
    # Its control is the first variant, so both differences are one.
    difference = f"{sum(apart) / 2:.4f} ± {12.7062047 * abs(apart[0] - apart[1]) / 2:.4f}"
    assert f"| {difference} | {difference} |" in page
    assert "Controls: is of rwr." in page
    queries, forwards, seconds = read_result(online.comparison, online.store).budgets
    assert queries.amount == 4 and seconds.amount > 0
    assert {name: spent.reward for name, spent in queries.variants.items()} == {
        name: interval(means) for name, means in last.items()
    }
    # Of an epoch of rwr: 4 samples of 2 steps with guidance, and each once, unguided, in an update.
    assert forwards.amount == 4 * 2 * 2 + 4 and forwards.variants["rwr"].epochs == 1
    assert 0 < forwards.variants["is"].epochs < 1
    assert f"## {EQUAL_BUDGETS}" in page and "| variant | 4 reward queries | 20 forwards | " in page
    assert (online.file.parent / "outputs" / "tiny" / "comparison.png").stat().st_size > 5000
    html = (online.file.parent / "outputs" / "tiny" / "comparison.html").read_text()
    assert all(name in html for name in last)
    assert html.count("data:image/webp") >= len(last)
    shown = "".join(online.screen.split())  # as narrow as the terminal is, paths are folded
    assert "comparison.png" in shown and all(name in online.screen for name in last)


def test_all_runs_are_shown_below_the_comparisons_page(online: Compared):
    tracking = online.comparison.members[0].config.tracking
    client = connect(tracking.uri)
    experiment = find_or_create_experiment(client, tracking.experiment)
    page = find_page(client, experiment, {RUN_ID_TAG: "tiny"})
    assert page is not None and page.info.status == "FINISHED"
    files = {file.path for file in client.list_artifacts(page.info.run_id)}
    assert files == {"comparison.html", "comparison.md", "comparison.png"}
    for member in online.comparison.members:
        stored = open_run(online.store, member.run_id)
        run = find_page(client, experiment, tags_of(stored))
        assert run is not None and run.info.status == "FINISHED"
        assert run.data.tags[MLFLOW_PARENT_RUN_ID] == page.info.run_id


def test_the_same_command_again_does_nothing_twice(
    online: Compared, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("work that is committed was done again")

    def committed() -> dict[str, str]:
        found = [key for key in online.store.list() if "/starts/" not in key]
        return {key: sha256_bytes(online.store.read(key)) for key in found}

    before = committed()
    page = online.file.parent / "outputs" / "tiny" / "comparison.md"
    told = page.read_text()
    as_in_a_new_process()
    monkeypatch.setattr("ddpo_workflow.tasks.worker.Policy", refuse)
    monkeypatch.setattr("ddpo_workflow.tasks.score.score_samples", refuse)
    typed("compare", str(online.file))
    assert committed() == before
    assert page.read_text() == told


def test_a_shared_run_is_gone_on_with_by_its_comparison_alone(online: Compared, tmp_path: Path):
    shared = online.comparison.shared[0]
    before = {key: sha256_bytes(online.store.read(key)) for key in online.store.list()}
    file = tmp_path / "shared.yaml"
    file.write_text(shared.config.model_dump_json())
    for words in (
        ("resume", shared.run_id, "--root", online.store.root),
        ("resume", shared.run_id, "--root", online.store.root, "--epochs", "3"),
        ("train", str(file), "--run-id", shared.run_id),
    ):
        screen = typed(*words, status=2)
        assert "ddpo compare CONFIG --name tiny" in screen
        assert "ddpo resume" not in screen
    for flow in (
        lambda: resume(shared.run_id, online.store.root),
        lambda: train(str(file), shared.run_id),
    ):
        with pytest.raises(ConfigError, match="ddpo compare CONFIG --name tiny"):
            flow()
    assert {key: sha256_bytes(online.store.read(key)) for key in online.store.list()} == before
    # A variant is a run like any other.
    typed("resume", online.comparison.variants["is"][0].run_id, "--root", online.store.root)


def test_what_a_comparison_has_drawn_otherwise_is_refused_by_name(tiny_model: Path, tmp_path: Path):
    """As where DDPO comes to regression: that keeps clean latents alone."""
    alike = {"rwr": VARIANTS["rwr"], "slow": {"algorithm": VARIANTS["rwr"]["algorithm"]}}
    file = written(tmp_path, tiny_model, variants=alike, seeds=[0])
    shared = read_comparison(file).shared[0]
    start_run(shared.config, shared.run_id)
    check_comparison(read_comparison(file))
    file = written(tmp_path, tiny_model, variants={**alike, "is": STEP}, seeds=[0])
    with pytest.raises(ConfigError, match=r"(?s)shared samples.*store_trajectories.*--name"):
        check_comparison(read_comparison(file))
    base = ["reward.name=colorfulness"]
    with pytest.raises(ConfigError, match=r"(?s)exists.*reward.*--name"):
        check_comparison(read_comparison(file, None, base))


def test_offline_all_learn_from_what_the_first_checkpoint_drew(tiny_model: Path, tmp_path: Path):
    as_in_a_new_process()
    file = written(tmp_path, tiny_model, epochs=3, seeds=[0], offline=True)
    comparison = read_comparison(file)
    shared = comparison.shared[0]
    run = start_run(shared.config, shared.run_id)
    sample_shared(run.handle, open_page(run).handle)
    first = CHECKPOINT.commit_of(run.store, Partition(run.run_id, 0))
    assert first is not None and CHECKPOINT.commit_of(run.store, Partition(run.run_id, 1)) is None
    untrained = CHECKPOINT.read(run.store, first.manifest).digests["policy_digest"]
    assert not verify_run(run.store, run.run_id).damages
    # Its second epoch's parts are made again by what made them: the first checkpoint.
    epoch = read_epoch(run.store, run.run_id, 1)
    lost = [
        epoch.shards[0].objects["trajectories"].key,
        manifests.load(run.store, epoch.commit.advantages).objects["advantages"].key,
    ]
    kept = [run.store.read(key) for key in lost]
    for key in lost:
        run.store.delete(key)
    mended = repair(run, verify_run(run.store, run.run_id).damages)
    assert len(mended) == 2 and all(each.done for each in mended), mended
    assert [run.store.read(key) for key in lost] == kept

    for members in comparison.variants.values():
        run_epochs(start_run(members[0].config, members[0].run_id), 3)
        by_epoch = [
            {
                row.policy_digest
                for manifest in rollouts(run.store, members[0], epoch)
                for row in decode_rollouts(run.store.get(manifest.objects["rollouts"]))
            }
            for epoch in range(3)
        ]
        assert by_epoch[:2] == [{untrained}, {untrained}]
        assert untrained not in by_epoch[2]

    result = read_result(comparison, run.store)
    assert (result.epochs, result.queries) == ((0, 2), (0, 8))
    on, off = result.ratios  # of DDPO's two epochs; regression has none
    assert {on.variant, off.variant} == {"is"}
    assert abs(off.mean - 1) > abs(on.mean - 1) and off.smallest < 1 < off.largest
    told = markdown(comparison, result)
    assert "trains off-policy" in told and "## Importance ratios" in told
    assert "a difference may be chance" in told
