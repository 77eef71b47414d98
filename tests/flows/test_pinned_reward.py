"""A run is scored by the reward that it was started with, and read without it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpo.analysis.report import report_figure, reward_curve
from ddpo.errors import ConfigError, RewardError, RunIdentityMismatch
from ddpo.prompts import Prompt, load_prompts
from ddpo.rewards import RewardIdentity, Scores, load_reward
from ddpo.rewards.service import endpoints as endpoints_module
from ddpo.rewards.service.app import create_app
from ddpo.runs import Run, RunHandle, open_run, start_run
from ddpo.store import epochs as commits
from ddpo.store.kinds import ROLLOUTS
from ddpo.store.manifests import Ref
from ddpo.store.objects import Store
from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.flows.train import train_run
from ddpo_workflow.tasks.commit import commit_epoch
from ddpo_workflow.tasks.credit import credit_of
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.start import start
from tests.fold import as_in_a_new_process
from tests.rewards.served import serving
from tests.servers import free_port
from tests.tiny import tiny_config

pytestmark = pytest.mark.slow

IMPATIENT = {"retries": 0, "start_within_s": 0.2}
OWN = "def constant(images, prompts): return [7.0] * len(images)\n"


class Weighty:
    """A reward whose score is its weights."""

    def __init__(self, weights: int) -> None:
        self.identity = RewardIdentity("weighty", {}, {"org/model": f"commit-{weights}"})
        self.weights = weights

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        return Scores(np.full(len(images), self.weights, np.float32))


@contextmanager
def deployed(port: int, weights: int) -> Iterator[RewardIdentity]:
    """A reward service with these weights on a port."""
    reward = Weighty(weights)
    with serving(create_app(lambda: reward), port):
        yield reward.identity


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDPO_REWARD_ENDPOINTS", raising=False)
    monkeypatch.delenv("DDPO_REWARD_TOKEN", raising=False)
    monkeypatch.setattr(endpoints_module, "_FIRST_WAIT_S", 0.01)
    as_in_a_new_process()


def started(model: Path, root: Path, reward: dict) -> tuple[Run, RunHandle, Ref, list[Ref]]:
    """A run with its first epoch drawn, and nothing scored."""
    run = start_run(tiny_config(model, storage={"root": str(root)}, reward=reward), "r")
    handle = RunHandle(root=run.store.root, run_id="r")
    first = start.fn(handle)
    return (
        run,
        handle,
        first,
        [sample_shard.fn(handle, first, 0, s) for s in range(run.shards_per_epoch)],
    )


def over(port: int) -> dict:
    """The reward `http` as a config has it."""
    endpoints = [f"http://127.0.0.1:{port}"]
    return {"name": "http", "parameters": {"endpoints": endpoints, **IMPATIENT}}


def score_all(handle: RunHandle, rollouts: list[Ref]) -> list[Ref]:
    return [score_shard.fn(handle, ref, 0, shard) for shard, ref in enumerate(rollouts)]


def test_a_service_redeployed_with_other_weights_is_refused_by_name(tiny_model, tmp_path):
    port = free_port()
    with deployed(port, 1) as first:
        run, handle, _, rollouts = started(tiny_model, tmp_path, over(port))
        scored = score_shard.fn(handle, rollouts[0], 0, 0)
    as_in_a_new_process()
    with deployed(port, 2) as second:
        with pytest.raises(
            RewardError, match=r"'r' was started with the reward.*ddpo fork"
        ) as told:
            score_shard.fn(handle, rollouts[1], 0, 1)
        for part in (first.digest, second.digest, second.reward_id, "'http'"):
            assert part in str(told.value)
        with pytest.raises(RewardError, match="was started with"):  # what is committed, too
            score_shard.fn(handle, rollouts[0], 0, 0)
        with pytest.raises(RunIdentityMismatch, match="digests"):
            start_run(run.config, "r")
    assert commits.reward_ids(run.store, "r") == [first.reward_id]
    as_in_a_new_process()
    with deployed(port, 1):
        assert score_shard.fn(handle, rollouts[0], 0, 0) == scored
        score_shard.fn(handle, rollouts[1], 0, 1)
    assert commits.reward_ids(run.store, "r") == [first.reward_id]


def test_a_reward_that_stands_in_for_the_runs_own_is_held_to_no_digest(tiny_model, tmp_path):
    run, handle, _, rollouts = started(tiny_model, tmp_path, {"name": "jpeg_compressibility"})
    other = run.config.reward.model_copy(update={"name": "jpeg_incompressibility"})
    score_shard.fn(handle, rollouts[0], 0, 0, other)
    (seen,) = commits.reward_ids(run.store, "r")
    assert seen.startswith("jpeg_incompressibility-")


@pytest.fixture
def ddpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process; gives exit status and what the screen showed."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ddpo", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().out

    return run


def committed_epoch(handle: RunHandle, first: Ref, rollouts: list[Ref]) -> None:
    """Score and commit the first epoch, with nothing learned."""
    scores = score_all(handle, rollouts)
    credit = credit_of.fn(handle, first, rollouts, scores, 0)
    commit_epoch.fn(handle, rollouts, scores, credit, first, 0)


def check_readable(ddpo, run: Run, mean: float) -> None:
    """Check that list, curve and report of a run with one epoch need no reward."""
    found = open_run(run.store, "r")
    (point,) = reward_curve(found)
    assert (point.epoch, point.mean) == (0, pytest.approx(mean))
    (line,) = report_figure(found, "0" * 8).axes[0].lines
    assert np.asarray(line.get_xydata()) == pytest.approx(np.asarray([(0, mean)]))
    status, screen = ddpo("runs", "--json", "--root", run.store.root)
    assert status == 0, screen
    (row,) = json.loads(screen)
    assert row["last_reward"] == pytest.approx(mean)


def test_a_runs_rewards_are_read_while_its_service_is_down(ddpo, tiny_model, tmp_path):
    """Its id has the name that the service told, which the config does not know."""
    port = free_port()
    with deployed(port, 3) as identity:
        run, handle, first, rollouts = started(tiny_model, tmp_path, over(port))
        assert reward_curve(open_run(run.store, "r")) == []
        committed_epoch(handle, first, rollouts)
    with pytest.raises(RewardError, match="no endpoint"):
        _ = open_run(run.store, "r").reward
    assert open_run(run.store, "r").reward_id == identity.reward_id
    check_readable(ddpo, run, 3.0)


def test_runs_of_a_served_reward_are_shown_without_listing_what_was_scored(
    ddpo, tiny_model, tmp_path, monkeypatch
):
    """A bucket may hold a hundred thousand of those manifests."""
    port = free_port()
    with deployed(port, 3):
        run, handle, first, rollouts = started(tiny_model, tmp_path, over(port))
        committed_epoch(handle, first, rollouts)
        start_run(run.config, "unscored")
    calls: dict[str, list[str]] = {"list": [], "folders": []}
    for name, seen in calls.items():
        right = getattr(Store, name)

        def counted(store: Store, prefix: str = "", *, seen=seen, right=right) -> list[str]:
            seen.append(prefix)
            return right(store, prefix)

        monkeypatch.setattr(Store, name, counted)
    status, screen = ddpo("runs", "--json", "--root", run.store.root)
    assert status == 0, screen
    assert [row["last_reward"] for row in json.loads(screen)] == [3, None]
    assert calls["list"] and not [prefix for prefix in calls["list"] if "rewards" in prefix]
    assert not calls["folders"]


def test_a_runs_rewards_are_read_when_the_users_code_is_gone(
    ddpo, tiny_model, tmp_path, monkeypatch
):
    code = tmp_path / "own_pinned_fixture.py"
    code.write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    reward = {"name": "own_pinned_fixture:constant"}
    run, handle, first, rollouts = started(tiny_model, tmp_path / "store", reward)
    committed_epoch(handle, first, rollouts)
    code.unlink()
    monkeypatch.delitem(sys.modules, "own_pinned_fixture")
    with pytest.raises(ConfigError, match="own_pinned_fixture"):
        _ = open_run(run.store, "r").reward
    check_readable(ddpo, run, 7.0)


def test_a_comment_in_a_rewards_file_is_named_as_what_refuses_a_resume(
    tiny_model, tmp_path, monkeypatch
):
    code = tmp_path / "own_commented_fixture.py"
    code.write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    reward = {"name": "own_commented_fixture:constant"}
    run, handle, _, rollouts = started(tiny_model, tmp_path / "store", reward)

    def edited(text: str) -> None:
        code.write_text(text)
        monkeypatch.delitem(sys.modules, "own_commented_fixture")
        as_in_a_new_process()

    edited(OWN + "# a comment\n")
    with pytest.raises(RunIdentityMismatch) as told:
        start_run(run.config, "r")
    version = run.pins.reward_version
    for part in (str(code), "has changed, if only in a comment", f"version = '{version}'", "fork"):
        assert part in str(told.value)
    with pytest.raises(RewardError, match=r"own_commented_fixture\.py has changed, if only in a c"):
        score_shard.fn(handle, rollouts[0], 0, 0)
    # The way out that it names.
    edited(f"{OWN}# a comment\nconstant.version = {version!r}\n")
    assert start_run(run.config, "r").reward.identity.digest == run.reward_digest
    as_in_a_new_process()
    score_shard.fn(handle, rollouts[0], 0, 0)


def test_the_source_of_a_reward_is_that_which_was_imported(tmp_path, monkeypatch):
    """Its file may be edited while other parts of the same module are at work."""
    code = tmp_path / "own_edited_fixture.py"
    prompts = "def prompts(): return ['a cat']\n"
    code.write_text(OWN + prompts)
    monkeypatch.syspath_prepend(tmp_path)
    load_prompts("own_edited_fixture:prompts", {})
    code.write_text(OWN.replace("7.0", "8.0") + prompts)
    loaded = load_reward("own_edited_fixture:constant", {})
    code.write_text(OWN + prompts)
    monkeypatch.delitem(sys.modules, "own_edited_fixture")
    assert load_reward("own_edited_fixture:constant", {}).identity == loaded.identity


@pytest.mark.parametrize("drawn", [0, 1])
def test_prompts_that_changed_since_the_start_are_not_drawn_from(tiny_model, tmp_path, drawn):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na dog\n")
    prompts = {"name": "text_file", "parameters": {"path": str(file)}}
    run = start_run(tiny_config(tiny_model, storage={"root": str(tmp_path)}, prompts=prompts), "r")
    first = start.fn(run.handle)
    for shard in range(drawn):
        sample_shard.fn(run.handle, first, 0, shard)
    as_in_a_new_process()
    file.write_text("a cat\na fox\n")
    refusal = r"'r' was started with other prompts: .* 'text_file' have changed. Restore them"
    with pytest.raises(ConfigError, match=refusal):
        sample_shard.fn(run.handle, first, 0, drawn)
    with pytest.raises(ConfigError, match=refusal):
        train_run(open_run(run.store, "r"))
    with pytest.raises(RunIdentityMismatch, match=r"'text_file' have changed\. Restore them"):
        start_run(run.config, "r")
    assert len(ROLLOUTS.partitions_of(run.store, "r")) == drawn
    file.write_text("a cat\na dog\n")
    as_in_a_new_process()
    sample_shard.fn(run.handle, first, 0, drawn)
